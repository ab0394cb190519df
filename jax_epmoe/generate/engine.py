"""`Engine`: prompts to token ids, in batches, on the mesh of a decoder.

A batch is prefilled in chunks and then decoded one token a call, each a program compiled ahead of time for the batch's
shapes (`batching.py`). Rows keep their state on the devices: the host dispatches steps without waiting, reads a step's
tokens a few steps later, and stops when it sees that every row has finished. A row that has finished, and one that is
padding, takes no expert rows.

Several processes run the same program with the same prompts, and each gets every completion.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_epmoe.generate.batching import Batch, Chunk, check_prompts, check_sizes, make_requests, plan_batches
from jax_epmoe.generate.sampling import Method, SamplingParams, request_keys, sample
from jax_epmoe.generate.stats import Stats, device_memory
from jax_epmoe.mesh import DATA
from jax_epmoe.models.kv_cache import check_kv_cache_dtype

# How many steps the host runs ahead of what it has read. Every process reads the same steps, so all stop at the same one;
# after the last row's end this many steps run for nothing.
_LOOKAHEAD = 4

_RUNNING, _STOP, _LENGTH = range(3)
_FINISH_REASONS: dict[int, Literal["stop", "length"]] = {_STOP: "stop", _LENGTH: "length"}

# Called with how many output tokens came and how many requests finished since the last call.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Completion:
    """What one prompt got: `token_ids` with the token that stopped it, if one did, and why it ended.

    `finish_reason` is "stop" after a stop token and "length" after `max_new_tokens` or at the context's end.
    """

    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Wishes:
    """What a batch's rows ask for: `[B]`, and `stop_ids [B, K]`."""

    prompt_length: jax.Array
    limit: jax.Array
    stop_ids: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array
    index: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Rows:
    """Where a batch's rows are: the last token, the positions in the cache, the tokens made, the state; `[B]` int32."""

    token: jax.Array
    length: jax.Array
    made: jax.Array
    status: jax.Array


