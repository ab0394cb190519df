"""Text to token ids and back, with the tokenizer that lies in a checkpoint's folder."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_epmoe.generate.entries import Entry

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")

# How many of the prompt's last tokens the completion is read together with: enough for a word's leading space.
_CONTEXT_TOKENS = 8


def load_tokenizer(folder: Path) -> Any | None:
    """The folder's tokenizer (transformers' `AutoTokenizer`), or None where it has none; nothing is downloaded.

    Raises:
      ValueError: its files cannot be read.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no advice about missing PyTorch
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever the tokenizer's own code makes of a broken file
        raise ValueError(f"the tokenizer in {folder} cannot be loaded: {error}") from error


def encode(tokenizer: Any | None, entry: Entry, *, chat: bool) -> list[int]:
    """An entry's token ids. Special tokens are added as the tokenizer does, in a chat as its template does.

    Raises:
      ValueError: no tokenizer for text; messages without `--chat`; no chat template, or one that refuses the messages.
    """
    if entry.kind == "prompt_token_ids":
        return [*entry.content]
    chat = entry.is_chat(chat)
    if entry.kind == "messages" and not chat:
        raise ValueError(f"{entry.name} holds messages; it should be a prompt, or --chat given")
    if tokenizer is None:
        raise ValueError(f"{entry.name} is text but the model's folder has no tokenizer; it should be token ids")
    if not chat:
        return tokenizer(entry.content)["input_ids"]
    messages = [{"role": "user", "content": entry.content}] if entry.kind == "prompt" else entry.content
    # The template writes the special tokens itself.
    return tokenizer(_chat_text(tokenizer, entry.name, messages), add_special_tokens=False)["input_ids"]


def check_chat_template(tokenizer: Any | None) -> None:
    """Refuses `--chat` where there is no template.

    Raises:
      ValueError: as it says.
    """
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("--chat needs a tokenizer with a chat template; the model's folder has none")


def _chat_text(tokenizer: Any, name: str, messages: Any) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: the chat template refuses the messages: {error}") from error


def decode(tokenizer: Any, prompt: Sequence[int], token_ids: Sequence[int]) -> str:
    """The text of `token_ids` after `prompt`, without special tokens.

    Tokenizers drop a text's first space, so the completion is read after the prompt's end and the latter cut off.
    """
    context = list(prompt[-_CONTEXT_TOKENS:])
    before = tokenizer.decode(context, skip_special_tokens=True)
    text = tokenizer.decode([*context, *token_ids], skip_special_tokens=True)
    if text.startswith(before):
        return text[len(before) :]
    return tokenizer.decode(list(token_ids), skip_special_tokens=True)


def completion_text(tokenizer: Any | None, prompt: Sequence[int], completion: Any) -> str | None:
    """What a completion says, without the token or string that stopped it; None without a tokenizer."""
    if tokenizer is None:
        return None
    ids, reason = completion.token_ids, completion.stop_reason
    if isinstance(reason, str):
        return decode(tokenizer, prompt, ids).partition(reason)[0]
    return decode(tokenizer, prompt, ids[:-1] if completion.finish_reason == "stop" else ids)
