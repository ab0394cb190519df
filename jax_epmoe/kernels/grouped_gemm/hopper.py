"""The grouped product on Hopper's tensor cores: a persistent, warp-specialised Pallas (Mosaic GPU) kernel.

Operands are swapped: weights ride wgmma's m, which is fixed at 64, and rows its n, which may be any multiple of 8. So a
tile is as high as its group needs, from 8 rows while decoding to 128, and no row is padded by more than 7.

A CTA has one producer warpgroup, which copies tiles of x and w into a ring of stages by TMA and runs on across output tiles,
and two or three consumer warpgroups, which share the tile's columns. CTAs walk over the tiles of `schedule.py`;
the row tiles of one expert that share weights come one after another, so that the L2 serves them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.config import Activation
from jax_epmoe.kernels import rows_hopper
from jax_epmoe.kernels.activations import gated
from jax_epmoe.kernels.device import num_sms, on_hopper
from jax_epmoe.kernels.grouped_gemm import schedule, tiles
from jax_epmoe.kernels.grouped_gemm.layout import (
    K_ALIGNMENT,
    OUTPUT_TRANSFORMS,
    ROW_ALIGNMENT,
    TRANSPOSED_ALIGNMENT,
    operand_transforms,
)
from jax_epmoe.kernels.grouped_gemm.tuning import Tiling, choose_tiling

# Of a thread, by the number of consumer warpgroups: what the producer keeps, what a consumer gets.
_REGISTERS = {2: (40, 232), 3: (24, 160)}


def matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    row_index: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
    transpose_w: bool = False,
    out_dtype: jax.typing.DTypeLike,
    expected_rows: int | None = None,
    tiling: Tiling | None = None,
) -> jax.Array:
    """What `reference.matmul` computes, for bfloat16 and float16; rows past the groups are left as they are.

    `tiling`: None for what suits `expected_rows` rows, by default all.

    `row_index` gathers in a separate pass: it runs at copy speed and leaves rows past the groups out; row-sized TMA copies
    inside the kernel are slower.

    Raises:
      NotImplementedError: another device than Hopper, another dtype, a k that 16 does not divide (for
        `transpose_w`: an n that 64 does not divide) or an n that 8 does not.
    """
    contraction, n = w.shape[-2:] if transpose_w else (w.shape[-1], w.shape[-2])
    refuse_unless_served(x.dtype, w.dtype, jnp.dtype(out_dtype))
    alignment = TRANSPOSED_ALIGNMENT if transpose_w else K_ALIGNMENT
    for refused, reason in (
        (x.size == 0 or w.size == 0, "an operand is empty"),
        (contraction % K_ALIGNMENT or w.shape[-1] % alignment, f"{alignment} does not divide {w.shape[-1]} or k"),
        (n % ROW_ALIGNMENT, f"{ROW_ALIGNMENT} does not divide n"),
    ):
        if refused:
            raise NotImplementedError(f"grouped_gemm's hopper backend: {reason}")
    rows = x.shape[0] if row_index is None else row_index.shape[0]
    padding = -rows % ROW_ALIGNMENT
    if tiling is None:
        expected_rows = rows if expected_rows is None else expected_rows
        tiling = choose_tiling(rows=expected_rows, experts=w.shape[0], n=n, k=contraction, gated=activation is not None)
    num_ctas = num_sms()
    plan = schedule.make_schedule(
        group_sizes,
        rows=rows + padding,
        heights=tiling.heights,
        largest_heights=tiling.largest_heights or tiling.heights[-1:],
        column_tiles=pl.cdiv(n, tiling.columns),
        num_ctas=num_ctas,
    )
    if row_index is not None:
        row_index = jnp.pad(row_index, (0, padding))
        x = rows_hopper.gather(x, row_index, plan[schedule.NUM_ROWS, 0]) if rows_hopper.serves(x) else x[row_index]
    elif padding:
        x = jnp.pad(x, ((0, padding), (0, 0)))
    w = w if activation else w[:, None]  # [experts, parts, n, k]
    if bias is not None:  # the last tiles read past its end
        bias = bias.reshape(w.shape[0], -1, n)
        bias = jnp.pad(bias.astype(jnp.float32), ((0, 0), (0, 0), (0, -n % tiling.columns)))
    out = _run(x, w, plan, bias, activation=activation, tiling=tiling, num_ctas=num_ctas, transpose_w=transpose_w)
    return out[:rows] if padding else out


def refuse_unless_served(*dtypes: jnp.dtype) -> None:
    """Raises NotImplementedError unless the device is a Hopper GPU and the dtypes are one 16-bit type."""
    if not on_hopper():
        raise NotImplementedError("grouped_gemm's hopper backend: the device is not a Hopper GPU")
    if len(set(dtypes)) > 1 or dtypes[0] not in (jnp.bfloat16, jnp.float16):
        names = ", ".join(map(str, dtypes))
        raise NotImplementedError(f"grouped_gemm's hopper backend: dtypes {names} are not all bfloat16 or all float16")


# Under jit of its own, so that a model's layers share one trace and one compilation.
@functools.partial(jax.jit, static_argnames=("activation", "tiling", "num_ctas", "transpose_w"))
def _run(
    x: jax.Array,
    w: jax.Array,
    plan: jax.Array,
    bias: jax.Array | None,
    *,
    activation: Activation | None,
    tiling: Tiling,
    num_ctas: int,
    transpose_w: bool,
) -> jax.Array:
    rows, k = x.shape
    parts = w.shape[1]
    n = w.shape[-1] if transpose_w else w.shape[-2]
    k_steps, column_tiles = pl.cdiv(k, tiling.block_k), pl.cdiv(n, tiling.columns)
    consumers = tiling.consumers
    own_columns = tiling.columns // consumers  # of a consumer warpgroup
    producer_registers, consumer_registers = _REGISTERS[consumers]
    blocks = own_columns // 64
    slots = min(tiling.slots, blocks)
    stages = tiling.stages
    max_height = tiling.heights[-1]
    i32 = jnp.int32

    def kernel(x_gmem, w_gmem, plan_gmem, *refs):
        *bias_gmem, out_gmem, x_smem, w_smem, out_smem, full, empty = refs
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        walk = tiles.Walk(plan_gmem, cta, num_ctas=num_ctas, column_tiles=column_tiles, heights=tiling.heights)

        @pl.when(warpgroup == consumers)
        def _produce():
            plgpu.set_max_registers(producer_registers, action="decrease")

            def begin(tile):
                first_row = pl.multiple_of(tile.first_row, ROW_ALIGNMENT)
                columns = pl.ds(tile.column_tile * tiling.columns, tiling.columns)

                def load(height, k_step, stage):
                    ks = pl.ds(k_step * tiling.block_k, tiling.block_k)
                    plgpu.copy_gmem_to_smem(
                        x_gmem.at[pl.ds(first_row, height), ks], x_smem.at[stage, pl.ds(0, height)], full.at[stage]
                    )
                    for part in range(parts):
                        box = (ks, columns) if transpose_w else (columns, ks)
                        plgpu.copy_gmem_to_smem(
                            w_gmem.at[tile.expert, part, *box], w_smem.at[stage, part], full.at[stage]
                        )

                return load

            walk.produce(k_steps, stages, empty, begin)

        @pl.when(warpgroup < consumers)
        def _consume():
            plgpu.set_max_registers(consumer_registers, action="increase")

            own = pl.ds(warpgroup * own_columns, own_columns)

            def multiply_tile(step, tile):
                first_column = tile.column_tile * tiling.columns + warpgroup * own_columns
                biases = [
                    plgpu.load(
                        ref.at[tile.expert, part, pl.ds(first_column, own_columns)],
                        layout=plgpu.Layout.WGMMA.reduce(1),
                        optimized=False,
                    )
                    for ref in bias_gmem
                    for part in range(parts)
                ]

                def main_loop(*accumulators):
                    def multiply(height):
                        @pl.loop(0, k_steps)
                        def _(k_step):
                            count = step * k_steps + k_step
                            stage = lax.rem(count, i32(stages))
                            plgpu.barrier_wait(full.at[stage])
                            for part, accumulator in enumerate(accumulators):
                                weights = w_smem.at[stage, part]
                                weights = weights.at[:, own].T if transpose_w else weights.at[own]
                                rows = x_smem.at[stage, pl.ds(0, height)]
                                plgpu.wgmma(accumulator.at[:, pl.ds(0, height)], weights, rows.T)
                            plgpu.wgmma_wait(1 if tiling.lag else 0)
                            if tiling.lag:

                                @pl.when(k_step > 0)
                                def _():
                                    plgpu.barrier_arrive(empty.at[lax.rem(count + (stages - 1), i32(stages))])
                            else:
                                plgpu.barrier_arrive(empty.at[stage])

                    walk.for_height(tile.code, multiply)
                    if tiling.lag:
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(empty.at[lax.rem(step * k_steps + (k_steps - 1), i32(stages))])
                    return tuple(accumulator[...] for accumulator in accumulators)

                accumulator = plgpu.ACC((own_columns, max_height), jnp.float32)
                results = pl.run_scoped(main_loop, *[accumulator] * parts)
                if biases:
                    results = [
                        result + lax.broadcast_in_dim(values, result.shape, (0,))
                        for result, values in zip(results, biases, strict=True)
                    ]
                result = gated(activation, *results) if activation else results[0]
                result = result.astype(
                    x.dtype
                )  # [own_columns, max_height]; columns past the tile's height mean nothing
                for block in range(blocks):
                    slot = block % slots
                    plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
                    # The accumulator's layout goes through the transposed view as it is: matrix stores.
                    out_smem.at[warpgroup, slot].T[...] = result[block * 64 : (block + 1) * 64, :]
                    plgpu.commit_smem()
                    tiles.store_rows(out_smem.at[warpgroup, slot], out_gmem, tile, first_column + block * 64)
                    plgpu.commit_smem_to_gmem_group()

            walk.over_tiles(multiply_tile)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    w_tile = (tiling.block_k, tiling.columns) if transpose_w else (tiling.columns, tiling.block_k)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows, n), x.dtype),
        scratch_types=[
            plgpu.SMEM((stages, max_height, tiling.block_k), x.dtype, transforms=operand_transforms(k)),
            plgpu.SMEM((stages, parts, *w_tile), w.dtype, transforms=operand_transforms(w.shape[-1])),
            plgpu.SMEM((consumers, slots, max_height, 64), x.dtype, transforms=OUTPUT_TRANSFORMS),
            plgpu.Barrier(num_arrivals=1 + parts, num_barriers=stages),
            plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        ],
        grid=(num_ctas,),
        grid_names=("cta",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(x, w, plan, *([] if bias is None else [bias]))