class Engine:
    """Generates from a decoder; compiled programs are kept from call to call.

    `engine.stats` tells of the last call, `engine.num_programs` how many programs have been compiled.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_batch_size: int = 32,
        prefill_chunk: int = 512,
        context_length: int | None = None,
        eos_token_ids: Sequence[int] | None = None,
        kv_cache_dtype: str = "auto",
    ):
        """
        Args:
          model: a `Decoder`, or what has its `config`, `mesh`, `batch_multiple`, `init_cache`, `hidden` and `logits`.
          max_batch_size: sequences that run together, rounded up to a multiple of the model's `batch_multiple`.
          prefill_chunk: how many tokens of each prompt one prefill call takes.
          context_length: the most positions of a prompt and its continuation; by default, and at most, the model's.
          eos_token_ids: which tokens end a text; the model's by default.
          kv_cache_dtype: as the model's `init_cache` takes it: "auto" is the model's dtype, "fp8" float8 with scales.

        Raises:
          ValueError: a size out of its range, or a `kv_cache_dtype` that does not exist.
        """
        self.context_length = check_sizes(
            model.config, max_batch_size=max_batch_size, prefill_chunk=prefill_chunk, context_length=context_length
        )
        self.config = model.config
        self.mesh = model.mesh
        self.max_batch_size = max_batch_size
        self.prefill_chunk = prefill_chunk
        self.eos_token_ids = tuple(self.config.eos_token_ids if eos_token_ids is None else eos_token_ids)
        self.stats = Stats()
        self._batch_multiple = model.batch_multiple
        check_kv_cache_dtype(kv_cache_dtype)
        self._init_cache = partial(model.init_cache, kv_cache_dtype=kv_cache_dtype)
        # Flattened once: a call of a compiled program passes a plain list of arrays.
        self._graphdef, state = nnx.split(model)
        self._weights, self._state_tree = jax.tree.flatten(state)
        self._replicated = NamedSharding(self.mesh, P())
        self._by_row = NamedSharding(self.mesh, P(DATA))  # each replica keeps its own rows' state
        self._programs: dict[tuple, Callable] = {}
        self._cache_shapes: dict[tuple[int, int], Any] = {}

    @property
    def num_programs(self) -> int:
        return len(self._programs)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """Continues every prompt.

        Args:
          prompts: token ids, of any lengths.
          sampling: for all prompts, or one each; greedy by default.
          progress: is told of tokens and finished requests as they come.

        Returns:
          Completions, in the order of the prompts.

        Raises:
          ValueError: an empty prompt, one that leaves the context no room for a token, a token id outside the vocabulary.
        """
        check_prompts(prompts, vocab_size=self.config.vocab_size, context_length=self.context_length)
        requests = make_requests(
            prompts,
            SamplingParams() if sampling is None else sampling,
            context_length=self.context_length,
            eos_token_ids=self.eos_token_ids,
        )
        batches = plan_batches(
            requests,
            max_batch_size=self.max_batch_size,
            replicas=self._batch_multiple,
            prefill_chunk=self.prefill_chunk,
            context_length=self.context_length,
        )
        self.stats = Stats(requests=len(requests), prompt_tokens=sum(len(r.prompt) for r in requests))
        with self._timed("compile_seconds"):
            for batch in batches:
                self._compile(batch)
        completions: dict[int, Completion] = {}
        for batch in batches:
            completions.update(self._run(batch, progress))
        if requests:
            self.stats.first_token_seconds /= len(requests)
        return [completions[request.index] for request in requests]

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        setattr(self.stats, name, getattr(self.stats, name) + time.perf_counter() - start)

    def _run(self, batch: Batch, progress: Progress | None) -> dict[int, Completion]:
        """One batch, from its prompts to its completions by request index."""
        reader = _Reader(batch, progress)
        before = self.stats.prefill_seconds
        with self._timed("prefill_seconds"):
            cache = self._init_cache(batch.size, batch.cache_length)
            wishes, rows = jax.tree.map(self._put, _start(batch))
            for chunk in batch.chunks:
                program = self._program(batch, chunk)
                tokens, start = self._put(batch.tokens(chunk)), self._put(np.array(chunk.start, np.int32))
                cache, rows, out = program(self._weights, cache, rows, wishes, tokens, start)
            reader.read(out)
        self.stats.first_token_seconds += (self.stats.prefill_seconds - before) * len(batch.requests)
        with self._timed("decode_seconds"):
            cache = self._decode(batch, cache, rows, wishes, reader)
        local = [device for device in self.mesh.devices.flat if device.process_index == jax.process_index()]
        self.stats.memory_bytes = max(self.stats.memory_bytes, device_memory(local))
        self.stats.output_tokens += sum(len(tokens) for tokens in reader.token_ids)
        return reader.completions()

    def _decode(self, batch: Batch, cache: Any, rows: _Rows, wishes: _Wishes, reader: "_Reader") -> Any:
        """Steps until every row has finished; returns the cache."""
        program = self._program(batch, None)
        unread: collections.deque[jax.Array] = collections.deque()
        for _ in range(max(request.limit for request in batch.requests) - 1):
            if reader.finished:
                break
            cache, rows, out = program(self._weights, cache, rows, wishes)
            out.copy_to_host_async()
            unread.append(out)
            if len(unread) > _LOOKAHEAD:
                reader.read(unread.popleft())
        for out in unread:
            reader.read(out)
        return cache

    def _sharding(self, value: np.ndarray) -> NamedSharding:
        return self._by_row if value.ndim else self._replicated

    def _put(self, value: np.ndarray) -> jax.Array:
        """Rows to their replicas and scalars everywhere, from the same value in every process."""
        return jax.make_array_from_callback(value.shape, self._sharding(value), lambda index: value[index])

    def _compile(self, batch: Batch) -> None:
        for chunk in batch.chunks:
            self._program(batch, chunk)
        if max(request.limit for request in batch.requests) > 1:
            self._program(batch, None)

    def _program(self, batch: Batch, chunk: Chunk | None) -> Callable:
        """The compiled prefill call for chunks of that length (the first ones have their own), or for None the decode step."""
        of_chunk = None if chunk is None else (chunk.length, chunk.start == 0)
        key = (batch.size, batch.cache_length, batch.num_stop_ids, batch.method, of_chunk)
        if key not in self._programs:
            self._programs[key] = self._lowered(batch, chunk).compile()
        return self._programs[key]

    def _lowered(self, batch: Batch, chunk: Chunk | None) -> jax.stages.Lowered:
        cache = self._cache_shape(batch.size, batch.cache_length)
        wishes, rows = jax.tree.map(self._shape, _start(batch))
        args = [self._weights, cache, rows, wishes]
        step: Callable = self._decode_step
        if chunk is not None:
            step = partial(self._prefill_step, is_start=chunk.start == 0)
            args += [
                self._shape(np.zeros((batch.size, chunk.length), np.int32)),
                self._shape(np.array(0, np.int32)),
            ]
        jitted = jax.jit(
            lambda *args: step(*args, method=batch.method),
            donate_argnums=(1, 2),
            out_shardings=(jax.tree.map(lambda a: a.sharding, cache), self._by_row, self._replicated),
        )
        return jitted.lower(*args)

    def _shape(self, value: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=self._sharding(value))

    def _cache_shape(self, batch_size: int, length: int) -> Any:
        """The shapes, dtypes and shardings of a cache. One is made to see them: what is traced has no shardings."""
        key = (batch_size, length)
        if key not in self._cache_shapes:
            self._cache_shapes[key] = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), self._init_cache(*key)
            )
        return self._cache_shapes[key]

    def _prefill_step(
        self,
        weights: list[jax.Array],
        cache: Any,
        rows: _Rows,
        wishes: _Wishes,
        tokens: jax.Array,
        start: jax.Array,
        *,
        is_start: bool,
        method: Method,
    ) -> tuple[Any, _Rows, jax.Array]:
        """Tokens `[B, S]` at positions `start .. start + S`; rows whose prompt ends among them get their first token."""
        size, length = tokens.shape
        num_tokens = jnp.clip(wishes.prompt_length - start, 0, length)
        ends = (num_tokens > 0) & (start + num_tokens == wishes.prompt_length)
        starts = jnp.broadcast_to(start, (size,))
        cache, rows = self._advance(
            weights, cache, rows, wishes, tokens, starts, num_tokens, ends, method, is_start=is_start
        )
        return cache, rows, jnp.stack([rows.token, rows.status])

    def _decode_step(
        self, weights: list[jax.Array], cache: Any, rows: _Rows, wishes: _Wishes, *, method: Method
    ) -> tuple[Any, _Rows, jax.Array]:
        """Every running row's last token into the cache, and its next one out."""
        running = rows.status == _RUNNING
        tokens, num_tokens = rows.token[:, None], running.astype(jnp.int32)
        cache, rows = self._advance(weights, cache, rows, wishes, tokens, rows.length, num_tokens, running, method)
        return cache, rows, jnp.stack([jnp.where(running, rows.token, -1), rows.status])

    def _advance(
        self,
        weights: list[jax.Array],
        cache: Any,
        rows: _Rows,
        wishes: _Wishes,
        tokens: jax.Array,
        start: jax.Array,
        num_tokens: jax.Array,
        ends: jax.Array,
        method: Method,
        *,
        is_start: bool = False,
    ) -> tuple[Any, _Rows]:
        """Feeds tokens to the model, and where `ends [B]` takes the token after each row's last one."""
        model = nnx.merge(self._graphdef, jax.tree.unflatten(self._state_tree, weights))
        hidden, cache = model.hidden(tokens, start, cache, num_tokens, is_start=is_start)  # [B, S, H]
        last = jnp.maximum(num_tokens - 1, 0)
        logits = model.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])  # [B, V]
        with jax.named_scope("sample"):
            keys = request_keys(wishes.seed, wishes.index)
            token = sample(logits, wishes.temperature, wishes.top_k, wishes.top_p, keys, rows.made, method=method)
        made = rows.made + 1
        stops = jnp.any(token[:, None] == wishes.stop_ids, axis=1)
        status = jnp.where(stops, _STOP, jnp.where(made >= wishes.limit, _LENGTH, _RUNNING))
        after = _Rows(token=token, length=rows.length + num_tokens, made=made, status=status)
        kept = dataclasses.replace(rows, length=after.length)
        return cache, jax.tree.map(lambda new, old: jnp.where(ends, new, old), after, kept)


