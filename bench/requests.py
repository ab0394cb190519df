"""What a throughput run is given, as SGLang's benchmarks make it, and the figures that they tell of it. Needs neither JAX nor torch."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MIN_SHAREGPT_TOKENS = 4


@dataclass(frozen=True)
class Request:
    """A prompt's token ids, and how many tokens are to follow."""

    prompt: list[int]
    output_len: int


def random_requests(
    count: int, input_len: int, output_len: int, range_ratio: float, vocab_size: int, seed: int
) -> list[Request]:
    """Random token ids; lengths are uniform from `range_ratio` of the length, at least 1, to all of it.

    Raises:
      ValueError: a length or a ratio out of its range.
    """
    if min(count, input_len, output_len) < 1:
        raise ValueError(f"numbers and lengths are {count}, {input_len}, {output_len}; they should be positive")
    if not 0 <= range_ratio <= 1:
        raise ValueError(f"--random-range-ratio is {range_ratio}; it should be from 0 to 1")
    generator = np.random.default_rng(seed)
    inputs, outputs = (
        generator.integers(max(int(length * range_ratio), 1), length + 1, count) for length in (input_len, output_len)
    )
    return [
        Request(generator.integers(0, vocab_size, n).tolist(), int(m)) for n, m in zip(inputs, outputs, strict=True)
    ]


def shared_prefix_requests(
    groups: int, prompts_a_group: int, system_len: int, question_len: int, output_len: int, vocab_size: int, seed: int
) -> list[Request]:
    """`groups` random system prompts, each before `prompts_a_group` random questions, all in random order.

    Raises:
      ValueError: a number or a length that is not positive.
    """
    sizes = (groups, prompts_a_group, system_len, question_len, output_len)
    if min(sizes) < 1:
        raise ValueError(f"the --gsp sizes are {sizes}; they should be positive")
    generator = np.random.default_rng(seed)
    requests = []
    for _ in range(groups):
        system = generator.integers(0, vocab_size, system_len).tolist()
        for question in generator.integers(0, vocab_size, (prompts_a_group, question_len)).tolist():
            requests.append(Request(system + question, output_len))
    random.Random(seed).shuffle(requests)
    return requests


def sharegpt_requests(
    path: Path, count: int, tokenizer: Any, context_length: int, output_len: int | None, seed: int
) -> list[Request]:
    """First turns of a ShareGPT file, `[{"conversations": [{"value": prompt}, {"value": answer}, ...]}, ...]`, in random order.

    Args:
      path: the JSON file.
      count: the most of them.
      tokenizer: the model's.
      context_length: longer turns are left out, as are those of less than 4 tokens.
      output_len: for all; by default the answer's own length.
      seed: of the order.

    Raises:
      ValueError: another format, or no turn that fits.
      OSError: the file cannot be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        turns = [entry.get("conversations", entry.get("conversation", [])) for entry in data]
        pairs = [(turn[0]["value"], turn[1]["value"]) for turn in turns if len(turn) >= 2]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no ShareGPT file: {error!r}; it should be a list of conversations") from None
    random.Random(seed).shuffle(pairs)
    requests: list[Request] = []
    for prompt, answer in pairs:
        if len(requests) == count:
            break
        ids, said = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
        length = len(said) if output_len is None else output_len
        if min(len(ids), length) >= MIN_SHAREGPT_TOKENS and len(ids) + length <= context_length:
            requests.append(Request(list(ids), length))
    if not requests:
        raise ValueError(f"{path} has no first turn that fits the context of {context_length}")
    return requests


def measured(backend: str, requests: Sequence[Request], output_tokens: int, seconds: float) -> dict[str, Any]:
    """SGLang's result fields: seconds, tokens, and each a second."""
    input_tokens = sum(len(request.prompt) for request in requests)
    return {
        "backend": backend,
        "successful_requests": len(requests),
        "total_latency": seconds,
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(requests) / seconds,
        "input_throughput": input_tokens / seconds,
        "output_throughput": output_tokens / seconds,
        "total_throughput": (input_tokens + output_tokens) / seconds,
    }
