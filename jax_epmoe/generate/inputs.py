"""What the command line is given to continue: prompts on the command line, text files and JSONL files."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from jax_epmoe.config import require
from jax_epmoe.generate.sampling import SamplingParams

SAMPLING_KEYS = frozenset(f.name for f in fields(SamplingParams))


@dataclass(frozen=True)
class Entry:
    """One thing to continue: text, token ids or chat messages.

    `name` is what errors call it, `sampling` what it says of its own sampling, `extra` what goes to the output as it is.
    """

    name: str
    content: str | list[int] | list[dict[str, Any]]
    kind: str = "prompt"
    sampling: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def params(self, default: SamplingParams) -> SamplingParams:
        """`default` with what this entry changes of it.

        Raises:
          ValueError: a value outside its range.
        """
        try:
            return default.replace(**self.sampling)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None


def read_entries(path: str) -> list[Entry]:
    """The entries of a file, or of standard input for `-`; blank lines are skipped.

    `.jsonl` holds a JSON object a line and `.txt` a prompt a line. Of anything else the first character decides: `{` is
    JSONL.

    Raises:
      ValueError: not UTF-8, no entry at all, or a line that is not what it should be; the line's number is told.
      OSError: the file cannot be read.
    """
    name = "standard input" if path == "-" else path
    try:
        text = (sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    suffix = Path(path).suffix.lower()
    is_jsonl = suffix == ".jsonl" or (suffix != ".txt" and text.lstrip().startswith("{"))
    parse: Callable[[str, str], Entry] = parse_json if is_jsonl else text_entry
    # Not splitlines: JSON strings and prompts may hold U+2028 and the like.
    lines = ((f"{name} line {number}", line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1))
    entries = [parse(line_name, line) for line_name, line in lines if line.strip()]
    require(bool(entries), name, "empty", "a prompt a line, or a JSON object a line")
    return entries


def text_entry(name: str, text: str) -> Entry:
    """A prompt of plain text.

    Raises:
      ValueError: it is empty or no Unicode text (half a surrogate pair, or bytes of another encoding).
    """
    _check_prompt(name, text)
    return Entry(name, text)


def parse_json(name: str, line: str) -> Entry:
    """An entry from a JSON object with one of `prompt`, `prompt_token_ids` and `messages`.

    Raises:
      ValueError: anything else.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    kinds = ("prompt", "prompt_token_ids", "messages")
    found = [kind for kind in kinds if isinstance(record, dict) and kind in record]
    require(len(found) == 1, name, _shortened(line), f"a JSON object with one of {', '.join(kinds)}")
    kind = found[0]
    content = record.pop(kind)
    _CHECKS[kind](f"{name}: {kind}", content)
    sampling = {key: record.pop(key) for key in SAMPLING_KEYS & record.keys()}
    return Entry(name, content, kind, sampling, record)


def _check_text(name: str, text: Any) -> None:
    require(isinstance(text, str), name, text, "a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} is {_shortened(text)!r}; it should be Unicode text without lone surrogates") from None


def _check_token_ids(name: str, ids: Any) -> None:
    is_ids = isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    require(is_ids, name, _shortened(str(ids)), "a list of token ids")


def _check_messages(name: str, messages: Any) -> None:
    is_list = isinstance(messages, list) and len(messages) > 0
    require(is_list, name, _shortened(str(messages)), "a list of messages")
    for number, message in enumerate(messages, 1):
        is_message = isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
        require(is_message, f"{name} {number}", _shortened(str(message)), "an object with a role and a content")
        if isinstance(message["content"], str):
            _check_text(f"{name} {number}", message["content"])


def _check_prompt(name: str, text: Any) -> None:
    _check_text(name, text)
    # A tokenizer may make one token of it, its BOS; whoever wants that can say so with token ids.
    require(text != "", name, text, "some text")


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "prompt": _check_prompt,
    "prompt_token_ids": _check_token_ids,
    "messages": _check_messages,
}


def _shortened(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
