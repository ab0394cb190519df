"""What runs on the devices: prefill calls, decode calls and copies between slots, compiled ahead for a run's shapes.

The cache, `[slots, positions, ...]`, and `Slots`, each slot's state, stay on the devices and are donated from call to call: what
a call writes it writes in place. A prefill call's rows lie on the devices of their slots, so that no cache crosses devices.
"""

import dataclasses
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_epmoe.generate.batching import Shapes
from jax_epmoe.generate.sampling import SamplingMode, log_probabilities, penalize, request_keys, sample
from jax_epmoe.generate.scheduler import Prefill
from jax_epmoe.mesh import DATA
from jax_epmoe.models.kv_cache import check_kv_cache_dtype

COPIES = 4  # of slots in a copy call, on each device
_COMPILING = 8  # programs that XLA compiles at a time


class Call(NamedTuple):
    """A program's kind and size: "start" and "continue" are prefill calls of `rows` x `length` tokens, the former of
    sequences that begin; "decode" makes `length` tokens for every slot; "copy" copies `rows` slots."""

    kind: Literal["start", "continue", "decode", "copy"]
    rows: int = 0
    length: int = 0


# What a request asks for, as columns of two arrays: int32, with the stop ids after these, and float32.
_INTS = ("limit", "top_k", "seed", "draw")
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty")
# What a prefill call is told of each row, int32: `start` and `length` of its tokens, and whether the prompt ends with them.
_PLACE = ("slot", "start", "length", "ends")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """Each slot's sequence, or each row's of a prefill call.

    Attributes:
      token: the last one, `[B]` int32.
      length: positions in the cache, `[B]` int32.
      made: new tokens so far, `[B]` int32.
      running: whether each decode step makes one, `[B]` bool.
      ints: `_INTS` (seed and draw are uint32) and the stop ids, `[B, 4 + K]` int32.
      floats: `_FLOATS`, `[B, 4]` float32.
      seen: the tokens of prompt and output, `[B, V]` bool; None where no request has a repetition penalty.
    """

    token: jax.Array
    length: jax.Array
    made: jax.Array
    running: jax.Array
    ints: jax.Array
    floats: jax.Array
    seen: jax.Array | None

    def wish(self, name: str) -> jax.Array:
        """A column of `ints` or `floats`, `[B]`."""
        if name in _FLOATS:
            return self.floats[:, _FLOATS.index(name)]
        column = self.ints[:, _INTS.index(name)]
        return jax.lax.bitcast_convert_type(column, jnp.uint32) if name in ("seed", "draw") else column

    @property
    def stop_ids(self) -> jax.Array:
        """`[B, K]`; -1 is none."""
        return self.ints[:, len(_INTS) :]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Made:
    """What a call made, on every device: `token [..., B]` int32, -1 for none; with log-probabilities, the chosen ones'
    `logprob [..., B]`, and the likeliest ones' `top_ids` and `top_logprobs [..., B, N]`; where it is asked for, the rows that each
    expert got, `load [..., MoE layers, E]`."""

    token: jax.Array
    logprob: jax.Array | None = None
    top_ids: jax.Array | None = None
    top_logprobs: jax.Array | None = None
    load: jax.Array | None = None


def pack(call: Prefill, num_stop_ids: int) -> tuple[np.ndarray, ...]:
    """A prefill call's tokens `[P, S]`, padded with 0, and `_PLACE [P, 4]`, both int32; and `Slots`'s `ints` and `floats`."""
    size = len(call.rows)
    tokens = np.zeros((size, call.chunk), np.int32)
    place = np.zeros((size, len(_PLACE)), np.int32)
    place[:, 0] = -1
    ints = np.full((size, len(_INTS) + num_stop_ids), -1, np.int32)
    floats = np.ones((size, len(_FLOATS)), np.float32)
    for i, row in enumerate(call.rows):
        if row is None:
            continue
        request = row.running.request
        sampling = request.sampling
        tokens[i, : row.length] = request.prompt[row.start : row.start + row.length]
        place[i] = row.slot, row.start, row.length, row.ends
        ints[i, : len(_INTS)] = request.limit, sampling.top_k, _as_int32(sampling.seed), _as_int32(request.draw)
        ints[i, len(_INTS) : len(_INTS) + len(request.stop_ids)] = request.stop_ids
        floats[i] = [getattr(sampling, name) for name in _FLOATS]
    return tokens, place, ints, floats


def _as_int32(value: int) -> int:
    return int(np.uint32(value % 2**32).astype(np.int32))


