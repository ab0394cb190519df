"""One query a sequence over multi-head latent attention's cache, on Hopper: all heads attend to the same latents.

    scores[h, l] = scale * q[h] . latent[l]        over the whole latent, its rotated part included
    out[h]       = softmax(scores[h]) @ latent[:, :rank]

What counts is reading the latents once. Positions ride wgmma's m and heads its n, so that few heads leave no product idle, and
a tile of latents serves both products from shared memory. A sequence's positions are dealt over several CTAs where there
are fewer sequences than streaming multiprocessors; their parts are merged by the largest score that each saw. Many heads have a
kernel of their own, `mla_hopper_many_heads`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.kernels import mla_hopper_many_heads
from jax_epmoe.kernels.device import num_sms
from jax_epmoe.kernels.mla_splits import OPERAND, POSITIONS, STAGES, merged, num_splits, own_tiles

_MOST_SPLITS = 4  # of many heads' kernel, whose parts are four times as large
_MAX_HEADS = 16  # of a CTA: as many sums, twice, as a warpgroup's registers hold


def serves(q: jax.Array, latent: jax.Array, rank: int) -> bool:
    """Whether `decode` can compute it: bfloat16 or float16, L a multiple of 8, sizes multiples of 64 that fit the SM."""
    return (
        q.dtype == latent.dtype
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and latent.shape[1] % 8 == 0
        and latent.shape[-1] % 64 == 0
        and rank % 64 == 0
        and rank <= 512
        and latent.shape[-1] <= 640
        and q.size > 0
        and latent.size > 0
    )


def decode(q: jax.Array, latent: jax.Array, lengths: jax.Array, *, rank: int, scale: float) -> jax.Array:
    """Softmax attention in float32 of one query a sequence.

    Args:
      q: `[B, heads, D]`, bfloat16 or float16.
      latent: `[B, L, D]` in q's dtype, the cache.
      lengths: `[B]` int32: how many positions of each sequence there are, from 1 to L. Others must be finite.
      rank: how many of the D numbers are values.
      scale: multiplies the scores.

    Returns:
      `[B, heads, rank]` in q's dtype.
    """
    batch, own_heads, _ = q.shape
    if mla_hopper_many_heads.serves(q, rank):
        splits = num_splits(batch * (own_heads // mla_hopper_many_heads.HEADS), latent.shape[1], num_sms())
        if splits <= _MOST_SPLITS:
            parts = mla_hopper_many_heads.run(q, latent, lengths, rank=rank, scale=scale, splits=splits)
            return parts[0] if splits == 1 else merged(*parts).astype(q.dtype)
    q = jnp.pad(q, ((0, 0), (0, -own_heads % 8), (0, 0)))
    heads = q.shape[1]
    group = next(size for size in range(min(heads, _MAX_HEADS), 0, -8) if heads % size == 0)
    splits = num_splits(batch * (heads // group), latent.shape[1], num_sms())
    out, largest, total = _run(q, latent, lengths, rank=rank, scale=scale, group=group, splits=splits)
    return merged(out.mT, largest, total)[:, :own_heads].astype(q.dtype)


# Under jit of its own, so that a model's layers share one trace and one compilation.
@functools.partial(jax.jit, static_argnames=("rank", "scale", "group", "splits"))
def _run(
    q: jax.Array, latent: jax.Array, lengths: jax.Array, *, rank: int, scale: float, group: int, splits: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each split's `out [splits, B, rank, heads]`, the largest score of each head in powers of two, and the sum of `exp2`."""
    batch, heads, size = q.shape
    i32, f32 = jnp.int32, jnp.float32
    by_column = plgpu.Layout.WGMMA.reduce(0)
    unit = scale * math.log2(math.e)

    def kernel(
        q_gmem, latent_gmem, lengths_gmem, out_gmem, largest_gmem, total_gmem, q_smem, tiles, p_smem, q_full, full
    ):
        split, sequence = lax.axis_index("split"), lax.axis_index("sequence")
        own_heads = pl.ds(lax.axis_index("group") * group, group)
        length = lengths_gmem[sequence]
        first, steps = own_tiles(length, split, splits)

        def load(step):
            stage = lax.rem(step, i32(STAGES))
            positions = pl.ds((first + step) * POSITIONS, POSITIONS)
            plgpu.copy_gmem_to_smem(latent_gmem.at[sequence, positions], tiles.at[stage], full.at[stage])

        for step in range(STAGES):
            pl.when(step < steps)(functools.partial(load, i32(step)))
        plgpu.copy_gmem_to_smem(q_gmem.at[sequence, own_heads], q_smem, q_full)
        plgpu.barrier_wait(q_full)

        def spread(values, shape):
            return lax.broadcast_in_dim(values, shape, (1,))

        def tile_body(step, carry):
            out, largest, sums = carry
            stage = lax.rem(step, i32(STAGES))
            plgpu.barrier_wait(full.at[stage])

            def multiply_scores(accumulator):
                plgpu.wgmma(accumulator, tiles.at[stage], q_smem.T)
                return accumulator[...]

            scores = pl.run_scoped(multiply_scores, plgpu.ACC((POSITIONS, group), f32)) * unit
            position = plgpu.broadcasted_iota(i32, scores.shape, 0, layout=plgpu.Layout.WGMMA)
            scores = jnp.where(position < length - (first + step) * POSITIONS, scores, -jnp.inf)
            higher = jnp.maximum(largest, jnp.max(scores, axis=0))
            shrink = jnp.exp2(largest - higher)
            p = jnp.exp2(scores - spread(higher, scores.shape))
            p_smem.T[...] = p.astype(q.dtype)
            plgpu.commit_smem()

            def multiply_values(accumulator):
                plgpu.wgmma(accumulator, tiles.at[stage, :, pl.ds(0, rank)].T, p_smem.T)
                return accumulator[...]

            values = pl.run_scoped(multiply_values, plgpu.ACC((rank, group), f32))
            out = out * spread(shrink, out.shape) + values
            pl.when(step + STAGES < steps)(lambda: load(step + STAGES))
            return out, higher, sums * spread(shrink, sums.shape) + p

        def zeros(*shape):
            return plgpu.layout_cast(jnp.zeros(shape, f32), plgpu.Layout.WGMMA)

        # The first tile of a split holds a position of the sequence, so that no score is compared with -inf alone.
        none = plgpu.layout_cast(jnp.full((group,), -1e30, f32), by_column)
        out, largest, sums = lax.fori_loop(0, steps, tile_body, (zeros(rank, group), none, zeros(POSITIONS, group)))
        largest_gmem[split, sequence, own_heads] = largest
        total_gmem[split, sequence, own_heads] = jnp.sum(sums, axis=0)
        out_gmem[split, sequence, :, own_heads] = out

    each = (splits, batch, heads)
    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((splits, batch, rank, heads), f32),
            jax.ShapeDtypeStruct(each, f32),
            jax.ShapeDtypeStruct(each, f32),
        ),
        scratch_types=[
            plgpu.SMEM((group, size), q.dtype, transforms=OPERAND),
            plgpu.SMEM((STAGES, POSITIONS, size), q.dtype, transforms=OPERAND),
            plgpu.SMEM((group, POSITIONS), q.dtype, transforms=OPERAND),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=STAGES),
        ],
        grid=(splits, batch, heads // group),
        grid_names=("split", "sequence", "group"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, latent, lengths)
