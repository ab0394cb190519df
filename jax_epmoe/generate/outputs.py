"""Completions to JSONL or to text, as they come: a file is valid after each of them, and an unfinished one is gone on with."""

import fcntl
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from jax_epmoe.config import require
from jax_epmoe.generate.engine import Completion
from jax_epmoe.generate.entries import Entry
from jax_epmoe.generate.openai_batch import response

RESUME_KEY = "resume_key"


@dataclass(frozen=True)
class Result:
    """An entry and what it got; `text` is None without a `tokenizer`, `key` the entry's `resume_key`, `model` the model's name."""

    entry: Entry
    key: str
    completion: Completion
    text: str | None
    model: str
    tokenizer: Any | None = None

    def json(self) -> str:
        """One line: OpenAI's response to its batch format; else the entry's extra keys, then `text`, `token_ids`,
        `finish_reason`, `logprobs` if they were asked for, and `resume_key`."""
        if self.entry.custom_id is not None:
            answer = response(self.entry, self.key, self.text, self.completion, self.model, self.tokenizer)
            return json.dumps(answer, ensure_ascii=False)
        record = {
            **self.entry.extra,
            "text": self.text,
            "token_ids": self.completion.token_ids,
            "finish_reason": self.completion.finish_reason,
        }
        if self.completion.logprobs is not None:
            record["logprobs"] = self.completion.logprobs
        record[RESUME_KEY] = self.key
        return json.dumps(record, ensure_ascii=False)

    def readable(self) -> str:
        """The text, or the token ids where there is none."""
        return ",".join(map(str, self.completion.token_ids)) if self.text is None else self.text

    def block(self) -> str:
        """One of several texts, below its prompt."""
        e, reason = self.entry, self.completion.finish_reason
        return f"=== {e.name} ===\n{_prompt(e)}\n--- completion ({reason}) ---\n{self.readable()}"


def _prompt(entry: Entry) -> str:
    if entry.kind == "prompt":
        return str(entry.content)
    if entry.kind == "prompt_token_ids":
        return ",".join(map(str, entry.content))
    return "\n".join(f"{m['role']}: {m['content']}" for m in entry.content)  # type: ignore[index]


class Stream:
    """Writes to a pipe, a device or a terminal. In the input's order, a result waits for those before it.

    Args:
      file: open for text.
      show: a result's text, without the newline.
      order: the places of all results that will come, in the input's order; None to write them as they come.
      between: what stands between two results.
    """

    done = 0
    places: frozenset[int] = frozenset()  # those that are there already: none

    def __init__(
        self, file: IO[str], show: Callable[[Result], str], order: Sequence[int] | None, between: str = ""
    ) -> None:
        self._file, self._show, self._between = file, show, between
        self._order = None if order is None else list(reversed(order))
        self._waiting: dict[int, Result] = {}

    def add(self, place: int, result: Result) -> None:
        self._waiting[place] = result
        if self._order is None:
            self._write(place)
            return
        while self._order and self._order[-1] in self._waiting:
            self._write(self._order.pop())

    def _write(self, place: int) -> None:
        before = self._between if self.done else ""
        self._file.write(f"{before}{self._show(self._waiting.pop(place))}\n")
        self._file.flush()
        self.done += 1

    def close(self, *, finished: bool) -> None:
        if self._file is not sys.stdout:
            self._file.close()


class ResumableFile:
    """A JSONL file that holds whole lines, in the order in which they came, whatever ends the program.

    On `close(finished=True)` they are put in the input's order, if asked, by one rename.
    """

    def __init__(self, path: str, keys: Mapping[str, int], *, resume: bool, in_order: bool) -> None:
        """Opens the file, and finds out what it holds.

        Args:
          path: the file.
          keys: the place in the input of each `resume_key`.
          resume: keep the lines that are there; else there should be none.
          in_order: sort them in the end.

        Raises:
          ValueError: a file that is there although `resume` is False, or a line that answers none of the input's.
          OSError: it cannot be read or written.
        """
        self._path = Path(os.path.realpath(path))
        self._in_order = in_order
        self.total = len(keys)
        self._lines: dict[int, tuple[int, int]] = {}  # of each place: where its line starts, and its length
        self._end = 0
        if not resume and self._path.exists() and self._path.stat().st_size > 0:
            raise ValueError(
                f"--output is {path!r}, which is there; it should be a new file, or --resume given to go on with that one"
            )
        self._is_new = not self._path.exists()
        self._file = open(self._path, "x+b" if self._is_new else "r+b", buffering=0)  # noqa: SIM115
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"--output is {path!r}, which another run is writing; it should be another file"
                ) from None
            self._read(path, keys)
        except BaseException:
            self._file.close()
            raise

    @property
    def done(self) -> int:
        return len(self._lines)

    @property
    def places(self) -> frozenset[int]:
        """The places of the input that have their line."""
        return frozenset(self._lines)

    def _read(self, path: str, places: Mapping[str, int]) -> None:
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break  # cut short: its prompt is generated again
                key = _key(line)
                place = places.get(key or "")
                wanted = "an answer to a prompt of this input with these parameters"
                require(place is not None, f"--resume: {path} line {number}", _shown(key), wanted)
                assert place is not None
                require(place not in self._lines, f"--resume: {path} line {number}", _shown(key), "there once")
                self._lines[place] = (self._end, len(line))
                self._end += len(line)
        self._cut()

    def _cut(self) -> None:
        """Drops what stands behind the last whole line."""
        self._file.truncate(self._end)
        self._file.seek(self._end)

    def add(self, place: int, result: Result) -> None:
        line = f"{result.json()}\n".encode()
        self._write(line)
        self._lines[place] = (self._end, len(line))
        self._end += len(line)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]

    def close(self, *, finished: bool) -> None:
        """Leaves whole lines, and sorts them if the run has finished and the order was asked for; without a line, no new file."""
        with self._file:
            self._cut()
            if self._is_new and not self._lines:
                self._path.unlink(missing_ok=True)
        ordered = [self._lines[place] for place in sorted(self._lines)]
        if finished and self._in_order and ordered != sorted(ordered):
            self._sort(ordered)

    def _sort(self, lines: Sequence[tuple[int, int]]) -> None:
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        try:
            with open(self._path, "rb") as source, open(temporary, "wb") as target:
                for start, length in lines:
                    source.seek(start)
                    target.write(source.read(length))
            os.replace(temporary, self._path)
        finally:
            temporary.unlink(missing_ok=True)


def _key(line: bytes) -> str | None:
    """The `resume_key` of an output line; None where it has none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    key = record.get(RESUME_KEY, record.get("id") if "custom_id" in record else None)
    return key if isinstance(key, str) else None


def _shown(key: str | None) -> str:
    return "a line without a resume_key" if key is None else f"{RESUME_KEY} {key}"
