"""Which prompts run together, and in what shapes: nothing here touches a device.

Shapes come from short lists, so that few programs are compiled:

- rows of a batch: the model's `batch_multiple` times a power of two, at most `max_batch_size`;
- tokens of a prefill call: a power of two from 16 to `prefill_chunk`;
- positions of the cache: a power of two from 128 to the context length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np

from jax_epmoe.config import ModelConfig, require
from jax_epmoe.generate.sampling import Method, SamplingParams, cheapest_method

MIN_CHUNK = 16
MIN_CACHE = 128
MIN_STOP_IDS = 4


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on: `limit` is the most tokens that it may get, `stop_ids` are those that end it."""

    index: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    limit: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """Positions `start .. start + length` of every prompt of a batch: one prefill call."""

    start: int
    length: int


@dataclass(frozen=True)
class Batch:
    """Requests that run together; `rows[i]` is the row of `requests[i]` among `size`. Other rows are padding."""

    requests: tuple[Request, ...]
    rows: tuple[int, ...]
    size: int
    chunks: tuple[Chunk, ...]
    cache_length: int
    num_stop_ids: int
    method: Method

    def tokens(self, chunk: Chunk) -> np.ndarray:
        """The prompts' tokens in `chunk`, padded on the right with 0: `[B, S]` int32."""
        tokens = np.zeros((self.size, chunk.length), np.int32)
        for row, request in zip(self.rows, self.requests, strict=True):
            part = request.prompt[chunk.start : chunk.start + chunk.length]
            tokens[row, : len(part)] = part
        return tokens

    def column(self, values: Sequence, dtype: np.typing.DTypeLike, padding: float = 0) -> np.ndarray:
        """One value a request, put into its row: `[B]` of `dtype`."""
        column = np.full(self.size, padding, dtype)
        column[list(self.rows)] = values
        return column

    def stop_ids(self) -> np.ndarray:
        """The tokens that end each row, padded with -1: `[B, K]` int32."""
        ids = np.full((self.size, self.num_stop_ids), -1, np.int32)
        for row, request in zip(self.rows, self.requests, strict=True):
            ids[row, : len(request.stop_ids)] = request.stop_ids
        return ids


def bucket(needed: int, low: int, high: int) -> int:
    """The least power of two from `low` that holds `needed`, or `high` where that is less. `needed <= high`."""
    return min(max(low, 1 << (needed - 1).bit_length()), high)


def check_sizes(config: ModelConfig, *, max_batch_size: int, prefill_chunk: int, context_length: int | None) -> int:
    """The context length to generate in: the one given, or the model's own, which is also the most.

    Raises:
      ValueError: a size out of its range.
    """
    longest = config.max_position_embeddings
    context_length = longest if context_length is None else context_length
    require(max_batch_size > 0, "max_batch_size", max_batch_size, "a positive integer")
    require(prefill_chunk > 0, "prefill_chunk", prefill_chunk, "a positive integer")
    require(1 < context_length <= longest, "context_length", context_length, f"from 2 to the model's {longest}")
    return context_length


def check_prompts(
    prompts: Sequence[Sequence[int]], *, vocab_size: int, context_length: int, names: Sequence[str] | None = None
) -> None:
    """Refuses prompts that no model of this vocabulary and context can continue.

    Args:
      prompts: token ids.
      vocab_size: ids lie below it.
      context_length: the most positions a prompt and its continuation may take together.
      names: what to call each prompt in an error; `prompts[i]` by default.

    Raises:
      ValueError: an empty prompt, one that leaves no room for a token, or an id outside the vocabulary.
    """
    for i, prompt in enumerate(prompts):
        name = f"prompts[{i}]" if names is None else names[i]
        require(len(prompt) > 0, f"{name}: number of tokens", 0, "at least 1")
        require(
            len(prompt) < context_length,
            f"{name}: number of tokens", len(prompt),
            f"at most {context_length - 1}: one less than the context length",
        )  # fmt: skip
        for token in prompt:
            require(
                isinstance(token, Integral) and not isinstance(token, bool) and 0 <= int(token) < vocab_size,
                f"{name}: token id", token, f"an integer from 0 to {vocab_size - 1}",
            )  # fmt: skip


def make_requests(
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams | Sequence[SamplingParams],
    *,
    context_length: int,
    eos_token_ids: Sequence[int],
) -> list[Request]:
    """Pairs checked prompts with their sampling parameters. A request gets `max_new_tokens`, or what the context has left.

    Raises:
      ValueError: as many sampling parameters as prompts were not given.
    """
    params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
    require(len(params) == len(prompts), "number of sampling parameters", len(params), f"{len(prompts)}, one a prompt")
    return [
        Request(
            index=index,
            prompt=tuple(int(token) for token in prompt),
            sampling=p,
            limit=min(p.max_new_tokens, context_length - len(prompt)),
            stop_ids=tuple(sorted({*p.stop_token_ids, *(() if p.ignore_eos else eos_token_ids)})),
        )
        for index, (prompt, p) in enumerate(zip(prompts, params, strict=True))
    ]


def plan_batches(
    requests: Sequence[Request], *, max_batch_size: int, replicas: int, prefill_chunk: int, context_length: int
) -> list[Batch]:
    """Deals requests into batches of similar lengths, the longest first: what does not fit the memory fails at once."""
    most_rows = -(-max_batch_size // replicas) * replicas
    ordered = sorted(requests, key=lambda r: (len(r.prompt), r.limit), reverse=True)
    return [
        _make_batch(
            ordered[i : i + most_rows],
            most_rows=most_rows,
            replicas=replicas,
            prefill_chunk=prefill_chunk,
            context_length=context_length,
        )
        for i in range(0, len(ordered), most_rows)
    ]


def _make_batch(
    requests: Sequence[Request], *, most_rows: int, replicas: int, prefill_chunk: int, context_length: int
) -> Batch:
    rows_per_replica = bucket(-(-len(requests) // replicas), 1, most_rows // replicas)
    longest = max(len(r.prompt) for r in requests)
    starts = range(0, longest, prefill_chunk)
    # The last new token is returned, not fed back, so it takes no position.
    positions = max(len(r.prompt) + r.limit - 1 for r in requests)
    return Batch(
        requests=tuple(requests),
        # Dealt round the replicas, so that padding rows do not all lie on the last one.
        rows=tuple(i % replicas * rows_per_replica + i // replicas for i in range(len(requests))),
        size=replicas * rows_per_replica,
        chunks=tuple(Chunk(s, bucket(min(longest - s, prefill_chunk), MIN_CHUNK, prefill_chunk)) for s in starts),
        cache_length=bucket(positions, MIN_CACHE, context_length),
        num_stop_ids=bucket(max(len(r.stop_ids) for r in requests), MIN_STOP_IDS, 2**31),
        method=cheapest_method({r.sampling.method for r in requests}),
    )
