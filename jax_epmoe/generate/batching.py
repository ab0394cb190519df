"""Which requests there are and in what shapes they run: nothing here touches a device.

Shapes come from short lists, so that few programs are compiled:

- slots (sequences that run together): the model's `batch_multiple` times a power of two, at most `max_batch_size` and what the
  memory holds;
- tokens of each row of a prefill call: one power of two from 16 to `prefill_chunk`, or two where prompts differ much;
- rows of a prefill call: as many as `max_prefill_tokens` allow; or a quarter of that, if that is at least two a device;
- positions of the cache: a power of two from 128 to the context length.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral

from jax_epmoe.config import ModelConfig, require
from jax_epmoe.generate.sampling import SamplingMode, SamplingParams, cheapest_mode

MIN_CHUNK = 16
MIN_CACHE = 128
MIN_STOP_IDS = 4


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on: `limit` is the most tokens that it may get, `stop_ids` are those that end it.

    `index` is its place among the prompts, `draw` the number beside its seed that its draws depend on.
    """

    index: int
    draw: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    limit: int
    stop_ids: tuple[int, ...]

    @property
    def positions(self) -> int:
        """Of the cache. The last new token is returned, not fed back, so it takes none."""
        return len(self.prompt) + self.limit - 1


@dataclass(frozen=True)
class Limits:
    """What bounds a run: see `Engine`'s arguments. `replicas`: over how many devices the slots lie, its `batch_multiple`."""

    max_batch_size: int
    replicas: int
    prefill_chunk: int
    max_prefill_tokens: int
    context_length: int
    decode_steps: int


@dataclass(frozen=True)
class Shapes:
    """The shapes of a run, which its programs are compiled for.

    Attributes:
      slots: sequences that run together, a multiple of `replicas`.
      replicas: over how many devices slots lie: slot i is on the `i // (slots / replicas)`-th.
      cache_length: positions of each slot's cache.
      num_stop_ids: tokens that may end a sequence, at the most.
      mode: of sampling.
      chunks: tokens of each row of a prefill call, ascending, and for each how many rows a call may have, ascending.
      decode_steps: tokens that a decode call makes for each slot.
    """

    slots: int
    replicas: int
    cache_length: int
    num_stop_ids: int
    mode: SamplingMode
    chunks: tuple[tuple[int, tuple[int, ...]], ...]
    decode_steps: int

    @property
    def chunk(self) -> int:
        """The most tokens of a prompt that a prefill call takes."""
        return self.chunks[-1][0]

    @property
    def slots_per_replica(self) -> int:
        return self.slots // self.replicas


def bucket(needed: int, low: int, high: int) -> int:
    """The least power of two from `low` that holds `needed`, or `high` where that is less. `needed <= high`."""
    return min(max(low, 1 << (needed - 1).bit_length()), high)


def check_sizes(config: ModelConfig, *, context_length: int | None, **sizes: int) -> int:
    """The context length to generate in: the one given, or the model's own, which is also the most.

    Raises:
      ValueError: it is out of its range, or one of the other sizes is not positive.
    """
    longest = config.max_position_embeddings
    context_length = longest if context_length is None else context_length
    for name, size in sizes.items():
        require(size > 0, name, size, "a positive integer")
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
    indices: Sequence[int] | None = None,
) -> list[Request]:
    """Pairs checked prompts with their sampling parameters. A request gets `max_new_tokens`, or what the context has left.

    Raises:
      ValueError: as many sampling parameters, or indices, as prompts were not given.
    """
    params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
    require(len(params) == len(prompts), "number of sampling parameters", len(params), f"{len(prompts)}, one a prompt")
    draws = range(len(prompts)) if indices is None else indices
    require(len(draws) == len(prompts), "number of indices", len(draws), f"{len(prompts)}, one a prompt")
    return [
        Request(
            index=index,
            draw=draw,
            prompt=tuple(int(token) for token in prompt),
            sampling=p,
            limit=min(p.max_new_tokens, context_length - len(prompt)),
            stop_ids=tuple(sorted({*p.stop_token_ids, *(() if p.ignore_eos else eos_token_ids)})),
        )
        for index, (draw, prompt, p) in enumerate(zip(draws, prompts, params, strict=True))
    ]


def plan_runs(
    requests: Sequence[Request], limits: Limits, most_slots: Callable[[int], int]
) -> Iterator[tuple[list[Request], Shapes]]:
    """Deals requests into runs, each with a cache of its own: one run, unless the longest requests leave too few slots.

    Args:
      requests: at least one.
      limits: sizes.
      most_slots: how many caches of a length the memory holds.
    """
    left = sorted(requests, key=lambda request: -request.limit)  # stable: what may last longest begins first
    while left:
        lengths = [bucket(r.positions, MIN_CACHE, limits.context_length) for r in left]
        longest, now = max(lengths), left
        if most_slots(longest) < min(len(left), limits.max_batch_size):
            now = [r for r, length in zip(left, lengths, strict=True) if length == longest]
        left = [r for r, length in zip(left, lengths, strict=True) if length < longest] if now is not left else []
        yield now, make_shapes(now, limits, most_slots(longest))


def make_shapes(requests: Sequence[Request], limits: Limits, most_slots: int) -> Shapes:
    """The shapes of a run of these requests, with at most `most_slots` slots."""
    replicas = limits.replicas
    most = max(1, min(-(-limits.max_batch_size // replicas), most_slots // replicas))
    slots_per_replica = min(bucket(-(-len(requests) // replicas), 1, 2**31), most)
    slots = replicas * slots_per_replica
    chunks = []
    for length in chunk_lengths([len(r.prompt) for r in requests], limits.prefill_chunk):
        rows = max(1, min(slots_per_replica, limits.max_prefill_tokens // (length * replicas)))
        # Once the slots are taken, few of them are freed at a time.
        fewer = {rows // 4} if rows >= 8 and len(requests) > slots else set()
        chunks.append((length, tuple(replicas * n for n in sorted({rows, *fewer}))))
    return Shapes(
        slots=slots,
        replicas=replicas,
        cache_length=bucket(max(r.positions for r in requests), MIN_CACHE, limits.context_length),
        num_stop_ids=bucket(max(len(r.stop_ids) for r in requests), MIN_STOP_IDS, 2**31),
        mode=cheapest_mode(r.sampling for r in requests),
        chunks=tuple(chunks),
        decode_steps=limits.decode_steps if max(r.limit for r in requests) > limits.decode_steps else 1,
    )


def chunk_lengths(prompt_lengths: Sequence[int], prefill_chunk: int) -> list[int]:
    """How many tokens of each prompt a prefill call takes: one number, or two if that spares a third of all."""
    most = bucket(min(max(prompt_lengths), prefill_chunk), MIN_CHUNK, prefill_chunk)
    rests = [(n - 1) % most + 1 for n in prompt_lengths]  # of each prompt's last call

    def padded(short: int) -> int:
        return sum(short if rest <= short else most for rest in rests)

    whole = sum(n - rest for n, rest in zip(prompt_lengths, rests, strict=True))
    shorter = [MIN_CHUNK << i for i in range(max(0, math.ceil(math.log2(most / MIN_CHUNK))))]
    best = min(shorter, key=padded, default=most)
    return [best, most] if 3 * (whole + padded(best)) <= 2 * (whole + padded(most)) else [most]
