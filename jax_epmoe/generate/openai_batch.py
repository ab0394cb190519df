"""OpenAI's batch format: a request a line in, a response a line out.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], "max_tokens": 64}}
    {"id": ..., "custom_id": "a", "response": {"status_code": 200, "request_id": ..., "body": {...}}, "error": null}

Of a body, what is served has its effect, what only labels is passed over, and anything else is refused unless it is null, false,
0 or empty: an answer never leaves out a wish in silence.
"""

import time
from typing import Any

from jax_epmoe.config import require
from jax_epmoe.generate.entries import CHECKS, Entry, shortened

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"

# OpenAI's name, or that under which vLLM and SGLang take more, to ours.
_SAMPLING = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "stop": "stop",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "stop_token_ids": "stop_token_ids",
    "ignore_eos": "ignore_eos",
}
_LABELS = frozenset(("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"))


def parse_batch_line(name: str, record: dict[str, Any]) -> Entry:
    """The entry of a line.

    Raises:
      ValueError: a line that is not of the format, or a body with a wish that is not served.
    """
    custom_id, url, body = record.get("custom_id"), record.get("url"), record["body"]
    require(isinstance(custom_id, str) and custom_id != "", f"{name}: custom_id", custom_id, "a string, not empty")
    require(record.get("method", "POST") == "POST", f"{name}: method", record.get("method"), "POST")
    require(url in (CHAT, COMPLETION), f"{name}: url", url, f"{CHAT} or {COMPLETION}")
    require(isinstance(body, dict), f"{name}: body", shortened(str(body)), "an object")
    body = dict(body)
    kind = "messages" if url == CHAT else "prompt"
    content = body.pop(kind, None)
    if kind == "prompt" and isinstance(content, list) and not any(isinstance(part, str) for part in content):
        kind = "prompt_token_ids"
    if kind == "messages":
        content = _texts(f"{name}: messages", content)
    CHECKS[kind](f"{name}: {'messages' if url == CHAT else 'prompt'}", content)
    sampling: dict[str, Any] = {}
    for key, ours in _SAMPLING.items():
        if body.get(key) is not None:
            sampling[ours] = body.pop(key)
    # A chat says whether, and in another key how many; a completion how many.
    asked, count = body.pop("logprobs", None), body.pop("top_logprobs", None)
    if asked is not None and asked is not False:
        sampling["logprobs"] = (count or 0) if asked is True else asked
    model = body.get("model")
    for key, value in body.items():
        if key not in _LABELS and value and not (key in ("n", "best_of") and value == 1):
            raise ValueError(f"{name}: {key} is {shortened(str(value))}; it is not served and should be left out")
    return Entry(name, content, kind, sampling, custom_id=custom_id, model=model if isinstance(model, str) else None)


def _texts(name: str, messages: Any) -> Any:
    """Messages whose contents are strings: a list of text parts becomes their text."""
    if not isinstance(messages, list):
        return messages
    plain = []
    for number, message in enumerate(messages, 1):
        if isinstance(message, dict) and isinstance(message.get("content"), list):
            parts = message["content"]
            texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
            is_text = len(texts) == len(parts) and all(isinstance(text, str) for text in texts)
            require(is_text, f"{name} {number}", shortened(str(parts)), "a string or parts of type text")
            message = {**message, "content": "".join(map(str, texts))}
        plain.append(message)
    return plain


def response(
    entry: Entry, key: str, text: str | None, completion: Any, model: str, tokenizer: Any | None = None
) -> dict[str, Any]:
    """The line that answers `entry`; `key` is its `resume_key`, and `model` its name where the request told none."""
    is_chat = entry.kind == "messages"
    logprobs = None if completion.logprobs is None else _logprobs(completion, tokenizer, is_chat=is_chat)
    choice: dict[str, Any] = {"index": 0, "finish_reason": completion.finish_reason, "logprobs": logprobs}
    choice |= {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
    if text is None:
        choice["token_ids"] = completion.token_ids  # as vLLM calls them
    made = len(completion.token_ids)
    prefix, kind = ("chatcmpl", "chat.completion") if is_chat else ("cmpl", "text_completion")
    identity = key.removeprefix("batch_req_")
    return {
        "id": key,
        "custom_id": entry.custom_id,
        "response": {
            "status_code": 200,
            "request_id": identity,
            "body": {
                "id": f"{prefix}-{identity}",
                "object": kind,
                "created": int(time.time()),
                "model": entry.model or model,
                "choices": [choice],
                "usage": {
                    "prompt_tokens": completion.prompt_tokens,
                    "completion_tokens": made,
                    "total_tokens": completion.prompt_tokens + made,
                },
            },
        },
        "error": None,
    }


def _logprobs(completion: Any, tokenizer: Any | None, *, is_chat: bool) -> dict[str, Any]:
    """Each token's log-probability and those of the likeliest ones, in the form of a chat or of a completion."""

    def name(token: int) -> str:
        return f"token_id:{token}" if tokenizer is None else tokenizer.decode([token])

    def told(token: int, logprob: float) -> dict[str, Any]:
        return {"token": name(token), "logprob": logprob, "bytes": list(name(token).encode())}

    each = list(zip(completion.token_ids, completion.logprobs, strict=True))
    if is_chat:
        return {
            "content": [
                {**told(token, top[token]), "top_logprobs": [told(*pair) for pair in _likeliest(top)]}
                for token, top in each
            ]
        }
    return {
        "tokens": [name(token) for token, _ in each],
        "token_logprobs": [top[token] for token, top in each],
        "top_logprobs": [{name(other): logprob for other, logprob in _likeliest(top)} for _, top in each],
    }


def _likeliest(top: dict[int, float]) -> list[tuple[int, float]]:
    return sorted(top.items(), key=lambda pair: -pair[1])
