"""`mla_hopper.decode` where a device has many heads: compute counts beside the latents' bytes, so heads ride wgmma's m.

A CTA has 64 heads of a sequence, and each of its two warpgroups half of the values' columns. Both compute all scores: that is a
third more products, but nothing is exchanged, probabilities never leave the registers, and one multiplies while the other takes
exponentials. A third warpgroup brings tiles of latents, which serve both products.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.kernels.decode_splits import POSITIONS, STAGES, operand, own_tiles

HEADS = 64  # of a CTA
_CONSUMERS = 2
_MOST_SIZE = 576  # numbers of a latent: of the queries and two tiles shared memory holds so many
_ROWS = plgpu.Layout.WGMMA.reduce(1)


def serves(q: jax.Array, rank: int) -> bool:
    """Whether `run` takes these queries `[B, heads, D]` and so many values, of what `mla_hopper.serves`."""
    return q.shape[1] % HEADS == 0 and q.shape[2] <= _MOST_SIZE and rank % (64 * _CONSUMERS) == 0


def add_product(total: jax.Array, a: jax.Array, b: Any) -> jax.Array:
    """`total + a @ b` in the registers that hold the total; the interpreter does not know such accumulators."""
    return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b))(plgpu.ACC.init(total))


# Under jit of its own, so that a model's layers share one trace and one compilation.
@functools.partial(jax.jit, static_argnames=("rank", "scale", "splits"))
def run(
    q: jax.Array, latent: jax.Array, lengths: jax.Array, *, rank: int, scale: float, splits: int
) -> tuple[jax.Array, ...]:
    """`[B, heads, rank]` in q's dtype, as `mla_hopper.decode` has it; of several splits, each one's part.

    A part is the float32 sum `[splits, B, heads, rank]`, each head's largest score in powers of two `[splits, B, heads]`, and
    the sum of `exp2` beside it.
    """
    batch, heads, size = q.shape
    i32, f32 = jnp.int32, jnp.float32
    unit = scale * math.log2(math.e)
    own_columns = rank // _CONSUMERS

    def kernel(q_gmem, latent_gmem, lengths_gmem, out_gmem, *refs):
        *of_split, q_smem, tiles, q_full, full, empty = refs
        split, sequence = lax.axis_index("split"), lax.axis_index("sequence")
        warpgroup = lax.axis_index("warpgroup")
        own_heads = pl.ds(lax.axis_index("group") * HEADS, HEADS)
        length = lengths_gmem[sequence]
        first, steps = own_tiles(length, split, splits)

        @pl.when(warpgroup == _CONSUMERS)
        def _load():
            plgpu.set_max_registers(40, action="decrease")
            plgpu.copy_gmem_to_smem(q_gmem.at[sequence, own_heads], q_smem, q_full)

            @pl.loop(0, steps)
            def _tile(step):
                stage = lax.rem(step, i32(STAGES))
                pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(empty.at[stage]))
                positions = pl.ds((first + step) * POSITIONS, POSITIONS)
                plgpu.copy_gmem_to_smem(latent_gmem.at[sequence, positions], tiles.at[stage], full.at[stage])

            @pl.loop(lax.max(steps - STAGES, i32(0)), steps)  # every stage is released before the kernel ends
            def _released(step):
                plgpu.barrier_wait(empty.at[lax.rem(step, i32(STAGES))])

        @pl.when(warpgroup < _CONSUMERS)
        def _attend():
            plgpu.set_max_registers(232, action="increase")
            columns = pl.ds(pl.multiple_of(warpgroup * own_columns, 64), own_columns)
            plgpu.barrier_wait(q_full)

            def along(values, shape):
                return lax.broadcast_in_dim(values, shape, (0,))

            def tile_body(step, carry):
                out, largest, sums = carry
                stage = lax.rem(step, i32(STAGES))
                plgpu.barrier_wait(full.at[stage])

                def multiply_scores(accumulator):
                    plgpu.wgmma(accumulator, q_smem, tiles.at[stage].T)
                    return accumulator[...]

                scores = pl.run_scoped(multiply_scores, plgpu.ACC((HEADS, POSITIONS), f32)) * unit
                position = plgpu.broadcasted_iota(i32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
                scores = jnp.where(position < length - (first + step) * POSITIONS, scores, -jnp.inf)
                higher = jnp.maximum(largest, jnp.max(scores, axis=1))
                shrink = jnp.exp2(largest - higher)
                p = jnp.exp2(scores - along(higher, scores.shape))
                sums = sums * shrink + jnp.sum(p, axis=1)

                out = add_product(out * along(shrink, out.shape), p.astype(q.dtype), tiles.at[stage, :, columns])
                plgpu.barrier_arrive(empty.at[stage])
                return out, higher, sums

            def filled(shape, value, layout):
                return plgpu.layout_cast(jnp.full(shape, value, f32), layout)

            # The first tile of a split holds a position of the sequence, so that no score is compared with -inf alone.
            start = (
                filled((HEADS, own_columns), 0, plgpu.Layout.WGMMA),
                filled((HEADS,), -1e30, _ROWS),
                filled((HEADS,), 0, _ROWS),
            )
            out, largest, sums = lax.fori_loop(0, steps, tile_body, start)
            if splits == 1:
                out_gmem[sequence, own_heads, columns] = (out * along(1 / sums, out.shape)).astype(q.dtype)
            else:
                out_gmem[split, sequence, own_heads, columns] = out
                for ref, values in zip(of_split, (largest, sums), strict=True):
                    ref[split, sequence, own_heads] = values  # by both warpgroups, the same

    each = (splits, batch, heads)
    part = jax.ShapeDtypeStruct((*each, rank), f32), *[jax.ShapeDtypeStruct(each, f32)] * 2
    return plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((batch, heads, rank), q.dtype),) if splits == 1 else part,
        scratch_types=[
            plgpu.SMEM((HEADS, size), q.dtype, transforms=operand(size, q.dtype)),
            plgpu.SMEM((STAGES, POSITIONS, size), q.dtype, transforms=operand(size, q.dtype)),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=STAGES),
        ],
        grid=(splits, batch, heads // HEADS),
        grid_names=("split", "sequence", "group"),
        num_threads=_CONSUMERS + 1,
        thread_name="warpgroup",
        # Nothing goes from registers to shared memory.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(q, latent, lengths)
