"""Attention over the tensor-parallel group: grouped-query (GQA) and multi-head latent (MLA).

Heads are dealt to the group's devices; or, with data-parallel attention, sequences are, and every device has all heads: nothing
is summed, and no key or latent is kept twice.

Both are called with tokens at absolute positions and, when generating, a cache that they extend: a token sees every cached
position up to its own. Entries past a sequence's end are never seen before they are overwritten.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_epmoe.config import GQAConfig, MLAConfig, RopeConfig, require
from jax_epmoe.kernels import decode_hopper, mla_hopper, rope_hopper
from jax_epmoe.kernels.device import compute_capability, on_hopper
from jax_epmoe.mesh import ALL_AXES, DATA, TP_AXES, axes_size
from jax_epmoe.models import kv_cache
from jax_epmoe.models.blocks import RMSNorm, rotate, tokens_spec
from jax_epmoe.models.kv_cache import Cache, Cached, Float8Vectors
from jax_epmoe.moe.gated_mlp import linear
from jax_epmoe.parameters import parameter, run_on_shards
from jax_epmoe.quant import FP8
from jax_epmoe.quantized_parameters import DenseWeights

RopeTable = tuple[jax.Array, jax.Array]

_MASK_BYTES = 2**29  # the largest mask that is made for the library
_SCORES_BYTES = 2**28


def causal_attention(
    q: jax.Array,
    k: Cached,
    v: Cached,
    positions: jax.Array,
    scale: float,
    *,
    cached: bool,
    sliding_window: int | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """`attend`, through our kernel or cuDNN where one serves the call.

    Args:
      k, v: as `attend`'s, or in float8 as a cache has them, which our kernel reads as they are; all else makes them 16 bits wide.
      positions: of the queries, `[B, S]`.
      cached: keys stand at positions 0 to L - 1; else at the queries' own, which rise by one, and S = L.
      sinks: as `attend`'s. cuDNN knows none: what it computes is scaled, by what a sink would have left to the keys.
    """
    (keys, k_scales), (values, v_scales) = kv_cache.stored(k), kv_cache.stored(v)
    (batch, length, _, dim), num_keys = q.shape, keys.shape[1]
    if cached and length == 1 and on_hopper() and decode_hopper.serves(q[:, 0], keys, values):
        lengths = _lengths(positions, keys)
        scales = None if k_scales is None or v_scales is None else (k_scales, v_scales)
        decode = partial(decode_hopper.decode, scale=scale, sliding_window=sliding_window)
        return decode(q[:, 0], keys, values, lengths, sinks, scales)[:, None]
    k, v = kv_cache.read(k, q.dtype), kv_cache.read(v, q.dtype)
    key_positions = _key_positions(batch, num_keys) if cached else positions
    masked = cached and (length > 1 or sliding_window is not None)
    if not (
        compute_capability() >= 80
        and q.dtype == k.dtype == v.dtype
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and dim % 8 == 0
        and v.shape[-1] <= dim <= (256 if on_hopper() else 128)
        and not (masked and 2 * batch * length * num_keys > _MASK_BYTES)
    ):
        return attend(q, k, v, positions, key_positions, scale, sliding_window, sinks)
    what_is_seen: dict[str, Any] = {}
    if masked:
        what_is_seen["mask"] = _visible(positions, key_positions, sliding_window)[:, None]
    elif cached:
        what_is_seen["key_value_seq_lengths"] = jnp.minimum(positions[:, 0] + 1, num_keys)
        what_is_seen["query_seq_lengths"] = jnp.ones_like(positions[:, 0])
    else:
        what_is_seen["is_causal"] = True
        if sliding_window is not None:
            what_is_seen["local_window_size"] = (sliding_window - 1, 0)
    if sinks is None and v.shape[-1] != dim and _takes_smaller_values():
        (out,) = _cudnn(q, k, v, scale=scale, **what_is_seen)
        return out
    padded_v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, dim - v.shape[-1])))  # its dimension must be the keys'
    if sinks is None:
        library: Callable[..., jax.Array] = jax.nn.dot_product_attention
        return library(q, k, padded_v, scale=scale, implementation="cudnn", **what_is_seen)[..., : v.shape[-1]]
    out, log_sums = _cudnn(q, k, padded_v, scale=scale, log_sums=True, **what_is_seen)
    log_sums = jnp.swapaxes(log_sums, 1, 2)
    # Of exp(log_sum) + exp(sink), the keys' part.
    kept = jax.nn.sigmoid(log_sums - sinks.astype(jnp.float32))[..., None]
    return (out[..., : v.shape[-1]] * kept).astype(v.dtype)


def _takes_smaller_values() -> bool:
    """Whether cuDNN knows values of another dimension than the keys'."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    return on_hopper() and cudnn.check_cudnn_version() >= 91000


