"""Rows quantised on Hopper, with a scale for 128 numbers or for a row: only those that there are, read once."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.kernels.device import num_sms
from jax_epmoe.kernels.warp_rows import HEIGHT, ROWS_BY_4
from jax_epmoe.quant import BLOCK, FP8, FP8_MAX, QuantizedArray

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_ROWS = 64
_CTAS = 8  # a streaming multiprocessor
MAX_ROOM = 1536  # for six registers at a time
_HELD_BYTES = 2**14  # of a row: a warp's, 128 registers


def serves(rows: jax.Array, granularity: str = "group") -> bool:
    """Whether `rows [R, n]` can be quantised here: bfloat16, float16 or float32, n a multiple of 128, R at least 64 (groups) or 4."""
    least = _ROWS if granularity == "group" else HEIGHT
    return rows.dtype in _DTYPES and rows.shape[0] >= least and rows.shape[1] % BLOCK == 0 and rows.size > 0


# Under jit of its own, so that a model's layers share one trace and one compilation.
@jax.jit
def quantize_groups(rows: jax.Array, num_rows: jax.Array) -> QuantizedArray:
    """What `quant.quantize(rows, "group")` gives of the first `num_rows`; what is past those, rounded up to 64, is left as it is.

    Args:
      rows: `[R, n]`, ones that it `serves`.
      num_rows: an int32, at most R.
    """
    total, n = rows.shape
    columns, ctas = n // BLOCK, num_sms() * _CTAS
    i32 = jnp.int32

    def kernel(rows_gmem, num_rows_gmem, values_gmem, scales_gmem, values_smem):
        cta = lax.axis_index("cta")
        blocks = lax.div(num_rows_gmem[0] + (_ROWS - 1), i32(_ROWS)) * columns

        def body(turn, _):
            block = turn * ctas + cta
            row_block = lax.div(block, i32(columns))
            column = block - row_block * columns
            here = pl.ds(lax.min(row_block * _ROWS, total - _ROWS), _ROWS)  # the last may do some rows again
            group = pl.ds(column * BLOCK, BLOCK)
            values = plgpu.load(rows_gmem.at[here, group], layout=plgpu.Layout.WGMMA, optimized=False)
            values, scales = quantize_values(values.astype(jnp.float32))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            values_smem[...] = values
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(values_smem, values_gmem.at[here, group])
            scales_gmem[column, here] = scales
            return ()

        lax.fori_loop(0, lax.div(blocks - cta + (ctas - 1), i32(ctas)), body, ())
        plgpu.wait_smem_to_gmem(0)

    values, scales = plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct(rows.shape, FP8), jax.ShapeDtypeStruct((columns, total), jnp.float32)),
        scratch_types=[plgpu.SMEM((_ROWS, BLOCK), FP8)],
        grid=(ctas,),
        grid_names=("cta",),
    )(rows, num_rows.reshape(1))
    return QuantizedArray(values, scales, "group")


@jax.jit
def quantize_tokens(rows: jax.Array, num_rows: jax.Array) -> QuantizedArray:
    """What `quant.quantize(rows, "token")` gives of the first `num_rows`; what is past those, rounded up to 4, is left as it is.

    Args:
      rows: `[R, n]`, ones that it `serves`.
      num_rows: an int32, at most R.
    """

    def turn(row: "_Rows", values_gmem: Any, scales_gmem: Any) -> None:
        scales = scales_of(row.largest())
        row.store(values_gmem, 1 / scales)
        scales_gmem[row.here] = scales

    out = jax.ShapeDtypeStruct(rows.shape, FP8), jax.ShapeDtypeStruct(rows.shape[:1], jnp.float32)
    return QuantizedArray(*_over_rows(turn, rows, num_rows, (), out), "token")


@jax.jit
def quantize_by(rows: jax.Array, num_rows: jax.Array, scales: jax.Array) -> jax.Array:
    """The values of `quant.quantize(rows, "token", scales)`, for the same rows as `quantize_tokens`; `scales [R]`."""

    def turn(row: "_Rows", scales_gmem: Any, values_gmem: Any) -> None:
        own = plgpu.load(scales_gmem.at[row.here], layout=ROWS_BY_4.reduce(1), optimized=False)
        row.store(values_gmem, 1 / own)

    return _over_rows(turn, rows, num_rows, (scales,), jax.ShapeDtypeStruct(rows.shape, FP8))


@jax.jit
def largest_of_rows(rows: jax.Array, num_rows: jax.Array) -> jax.Array:
    """`[R]`: the largest magnitude of each of the first `num_rows`; what is past those, rounded up to 4, is left as it is."""

    def turn(row: "_Rows", largest_gmem: Any) -> None:
        largest_gmem[row.here] = row.largest()

    return _over_rows(turn, rows, num_rows, (), jax.ShapeDtypeStruct(rows.shape[:1], jnp.float32))


class _Rows:
    """Four rows in a kernel, a warp's each. Short ones are read once, into registers; longer ones in parts, each time anew."""

    def __init__(self, rows_gmem: Any, here: Any) -> None:
        self.rows_gmem, self.here = rows_gmem, here
        n = rows_gmem.shape[1]
        blocks, held = n // BLOCK, _HELD_BYTES // (BLOCK * rows_gmem.dtype.itemsize)
        self.is_held = blocks <= held
        # Columns of a part, of equally many blocks; half of what could be held, for compilers keep some of the next one's too.
        of_part = blocks if self.is_held else max(i for i in range(1, held // 2 + 1) if blocks % i == 0)
        self.width, self.parts = of_part * BLOCK, blocks // of_part
        if self.is_held:
            self.values = self.load(0)

    def blocks(self, part: jax.Array | int) -> list[Any]:
        return [pl.ds(part * self.width + i * BLOCK, BLOCK) for i in range(self.width // BLOCK)]

    def load(self, part: jax.Array | int) -> list[jax.Array]:
        refs = [self.rows_gmem.at[self.here, block] for block in self.blocks(part)]
        return [plgpu.load(ref, layout=ROWS_BY_4, optimized=False) for ref in refs]

    def largest(self) -> jax.Array:
        """`[4]` float32: of magnitudes."""

        def of(values: Sequence[jax.Array]) -> jax.Array:
            return functools.reduce(jnp.maximum, map(jnp.abs, values))

        if self.is_held:
            found = of(self.values)
        else:
            start = plgpu.layout_cast(jnp.zeros((HEIGHT, BLOCK), self.rows_gmem.dtype), ROWS_BY_4)
            found = lax.fori_loop(0, self.parts, lambda part, found: jnp.maximum(found, of(self.load(part))), start)
        return jnp.max(found.astype(jnp.float32), axis=1)

    def store(self, values_gmem: Any, factors: jax.Array) -> None:
        """The rows in float8, each times its own of `factors [4]`."""
        factors = plgpu.layout_cast(lax.broadcast_in_dim(factors, (HEIGHT, BLOCK), (0,)), ROWS_BY_4)

        def store_part(part: jax.Array | int, values: Sequence[jax.Array]) -> None:
            for block, value in zip(self.blocks(part), values, strict=True):
                values_gmem[self.here, block] = (value.astype(jnp.float32) * factors).astype(FP8)  # which saturates

        if self.is_held:
            store_part(0, self.values)
        else:

            @pl.loop(0, self.parts)
            def _(part):
                store_part(part, self.load(part))


def _over_rows(turn: Any, rows: jax.Array, num_rows: jax.Array, more: tuple[jax.Array, ...], out: Any) -> Any:
    """A kernel that gives `turn` the first `num_rows` rows, four at a time, with references to `more` and to what comes out."""
    total = len(rows)
    ctas = min(pl.cdiv(total, HEIGHT), num_sms() * _CTAS)

    def kernel(rows_gmem, num_rows_gmem, *refs):
        cta = lax.axis_index("cta")
        blocks = lax.div(num_rows_gmem[0] + (HEIGHT - 1), HEIGHT)

        def body(step, _):
            first_row = lax.min((step * ctas + cta) * HEIGHT, total - HEIGHT)  # the last may do some rows again
            turn(_Rows(rows_gmem, pl.ds(first_row, HEIGHT)), *refs)
            return ()

        lax.fori_loop(0, lax.div(blocks - cta + (ctas - 1), ctas), body, ())

    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(ctas,),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),  # there is no shared memory
    )(rows, num_rows.reshape(1), *more)


def quantize_values(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """In a kernel: `values [rows, n]` float32 in float8, a scale a row, and the scales `[rows]`, as `quant.quantize` has them."""
    scales = scales_of(jnp.max(jnp.abs(values), axis=1))
    return (values * lax.broadcast_in_dim(1 / scales, values.shape, (0,))).astype(FP8), scales  # which saturates


def scales_of(largest: jax.Array) -> jax.Array:
    """Of values whose largest magnitudes these are."""
    return jnp.where(largest <= FP8_MAX * jnp.finfo(jnp.float32).tiny, 1.0, largest * (1 / FP8_MAX))


def largest_of_columns(values: jax.Array, room: Any) -> jax.Array:
    """`jnp.max(values, axis=0)` in a kernel of several warpgroups, of `[64, n]` float32 in wgmma's layout.

    That function's shared memory is the same for all of them; `room` is a warpgroup's own, `[MAX_ROOM]` float32.
    """
    shape = plgpu.ShapeDtypeStruct(values.shape[1:], jnp.float32, layout=plgpu.Layout.WGMMA.reduce(0))

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()), return_type=shape)
    def largest(ctx: Any, values: Any, room: Any) -> Any:
        return values.reduce("max", 0, room)

    return largest(values, room)
