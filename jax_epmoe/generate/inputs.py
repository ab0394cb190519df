"""What the command line is given to continue: text files and JSONL files."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from jax_epmoe.config import require
from jax_epmoe.generate.entries import CHECKS, KINDS, SAMPLING_KEYS, Entry, check_prompt, shortened
from jax_epmoe.generate.openai_batch import parse_batch_line

Parse = Callable[[str, str], Entry]


def read_lines(path: str) -> tuple[Parse, list[tuple[str, str]]]:
    """The lines of a file, or of standard input for `-`, without blank ones, each with a name for errors; and what parses one.

    `.jsonl` holds a JSON object a line and `.txt` a prompt a line. Of anything else the first character decides: `{` is
    JSONL.

    Raises:
      ValueError: not UTF-8, or no line at all.
      OSError: the file cannot be read.
    """
    name = "standard input" if path == "-" else path
    try:
        text = (sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    suffix = Path(path).suffix.lower()
    is_jsonl = suffix == ".jsonl" or (suffix != ".txt" and text.lstrip().startswith("{"))
    # Not splitlines: JSON strings and prompts may hold U+2028 and the like.
    numbered = ((f"{name} line {number}", line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1))
    lines = [(line_name, line) for line_name, line in numbered if line.strip()]
    require(bool(lines), name, "empty", "a prompt a line, or a JSON object a line")
    return (parse_json if is_jsonl else text_entry), lines


def read_entries(path: str) -> list[Entry]:
    """Every line of `read_lines`, parsed.

    Raises:
      ValueError: a line that is not what it should be; its number is told.
      OSError: the file cannot be read.
    """
    parse, lines = read_lines(path)
    return [parse(name, line) for name, line in lines]


def text_entry(name: str, text: str) -> Entry:
    """A prompt of plain text.

    Raises:
      ValueError: it is empty or no Unicode text (half a surrogate pair, or bytes of another encoding).
    """
    check_prompt(name, text)
    return Entry(name, text)


def token_ids_entry(name: str, ids: list[int]) -> Entry:
    """A prompt of token ids."""
    return Entry(name, ids, "prompt_token_ids")


def parse_json(name: str, line: str) -> Entry:
    """An entry from a JSON object with one of `prompt`, `prompt_token_ids` and `messages`, or in OpenAI's batch format.

    Raises:
      ValueError: anything else.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if isinstance(record, dict) and {"custom_id", "body"} <= record.keys():
        return parse_batch_line(name, record)
    found = [kind for kind in KINDS if isinstance(record, dict) and kind in record]
    expected = f"a JSON object with one of {', '.join(KINDS)}, or a custom_id and a body"
    require(len(found) == 1, name, shortened(line), expected)
    kind = found[0]
    content = record.pop(kind)
    CHECKS[kind](f"{name}: {kind}", content)
    sampling = {key: record.pop(key) for key in (SAMPLING_KEYS | {"max_tokens"}) & record.keys()}
    return Entry(name, content, kind, sampling, record)