class Programs:
    """A model's programs, each compiled once."""

    def __init__(self, model: Any, kv_cache_dtype: str, *, with_load: bool = False):
        check_kv_cache_dtype(kv_cache_dtype)
        self.mesh = model.mesh
        self.replicas: int = model.batch_multiple
        self.vocab_size: int = model.config.vocab_size
        self._with_load = with_load
        self.compiled: dict[tuple, Callable[..., Any]] = {}
        # Flattened once: a call of a compiled program passes a plain list of arrays.
        self._graphdef, state = nnx.split(model)
        self.weights, self._state_tree = jax.tree.flatten(state)
        self.init_cache = partial(model.init_cache, kv_cache_dtype=kv_cache_dtype)
        # A small one is made to see dtypes and shardings: what is traced has none.
        small = self.init_cache(self.replicas, 1)
        self._cache = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), small)
        self._cache_specs = jax.tree.map(lambda a: a.sharding.spec, self._cache)
        self._by_slot = P(jax.tree.leaves(self._cache)[0].sharding.spec[0])
        self._replicated = NamedSharding(self.mesh, P())
        self._by_row = NamedSharding(self.mesh, P(DATA))  # each replica keeps its own slots' state

    def cache_shape(self, slots: int, length: int) -> Any:
        """The cache's shapes, dtypes and shardings."""
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((slots, length, *a.shape[2:]), a.dtype, sharding=a.sharding), self._cache
        )

    def slot_bytes(self, length: int) -> int:
        """What a slot of so many positions takes of each device that holds it."""
        one_each = jax.tree.leaves(self.cache_shape(self.replicas, length))
        return sum(int(np.prod(a.sharding.shard_shape(a.shape))) * a.dtype.itemsize for a in one_each)

    def new_slots(self, shapes: Shapes) -> Slots:
        """Empty slots."""
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), self._slots_shape(shapes))

    def put(self, value: np.ndarray) -> jax.Array:
        """Rows, to the replicas of their slots; the same value in every process."""
        if jax.process_count() == 1:
            return jax.device_put(value, self._by_row)
        return jax.make_array_from_callback(value.shape, self._by_row, lambda index: value[index])

    def compile(self, shapes: Shapes, calls: Iterable[Call]) -> None:
        """Compiles those that are not yet, several at a time."""
        missing = {self._key(shapes, call): call for call in calls}
        missing = {key: call for key, call in missing.items() if key not in self.compiled}
        with ThreadPoolExecutor(_COMPILING) as pool:
            made = {key: pool.submit(self.lower(shapes, call).compile) for key, call in missing.items()}
            self.compiled.update({key: future.result() for key, future in made.items()})

    def __call__(self, shapes: Shapes, call: Call) -> Callable[..., Any]:
        """The compiled program: of (weights, cache, slots, ...) for prefill and decode, of (cache, from, to) for copies."""
        key = self._key(shapes, call)
        if key not in self.compiled:
            self.compile(shapes, [call])
        return self.compiled[key]

    def _key(self, shapes: Shapes, call: Call) -> tuple:
        key = (call, shapes.slots, shapes.cache_length)
        return key if call.kind == "copy" else (*key, shapes.num_stop_ids, shapes.mode)

    def lower(self, shapes: Shapes, call: Call) -> jax.stages.Lowered:
        """The program, traced and not yet compiled."""
        cache, slots = self.cache_shape(shapes.slots, shapes.cache_length), self._slots_shape(shapes)
        shardings = jax.tree.map(lambda a: a.sharding, cache)
        if call.kind == "copy":
            numbers = self._shape((call.rows,), jnp.int32)
            return jax.jit(self._copy, donate_argnums=0, out_shardings=shardings).lower(cache, numbers, numbers)
        if call.kind == "decode":
            function: Callable[..., Any] = partial(self._decode, mode=shapes.mode, steps=call.length)
            args = [self._shape((shapes.slots,), jnp.bool_)]
        else:
            function = partial(self._prefill, mode=shapes.mode, is_start=call.kind == "start")
            args = [
                self._shape((call.rows, call.length), jnp.int32),
                self._shape((call.rows, len(_PLACE)), jnp.int32),
                self._shape((call.rows, len(_INTS) + shapes.num_stop_ids), jnp.int32),
                self._shape((call.rows, len(_FLOATS)), jnp.float32),
            ]
        jitted = jax.jit(function, donate_argnums=(1, 2), out_shardings=(shardings, self._by_row, self._replicated))
        return jitted.lower(self.weights, cache, slots, *args)

    def _shape(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._by_row)

    def _slots_shape(self, shapes: Shapes) -> Any:
        size = shapes.slots
        column: Any = self._shape((size,), jnp.int32)
        running: Any = self._shape((size,), jnp.bool_)
        ints: Any = self._shape((size, len(_INTS) + shapes.num_stop_ids), jnp.int32)
        floats: Any = self._shape((size, len(_FLOATS)), jnp.float32)
        seen: Any = self._shape((size, self.vocab_size), jnp.bool_) if shapes.mode.penalty else None
        return Slots(column, column, column, running, ints, floats, seen)

    def _model(self, weights: list[jax.Array]) -> Any:
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._state_tree, weights))

    def _hidden(self, model: Any, *args: Any, is_start: bool) -> tuple[jax.Array, Any, jax.Array | None]:
        """`Decoder.hidden`, and the rows that each expert got where they are asked for."""
        if self._with_load:
            return model.hidden_with_load(*args, is_start=is_start)
        return *model.hidden(*args, is_start=is_start), None

    def _prefill(self, weights, cache, slots, tokens, place, ints, floats, *, mode: SamplingMode, is_start: bool):
        """Tokens `[P, S]` into their slots; rows whose prompt ends among them get their first new token."""
        size, length = tokens.shape
        slot, start, num_tokens, ends = jnp.moveaxis(place, 1, 0)
        model = self._model(weights)
        if is_start:
            read = jax.tree.map(lambda a: jnp.zeros((size, length, *a.shape[2:]), a.dtype), cache)
        else:
            read = self._gather(cache, slot)
        hidden, written, load = self._hidden(model, tokens, start, read, num_tokens, is_start=is_start)  # [P, S, H]
        cache = self._write(cache, written, slot, start, num_tokens, length=length, is_start=is_start)
        last = jnp.maximum(num_tokens - 1, 0)
        logits = model.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])  # [P, V]
        seen = self._seen(slots.seen, slot, start, num_tokens, tokens) if mode.penalty else None
        zeros = jnp.zeros_like(slot)
        rows = Slots(zeros, start + num_tokens, zeros, jnp.zeros_like(slot, bool), ints, floats, seen)
        rows, made = _choose(logits, rows, ends != 0, mode)
        return cache, self._put_rows(slots, rows, slot), dataclasses.replace(made, load=load)

    def _decode(self, weights, cache, slots, alive, *, mode: SamplingMode, steps: int):
        """`steps` times: every running slot's last token into the cache, and its next one out. Slots not `alive [B]` stop."""
        model = self._model(weights)
        shardings = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self._cache_specs)

        def step(carry: tuple[Any, Slots], _: None) -> tuple[tuple[Any, Slots], Made]:
            cache, slots = carry
            running = slots.running
            num_tokens = running.astype(jnp.int32)
            tokens = slots.token[:, None]
            hidden, cache, load = self._hidden(model, tokens, slots.length, cache, num_tokens, is_start=False)
            slots = dataclasses.replace(slots, length=slots.length + num_tokens)
            slots, made = _choose(model.logits(hidden[:, 0]), slots, running, mode)
            carry = jax.lax.with_sharding_constraint((cache, slots), (shardings, self._by_row))
            return carry, dataclasses.replace(made, load=load)

        carry = cache, dataclasses.replace(slots, running=slots.running & alive)
        if steps == 1:
            carry, made = step(carry, None)
            made = jax.tree.map(lambda a: a[None], made)
        else:
            carry, made = jax.lax.scan(step, carry, None, length=steps)
        return *carry, made

    def _copy(self, cache, source, target):
        """What is in slots `source [C]` into slots `target [C]`, which are on the same device; -1: nothing."""

        def on_device(cache, source, target):
            return jax.tree.map(lambda a: _set_rows(a, _rows(a, source, self._by_slot), target, self._by_slot), cache)

        return self._on_shards(on_device, self._cache_specs)(cache, source, target)

    def _gather(self, cache, slot):
        """The slots' rows of the cache: `[P, L, ...]`."""

        def on_device(cache, slot):
            return jax.tree.map(lambda a: _rows(a, slot, self._by_slot), cache)

        return self._on_shards(on_device, self._cache_specs)(cache, slot)

    def _write(self, cache, written, slot, start, num_tokens, *, length: int, is_start: bool):
        """The new tokens' positions of `written [P, L, ...]` (with `is_start` `[P, S, ...]`) into the slots' rows."""

        def on_device(cache, written, slot, start, num_tokens):
            step = jnp.arange(length)
            position, row = start[:, None] + step, jnp.arange(len(slot))[:, None]

            def one(all_slots, rows):
                new = rows if is_start else rows.at[row, position].get(mode="clip")
                local = _local(slot, all_slots.shape[0], self._by_slot)
                where = jnp.where(step < num_tokens[:, None], position, all_slots.shape[1])
                return all_slots.at[local[:, None], where].set(new, mode="drop")

            return jax.tree.map(one, cache, written)

        return self._on_shards(on_device, self._cache_specs, self._cache_specs)(cache, written, slot, start, num_tokens)

    def _seen(self, seen, slot, start, num_tokens, tokens):
        """Which tokens each row's prompt has had, `[P, V]`: those before, unless it begins, and these."""
        spec = P(DATA)
        gather = self._on_shards(lambda seen, slot: _rows(seen, slot, spec), spec, by=spec, out=spec)
        before = gather(seen, slot) & (start > 0)[:, None]
        real = jnp.arange(tokens.shape[1]) < num_tokens[:, None]
        return _mark(before, jnp.where(real, tokens, self.vocab_size))

    def _put_rows(self, slots: Slots, rows: Slots, slot: jax.Array) -> Slots:
        """The rows' state into their slots."""
        spec = P(DATA)

        def on_device(slots, rows, slot):
            return jax.tree.map(lambda all_slots, row: _set_rows(all_slots, row, slot, spec), slots, rows)

        return self._on_shards(on_device, spec, spec, by=spec, out=spec)(slots, rows, slot)

    def _on_shards(self, function: Callable[..., Any], *specs: Any, by: P | None = None, out: Any = None) -> Any:
        """`function` on every device: arguments by `specs`, and numbers, a row each, as slots lie."""

        def call(*args: Any) -> Any:
            rest = [by or self._by_slot] * (len(args) - len(specs))
            return jax.shard_map(
                function, mesh=self.mesh, in_specs=(*specs, *rest), out_specs=out or self._cache_specs, check_vma=False
            )(*args)

        return call


