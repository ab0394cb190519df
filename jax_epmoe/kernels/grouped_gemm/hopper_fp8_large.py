"""hopper_fp8.py's product for groups of many rows: rows on wgmma's m.

A thread's accumulator then spans two rows, so it scales by two numbers, where operands swapped it would be 32. While a warpgroup
promotes, the tensor cores need work from another. Of three warpgroups with one product a step each, two are multiplying while the
third promotes; two with two products each tend to promote at the same time, but their tiles are higher, and fit groups better that are
no multiple of three warpgroups' rows. CTAs come in pairs, side by side in n: each loads half of a tile's rows for both.

Where a gated output is to be quantised in groups of 128, two warpgroups have 64 rows each, and a product for gate and one for up: then
a group lies within a warpgroup, and is quantised from its sums.

A tile's height counts in steps of 64, a product's: that suits groups of several tiles.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.config import Activation
from jax_epmoe.kernels import quantize_hopper
from jax_epmoe.kernels.activations import gated
from jax_epmoe.kernels.grouped_gemm import tiles
from jax_epmoe.kernels.grouped_gemm.layout import OUTPUT_TRANSFORMS, ROW_ALIGNMENT, operand_transforms
from jax_epmoe.kernels.grouped_gemm.tuning import Tiling
from jax_epmoe.quant import BLOCK, FP8, QuantizedArray

PAIR = 2  # CTAs of a cluster
_OWN_ROWS = 64  # of a product
_THREE_WARPGROUPS = (64, 128, 192)  # heights of a tile: a product each
_TWO_WARPGROUPS = (64, 128, 192, 256)  # two each
_QUANTIZING = (64, 128)  # two warpgroups, a product for gate and one for up
_THREE_FROM = 4096  # rows of an expert
_BAND = 16  # row tiles that go through all columns before the next ones do, so that they stay in the L2


def large_tiling(*, rows_per_expert: float, gated: bool, quantizes: bool = False) -> Tiling:
    """Tiles of 128 rows of w, with a gate 64 of either half; 128 of either half where it quantises what is gated."""
    if quantizes:
        return Tiling(columns=BLOCK, heights=_QUANTIZING, block_k=BLOCK, stages=4)
    columns = 64 if gated else 128
    if rows_per_expert >= _THREE_FROM:
        return Tiling(columns=columns, heights=_THREE_WARPGROUPS, block_k=BLOCK, stages=4, slots=2)
    return Tiling(columns=columns, heights=_TWO_WARPGROUPS, block_k=BLOCK, stages=4)


def promotes_meanwhile(tiling: Tiling) -> bool:
    """Whether a warpgroup promotes while two multiply: there is nothing to gain from fewer promotions then."""
    return tiling.heights == _THREE_WARPGROUPS


def is_large(tiling: Tiling) -> bool:
    """Whether the tiling is one of `large_tiling`'s."""
    return tiling.heights in (_THREE_WARPGROUPS, _TWO_WARPGROUPS, _QUANTIZING)