def _start(batch: Batch) -> tuple[_Wishes, _Rows]:
    """A batch's first state, as NumPy arrays; padding rows have finished before they begin."""
    requests = batch.requests
    params = [request.sampling for request in requests]
    column: Callable[..., Any] = batch.column
    stop_ids: Any = batch.stop_ids()
    zeros: Any = np.zeros(batch.size, np.int32)
    wishes = _Wishes(
        prompt_length=column([len(r.prompt) for r in requests], np.int32),
        limit=column([r.limit for r in requests], np.int32),
        stop_ids=stop_ids,
        temperature=column([p.temperature for p in params], np.float32),
        top_k=column([p.top_k for p in params], np.int32),
        top_p=column([p.top_p for p in params], np.float32, padding=1),
        seed=column([p.seed for p in params], np.uint32),
        index=column([r.index for r in requests], np.uint32),
    )
    status = column([_RUNNING] * len(requests), np.int32, padding=_LENGTH)
    return wishes, _Rows(token=zeros, length=zeros, made=zeros, status=status)


class _Reader:
    """Collects what the steps of a batch made, on the host."""

    def __init__(self, batch: Batch, progress: Progress | None):
        self.finished = False
        self.token_ids: list[list[int]] = [[] for _ in batch.requests]
        self._batch = batch
        self._progress = progress
        self._status = [_RUNNING] * len(batch.requests)

    def read(self, out: jax.Array) -> None:
        """A step's tokens (-1: none) and states, `[2, B]`; waits for them."""
        tokens, status = np.asarray(out)[:, list(self._batch.rows)].tolist()
        for ids, token in zip(self.token_ids, tokens, strict=True):
            if token >= 0:
                ids.append(token)
        done = sum(s != _RUNNING for s in status) - sum(s != _RUNNING for s in self._status)
        self._status = status
        self.finished = _RUNNING not in status
        if self._progress is not None:
            self._progress(sum(token >= 0 for token in tokens), done)

    def completions(self) -> dict[int, Completion]:
        return {
            request.index: Completion(ids, _FINISH_REASONS[status], len(request.prompt))
            for request, ids, status in zip(self._batch.requests, self.token_ids, self._status, strict=True)
        }
