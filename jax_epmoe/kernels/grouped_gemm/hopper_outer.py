"""The gradient of the weights on Hopper: `out[e] = left[rows of e].T @ right[rows of e]`, a product over ragged rows.

Structure as in hopper.py: one producer and two consumer warpgroups, persistent CTAs. A CTA's tile is 128 x 256 of one
expert's matrix; it walks over the expert's rows, and both operands are read transposed from shared memory. What an expert's
first and last stage hold of its neighbours' rows is set to zero there in `left`. Zeros times NaN would be NaN: rows past all
groups are set to zero in `right` too. (Doing so for every neighbour's rows took 16 to 18% longer with 300 rows an expert.)
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.kernels.grouped_gemm import hopper
from jax_epmoe.kernels.grouped_gemm.layout import (
    OUTPUT_TRANSFORMS,
    ROW_ALIGNMENT,
    TRANSPOSED_ALIGNMENT,
    operand_transforms,
)

_CONSUMERS = 2
_ROWS = 64  # of a stage
_TILE = (128, 256)  # of the output
_STAGES = 4


def outer(left: jax.Array, right: jax.Array, group_sizes: jax.Array, *, out_dtype: jax.typing.DTypeLike) -> jax.Array:
    """What `reference.outer` computes, for bfloat16 and float16. Rows past the groups may hold anything, NaN too.

    A row of `right` in a group may be infinite or NaN at the cost of the groups beside it: they may get NaNs as well.

    Raises:
      NotImplementedError: another device than Hopper, another dtype, an empty operand, or an n or k that 64 does not divide.
    """
    hopper.refuse_unless_served(left.dtype, right.dtype, jnp.dtype(out_dtype))
    if left.size == 0 or right.size == 0 or group_sizes.size == 0:
        raise NotImplementedError("grouped_gemm's hopper backend: an operand is empty")
    if left.shape[1] % TRANSPOSED_ALIGNMENT or right.shape[1] % TRANSPOSED_ALIGNMENT:
        raise NotImplementedError(f"grouped_gemm's hopper backend: {TRANSPOSED_ALIGNMENT} does not divide n or k")
    if padding := -left.shape[0] % ROW_ALIGNMENT:
        left, right = (jnp.pad(operand, ((0, padding), (0, 0))) for operand in (left, right))
    return _run(left, right, group_sizes, num_ctas=hopper.num_sms())


# Under jit of its own, so that a model's layers share one trace and one compilation.
@functools.partial(jax.jit, static_argnames="num_ctas")
def _run(left: jax.Array, right: jax.Array, group_sizes: jax.Array, *, num_ctas: int) -> jax.Array:
    n, k, experts = left.shape[1], right.shape[1], group_sizes.shape[0]
    tiles_n, tiles_k = pl.cdiv(n, _TILE[0]), pl.cdiv(k, _TILE[1])
    own = _TILE[0] // _CONSUMERS  # rows of the tile, columns of left, that a consumer warpgroup multiplies
    total = experts * tiles_n * tiles_k
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    bounds = jnp.stack([ends - group_sizes.astype(jnp.int32), ends])  # [2, experts]
    i32 = jnp.int32

    def kernel(left_gmem, right_gmem, bounds_gmem, out_gmem, left_smem, right_smem, out_smem, full, empty, cleared):
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        steps = lax.div(total - cta + (num_ctas - 1), i32(num_ctas))

        def tile_of(step):
            """Expert, first row and column of the tile, the group's rows [start, end), the first stage's row, stages."""
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
            all_rows = bounds_gmem[1, experts - 1]

            def clear_outside(operand, width, stage, low, high):
                """Sets a stage's rows outside [low, high) to zero, half of the columns in each consumer warpgroup."""
                layout = plgpu.Layout.WGMMA
                row = plgpu.broadcasted_iota(jnp.int32, (_ROWS, 64), 0, layout=layout)
                inside = (row >= low) & (row < high)
                for block in range(width // _CONSUMERS // 64):
                    columns = pl.ds(warpgroup * (width // _CONSUMERS) + block * 64, 64)
                    values = plgpu.load(operand.at[stage, :, columns], layout=layout, optimized=False)
                    operand[stage, :, columns] = jnp.where(inside, values, jnp.zeros_like(values))
                plgpu.commit_smem()

            def multiply_tile(step, done):
                expert, row, column, start, end, first_row, loads = tile_of(step)

                def main_loop(accumulator):
                    def body(load, _):
                        stage = lax.rem(done + load, i32(_STAGES))
                        plgpu.barrier_wait(full.at[stage])
                        stage_row = first_row + load * _ROWS

                        @pl.when((stage_row < start) | (stage_row + _ROWS > end))
                        def _clear_left():
                            clear_outside(left_smem, _TILE[0], stage, start - stage_row, end - stage_row)

                        @pl.when(stage_row + _ROWS > all_rows)
                        def _clear_right():  # both warpgroups read all of it
                            clear_outside(right_smem, _TILE[1], stage, 0, all_rows - stage_row)
                            plgpu.barrier_arrive(cleared)
                            plgpu.barrier_wait(cleared)

                        mine = left_smem.at[stage, :, pl.ds(warpgroup * own, own)]
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
            plgpu.Barrier(num_arrivals=_CONSUMERS),
        ],
        grid=(num_ctas,),
        grid_names=("cta",),
        num_threads=_CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(left, right, bounds)