# Under jit of its own, so that a model's layers share one trace and one compilation.
@functools.partial(jax.jit, static_argnames=("activation", "tiling", "num_ctas", "out_dtype"))
def run(
    x: jax.Array,
    w: jax.Array,
    x_scale: jax.Array,
    w_scale: jax.Array,
    plan: jax.Array,
    bias: jax.Array | None,
    out_factor: jax.Array | None,
    *,
    activation: Activation | None,
    tiling: Tiling,
    num_ctas: int,
    out_dtype: jnp.dtype,
) -> jax.Array | QuantizedArray:
    """`hopper_fp8._run`, for a plan of `num_ctas // PAIR` pairs and tiles `PAIR * tiling.columns` wide.

    `out_dtype` float8: with a tiling that quantises, `n` a multiple of 128; without `out_factor` a `QuantizedArray` of groups.
    """
    rows, k = x.shape
    parts, n = w.shape[1:3]
    columns, stages, block_k = tiling.columns, tiling.stages, tiling.block_k
    consumers = 3 if tiling.heights == _THREE_WARPGROUPS else 2
    row_blocks = tiling.heights[-1] // _OWN_ROWS // consumers  # of a warpgroup
    quantizes, in_groups = out_dtype == FP8, out_dtype == FP8 and out_factor is None
    # A warpgroup's products of a step: which of its row blocks by which parts of w.
    in_one = [(part,) for part in range(parts)] if quantizes else [tuple(range(parts))]
    products = [(i, of) for i in range(row_blocks) for of in in_one]
    k_steps, column_tiles = pl.cdiv(k, block_k), pl.cdiv(n, columns)
    stored_columns = 128 // out_dtype.itemsize  # at a time: a row of the widest swizzle
    slots = min(tiling.slots, columns // stored_columns)
    scaled_at_the_end = w_scale.ndim == 3
    i32, f32 = jnp.int32, jnp.float32
    by_row, by_column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

    def kernel(x_gmem, w_gmem, xs_gmem, ws_gmem, plan_gmem, *refs):
        bias_gmem, refs = refs[: len(biases)], refs[len(biases) :]
        factor_gmem, refs = refs[: len(factors)], refs[len(factors) :]
        (out_gmem, *scales_gmem), refs = refs[: len(out_types)], refs[len(out_types) :]
        x_smem, w_smem, xs_smem, out_smem, full, empty, *scales_smem = refs
        warpgroup = lax.axis_index("warpgroup")
        walk = tiles.Walk(
            plan_gmem,
            lax.axis_index("pair"),
            num_ctas=num_ctas // PAIR,
            column_tiles=pl.cdiv(column_tiles, PAIR),
            heights=tiling.heights,
            band=_BAND,
        )

        def column_tile(tile):
            """This CTA's of the pair's two; the last one twice, if there is an odd number."""
            return lax.min(tile.column_tile * PAIR + lax.axis_index("cta"), column_tiles - 1)

        @pl.when(warpgroup == consumers)
        def _produce():
            plgpu.set_max_registers(32, action="decrease")

            def begin(tile):
                first_row = pl.multiple_of(tile.first_row, ROW_ALIGNMENT)
                own_columns = pl.ds(column_tile(tile) * columns, columns)

                def load(height, k_step, stage):
                    ks, top = pl.ds(k_step * block_k, block_k), pl.ds(0, height)
                    plgpu.copy_gmem_to_smem(
                        x_gmem.at[pl.ds(first_row, height), ks],
                        x_smem.at[stage, top],
                        full.at[stage],
                        collective_axes="cta",
                    )
                    for part in range(parts):
                        plgpu.copy_gmem_to_smem(
                            w_gmem.at[tile.expert, part, own_columns, ks],
                            w_smem.at[stage, pl.ds(part * columns, columns)],
                            full.at[stage],
                        )
                    if not scaled_at_the_end:
                        plgpu.copy_gmem_to_smem(
                            xs_gmem.at[k_step, pl.ds(first_row, height)], xs_smem.at[stage, top], full.at[stage]
                        )

                return load

            walk.produce(k_steps, stages, empty, begin)

        @pl.when(warpgroup < consumers)
        def _consume():
            plgpu.set_max_registers(160 if consumers == 3 else 232, action="increase")

            def multiply_tile(step, tile):
                first_column = column_tile(tile) * columns

                def offset(i):
                    """Of this warpgroup's i-th row block."""
                    return (i * consumers + warpgroup) * _OWN_ROWS

                def own_tile(i):
                    return tile._replace(
                        first_row=tile.first_row + offset(i),
                        low=lax.max(tile.low - offset(i), i32(0)),
                        high=lax.min(tile.high - offset(i), i32(_OWN_ROWS)),
                    )

                def wait_for(k_step):
                    stage = lax.rem(step * k_steps + k_step, i32(stages))
                    plgpu.barrier_wait(full.at[stage])
                    return stage

                def along_rows(ref, width):
                    values = plgpu.load(ref, layout=by_column, optimized=False)
                    return lax.broadcast_in_dim(values, (_OWN_ROWS, width), (1,))

                def along_columns(values, width):
                    return lax.broadcast_in_dim(values, (_OWN_ROWS, width), (0,))

                def weight_scales(k_step):
                    """Of one step, a scalar for each part."""
                    if scaled_at_the_end:
                        return ()
                    block = lax.div(first_column, i32(BLOCK))
                    k_block = lax.min(k_step, k_steps - 1)
                    return tuple(ws_gmem[tile.expert, part, block, k_block] for part in range(parts))

                def multiply(stage, row_block, of, accumulator):
                    """A product, and its rows' scales."""
                    own, of_w = pl.ds(offset(row_block), _OWN_ROWS), pl.ds(of[0] * columns, len(of) * columns)
                    plgpu.wgmma(accumulator, x_smem.at[stage, own], w_smem.at[stage, of_w].T)
                    if scaled_at_the_end:
                        return accumulator[...], None
                    return accumulator[...], plgpu.load(xs_smem.at[stage, own], layout=by_row, optimized=False)

                def multiply_and_promote(stage, row_block, of, sums, of_weights, release):
                    """The sums, one for each part, with a product of a stage, which is then released."""
                    accumulator = plgpu.ACC((_OWN_ROWS, len(of) * columns), f32)
                    product, of_rows = pl.run_scoped(functools.partial(multiply, stage, row_block, of), accumulator)
                    if release:
                        plgpu.barrier_arrive(empty.at[stage])
                    new = []
                    for i, (part, before) in enumerate(zip(of, sums, strict=True)):
                        own_product = product[:, i * columns : (i + 1) * columns]
                        if not scaled_at_the_end:
                            own_product = own_product * along_columns(of_rows * of_weights[part], columns)
                        new.append(before + own_product)
                    return tuple(new)

                def multiply_rows(count):
                    """The tile's first `count` row blocks of this warpgroup."""
                    own_products = [(row_block, of) for row_block, of in products if row_block < count]
                    is_one = len(own_products) == 1

                    def k_body(k_step, carry):
                        sums, of_weights = carry
                        stage = wait_for(k_step)
                        following = weight_scales(k_step + 1)
                        new = []
                        for product, before in zip(own_products, sums, strict=True):
                            release = product == own_products[-1]
                            add = functools.partial(
                                multiply_and_promote, stage, *product, before, of_weights, release=release
                            )
                            # Behind a branch ptxas does not share an accumulator's zeros with the next one's, by moves.
                            new.append(add() if is_one else lax.cond(tile.expert >= 0, add, lambda b=before: b))
                        return tuple(new), following

                    zeros = plgpu.layout_cast(jnp.zeros((_OWN_ROWS, columns), f32), plgpu.Layout.WGMMA)
                    start = tuple((zeros,) * len(of) for _, of in own_products), weight_scales(i32(0))
                    sums, _ = lax.fori_loop(0, k_steps, k_body, start)
                    for row_block in range(count):
                        of_block = [sums[i] for i, (block, _) in enumerate(own_products) if block == row_block]
                        store(own_tile(row_block), sum(of_block, ()))

                def store(own, sums):
                    if scaled_at_the_end:
                        first_row = pl.multiple_of(own.first_row, ROW_ALIGNMENT)
                        of_rows = plgpu.load(xs_gmem.at[pl.ds(first_row, _OWN_ROWS)], layout=by_row, optimized=False)
                        of_rows = along_columns(of_rows, stored_columns)
                    for i in range(columns // stored_columns):
                        block = pl.ds(first_column + i * stored_columns, stored_columns)
                        of_parts = []
                        for part, total in enumerate(sums):
                            result = total[:, i * stored_columns : (i + 1) * stored_columns]
                            if scaled_at_the_end:
                                of_columns = along_rows(ws_gmem.at[tile.expert, part, block], stored_columns)
                                result = result * of_rows * of_columns
                            for ref in bias_gmem:
                                result = result + along_rows(ref.at[tile.expert, part, block], stored_columns)
                            of_parts.append(result)
                        result = gated(activation, *of_parts) if activation else of_parts[0]
                        out_block = out_smem.at[warpgroup, i % slots]
                        plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
                        for ref in factor_gmem:
                            result = result * ref[tile.expert]
                        if in_groups:
                            result, scales = quantize_hopper.quantize_values(result)
                            scales_smem[0][warpgroup] = scales
                        out_block[...] = result.astype(out_dtype)
                        plgpu.commit_smem()
                        tiles.store_rows(out_block, out_gmem, own, first_column + i * stored_columns)
                        if in_groups:
                            tiles.store_numbers(scales_smem[0].at[warpgroup], scales_gmem[0], column_tile(tile), own)
                        plgpu.commit_smem_to_gmem_group()

                highest = [own_tile(i).high for i in range(row_blocks)]
                for i in range(row_blocks):
                    is_last = (highest[i] > 0) & (highest[i + 1] <= 0) if i + 1 < row_blocks else highest[i] > 0
                    pl.when(is_last)(functools.partial(multiply_rows, i + 1))

                @pl.when(highest[0] <= 0)
                def _skip():
                    @pl.loop(0, k_steps)
                    def _(k_step):
                        plgpu.barrier_arrive(empty.at[wait_for(k_step)])

            walk.over_tiles(multiply_tile)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    biases, factors = ([] if vector is None else [vector] for vector in (bias, out_factor))
    transforms = operand_transforms(k, 1)
    out_types = [jax.ShapeDtypeStruct((rows, n), out_dtype)]
    if in_groups:
        out_types.append(jax.ShapeDtypeStruct((column_tiles, rows), f32))
    out, *scales = plgpu.kernel(
        kernel,
        out_type=out_types,
        scratch_types=[
            plgpu.SMEM((stages, tiling.heights[-1], block_k), FP8, transforms=transforms),
            plgpu.SMEM((stages, parts * columns, block_k), FP8, transforms=transforms),
            plgpu.SMEM((stages, tiling.heights[-1]), f32),
            plgpu.SMEM((consumers, slots, _OWN_ROWS, stored_columns), out_dtype, transforms=OUTPUT_TRANSFORMS),
            plgpu.Barrier(num_arrivals=1 + parts + (not scaled_at_the_end), num_barriers=stages),
            plgpu.ClusterBarrier(collective_axes=("cta",), num_arrivals=consumers, num_barriers=stages),
            *([plgpu.SMEM((consumers, _OWN_ROWS), f32)] if in_groups else []),
        ],
        grid=(num_ctas // PAIR,),
        grid_names=("pair",),
        cluster=(PAIR,),
        cluster_names=("cta",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(x, w, x_scale, w_scale, plan, *biases, *factors)
    return QuantizedArray(out, scales[0], "group") if in_groups else out
