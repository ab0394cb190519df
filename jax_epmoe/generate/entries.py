"""One thing to continue, and what is right for it."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from jax_epmoe.config import require
from jax_epmoe.generate.sampling import SamplingParams

SAMPLING_KEYS = frozenset(f.name for f in fields(SamplingParams))
KINDS = ("prompt", "prompt_token_ids", "messages")


@dataclass(frozen=True)
class Entry:
    """One thing to continue: text, token ids or chat messages.

    Attributes:
      name: what errors call it.
      content: what to continue.
      kind: one of `KINDS`, which says what `content` is.
      sampling: what it says of its own sampling.
      extra: what goes to the output as it is.
      custom_id: the name of a line in OpenAI's batch format, None for others.
      model: what such a line calls the model.
    """

    name: str
    content: str | list[int] | list[dict[str, Any]]
    kind: str = "prompt"
    sampling: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    custom_id: str | None = None
    model: str | None = None

    def params(self, default: SamplingParams) -> SamplingParams:
        """`default` with what this entry changes of it.

        Raises:
          ValueError: a value outside its range.
        """
        try:
            return default.replace(**self.sampling)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None

    def is_chat(self, chat: bool) -> bool:
        """Whether the tokenizer's chat template writes it; `chat` is what the command line says, OpenAI's lines say it themselves."""
        return chat if self.custom_id is None else self.kind == "messages"


def resume_key(entry: Entry, index: int, params: SamplingParams, *, chat: bool) -> str:
    """What stands in the output line for this entry and its parameters; another prompt or other parameters have another.

    Args:
      entry: what was asked.
      index: its place in the input, from 0; a `custom_id` stands for it where there is one.
      params: all of them, the defaults included.
      chat: as the command line says.
    """
    plain = SamplingParams()
    changed = {k: v for k, v in dataclasses.asdict(params).items() if v != getattr(plain, k)}
    asked = [entry.kind, entry.content, entry.is_chat(chat), changed, entry.custom_id]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    return f"{index}-{digest}" if entry.custom_id is None else f"batch_req_{digest}"


def _check_text(name: str, text: Any) -> None:
    require(isinstance(text, str), name, text, "a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} is {shortened(text)!r}; it should be Unicode text without lone surrogates") from None


def _check_token_ids(name: str, ids: Any) -> None:
    is_ids = isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    require(is_ids, name, shortened(str(ids)), "a list of token ids")


def _check_messages(name: str, messages: Any) -> None:
    is_list = isinstance(messages, list) and len(messages) > 0
    require(is_list, name, shortened(str(messages)), "a list of messages")
    for number, message in enumerate(messages, 1):
        is_message = isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
        require(is_message, f"{name} {number}", shortened(str(message)), "an object with a role and a content")
        if isinstance(message["content"], str):
            _check_text(f"{name} {number}", message["content"])


def check_prompt(name: str, text: Any) -> None:
    """Refuses what is no text to continue."""
    _check_text(name, text)
    # A tokenizer may make one token of it, its BOS; whoever wants that can say so with token ids.
    require(text != "", name, text, "some text")


CHECKS: dict[str, Callable[[str, Any], None]] = {
    "prompt": check_prompt,
    "prompt_token_ids": _check_token_ids,
    "messages": _check_messages,
}


def shortened(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
