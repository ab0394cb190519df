"""The gradient of the weights on Hopper: `out[e] = left[rows of e].T @ right[rows of e]`, a product over ragged rows.

Structure as in hopper.py: one producer and two consumer warpgroups, persistent CTAs. A CTA's tile is 128 x 256 of one
expert's matrix; it walks over the expert's rows, and both operands are read transposed from shared memory. Rows of the
neighbouring groups that lie in an expert's first or last stage are set to zero there, in `left`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.kernels.grouped_gemm.layout import OUTPUT_TRANSFORMS, ROW_ALIGNMENT, operand_transforms

_CONSUMERS = 2
_ROWS = 64  # of a stage
_TILE = (128, 256)  # of the output
_STAGES = 4


@functools.partial(jax.jit, static_argnames="num_ctas")
def outer(left: jax.Array, right: jax.Array, group_sizes: jax.Array, *, num_ctas: int) -> jax.Array:
    """`left [rows, n]`, `right [rows, k]` of one 16-bit dtype, rows a multiple of 8 -> `[experts, n, k]` of that dtype.

    Rows of `right` past the groups must be finite.
    """
    n, k, experts = left.shape[1], right.shape[1], group_sizes.shape[0]
    tiles_n, tiles_k = pl.cdiv(n, _TILE[0]), pl.cdiv(k, _TILE[1])
    own = _TILE[0] // _CONSUMERS
    total = experts * tiles_n * tiles_k
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    bounds = jnp.stack([ends - group_sizes.astype(jnp.int32), ends])  # [2, experts]
    i32 = jnp.int32

    def kernel(left_gmem, right_gmem, bounds_gmem, out_gmem, left_smem, right_smem, out_smem, full, empty):
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        steps = lax.div(total - cta + (num_ctas - 1), i32(num_ctas))

        def tile_of(step):
            """Expert, first row and column of the tile, the group's first and last row, the first stage's row, stages."""
            index = step * num_ctas + cta
            expert = lax.div(index, i32(tiles_n * tiles_k))
            within = index - expert * (tiles_n * tiles_k)
            row_tile = lax.div(within, i32(tiles_k))
            column = (within - row_tile * tiles_k) * _TILE[1]
            start, end = bounds_gmem[0, expert], bounds_gmem[1, expert]
            first_row = lax.div(start, i32(ROW_ALIGNMENT)) * ROW_ALIGNMENT
            loads = lax.select(end > start, lax.div(end - first_row + (_ROWS - 1), i32(_ROWS)), i32(0))
            return expert, row_tile * _TILE[0], column, start, end, first_row, loads

        @pl.when(warpgroup == _CONSUMERS)
        def _produce():
            plgpu.set_max_registers(40, action="decrease")

            def load_tile(step, done):
                _, row, column, _, _, first_row, loads = tile_of(step)

                @pl.loop(0, loads)
                def _load(load):
                    count = done + load
                    stage = lax.rem(count, i32(_STAGES))

                    @pl.when(count >= _STAGES)
                    def _wait():
                        plgpu.barrier_wait(empty.at[stage])

                    rows = pl.ds(pl.multiple_of(first_row + load * _ROWS, ROW_ALIGNMENT), _ROWS)
                    plgpu.copy_gmem_to_smem(
                        left_gmem.at[rows, pl.ds(row, _TILE[0])], left_smem.at[stage], full.at[stage]
                    )
                    plgpu.copy_gmem_to_smem(
                        right_gmem.at[rows, pl.ds(column, _TILE[1])], right_smem.at[stage], full.at[stage]
                    )

                return done + loads

            done = lax.fori_loop(0, steps, load_tile, i32(0))

            @pl.loop(lax.max(done - _STAGES, i32(0)), done)
            def _drain(count):  # every stage must be released before the kernel ends
                plgpu.barrier_wait(empty.at[lax.rem(count, i32(_STAGES))])

        @pl.when(warpgroup < _CONSUMERS)
        def _consume():
            plgpu.set_max_registers(232, action="increase")
            own_columns = pl.ds(warpgroup * own, own)

            def multiply_tile(step, done):
                expert, row, column, start, end, first_row, loads = tile_of(step)

                def main_loop(accumulator):
                    def body(load, _):
                        stage = lax.rem(done + load, i32(_STAGES))
                        plgpu.barrier_wait(full.at[stage])
                        stage_row = first_row + load * _ROWS
                        mine = left_smem.at[stage, :, own_columns]

                        @pl.when((stage_row < start) | (stage_row + _ROWS > end))
                        def _clear_foreign_rows():
                            values = plgpu.load(mine, layout=plgpu.Layout.WGMMA, optimized=False)
                            rows = stage_row + plgpu.broadcasted_iota(
                                jnp.int32, (_ROWS, own), 0, layout=plgpu.Layout.WGMMA
                            )
                            inside = (rows >= start) & (rows < end)
                            mine[...] = jnp.where(inside, values, jnp.zeros_like(values))
                            plgpu.commit_smem()

                        plgpu.wgmma(accumulator, mine.T, right_smem.at[stage])
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(empty.at[stage])
                        return ()

                    lax.fori_loop(0, loads, body, ())
                    return accumulator[...]

                result = pl.run_scoped(main_loop, plgpu.ACC((own, _TILE[1]), jnp.float32)).astype(left.dtype)
                for block in range(_TILE[1] // 64):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out_smem[warpgroup] = result[:, block * 64 : (block + 1) * 64]
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        out_smem.at[warpgroup],
                        out_gmem.at[expert, pl.ds(row + warpgroup * own, own), pl.ds(column + block * 64, 64)],
                    )
                return done + loads

            lax.fori_loop(0, steps, multiply_tile, i32(0))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((experts, n, k), left.dtype),
        scratch_types=[
            plgpu.SMEM((_STAGES, _ROWS, _TILE[0]), left.dtype, transforms=operand_transforms(n)),
            plgpu.SMEM((_STAGES, _ROWS, _TILE[1]), right.dtype, transforms=operand_transforms(k)),
            plgpu.SMEM((_CONSUMERS, own, 64), left.dtype, transforms=OUTPUT_TRANSFORMS),
            plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
            plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=_STAGES),
        ],
        grid=(num_ctas,),
        grid_names=("cta",),
        num_threads=_CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(left, right, bounds)
