"""What a decode step does between its QKV product and attention, in one kernel on Hopper: QK norm, rotary embedding, the cache's new position."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.kernels.quantize_hopper import scales_of
from jax_epmoe.kernels.warp_rows import HEIGHT, LANES, ROWS, spread
from jax_epmoe.quant import FP8

_MAX_HALF = 256

Table = tuple[jax.Array, jax.Array]


def serves(q: jax.Array, k: jax.Array, table: Table, cache: jax.Array, dtype: jax.typing.DTypeLike) -> bool:
    """Whether `rotate_into_cache` can take them, of caches the keys' values: head counts are multiples of 4, all of a head, up to 512, is rotated."""
    half = q.shape[-1] // 2
    return (
        q.dtype == k.dtype == jnp.float32
        and dtype in (jnp.bfloat16, jnp.float16)
        and cache.dtype in (dtype, jnp.uint8)
        and q.shape[1] % HEIGHT == k.shape[1] % HEIGHT == 0
        and half % LANES == 0
        and half <= _MAX_HALF
        and table[0].shape[-1] == half
        and q.size > 0
        and cache.size > 0
    )


# Under jit of its own, so that a model's layers share one trace and one compilation.
@functools.partial(jax.jit, static_argnames=("eps", "dtype"))
def rotate_into_cache(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: Table,
    positions: jax.Array,
    caches: tuple[jax.Array, ...],
    norms: tuple[jax.Array, jax.Array] | None,
    *,
    eps: float,
    dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """One token of each sequence: queries and keys normalised (if at all) and rotated, keys and values put into the cache.

    Args:
      q: `[B, heads, D]` float32, with k, `table` and a cache that it `serves`.
      k, v: `[B, kv_heads, D]` float32.
      table: cos and sin, `[B, D / 2]` float32; the first half of a head is rotated against its second.
      positions: `[B]` int32, from 0 on; what is past L is dropped.
      caches: keys and values, `[B, L, kv_heads, D]` each in 16 bits; or in float8_e4m3fn, as bytes (uint8), and then
        the scales of both, `[B, L, kv_heads]` float32.
      norms: scales of the norms of each query and key head, `[D]` each; None: there are none.
      eps: of these norms.
      dtype: of the queries, 16 bits; what becomes float8 is rounded to it before.

    Returns:
      The queries, and the caches with the new position.
    """
    batch, heads, dim = q.shape
    length, half = caches[0].shape[1], dim // 2
    q_groups, kv_groups = heads // HEIGHT, k.shape[1] // HEIGHT
    halves = pl.ds(0, half), pl.ds(half, half)

    def kernel(x_gmem, cos_gmem, sin_gmem, positions_gmem, *refs):
        norms_gmem, caches_gmem, q_gmem = refs[: len(norms or ())], refs[-1 - len(caches) : -1], refs[-1]
        sequence, group = lax.axis_index("sequence"), lax.axis_index("group")
        position = positions_gmem[sequence]

        def load(ref, layout):
            return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

        def columns(ref):
            return spread(load(ref, ROWS.reduce(0)), (HEIGHT, half), 1)

        x = [load(x_gmem.at[sequence, pl.ds(group * HEIGHT, HEIGHT), part], ROWS) for part in halves]

        def rotated(norm_gmem):
            first, second = x
            if norm_gmem is not None:
                squares = jnp.sum(first * first, axis=1) + jnp.sum(second * second, axis=1)
                norm = spread(lax.rsqrt(squares / dim + eps), first.shape, 0)
                first, second = (
                    value * norm * columns(norm_gmem.at[part]) for value, part in zip(x, halves, strict=True)
                )
            cos, sin = columns(cos_gmem.at[sequence]), columns(sin_gmem.at[sequence])
            return first * cos - second * sin, second * cos + first * sin

        def store(ref, group, values):
            for part, value in zip(halves, values, strict=True):
                ref[pl.ds(group * HEIGHT, HEIGHT), part] = value.astype(ref.dtype)

        def cache(values_gmem, scales_gmem, group, values):
            if scales_gmem is not None:
                values = [value.astype(dtype).astype(jnp.float32) for value in values]
                first, second = (jnp.max(jnp.abs(value), axis=1) for value in values)
                scales = scales_of(jnp.maximum(first, second))
                values = [value * spread(1 / scales, value.shape, 0) for value in values]
                scales_gmem[sequence, position, pl.ds(group * HEIGHT, HEIGHT)] = scales
            store(values_gmem.at[sequence, position], group, values)

        q_norm, k_norm = norms_gmem or (None, None)
        k_gmem, v_gmem, k_scales_gmem, v_scales_gmem = (*caches_gmem, None, None)[:4]
        k_group, v_group = group - q_groups, group - q_groups - kv_groups

        @pl.when(group < q_groups)
        def _query():
            store(q_gmem.at[sequence], group, rotated(q_norm))

        @pl.when((k_group >= 0) & (v_group < 0) & (position < length))
        def _key():
            cache(k_gmem, k_scales_gmem, k_group, rotated(k_norm))

        @pl.when((v_group >= 0) & (position < length))
        def _value():
            cache(v_gmem, v_scales_gmem, v_group, x)

    stored = [FP8 if cache.dtype == jnp.uint8 else cache.dtype for cache in caches]
    refs = [jax.new_ref(lax.bitcast_convert_type(*pair)) for pair in zip(caches, stored, strict=True)]
    q = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, dtype),
        grid=(batch, q_groups + 2 * kv_groups),
        grid_names=("sequence", "group"),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),  # there is no shared memory
    )(
        jnp.concatenate([q, k, v], axis=1),  # as one product made them
        *table,
        positions,
        *(norms or ()),
        *refs,
    )
    written = zip(map(jax.freeze, refs), caches, strict=True)
    return q, tuple(lax.bitcast_convert_type(new, cache.dtype) for new, cache in written)
