"""One query a sequence over attention's cache, on Hopper: a few query heads attend to the key head that they share.

    scores[h, l] = scale * q[h] . k[l]
    out[h]       = softmax(scores[h]) @ v

What counts is reading keys and values once. Positions ride wgmma's m and heads its n, so that a few heads leave no product idle.
A sequence's positions are dealt over several CTAs where there is less to do than CTAs can run; their parts are merged
by the largest score that each saw.

A cache in float8 is read as it is and becomes float16 here: keys in registers, values, which wgmma takes transposed, in shared
memory. A key's scale multiplies its score; a value's is added to the score as a power of two, so that what multiplies the values
is at most 1, and is taken out of the sum of exponentials again.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.kernels.decode_splits import POSITIONS, STAGES, merged, num_splits, operand, own_tiles
from jax_epmoe.kernels.device import num_sms
from jax_epmoe.kernels.warp_rows import ROWS
from jax_epmoe.quant import FP8

_MAX_HEADS = 16  # of a CTA: as many sums, twice, as a warpgroup's registers hold
_AT_ONCE = 128  # columns of a float8 tile that become float16
_SHARED_BYTES = 2**16  # of stages that leave room for two CTAs: one computes while the other waits


def serves(q: jax.Array, k: jax.Array, v: jax.Array) -> bool:
    """Whether `decode` should compute it: 8 or 16 query heads a key head, heads of 64 or 128, all in 16 bits, or k and v in float8.

    L is a multiple of 8, in float8 of 64: scales are read 64 at a time.
    """
    group, rest = divmod(q.shape[1], k.shape[2])
    return (
        k.dtype == v.dtype
        and k.dtype in (q.dtype, jnp.uint8)
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and rest == 0
        and group in (8, 16)
        and q.shape[-1] in (64, 128)
        and k.shape == v.shape
        and k.shape[1] % (POSITIONS if k.dtype == jnp.uint8 else 8) == 0
        and q.size > 0
        and k.size > 0
    )


# Under jit of its own, so that a model's layers share one trace and one compilation.
@functools.partial(jax.jit, static_argnames=("rank", "scale", "sliding_window"))
def decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    lengths: jax.Array,
    sinks: jax.Array | None = None,
    scales: tuple[jax.Array, jax.Array] | None = None,
    rotated: jax.Array | None = None,
    *,
    scale: float,
    rank: int = 0,
    sliding_window: int | None = None,
) -> jax.Array:
    """Softmax attention in float32 of one query a sequence.

    Args:
      q: `[B, heads, D]`, bfloat16 or float16; head n reads key head `n // (heads / kv_heads)`, and 8 divides their quotient.
      k: `[B, L, kv_heads, D]` in q's dtype, L a multiple of 8 and D of 64; or, with `scales`, float8_e4m3fn as bytes (uint8), L a multiple of 64.
      v: `[B, L, kv_heads, Dv]`, Dv a multiple of 64; None: the first `rank` numbers of the keys.
      lengths: `[B]` int32: how many positions of each sequence there are, from 1 to L. Others must be finite.
      sinks: `[heads]`: a score more in each head's softmax, of a key whose value is zero; None: there are none.
      scales: of keys and values in float8, `[B, L, kv_heads]` float32 each, positive where there are positions; without v, of k
        and `rotated`.
      rotated: in float8 without v, as bytes too: the keys' numbers after the first `rank`, `[B, L, kv_heads, 64]`; k is then `rank` wide.
      scale: multiplies the scores.
      rank: how many, without v.
      sliding_window: how many last positions a query sees; None: all. What is before them is not read.

    Returns:
      `[B, heads, Dv]` in q's dtype.
    """
    (batch, heads, size), (_, length, kv_heads, _) = q.shape, k.shape
    columns = v.shape[-1] if v is not None else rank
    of_key_head = heads // kv_heads
    group = next(n for n in range(min(of_key_head, _MAX_HEADS), 0, -8) if of_key_head % n == 0)
    out_dtype, half = q.dtype, q.dtype if scales is None else jnp.float16  # `half`: of what is multiplied
    caches = [cache for cache in (k, v, rotated) if cache is not None]
    stages_bytes = STAGES * POSITIONS * sum(cache.shape[-1] for cache in caches) * k.dtype.itemsize
    ctas = num_sms() * (2 if stages_bytes <= _SHARED_BYTES else 1)
    seen = length if sliding_window is None else min(length, sliding_window + POSITIONS - 1)
    splits = num_splits(batch * (heads // group), seen, ctas)
    i32, f32 = jnp.int32, jnp.float32
    by_column, by_row = (plgpu.Layout.WGMMA.reduce(axis) for axis in (0, 1))
    unit = scale * math.log2(math.e)
    sinks = None if sinks is None else sinks.astype(f32) * math.log2(math.e)
    if scales is not None:
        caches = [lax.bitcast_convert_type(cache, FP8) for cache in caches]
    own_sinks = [sinks] if sinks is not None and splits == 1 else []

    def kernel(*refs):
        left = iter(refs)

        def take(number):
            return list(itertools.islice(left, number))

        (q_gmem,), caches_gmem, (lengths_gmem,) = map(take, (1, len(caches), 1))
        scales_gmem, sinks_gmem = map(take, (len(scales or ()), len(own_sinks)))
        (out_gmem,), of_split = map(take, (1, len(parts) - 1))
        (q_full, full, q_smem, p_smem), tiles = map(take, (4, len(caches)))
        half_smem, out_smem = map(take, (int(scales is not None), int(splits == 1)))
        split, sequence, index = lax.axis_index("split"), lax.axis_index("sequence"), lax.axis_index("group")
        own_heads, key_head = pl.ds(index * group, group), lax.div(index, i32(of_key_head // group))
        length = lengths_gmem[sequence]
        start = 0 if sliding_window is None else lax.max(length - sliding_window, i32(0))
        first, steps = own_tiles(length, split, splits, start)

        def load(step):
            stage = lax.rem(step, i32(STAGES))
            positions = pl.ds((first + step) * POSITIONS, POSITIONS)
            for source, target in zip(caches_gmem, tiles, strict=True):
                plgpu.copy_gmem_to_smem(source.at[sequence, positions, key_head], target.at[stage], full.at[stage])

        for step in range(STAGES):
            pl.when(step < steps)(functools.partial(load, i32(step)))
        if half_smem:
            own_q = plgpu.load(q_gmem.at[sequence, own_heads], layout=ROWS, optimized=False)
            q_smem[...] = own_q.astype(f32).astype(half)
            plgpu.commit_smem()
        else:
            plgpu.copy_gmem_to_smem(q_gmem.at[sequence, own_heads], q_smem, q_full)
            plgpu.barrier_wait(q_full)

        def scales_of(step):
            tile = lax.clamp(i32(0), first + step, i32(k.shape[1] // POSITIONS - 1))
            positions = pl.ds(tile * POSITIONS, POSITIONS)
            return tuple(
                plgpu.load(ref.at[sequence, positions, key_head], layout=by_row, optimized=False) for ref in scales_gmem
            )

        def widened(tile):
            """A float8 tile in float16, in registers as wgmma takes them."""
            values = plgpu.load(tile, layout=plgpu.Layout.WGMMA_UPCAST_2X).astype(half)
            return plgpu.layout_cast(values, plgpu.Layout.WGMMA)

        def widen(tile):
            """All of a float8 tile in float16, in shared memory, as many columns at a time as registers hold."""
            for first_column in range(0, columns, _AT_ONCE):
                here = pl.ds(first_column, min(_AT_ONCE, columns - first_column))
                half_smem[0][:, here] = widened(tile.at[:, here])
            plgpu.commit_smem()
            return half_smem[0]

        def spread(values, shape, axis=1):
            return lax.broadcast_in_dim(values, shape, (axis,))

        def product(rows, a, b):
            def multiply(accumulator):
                plgpu.wgmma(accumulator, a, b)
                return accumulator[...]

            return pl.run_scoped(multiply, plgpu.ACC((rows, group), f32))

        def tile_body(step, carry):
            out, largest, sums, own_scales = carry
            next_scales = scales_of(step + 1)
            stage = lax.rem(step, i32(STAGES))
            plgpu.barrier_wait(full.at[stage])
            keys = tiles[0].at[stage]
            values = (tiles[0] if rotated is not None else tiles[-1]).at[stage, :, pl.ds(0, columns)]
            if not own_scales:
                scores = product(POSITIONS, keys, q_smem.T) * unit
            elif rotated is None:
                k_scales, v_scales = own_scales
                scores = product(POSITIONS, widened(keys), q_smem.T) * unit
                scores *= spread(k_scales, scores.shape, 0)
            else:
                v_scales, rotated_scales = own_scales
                values, q_parts = widen(keys), [q_smem.at[:, pl.ds(*part)] for part in ((0, rank), (rank, size - rank))]
                scores = product(POSITIONS, values, q_parts[0].T) * spread(v_scales * unit, (POSITIONS, group), 0)
                rest = product(POSITIONS, widened(tiles[1].at[stage]), q_parts[1].T)
                scores += rest * spread(rotated_scales * unit, (POSITIONS, group), 0)
            if own_scales:
                v_scales = jnp.maximum(v_scales, jnp.finfo(f32).tiny)  # where nothing was written they are 0
                scores += spread(jnp.log2(v_scales), scores.shape, 0)
            before = (first + step) * POSITIONS
            position = plgpu.broadcasted_iota(i32, scores.shape, 0, layout=plgpu.Layout.WGMMA)
            scores = jnp.where(position < length - before, scores, -jnp.inf)
            if sliding_window is not None:
                scores = jnp.where(position >= start - before, scores, -jnp.inf)
            higher = jnp.maximum(largest, jnp.max(scores, axis=0))
            shrink = jnp.exp2(largest - higher)
            p = jnp.exp2(scores - spread(higher, scores.shape))
            p_smem.T[...] = p.astype(half)
            if own_scales:
                p *= spread(1 / v_scales, p.shape, 0)
            if own_scales and rotated is None:
                values = widen(values)
            else:
                plgpu.commit_smem()
            out = out * spread(shrink, out.shape) + product(columns, values.T, p_smem.T)
            pl.when(step + STAGES < steps)(lambda: load(step + STAGES))
            return out, higher, sums * spread(shrink, sums.shape) + p, next_scales

        def zeros(*shape):
            return plgpu.layout_cast(jnp.zeros(shape, f32), plgpu.Layout.WGMMA)

        # The first tile of a split holds a position that is seen, so that no score is compared with -inf alone.
        none = plgpu.layout_cast(jnp.full((group,), -1e30, f32), by_column)
        start_with = zeros(columns, group), none, zeros(POSITIONS, group), scales_of(0)
        out, largest, sums, _ = lax.fori_loop(0, steps, tile_body, start_with)
        total = jnp.sum(sums, axis=0)
        for ref in sinks_gmem:
            total += jnp.exp2(plgpu.load(ref.at[own_heads], layout=by_column, optimized=False) - largest)
        if splits == 1:
            out_smem[0].T[...] = (out * spread(1 / total, out.shape)).astype(out_dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem[0], out_gmem.at[sequence, own_heads])
            plgpu.wait_smem_to_gmem(0)
        else:
            out_gmem[split, sequence, :, own_heads] = out
            for ref, values in zip(of_split, (largest, total), strict=True):
                ref[split, sequence, own_heads] = values

    each = (splits, batch, heads)
    parts = [(splits, batch, columns, heads), each, each] if splits > 1 else [(batch, heads, columns)]

    def memory(shape, dtype=half):
        return plgpu.SMEM(shape, dtype, transforms=operand(shape[-1], dtype))

    found = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(shape, f32 if splits > 1 else out_dtype) for shape in parts],
        scratch_types=[
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=len(caches), num_barriers=STAGES),
            memory((group, size)),
            memory((group, POSITIONS)),
            *(memory((STAGES, POSITIONS, cache.shape[-1]), cache.dtype) for cache in caches),
            *([memory((POSITIONS, columns))] if scales is not None else []),
            *([memory((group, columns), out_dtype)] if splits == 1 else []),
        ],
        grid=(splits, batch, heads // group),
        grid_names=("split", "sequence", "group"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, *caches, lengths, *(scales or ()), *own_sinks)
    if splits == 1:
        return found[0]
    out, largest, total = found
    return merged(out.mT, largest, total, sinks).astype(out_dtype)