def _cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    mask: jax.Array | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: tuple[int, int] | None = None,
    log_sums: bool = False,
) -> tuple[jax.Array, ...]:
    """`jax.nn.dot_product_attention` by cuDNN; with `log_sums` the logarithm of each query's sum of exponentials too, `[B, heads, S]` float32.

    That function would return it as well, but rounded to the queries' dtype, and does not take values of another dimension than the
    keys', so this calls what it is made of.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn  # here, so that only this depends on where JAX has it

    mask_type = cudnn.MaskType.NO_MASK
    if is_causal:
        mask_type = cudnn.MaskType.CAUSAL
    elif key_value_seq_lengths is not None:
        mask_type = cudnn.MaskType.PADDING
    window = None if local_window_size is None else local_window_size[0] + 1
    found = cudnn.dot_product_attention(
        q, k, v, None, mask, query_seq_lengths, key_value_seq_lengths,
        scale=scale, mask_type=mask_type, sliding_window_length=window, return_residual=log_sums,
    )  # fmt: skip
    return tuple(found) if log_sums else (found,)


def queries_at_a_time(batch: int, length: int, heads: int, num_keys: int) -> int:
    """For how many of each sequence's `length` queries `attend` makes scores at once: what fits 256 MiB, evenly cut."""
    parts = min(length, -(-4 * batch * length * heads * num_keys // _SCORES_BYTES))
    return -(-length // max(parts, 1))


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    scale: float,
    sliding_window: int | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention in float32, causal by absolute position.

    Args:
      q: `[B, S, heads, D]`.
      k: `[B, L, kv_heads, D]`; query head n reads key head `n // (heads / kv_heads)`.
      v: `[B, L, kv_heads, Dv]`.
      query_positions: `[B, S]`.
      key_positions: `[B, L]`.
      scale: multiplies the scores.
      sliding_window: how many last positions, its own included, a query sees; None for all.
      sinks: `[heads]`: a score more in each head's softmax, of a key whose value is zero; None for none.

    Returns:
      `[B, S, heads, Dv]` in v's dtype.
    """
    batch, length, heads, _ = q.shape
    size = queries_at_a_time(batch, length, heads, k.shape[1])
    if size == length:
        return _attend(q, k, v, query_positions, key_positions, scale, sliding_window, sinks)
    parts = -(-length // size)
    padding = parts * size - length

    def split(x: jax.Array) -> jax.Array:
        """`[B, S, ...]` -> `[parts, B, size, ...]`."""
        padded = jnp.pad(x, ((0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(padded.reshape(batch, parts, size, *x.shape[2:]), 1, 0)

    def one(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _attend(part[0], k, v, part[1], key_positions, scale, sliding_window, sinks)

    out = jax.lax.map(one, (split(q), split(query_positions)))
    return jnp.moveaxis(out, 0, 1).reshape(batch, parts * size, heads, v.shape[-1])[:, :length]


def _attend(q, k, v, query_positions, key_positions, scale, sliding_window, sinks):
    """`attend`, with all scores at once."""
    batch, length, heads, dim = q.shape
    q = q.reshape(batch, length, k.shape[2], heads // k.shape[2], dim)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum("bskgd,blkd->bkgsl", q, k, precision=precision, preferred_element_type=jnp.float32) * scale
    visible = _visible(query_positions, key_positions, sliding_window)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = _softmax(scores, sinks).astype(v.dtype)
    out = jnp.einsum("bkgsl,blkd->bskgd", weights, v, precision=precision, preferred_element_type=jnp.float32)
    return out.reshape(batch, length, heads, v.shape[-1]).astype(v.dtype)


def _softmax(scores: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """Of `scores [B, kv_heads, group, S, L]` along L; with `sinks`, of one score more that is then left out."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = sinks.astype(jnp.float32).reshape(*scores.shape[1:3], 1, 1)
    largest = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks)
    powers = jnp.exp(scores - largest)
    return powers / (jnp.sum(powers, axis=-1, keepdims=True) + jnp.exp(sinks - largest))


def _visible(query_positions: jax.Array, key_positions: jax.Array, sliding_window: int | None) -> jax.Array:
    """`[B, S, L]` bool."""
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    visible = distance >= 0
    return visible if sliding_window is None else visible & (distance < sliding_window)


def _key_positions(batch: int, length: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(length), (batch, length))


class Attention(nnx.Module):
    """What both kinds share: one shard_map, one all-reduce (GQA's "full" QK norm adds a small one), a cache by its specs.

    With data-parallel attention `head_axes` is empty, and there is no collective.
    """

    mesh: Mesh
    o: nnx.Param | DenseWeights
    head_axes: tuple[str, ...]
    cache_spec: P
    cache_shapes: tuple[tuple[int, ...], ...]  # of one position of one sequence
    fp8_cache_shapes: tuple[
        tuple[int, ...], ...
    ]  # the same, cut so that what lies in the last dimension may share a scale

    def init_cache(self, batch_size: int, length: int, dtype: jax.typing.DTypeLike) -> Cache:
        """Zeros for `batch_size` sequences of up to `length` positions, on their shards; float8_e4m3fn has scales beside them."""
        abstract = self.abstract_cache(batch_size, length, dtype)
        return jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype, device=array.sharding), abstract)

    def abstract_cache(self, batch_size: int, length: int, dtype: jax.typing.DTypeLike) -> tuple[Any, ...]:
        """The shapes, dtypes and shardings of `init_cache`."""
        shapes = self.fp8_cache_shapes if jnp.dtype(dtype) == FP8 else self.cache_shapes
        return tuple(
            kv_cache.abstract_cached((batch_size, length, *shape), dtype, self.mesh, self.cache_spec)
            for shape in shapes
        )

    def __call__(
        self, x: jax.Array, rope: RopeTable, positions: jax.Array, cache: Cache | None, is_start: bool = False
    ) -> tuple[jax.Array, Cache | None]:
        """`x [B, S, H]`, rope tables `[B, S, dim / 2]`, `positions [B, S]` -> `[B, S, H]` and the cache with x in it.

        `is_start`: x begins its sequences, so that the cache is written and not read.
        """
        cache_specs = kv_cache.specs(cache, self.cache_spec)
        split = not self.head_axes
        spec = tokens_spec(3, split)
        return run_on_shards(
            self,
            partial(type(self)._on_device, is_start=is_start),
            x,
            rope,
            positions,
            cache,
            mesh=self.mesh,
            in_specs=(spec, (spec, spec), tokens_spec(2, split), cache_specs),
            out_specs=(spec, cache_specs),
        )

    def _on_device(self, x, rope, positions, cache, *, is_start):
        raise NotImplementedError

    def _output(self, heads: jax.Array) -> jax.Array:
        """`heads [B, S, local heads, Dv]` through this device's columns of `o [H, local heads, Dv]`, summed."""
        o = self.o if isinstance(self.o, DenseWeights) else self.o[...].reshape(self.o.shape[0], -1)
        merged = linear(heads.reshape(*heads.shape[:2], -1), o, out_dtype=heads.dtype)
        return jax.lax.psum(merged, self.head_axes) if self.head_axes else merged


