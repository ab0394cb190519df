"""Completions to JSONL or to text; a file appears whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from jax_epmoe.generate.engine import Completion
from jax_epmoe.generate.inputs import Entry


@dataclass(frozen=True)
class Result:
    """An entry and what it got; `text` is None without a tokenizer."""

    entry: Entry
    completion: Completion
    text: str | None

    def json(self) -> str:
        """One line: the entry's extra keys, then `text`, `token_ids` and `finish_reason`."""
        record = {
            **self.entry.extra,
            "text": self.text,
            "token_ids": self.completion.token_ids,
            "finish_reason": self.completion.finish_reason,
        }
        return json.dumps(record, ensure_ascii=False)

    def readable(self) -> str:
        """The text, or the token ids where there is none."""
        return ",".join(map(str, self.completion.token_ids)) if self.text is None else self.text


def readable(results: Sequence[Result]) -> str:
    """A single completion by itself; several each below its prompt."""
    if len(results) == 1:
        return results[0].readable()
    return "\n\n".join(
        f"=== {r.entry.name} ===\n{_prompt(r.entry)}\n--- completion ({r.completion.finish_reason}) ---\n{r.readable()}"
        for r in results
    )


def _prompt(entry: Entry) -> str:
    if entry.kind == "prompt":
        return str(entry.content)
    if entry.kind == "prompt_token_ids":
        return ",".join(map(str, entry.content))
    return "\n".join(f"{m['role']}: {m['content']}" for m in entry.content)  # type: ignore[index]


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[IO[str]]:
    """A file to write that takes its place at `path` on leaving, unless an exception leaves: then nothing is there.

    Pipes and devices are written to as they are.

    Raises:
      OSError: its folder cannot be written to; told before anything is written.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        with open(target, "w", encoding="utf-8") as file:
            yield file
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