def _local(slot: jax.Array, size: int, spec: P) -> jax.Array:
    """A device's own numbers of slots, of which it has `size`; `size`, which is dropped, for those of others and -1."""
    local = slot - jax.lax.axis_index(spec[0]) * size
    return jnp.where((local >= 0) & (local < size), local, size)


def _rows(array: jax.Array, slot: jax.Array, spec: P) -> jax.Array:
    return array.at[_local(slot, array.shape[0], spec)].get(mode="clip")


def _set_rows(array: jax.Array, rows: jax.Array, slot: jax.Array, spec: P) -> jax.Array:
    return array.at[_local(slot, array.shape[0], spec)].set(rows, mode="drop")


def _mark(seen: jax.Array, tokens: jax.Array) -> jax.Array:
    """`seen [B, V]` with `tokens [B, N]`; those from V on are none."""
    return jax.vmap(lambda row, tokens: row.at[tokens].set(True, mode="drop"))(seen, tokens)


def _choose(logits: jax.Array, slots: Slots, where: jax.Array, mode: SamplingMode) -> tuple[Slots, Made]:
    """The next token of each row, from `logits [B, V]`, and the rows' state after it; only of rows `where [B]`."""
    with jax.named_scope("sample"):
        scores = logits if slots.seen is None else penalize(logits, slots.seen, slots.wish("repetition_penalty"))
        keys = request_keys(slots.wish("seed"), slots.wish("draw"))
        temperature, top_k, top_p, min_p = map(slots.wish, ("temperature", "top_k", "top_p", "min_p"))
        token = sample(scores, temperature, top_k, top_p, min_p, keys, slots.made, method=mode.method)
        made = Made(jnp.where(where, token, -1))
        if mode.num_logprobs is not None:
            made = Made(made.token, *log_probabilities(logits, token, mode.num_logprobs))
        stops = jnp.any(token[:, None] == slots.stop_ids, axis=1) | (slots.made + 1 >= slots.wish("limit"))
        seen = slots.seen
        if seen is not None:
            seen = _mark(seen, jnp.where(where, token, seen.shape[1])[:, None])
        return dataclasses.replace(
            slots,
            token=jnp.where(where, token, slots.token),
            made=slots.made + where,
            running=jnp.where(where, ~stops, slots.running),
            seen=seen,
        ), made
