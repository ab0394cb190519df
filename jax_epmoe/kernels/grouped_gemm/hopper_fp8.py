"""The grouped product of float8 operands on Hopper: hopper.py's structure, with a float32 sum beside the tensor cores' own.

Tensor cores add float8 products with few bits: over a long k that truncates, always downwards. So every 128 of k, or 256, go to a
fresh accumulator, and warpgroups add that to a float32 sum ("promotion"), in every format. Block formats scale it on the way, by one
number a block of weights and one a row of x, which comes by TMA beside x; others scale the sum at the end, and add a step's product
at once: of 256, truncation takes 0.2% from a sum of positive products (of 128: 0.06%), and less than bfloat16's rounding from others.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.config import Activation
from jax_epmoe.kernels import quantize_hopper, rows_hopper
from jax_epmoe.kernels.activations import gate, gated
from jax_epmoe.kernels.device import num_sms, on_hopper
from jax_epmoe.kernels.grouped_gemm import hopper_fp8_large, schedule, tiles
from jax_epmoe.kernels.grouped_gemm.layout import FP8_K_ALIGNMENT, OUTPUT_TRANSFORMS, ROW_ALIGNMENT, operand_transforms
from jax_epmoe.kernels.grouped_gemm.reference import quantize_rows
from jax_epmoe.kernels.grouped_gemm.tuning import SHARED_MEMORY_LIMIT, Tiling
from jax_epmoe.quant import BLOCK, FP8, Granularity, QuantizedArray

_CONSUMERS = 2
_APART = (112,)  # heights at which ptxas spills otherwise
_OUTPUTS = (jnp.bfloat16, jnp.float16, jnp.float32)


def quantized_matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    row_index: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
    x_scale: jax.Array,
    w_scale: jax.Array,
    quantize_out: Granularity | None = None,
    out_scale: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike,
    expected_rows: int | None = None,
    tiling: Tiling | None = None,
    splits: int = 1,
) -> jax.Array | QuantizedArray:
    """What `reference.quantized_matmul` computes; rows past the groups are left as they are. Scales as `grouped_gemm` has them.

    Raises:
      NotImplementedError: another device than Hopper, a k that 32 or an n that 8 does not divide, 128 values of x a scale
        with other weights than blocks (or one for all of an expert's).
    """
    experts, n, k = w.shape[0], w.shape[-2], w.shape[-1]
    parts = 2 if activation else 1
    if quantize_out:
        by_tile = (quantize_out == "group" or out_scale is not None) and parts == 2 and n % BLOCK == 0
        out_dtype = FP8 if by_tile else jnp.float32
    out_dtype = jnp.dtype(out_dtype)
    x_groups, w_blocks = x_scale.ndim == 2, w.ndim - w_scale.ndim == 0
    by_channel = w.ndim - w_scale.ndim == 1
    for refused, reason in (
        (not on_hopper(), "the device is not a Hopper GPU"),
        (x.dtype != FP8 or w.dtype != FP8, f"dtypes {x.dtype}, {w.dtype} are not {FP8}"),
        (quantize_out is None and out_dtype not in _OUTPUTS, f"out_dtype {out_dtype}"),
        (x.size == 0 or w.size == 0, "an operand is empty"),
        (k % FP8_K_ALIGNMENT, f"{FP8_K_ALIGNMENT} does not divide k"),
        (n % ROW_ALIGNMENT, f"{ROW_ALIGNMENT} does not divide n"),
        (x_groups and by_channel, "x has a scale for 128 values, and w one for a channel"),
    ):
        if refused:
            raise NotImplementedError(f"grouped_gemm's hopper backend, float8: {reason}")
    rows = x.shape[0] if row_index is None else row_index.shape[0]
    padding = -rows % ROW_ALIGNMENT
    expected_rows = rows if expected_rows is None else expected_rows
    by_blocks = x_groups or w_blocks
    if tiling is None:
        tiling, splits = _choose(rows, expected_rows, w.shape, parts, out_dtype, whole_blocks=by_blocks)
        if splits == 1 and not by_blocks:
            tiling = _with_longer_steps(tiling, k)
    if out_dtype == FP8 and (splits > 1 or tiling.columns != BLOCK):  # a tile's columns are no group
        out_dtype = jnp.dtype(jnp.float32)
    # Parts of k are summed before gate and up are gated, so these are columns like others.
    side_by_side = (experts, parts, n) if splits == 1 else (experts, 1, parts * n)
    large = hopper_fp8_large.is_large(tiling)
    together = hopper_fp8_large.PAIR if large else 1  # CTAs
    plan = schedule.make_schedule(
        group_sizes,
        rows=rows + padding,
        heights=tiling.heights,
        largest_heights=tiling.largest_heights or tiling.heights[-1:],
        column_tiles=splits * pl.cdiv(side_by_side[-1], tiling.columns * together),
        num_ctas=num_sms() // together,
        rest_apart=large,
    )
    if x_scale.ndim == 0:
        x_scale = jnp.broadcast_to(x_scale, x.shape[:1])
    if row_index is not None:
        row_index = jnp.pad(row_index, (0, padding))
        x, x_scale = _gather(x, row_index, plan[schedule.NUM_ROWS, 0]), x_scale[..., row_index]
    elif padding:
        x = jnp.pad(x, ((0, padding), (0, 0)))
        x_scale = jnp.pad(x_scale, ((0, 0),) * (x_scale.ndim - 1) + ((0, padding),))
    blocks = pl.cdiv(k, BLOCK)
    # The last tiles read past the ends of what comes once a tile.
    past_the_end = ((0, 0), (0, 0), (0, -side_by_side[-1] % tiling.columns))
    if by_blocks:
        x_scale = jnp.broadcast_to(x_scale, (blocks, x.shape[0]))
        shape = (experts, parts, pl.cdiv(n, BLOCK), blocks)
        w_scale = jnp.broadcast_to(w_scale.reshape(experts, parts, *(shape[2:] if w_blocks else (1, 1))), shape)
        w_scale = w_scale.reshape(*side_by_side[:2], -1, blocks)
    else:
        x_scale = jnp.pad(x_scale, (0, tiling.heights[-1]))
        w_scale = jnp.broadcast_to(w_scale.reshape(experts, parts, n if by_channel else 1), (experts, parts, n))
        w_scale = jnp.pad(w_scale.reshape(side_by_side), past_the_end)
    bias = None if bias is None else bias.astype(jnp.float32).reshape(side_by_side)
    run = functools.partial(
        hopper_fp8_large.run if large else _run, x, w.reshape(*side_by_side, k), x_scale, w_scale, plan
    )
    options: dict[str, Any] = {"tiling": tiling, "num_ctas": num_sms()}
    if splits == 1:
        bias = None if bias is None else jnp.pad(bias, past_the_end)
        out_factor = None if out_scale is None or out_dtype != FP8 else 1 / out_scale
        out = run(bias, out_factor, activation=activation, out_dtype=out_dtype, **options)
    else:
        out = run(None, None, activation=None, out_dtype=jnp.dtype(jnp.float32), splits=splits, **options)
        out = out if bias is None else out + bias[0, 0]
        out = (out if activation is None else gate(activation, out.reshape(-1, 2, n))).astype(out_dtype)
    if isinstance(out, QuantizedArray):
        return QuantizedArray(out.values[:rows], out.scales[:, :rows], "group") if padding else out
    out = out[:rows] if padding else out
    if out.dtype == FP8 and out_scale is not None:
        return QuantizedArray(out, _scales_of_rows(out_scale, group_sizes, rows), "token")
    if quantize_out:
        return _quantize_rows(out, group_sizes, plan[schedule.NUM_ROWS, 0], quantize_out, out_scale)
    return out


def _quantize_rows(
    out: jax.Array, group_sizes: jax.Array, num_rows: jax.Array, granularity: Granularity, out_scale: jax.Array | None
) -> QuantizedArray:
    """`reference.quantize_rows`, by kernels where they serve: those read only the `num_rows` rows that there are."""
    if not quantize_hopper.serves(out):
        return quantize_rows(out, group_sizes, granularity, out_scale)
    if granularity == "group":
        return quantize_hopper.quantize_groups(out, num_rows)
    if granularity == "token":
        return quantize_hopper.quantize_tokens(out, num_rows)
    if out_scale is not None:
        scales = _scales_of_rows(out_scale, group_sizes, len(out))
        return QuantizedArray(quantize_hopper.quantize_by(out, num_rows, scales), scales, "token")
    largest = jnp.where(jnp.arange(len(out)) < num_rows, quantize_hopper.largest_of_rows(out, num_rows), 0)
    scale = quantize_hopper.scales_of(jnp.max(largest))
    values = quantize_hopper.quantize_by(out, num_rows, jnp.broadcast_to(scale, out.shape[:1]))
    return QuantizedArray(values, scale, "tensor")


def _scales_of_rows(out_scale: jax.Array, group_sizes: jax.Array, rows: int) -> jax.Array:
    """An expert's for each of its rows."""
    return jnp.repeat(out_scale, group_sizes, total_repeat_length=rows)


def choose_tiling(
    *,
    rows: int,
    experts: int,
    n: int,
    gated: bool,
    out_dtype: jnp.dtype,
    one_height: bool = False,
) -> Tiling:
    """A tiling for `rows` rows over `experts` groups of unknown sizes; `block_k` is 128 or 256.

    `out_dtype`: float8 where the kernel quantises what is gated.
    `one_height`: for a single group of exactly so many rows, which are cut evenly: code for other heights would be compiled for nothing.
    """
    rows_per_expert = rows / experts
    if rows_per_expert >= _MANY_ROWS:
        return hopper_fp8_large.large_tiling(rows_per_expert=rows_per_expert, gated=gated, quantizes=out_dtype == FP8)
    if rows_per_expert <= 16:
        tiling = Tiling(columns=128, heights=(16, 32), block_k=2 * BLOCK)
    elif rows_per_expert <= (64 if experts == 1 else 48):
        tiling = Tiling(columns=128, heights=(16, 32, 64), block_k=BLOCK)
    else:
        narrow = gated or -(-n // 256) * 256 > 1.15 * n
        heights = tuple(height for height in _HEIGHTS if _fits(height, 256, 4, BLOCK, out_dtype))
        tiling = Tiling(columns=128 if narrow else 256, heights=heights, block_k=BLOCK)
    if one_height:
        tiles_of_rows = pl.cdiv(rows, tiling.heights[-1])
        enough = next(height for height in tiling.heights if height * tiles_of_rows >= rows)
        tiling = dataclasses.replace(tiling, heights=(enough,))
    height, weights = tiling.heights[-1], tiling.columns * (2 if gated else 1)
    # High tiles: a power of two. With others ptxas does not see that an accumulator begins at zero, and runs out of registers.
    counts = (4, 2) if height > 64 else range(8, 1, -1)
    return dataclasses.replace(
        tiling, stages=next(count for count in counts if _fits(height, weights, count, tiling.block_k, out_dtype))
    )


def choose_splits(*, rows: int, n: int, k: int, tiling: Tiling) -> int:
    """Into how many parts k is cut where one group has so few tiles that most of the GPU would be idle."""
    tiles, steps = pl.cdiv(rows, tiling.heights[-1]) * pl.cdiv(n, tiling.columns), pl.cdiv(k, tiling.block_k)
    most = min(num_sms() // tiles, steps // _FEWEST_STEPS)
    return next((splits for splits in range(most, 1, -1) if steps % splits == 0), 1)


def _choose(
    rows: int,
    expected_rows: int,
    w_shape: tuple[int, ...],
    parts: int,
    out_dtype: jnp.dtype,
    *,
    whole_blocks: bool,
) -> tuple[Tiling, int]:
    """A tiling, and in how many parts k is summed. `whole_blocks`: gate and up may not meet within a block of w."""
    experts, (n, k) = w_shape[0], w_shape[-2:]
    one_height = experts == 1 and rows == expected_rows
    if experts == 1 and (parts == 1 or not whole_blocks or n % BLOCK == 0):
        options = {"n": parts * n, "gated": False, "out_dtype": jnp.dtype(jnp.float32), "one_height": one_height}
        tiling = choose_tiling(rows=min(rows, _MANY_ROWS - 1), experts=1, **options)
        splits = choose_splits(rows=rows, n=parts * n, k=k, tiling=tiling)
        if splits > 1:
            return tiling, splits
    tiling = choose_tiling(
        rows=expected_rows,
        experts=experts,
        n=n,
        gated=parts == 2,
        out_dtype=out_dtype,
        one_height=one_height,
    )
    return tiling, 1


def _with_longer_steps(tiling: Tiling, k: int) -> Tiling:
    """High tiles' steps twice as long, for half as many promotions, unless the last of them would be much longer than what is left of k."""
    longer = 2 * BLOCK
    is_high = (tiling.block_k, tiling.stages) == (BLOCK, 4) and not hopper_fp8_large.promotes_meanwhile(tiling)
    fits = k >= 2 * longer and pl.cdiv(k, longer) * longer <= 1.05 * pl.cdiv(k, BLOCK) * BLOCK
    return dataclasses.replace(tiling, block_k=longer, stages=2) if is_high and fits else tiling


_FEWEST_STEPS = 4
_MANY_ROWS = 512  # of an expert: `hopper_fp8_large` runs
_HEIGHTS = (64, 80, 96, 104, 112, 128)


def _fits(height: int, weights: int, stages: int, block_k: int, out_dtype: jnp.dtype) -> bool:
    """Whether shared memory holds so many stages of a tile of `height` rows and `weights` rows of w, and a block of output."""
    stage = (height + weights) * block_k + 4 * _scales_of(height) * (block_k // BLOCK)
    output = _CONSUMERS * height * 64 * out_dtype.itemsize
    if out_dtype == FP8:
        output += sum(4 * math.prod(shape) for shape in _for_quantizing(height))
    return stages * stage + output + 1024 <= SHARED_MEMORY_LIMIT


def _for_quantizing(height: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of what shared memory holds beside, float32, of each warpgroup: scales, room for finding maxima, and these, of two tiles."""
    return (_CONSUMERS, height), (_CONSUMERS, quantize_hopper.MAX_ROOM), (2, _CONSUMERS, height)


def _scales_of(height: int) -> int:
    """The room for a stage's scales: TMA writes to multiples of 128 bytes."""
    return pl.cdiv(height, 32) * 32


def _gather(x: jax.Array, row_index: jax.Array, num_rows: jax.Array) -> jax.Array:
    """Two float8 numbers are moved as one of 16 bits."""
    pairs = lax.bitcast_convert_type(x.reshape(x.shape[0], -1, 2), jnp.bfloat16)
    if not rows_hopper.serves(pairs):
        return x[row_index]
    return lax.bitcast_convert_type(rows_hopper.gather(pairs, row_index, num_rows), FP8).reshape(-1, x.shape[1])


# Under jit of its own, so that a model's layers share one trace and one compilation.
@functools.partial(jax.jit, static_argnames=("activation", "tiling", "num_ctas", "out_dtype", "splits"))
def _run(
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
    splits: int = 1,
) -> jax.Array | QuantizedArray:
    """`w [experts, parts, n, k]`; `x_scale [blocks of k, rows]`, `w_scale [experts, parts, blocks of n, blocks of k]`, or for
    scales at the end `[rows and more]`, `[experts, parts, n and more]`.

    `splits`: tiles hold that part of k each, and are summed by XLA; it divides the steps. `out_dtype` float8: what is gated, each
    expert's times its `out_factor [experts]`, or else quantised in groups of 128; with tiles of so many columns."""
    rows, k = x.shape
    parts, n = w.shape[1:3]
    k_steps, column_tiles = pl.cdiv(k, tiling.block_k) // splits, pl.cdiv(n, tiling.columns)
    own_columns = tiling.columns // _CONSUMERS
    blocks, stages, max_height = own_columns // 64, tiling.stages, tiling.heights[-1]
    scaled_at_the_end, in_groups = w_scale.ndim == 3, out_dtype == FP8 and out_factor is None
    promotions = 1 if scaled_at_the_end else tiling.block_k // BLOCK  # of a step
    promoted_k = tiling.block_k // promotions
    scale_steps = 0 if scaled_at_the_end else promotions
    i32, f32 = jnp.int32, jnp.float32

    def k_block(k_step, i):
        """The i-th block of a step; past the end the last, which scales zeros."""
        return lax.min(k_step * promotions + i, pl.cdiv(k, BLOCK) - 1)

    def place(tile):
        """Which columns of w a tile has, and the first of its steps through k."""
        if splits == 1:
            return tile.column_tile, i32(0)
        part = lax.div(tile.column_tile, i32(column_tiles))
        return tile.column_tile - part * column_tiles, part * k_steps

    def kernel(x_gmem, w_gmem, xs_gmem, ws_gmem, plan_gmem, *refs):
        bias_gmem, refs = refs[: len(biases)], refs[len(biases) :]
        factor_gmem, refs = refs[: len(factors)], refs[len(factors) :]
        (out_gmem, *scales_gmem), refs = refs[: len(out_types)], refs[len(out_types) :]
        x_smem, w_smem, xs_smem, out_smem, full, empty, *for_quantizing = refs
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        all_columns = splits * column_tiles
        walk = tiles.Walk(plan_gmem, cta, num_ctas=num_ctas, column_tiles=all_columns, heights=tiling.heights)

        @pl.when(warpgroup == _CONSUMERS)
        def _produce():
            plgpu.set_max_registers(40, action="decrease")

            def begin(tile):
                first_row = pl.multiple_of(tile.first_row, ROW_ALIGNMENT)
                column_tile, first_step = place(tile)
                columns = pl.ds(column_tile * tiling.columns, tiling.columns)

                def load(height, step, stage):
                    k_step = first_step + step
                    ks, top = pl.ds(k_step * tiling.block_k, tiling.block_k), pl.ds(0, height)
                    plgpu.copy_gmem_to_smem(
                        x_gmem.at[pl.ds(first_row, height), ks], x_smem.at[stage, top], full.at[stage]
                    )
                    for part in range(parts):
                        plgpu.copy_gmem_to_smem(
                            w_gmem.at[tile.expert, part, columns, ks], w_smem.at[stage, part], full.at[stage]
                        )
                    for i in range(scale_steps):
                        plgpu.copy_gmem_to_smem(
                            xs_gmem.at[k_block(k_step, i), pl.ds(first_row, height)],
                            xs_smem.at[stage, i, top],
                            full.at[stage],
                        )

                return load

            walk.produce(k_steps, stages, empty, begin)

        @pl.when(warpgroup < _CONSUMERS)
        def _consume():
            plgpu.set_max_registers(232, action="increase")
            whole = [(part, block) for block in range(blocks) for part in range(parts)]

            def along_rows(values, height):
                return lax.broadcast_in_dim(values, (64, height), (1,))

            def along_columns(ref, height):
                values = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
                return lax.broadcast_in_dim(values, (64, height), (0,))

            def multiply_tile(step, tile):
                first_row = pl.multiple_of(tile.first_row, ROW_ALIGNMENT)
                column_tile, first_step = place(tile)
                first_column = column_tile * tiling.columns + warpgroup * own_columns
                out_column = tile.column_tile * tiling.columns + warpgroup * own_columns

                def sums_of(height):
                    """Of each part and each 64 of this warpgroup's columns, transposed."""

                    def weight_scales(k_step):
                        """Of one step, a scalar for each promotion of each part."""
                        if scaled_at_the_end:
                            return ()
                        # A warpgroup's columns lie in one block of weights; those past n in none.
                        block = lax.min(lax.div(first_column, i32(BLOCK)), ws_gmem.shape[2] - 1)
                        return tuple(
                            ws_gmem[tile.expert, part, block, k_block(first_step + k_step, i)]
                            for i in range(promotions)
                            for part in range(parts)
                        )

                    def k_body(k_step, carry):
                        sums, of_weights = carry
                        count = step * k_steps + k_step
                        stage = lax.rem(count, i32(stages))
                        plgpu.barrier_wait(full.at[stage])
                        following = weight_scales(k_step + 1)
                        for promotion in range(promotions):
                            ks = pl.ds(promotion * promoted_k, promoted_k)
                            rows_smem, of_rows = x_smem.at[stage, pl.ds(0, height), ks], None
                            if not scaled_at_the_end:
                                own = xs_smem.at[stage, promotion, pl.ds(0, height)]
                                of_rows = plgpu.load(own, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
                                if parts == 1:  # the same for both blocks
                                    of_rows = of_rows * of_weights[promotion]
                            new = []
                            for i, (part, block) in enumerate(whole):
                                columns = pl.ds(warpgroup * own_columns + block * 64, 64)
                                weights = w_smem.at[stage, part, columns, ks]

                                def one(accumulator, weights=weights, rows_smem=rows_smem):
                                    plgpu.wgmma(accumulator, weights, rows_smem.T)
                                    return accumulator[...]

                                run = functools.partial(pl.run_scoped, one, plgpu.ACC((64, height), f32))
                                # Behind a branch ptxas does not share its zeros with the next accumulator's, by moves.
                                apart = parts == 1 and i == 0 and height in _APART
                                product = lax.cond(tile.expert >= 0, run, lambda: nothing) if apart else run()
                                if (promotion, i) == (promotions - 1, len(whole) - 1):
                                    plgpu.barrier_arrive(empty.at[stage])
                                if of_rows is not None:
                                    scale = of_rows if parts == 1 else of_rows * of_weights[promotion * parts + part]
                                    product = product * along_rows(scale, height)
                                new.append(sums[i] + product)
                            sums = new
                        return tuple(sums), following

                    nothing = plgpu.layout_cast(jnp.zeros((64, height), f32), plgpu.Layout.WGMMA)
                    start = (nothing,) * len(whole), weight_scales(i32(0))
                    sums, _ = lax.fori_loop(0, k_steps, k_body, start)
                    return dict(zip(whole, sums, strict=True))

                def result_of(sums, block, of_rows, height):
                    """64 columns as they are to be stored, but for their dtype: scaled, biased, gated."""
                    of_parts = []
                    for part in range(parts):
                        result = sums[part, block]
                        columns = (tile.expert, part, pl.ds(first_column + block * 64, 64))
                        if scaled_at_the_end:
                            result = result * of_rows * along_columns(ws_gmem.at[*columns], height)
                        for ref in bias_gmem:
                            result = result + along_columns(ref.at[*columns], height)
                        of_parts.append(result)
                    return gated(activation, *of_parts) if activation else of_parts[0]

                def maxima_of_groups(result, height):
                    """Magnitudes, of each row of a tile's 128 columns: of this warpgroup's 64 and of the other's."""
                    _, room, maxima, met = for_quantizing
                    # Two tiles' by turns: the other warpgroup may still be reading the last one's.
                    of_tile = maxima.at[lax.rem(step, i32(2))]
                    own = quantize_hopper.largest_of_columns(jnp.abs(result), room.at[warpgroup])
                    of_tile[warpgroup, pl.ds(0, height)] = own
                    plgpu.barrier_arrive(met)
                    plgpu.barrier_wait(met)
                    others = of_tile.at[1 - warpgroup, pl.ds(0, height)]
                    return jnp.maximum(own, plgpu.load(others, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False))

                def store(result, scales, block, height):
                    """64 columns, and what they are to be multiplied by, if they are quantised."""
                    if out_dtype.itemsize != 2:  # 16 bits go through the transposed view as they are: matrix stores
                        result = plgpu.layout_cast(result, plgpu.Layout.WGMMA_TRANSPOSED)
                    result = result.astype(out_dtype)
                    # One block's room: the next waits until this one has been read.
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    own_out = out_smem.at[warpgroup, pl.ds(0, height)]
                    own_out.T[...] = result
                    if in_groups:
                        for_quantizing[0][warpgroup, pl.ds(0, height)] = scales
                    plgpu.commit_smem()
                    tiles.store_rows(own_out, out_gmem, tile, out_column + block * 64)
                    if in_groups:  # both have them
                        own_scales = for_quantizing[0].at[warpgroup, pl.ds(0, height)]
                        pl.when(warpgroup == 0)(
                            functools.partial(tiles.store_numbers, own_scales, scales_gmem[0], tile.column_tile, tile)
                        )
                    plgpu.commit_smem_to_gmem_group()

                def multiply(height):
                    sums, of_rows = sums_of(height), None
                    if scaled_at_the_end:
                        own = xs_gmem.at[pl.ds(first_row, height)]
                        of_rows = along_rows(
                            plgpu.load(own, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False), height
                        )
                    for block in range(blocks):
                        result, scales = result_of(sums, block, of_rows, height), None
                        for ref in factor_gmem:
                            result = result * ref[tile.expert]
                        if in_groups:
                            scales = quantize_hopper.scales_of(maxima_of_groups(result, height))
                            result = result * along_rows(1 / scales, height)
                        store(result, scales, block, height)

                walk.for_height(tile.code, multiply)

            walk.over_tiles(multiply_tile)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    biases, factors = ([] if vector is None else [vector] for vector in (bias, out_factor))
    # A copy of one row that is not swizzled is a plain one, which does not stop at the last column.
    out_columns = splits * column_tiles * tiling.columns if out_dtype == f32 else n
    out_types = [jax.ShapeDtypeStruct((rows, out_columns), out_dtype)]
    for_quantizing: list[Any] = []
    if in_groups:
        out_types.append(jax.ShapeDtypeStruct((column_tiles, rows), f32))
        for_quantizing = [plgpu.SMEM(shape, f32) for shape in _for_quantizing(max_height)]
        for_quantizing.append(plgpu.Barrier(num_arrivals=_CONSUMERS))
    out, *scales = plgpu.kernel(
        kernel,
        out_type=out_types,
        scratch_types=[
            plgpu.SMEM((stages, max_height, tiling.block_k), FP8, transforms=operand_transforms(k, 1)),
            plgpu.SMEM((stages, parts, tiling.columns, tiling.block_k), FP8, transforms=operand_transforms(k, 1)),
            plgpu.SMEM((stages, promotions, _scales_of(max_height)), f32),
            plgpu.SMEM(
                (_CONSUMERS, max_height, 64), out_dtype, transforms=OUTPUT_TRANSFORMS if out_dtype.itemsize == 2 else ()
            ),
            plgpu.Barrier(num_arrivals=1 + parts + scale_steps, num_barriers=stages),
            plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=stages),
            *for_quantizing,
        ],
        grid=(num_ctas,),
        grid_names=("cta",),
        num_threads=_CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(x, w, x_scale, w_scale, plan, *biases, *factors)
    if in_groups:
        return QuantizedArray(out, scales[0], "group")
    out = out if splits == 1 else jnp.sum(out.reshape(rows, splits, -1), axis=1)
    return out[:, :n]
