"""Where a text ends, and what is told of its tokens: what the host makes of the tokens that it reads."""

from collections.abc import Callable, Sequence
from typing import Any

from jax_epmoe.generate.scheduler import Running

# (the prompt's ids, new ids) -> the new ids' text.
Detokenize = Callable[[Sequence[int], Sequence[int]], str]

_MARGIN = 16  # tokens looked at besides as many as a stop string has letters: some have no text of their own


def read_tokens(
    running: Running, tokens: Sequence[int], logprobs: Sequence[Any] | None, detokenize: Detokenize | None
) -> int:
    """Takes a call's tokens, up to the first -1 or the sequence's end; returns how many are its own.

    `logprobs`: for each token its own log-probability, and the likeliest tokens' ids and log-probabilities.
    """
    request, old = running.request, len(running.token_ids)
    for i, token in enumerate(tokens):
        if token < 0:
            break
        running.token_ids.append(token)
        if logprobs is not None and request.sampling.logprobs is not None:
            own, ids, values = logprobs[i]
            count = request.sampling.logprobs
            running.logprobs.append({token: own, **dict(zip(ids[:count], values[:count], strict=True))})
        if token in request.stop_ids:
            running.finish_reason = "stop"
            running.stop_reason = token if token in request.sampling.stop_token_ids else None
            break
        if len(running.token_ids) == request.limit:
            running.finish_reason = "length"
            break
    if request.sampling.stop and detokenize is not None:
        _stop_at_string(running, old, detokenize)
    return len(running.token_ids) - old


def _stop_at_string(running: Running, old: int, detokenize: Detokenize) -> None:
    """Ends the sequence with the token that completes a stop string, if one after the `old` first tokens does."""
    ids, strings = running.token_ids, running.request.sampling.stop
    first = max(0, old - max(map(len, strings)) - _MARGIN)
    before = [*running.request.prompt, *ids[:first]]

    def found(end: int) -> str | None:
        return first_stop(detokenize(before, ids[first:end]), strings)[1]

    if found(len(ids)) is None:
        return
    end = next(end for end in range(old + 1, len(ids) + 1) if found(end) is not None or end == len(ids))
    running.finish_reason, running.stop_reason = "stop", found(end)
    del ids[end:]
    del running.logprobs[end:]


def first_stop(text: str, strings: Sequence[str]) -> tuple[int, str | None]:
    """Where the first of `strings` begins in a text, and which it is; the text's length and None if none is there."""
    places = [(place, string) for string in strings if (place := text.find(string)) >= 0]
    return min(places, key=lambda found: found[0], default=(len(text), None))