class GQA(Attention):
    """Grouped-query attention (Ainslie et al., 2023).

    Parameters: `q [heads, D, H]`, `k`, `v [kv_heads, D, H]`, `o [H, heads, D]`; with biases `q_bias [heads, D]`, `k_bias`,
    `v_bias [kv_heads, D]`; `o_bias [H]`; `sinks [heads]`; with QK norm `q_norm`, `k_norm`. With fewer KV heads than devices, k and v are on every device, each
    uses the head that its query heads need, and the cache holds one head a device.
    """

    def __init__(
        self,
        config: GQAConfig,
        rope: RopeConfig,
        hidden_size: int,
        eps: float,
        *,
        mesh: Mesh,
        dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
        data_parallel: bool = False,
    ):
        self.head_axes = () if data_parallel else TP_AXES
        head_axes = self.head_axes or None
        tp_size = axes_size(mesh, head_axes)
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        require(heads % tp_size == 0, "tp_size", tp_size, f"a divisor of the {heads} query heads")
        require(
            kv_heads % tp_size == 0 or tp_size % kv_heads == 0,
            "tp_size", tp_size, f"a divisor or a multiple of the {kv_heads} KV heads",
        )  # fmt: skip
        require(config.rope_dim % 2 == 0, "head_dim", dim, "even: rotary embedding turns pairs")
        self.config = config
        self.interleaved = rope.interleaved
        self.scale = dim**-0.5 * rope.softmax_scale_factor
        self.mesh = mesh
        self.devices_per_kv_head = max(1, tp_size // kv_heads)
        kv_axes = head_axes if self.devices_per_kv_head == 1 else None
        cached_heads = max(kv_heads, tp_size)
        self.cache_spec = P(ALL_AXES if data_parallel else DATA, None, head_axes, None)
        self.cache_shapes = self.fp8_cache_shapes = ((cached_heads, dim), (cached_heads, dim))
        new: dict[str, Any] = {"mesh": mesh, "dtype": dtype, "rngs": rngs}
        self.q = parameter((heads, dim, hidden_size), (head_axes, None, None), **new)
        self.k = parameter((kv_heads, dim, hidden_size), (kv_axes, None, None), **new)
        self.v = parameter((kv_heads, dim, hidden_size), (kv_axes, None, None), **new)
        self.o = parameter((hidden_size, heads, dim), (None, head_axes, None), **new)
        if config.qkv_bias:
            self.q_bias = parameter((heads, dim), (head_axes, None), **new)
            self.k_bias = parameter((kv_heads, dim), (kv_axes, None), **new)
            self.v_bias = parameter((kv_heads, dim), (kv_axes, None), **new)
        if config.o_bias:
            self.o_bias = parameter((hidden_size,), (None,), **new)
        if config.sinks:
            self.sinks = parameter((heads,), (head_axes,), **new)
        if config.qk_norm == "head":
            self.q_norm = RMSNorm(dim, eps, **new)
            self.k_norm = RMSNorm(dim, eps, **new)
        elif config.qk_norm == "full":
            self.q_norm = RMSNorm(heads * dim, eps, axes=head_axes, **new)
            self.k_norm = RMSNorm(kv_heads * dim, eps, axes=kv_axes, **new)

    def _on_device(self, x, rope, positions, cache, *, is_start):
        q = linear(x, self.q)  # [B, S, local heads, D] float32
        k = linear(x, self._own_heads(self.k))
        v = linear(x, self._own_heads(self.v))
        if self.config.qkv_bias:
            q += self.q_bias[...]
            k += self._own_heads(self.k_bias[...])
            v += self._own_heads(self.v_bias[...])
        cached, window = cache is not None and not is_start, self.config.sliding_window
        if cached and self._is_one_kernel(q, k, rope, cache, x.dtype):
            q, cache = self._rotate_into_cache(q, k, v, rope, positions, cache, x.dtype)
        else:
            q, k, v = self._rotated(q, k, v, rope, x.dtype)
            if cache is not None:
                cache = kv_cache.write(cache[0], k, positions), kv_cache.write(cache[1], v, positions)
        if cached:
            k, v = cache
        sinks = self.sinks[...] if self.config.sinks else None
        out = causal_attention(q, k, v, positions, self.scale, cached=cached, sliding_window=window, sinks=sinks)
        out = self._output(out)
        if self.config.o_bias:  # once, after the devices' parts are summed
            out += self.o_bias[...].astype(out.dtype)
        return out, cache

    def _rotated(self, q, k, v, rope, dtype):
        """Normalised, clipped, rotated where they should be, and rounded."""
        if self.config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        elif self.config.qk_norm == "full":
            q, k = self._norm_over_all_heads(q, k)
        if self.config.clip_qkv is not None:
            q, k, v = (jnp.clip(a, -self.config.clip_qkv, self.config.clip_qkv) for a in (q, k, v))
        return *(rotate(a, rope, self.interleaved).astype(dtype) for a in (q, k)), v.astype(dtype)

    def _is_one_kernel(self, q, k, rope, cache, dtype) -> bool:
        """Whether `_rotate_into_cache` does what `_rotated` and writing do."""
        return (
            on_hopper()
            and q.shape[1] == 1
            and self.config.qk_norm in (None, "head")
            and self.config.clip_qkv is None
            and not self.interleaved
            and rope_hopper.serves(q[:, 0], k[:, 0], rope, kv_cache.stored(cache[0])[0], dtype)
        )

    def _rotate_into_cache(self, q, k, v, rope, positions, cache, dtype):
        norms = (self.q_norm, self.k_norm) if self.config.qk_norm else ()
        values, scales = zip(*map(kv_cache.stored, cache), strict=True)
        in_float8 = isinstance(cache[0], Float8Vectors)
        q, new = rope_hopper.rotate_into_cache(
            *(a[:, 0] for a in (q, k, v)),
            tuple(a[:, 0] for a in rope),
            positions[:, 0],
            (*values, *scales) if in_float8 else values,
            tuple(norm.scale[...] for norm in norms) or None,
            eps=norms[0].eps if norms else 0.0,
            dtype=dtype,
        )
        return q[:, None], tuple(map(Float8Vectors, new[:2], new[2:])) if in_float8 else new

    def _own_heads[KV: (jax.Array, nnx.Param, DenseWeights)](self, kv: KV) -> KV | jax.Array:
        """This device's KV heads `[local kv heads, ...]`: its shard as it is, or of all heads the one that its query heads read."""
        if self.devices_per_kv_head == 1:
            return kv
        head = jax.lax.axis_index(self.head_axes) // self.devices_per_kv_head
        return jax.lax.dynamic_slice_in_dim(kv[...], head, 1)

    def _norm_over_all_heads(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """OLMoE's QK norm: the mean square runs over every device's heads, so it takes one small all-reduce."""
        squares = jnp.stack([jnp.sum(jnp.square(a), axis=(-2, -1), keepdims=True) for a in (q, k)])
        q_square, k_square = jax.lax.psum(squares, self.head_axes) if self.head_axes else squares
        heads, kv_heads, dim = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        q_scale = self.q_norm.scale[...].reshape(-1, dim)
        k_scale = self._own_heads(self.k_norm.scale[...].reshape(-1, dim))
        return (
            self.q_norm.scaled(q, q_square / (heads * dim), q_scale),
            self.k_norm.scaled(k, k_square / (kv_heads * dim * self.devices_per_kv_head), k_scale),
        )


class MLA(Attention):
    """Multi-head latent attention (DeepSeek-V2, section 2.1).

    Parameters (`nope`, `rope`: the parts of a query or key head without and with position; `v`: a value head):
    `q [heads, nope + rope, H]`, or `q_a [q_lora, H]`, `q_a_norm` and `q_b [heads, nope + rope, q_lora]`;
    `kv_a [kv_lora + rope, H]`, `kv_a_norm`, `kv_b [heads, nope + v, kv_lora]`; `o [H, heads, v]`.

    The cache holds, for each position, the normalised latent and the rotated key that all heads share, on every device:
    `kv_lora + rope` numbers in one array; in float8 they are two, each with scales. One-token calls run in the absorbed form: `kv_b`'s key half is applied to the query and its
    value half to the result, so that all heads attend to the latent itself, as one shared key head.
    """

    def __init__(
        self,
        config: MLAConfig,
        rope: RopeConfig,
        hidden_size: int,
        *,
        mesh: Mesh,
        dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
        data_parallel: bool = False,
    ):
        self.head_axes = () if data_parallel else TP_AXES
        head_axes = self.head_axes or None
        tp_size = axes_size(mesh, head_axes)
        heads = config.num_heads
        require(heads % tp_size == 0, "tp_size", tp_size, f"a divisor of the {heads} query heads")
        rope_dim = config.qk_rope_head_dim
        require(rope_dim % 2 == 0, "qk_rope_head_dim", rope_dim, "even: rotary embedding turns pairs")
        self.config = config
        self.interleaved = rope.interleaved
        qk_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.scale = qk_dim**-0.5 * rope.softmax_scale_factor
        self.mesh = mesh
        latent_size = config.kv_lora_rank + config.qk_rope_head_dim
        self.cache_spec = P(ALL_AXES if data_parallel else DATA, None, None)
        self.cache_shapes = ((latent_size,),)
        self.fp8_cache_shapes = ((config.kv_lora_rank,), (rope_dim,))
        new: dict[str, Any] = {"mesh": mesh, "dtype": dtype, "rngs": rngs}
        per_head = (head_axes, None, None)
        if config.q_lora_rank is None:
            self.q = parameter((heads, qk_dim, hidden_size), per_head, **new)
        else:
            self.q_a = parameter((config.q_lora_rank, hidden_size), (None, None), **new)
            self.q_a_norm = RMSNorm(config.q_lora_rank, config.latent_norm_eps, **new)
            self.q_b = parameter((heads, qk_dim, config.q_lora_rank), per_head, **new)
        self.kv_a = parameter((latent_size, hidden_size), (None, None), **new)
        self.kv_a_norm = RMSNorm(config.kv_lora_rank, config.latent_norm_eps, **new)
        kv_dim = config.qk_nope_head_dim + config.v_head_dim
        self.kv_b = parameter((heads, kv_dim, config.kv_lora_rank), per_head, **new)
        self.o = parameter((hidden_size, heads, config.v_head_dim), (None, head_axes, None), **new)

    def _on_device(self, x, rope, positions, cache, *, is_start):
        nope, rank = self.config.qk_nope_head_dim, self.config.kv_lora_rank
        q = self._queries(x)  # [B, S, local heads, nope + rope]
        q_rope = rotate(q[..., nope:], rope, self.interleaved)
        q_nope = q[..., :nope]
        kv = linear(x, self.kv_a)  # [B, S, kv_lora + rope] float32
        k_rope = rotate(kv[..., None, rank:], rope, self.interleaved)[:, :, 0]
        latent = jnp.concatenate([self.kv_a_norm(kv[..., :rank]), k_rope], axis=-1).astype(x.dtype)
        cached = cache is not None and not is_start
        if cache is not None:
            parts = (latent,) if len(cache) == 1 else (latent[..., :rank], latent[..., rank:])
            cache = tuple(kv_cache.write(*array, positions) for array in zip(cache, parts, strict=True))
        form = self._absorbed if x.shape[1] == 1 else self._expanded
        out = form(q_nope, q_rope, cache if cached else (latent,), positions, cached, x.dtype)
        return self._output(out), cache

    def _queries(self, x: jax.Array) -> jax.Array:
        if self.config.q_lora_rank is None:
            return linear(x, self.q, out_dtype=x.dtype)
        return linear(self.q_a_norm(linear(x, self.q_a)).astype(x.dtype), self.q_b, out_dtype=x.dtype)

    def _expanded(self, q_nope, q_rope, latents, positions, cached, dtype):
        """Keys and values of every head, from the latents `[B, L, kv_lora + rope]`: cheaper where many queries share them."""
        nope, rank = self.config.qk_nope_head_dim, self.config.kv_lora_rank
        latent = kv_cache.read_latents(latents, dtype)
        kv = linear(latent[..., :rank], self.kv_b, out_dtype=latent.dtype)  # [B, L, local heads, nope + v]
        k_rope = jnp.broadcast_to(latent[..., None, rank:], (*kv.shape[:3], latent.shape[-1] - rank))
        k = jnp.concatenate([kv[..., :nope], k_rope], axis=-1)
        q = jnp.concatenate([q_nope, q_rope], axis=-1).astype(latent.dtype)
        return causal_attention(q, k, kv[..., nope:], positions, self.scale, cached=cached)

    def _absorbed(self, q_nope, q_rope, latents, positions, cached, dtype):
        """The same product, regrouped: `q . (W_k c) = (W_k^T q) . c` and `sum p (W_v c) = W_v (sum p c)`."""
        nope = self.config.qk_nope_head_dim
        w_k, w_v = self.kv_b[...][:, :nope], self.kv_b[...][:, nope:]  # [local heads, nope or v, kv_lora]
        q_latent = _per_head("bsnd,ndr->bsnr", q_nope.astype(dtype), w_k)
        q = jnp.concatenate([q_latent, q_rope], axis=-1).astype(dtype)
        out = self._over_latents(q, latents, positions, cached)
        return _per_head("bsnr,ndr->bsnd", out, w_v).astype(dtype)

    def _over_latents(self, q, latents, positions, cached):
        """All heads' `q [B, 1, local heads, kv_lora + rope]` over the latents, as one shared key head -> `[B, 1, local heads, kv_lora]`."""
        rank, by_kernel = self.config.kv_lora_rank, cached and on_hopper()
        if by_kernel and isinstance(latents[0], Float8Vectors):
            values, rotated = latents
            if mla_hopper.serves_float8(q[:, 0], values.data, rotated.data):
                lengths, scales = _lengths(positions, values.data), (values.scales, rotated.scales)
                arrays = q[:, 0], values.data, rotated.data, scales, lengths
                return mla_hopper.decode_float8(*arrays, scale=self.scale)[:, None]
        latent = kv_cache.read_latents(latents, q.dtype)
        if by_kernel and mla_hopper.serves(q[:, 0], latent, rank):
            return mla_hopper.decode(q[:, 0], latent, _lengths(positions, latent), rank=rank, scale=self.scale)[:, None]
        key_positions = _key_positions(*latent.shape[:2]) if cached else positions
        shared = latent[:, :, None]
        return attend(q, shared, shared[..., :rank], positions, key_positions, self.scale)


def _lengths(positions: jax.Array, cached: jax.Array) -> jax.Array:
    """Of sequences whose last token is at `positions [B, 1]` of `cached [B, L, ...]`: `[B]`."""
    return jnp.minimum(positions[:, 0] + 1, cached.shape[1])


def _per_head(subscripts: str, x: jax.Array, w: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, x, w, precision=precision, preferred_element_type=jnp.float32)
