"""What a decode step does between its QKV product and attention, in one kernel on Hopper: QK norm, rotary embedding, the cache's new position."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.kernels.warp_rows import HEIGHT, LANES, ROWS, spread

_MAX_HALF = 256

Table = tuple[jax.Array, jax.Array]


def serves(q: jax.Array, k: jax.Array, table: Table, cache: jax.Array) -> bool:
    """Whether `rotate_into_cache` can take them: head counts that are multiples of 4, and all of a head, up to 512, is rotated."""
    half = q.shape[-1] // 2
    return (
        q.dtype == k.dtype == jnp.float32
        and cache.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[1] % HEIGHT == k.shape[1] % HEIGHT == 0
        and half % LANES == 0
        and half <= _MAX_HALF
        and table[0].shape[-1] == half
        and q.size > 0
        and cache.size > 0
    )


# Under jit of its own, so that a model's layers share one trace and one compilation.
@functools.partial(jax.jit, static_argnames="eps")
def rotate_into_cache(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: Table,
    positions: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    scales: tuple[jax.Array, jax.Array] | None,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One token of each sequence: queries and keys normalised (if at all) and rotated, keys and values put into the cache.

    Args:
      q: `[B, heads, D]` float32, with k, `table` and a cache that it `serves`.
      k, v: `[B, kv_heads, D]` float32.
      table: cos and sin, `[B, D / 2]` float32; the first half of a head is rotated against its second.
      positions: `[B]` int32, from 0 on; what is past L is dropped.
      k_cache, v_cache: `[B, L, kv_heads, D]`.
      scales: of the norms of each query and key head, `[D]` each; None: there are none.
      eps: of these norms.

    Returns:
      The queries, in the cache's dtype, and both caches.
    """
    batch, heads, dim = q.shape
    length, half = k_cache.shape[1], dim // 2
    q_groups, kv_groups = heads // HEIGHT, k.shape[1] // HEIGHT
    halves = pl.ds(0, half), pl.ds(half, half)

    def kernel(x_gmem, cos_gmem, sin_gmem, positions_gmem, *refs):
        *scales_gmem, k_cache_gmem, v_cache_gmem, q_gmem = refs
        sequence, group = lax.axis_index("sequence"), lax.axis_index("group")
        position = positions_gmem[sequence]

        def load(ref, layout):
            return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

        def columns(ref):
            return spread(load(ref, ROWS.reduce(0)), (HEIGHT, half), 1)

        x = [load(x_gmem.at[sequence, pl.ds(group * HEIGHT, HEIGHT), part], ROWS) for part in halves]

        def rotated(scale_gmem):
            first, second = x
            if scale_gmem is not None:
                squares = jnp.sum(first * first, axis=1) + jnp.sum(second * second, axis=1)
                norm = spread(lax.rsqrt(squares / dim + eps), first.shape, 0)
                first, second = (
                    value * norm * columns(scale_gmem.at[part]) for value, part in zip(x, halves, strict=True)
                )
            cos, sin = columns(cos_gmem.at[sequence]), columns(sin_gmem.at[sequence])
            return first * cos - second * sin, second * cos + first * sin

        def store(ref, group, values):
            for part, value in zip(halves, values, strict=True):
                ref[pl.ds(group * HEIGHT, HEIGHT), part] = value.astype(ref.dtype)

        q_scale, k_scale = scales_gmem or (None, None)
        k_group, v_group = group - q_groups, group - q_groups - kv_groups

        @pl.when(group < q_groups)
        def _query():
            store(q_gmem.at[sequence], group, rotated(q_scale))

        @pl.when((k_group >= 0) & (v_group < 0) & (position < length))
        def _key():
            store(k_cache_gmem.at[sequence, position], k_group, rotated(k_scale))

        @pl.when((v_group >= 0) & (position < length))
        def _value():
            store(v_cache_gmem.at[sequence, position], v_group, x)

    caches = jax.new_ref(k_cache), jax.new_ref(v_cache)
    q = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, k_cache.dtype),
        grid=(batch, q_groups + 2 * kv_groups),
        grid_names=("sequence", "group"),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),  # there is no shared memory
    )(
        jnp.concatenate([q, k, v], axis=1),  # as one product made them
        *table,
        positions,
        *(scales or ()),
        *caches,
    )
    return q, jax.freeze(caches[0]), jax.freeze(caches[1])
