"""Rows quantised on Hopper, with a scale for 128 numbers, a row or all, where they lie or gathered: only those that there are."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.kernels.device import num_sms
from jax_epmoe.kernels.warp_rows import HEIGHT, ROWS_BY_4
from jax_epmoe.quant import BLOCK, FP8, FP8_MAX, Granularity, QuantizedArray

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_CTAS = 8  # a streaming multiprocessor
_GATHERING_CTAS = 16
_LONGEST_GATHERED = 16384  # columns, 128 a thread
MAX_ROOM = 1536  # for six registers at a time
_HELD_BYTES = 2**14  # of a row: a warp's, 128 registers
_CHUNK = 1024  # columns at most


def serves(rows: jax.Array) -> bool:
    """Whether `rows [R, n]` can be quantised here: bfloat16, float16 or float32, at least 4 of them, n a multiple of 128."""
    return rows.dtype in _DTYPES and rows.shape[0] >= HEIGHT and rows.shape[1] % BLOCK == 0 and rows.size > 0


def serves_gather(x: jax.Array) -> bool:
    """Whether `gather` can take `x [T, n]`: bfloat16, float16 or float32, n a multiple of 512, at most 16384."""
    _, n = x.shape
    return x.dtype in _DTYPES and n % (HEIGHT * BLOCK) == 0 and n <= _LONGEST_GATHERED and x.size > 0


# All under jit of their own, so that a model's layers share one trace and one compilation.
@jax.jit
def quantize_groups(rows: jax.Array, num_rows: jax.Array) -> QuantizedArray:
    """What `quant.quantize(rows, "group")` gives of the first `num_rows`; what is past those, rounded up to 4, is left as it is.

    Args:
      rows: `[R, n]`, ones that it `serves`.
      num_rows: an int32, at most R.
    """
    width = _chunk(rows.shape[1])

    def turn(rows_gmem: Any, here: Any, chunk: jax.Array, values_gmem: Any, scales_gmem: Any) -> None:
        blocks = [chunk * (width // BLOCK) + i for i in range(width // BLOCK)]
        values = [_load(rows_gmem, here, pl.ds(block * BLOCK, BLOCK)) for block in blocks]
        for block, value in zip(blocks, values, strict=True):
            scales = scales_of(_largest([value]))
            values_gmem[here, pl.ds(block * BLOCK, BLOCK)] = _scaled(value, 1 / scales)
            scales_gmem[block, here] = scales

    out = jax.ShapeDtypeStruct(rows.shape, FP8), jax.ShapeDtypeStruct((rows.shape[1] // BLOCK, len(rows)), jnp.float32)
    values, scales = _over_rows(turn, rows, num_rows, (), out, chunks=rows.shape[1] // width)
    return QuantizedArray(values, scales, "group")


@jax.jit
def quantize_tokens(rows: jax.Array, num_rows: jax.Array) -> QuantizedArray:
    """`quantize_groups` with a scale a row."""

    def turn(rows_gmem: Any, here: Any, _: jax.Array, values_gmem: Any, scales_gmem: Any) -> None:
        row = _Rows(rows_gmem, here)
        scales = scales_of(row.largest())
        row.store(values_gmem, 1 / scales)
        scales_gmem[here] = scales

    out = jax.ShapeDtypeStruct(rows.shape, FP8), jax.ShapeDtypeStruct(rows.shape[:1], jnp.float32)
    values, scales = _over_rows(turn, rows, num_rows, (), out)
    return QuantizedArray(values, scales, "token")


@jax.jit
def quantize_by(rows: jax.Array, num_rows: jax.Array, scales: jax.Array) -> jax.Array:
    """The values of `quant.quantize(rows, "token", scales)`, for the same rows as `quantize_groups`; `scales [R]`."""
    width = _chunk(rows.shape[1])

    def turn(rows_gmem: Any, here: Any, chunk: jax.Array, scales_gmem: Any, values_gmem: Any) -> None:
        columns = pl.ds(chunk * width, width)
        own = plgpu.load(scales_gmem.at[here], layout=ROWS_BY_4.reduce(1), optimized=False)
        values_gmem[here, columns] = _scaled(_load(rows_gmem, here, columns), 1 / own)

    out = jax.ShapeDtypeStruct(rows.shape, FP8)
    return _over_rows(turn, rows, num_rows, (scales,), out, chunks=rows.shape[1] // width)


@jax.jit
def largest_of_rows(rows: jax.Array, num_rows: jax.Array) -> jax.Array:
    """`[R]`: the largest magnitude of each of the first `num_rows`; what is past those, rounded up to 4, is left as it is."""

    def turn(rows_gmem: Any, here: Any, _: jax.Array, largest_gmem: Any) -> None:
        largest_gmem[here] = _Rows(rows_gmem, here).largest()

    return _over_rows(turn, rows, num_rows, (), jax.ShapeDtypeStruct(rows.shape[:1], jnp.float32))


@functools.partial(jax.jit, static_argnames="granularity")
def gather(
    x: jax.Array, row_index: jax.Array, num_rows: jax.Array, scale: jax.Array | None, *, granularity: Granularity
) -> QuantizedArray:
    """`quant.quantize(x[row_index], granularity, scale)`; what is past `num_rows` is left as it is.

    A CTA takes a row, each of its warps a group of 128 of every four.

    Args:
      x: `[T, n]`, one that it `serves_gather`.
      row_index: `[R]` int32, each in range.
      num_rows: an int32, at most R.
      scale: a float32 with "tensor", or else None.
      granularity: "group", "token" or "tensor".
    """
    (rows,), (tokens, n) = row_index.shape, x.shape
    ctas = min(rows, num_sms() * _GATHERING_CTAS)
    f32, quarters = jnp.float32, range(n // (HEIGHT * BLOCK))
    given = [] if scale is None else [scale.reshape(1)]
    shape_of_scales = {"group": (n // BLOCK, rows), "token": (rows,)}.get(granularity)
    out_scales = [] if shape_of_scales is None else [jax.ShapeDtypeStruct(shape_of_scales, f32)]

    def kernel(x_gmem, index_gmem, num_rows_gmem, *refs):
        given_gmem, (values_gmem, *scales_gmem), largest_smem = refs[: len(given)], refs[len(given) : -1], refs[-1]
        cta = lax.axis_index("cta")

        def body(step, _):
            row = step * ctas + cta
            groups = [pl.ds(i * HEIGHT, HEIGHT) for i in quarters]
            token = index_gmem[row]
            values = [plgpu.load(x_gmem.at[token, group], layout=ROWS_BY_4, optimized=False) for group in groups]
            if granularity == "group":
                for group, value in zip(groups, values, strict=True):
                    scales = scales_of(_largest([value]))
                    values_gmem[row, group] = _scaled(value, 1 / scales)
                    scales_gmem[0][group, row] = scales
                return ()
            if granularity == "token":
                largest_smem[...] = _largest(values)  # a warp's, each
                own = scales_of(functools.reduce(jnp.maximum, [largest_smem[i] for i in range(HEIGHT)]))
                scales_gmem[0][row] = own
            else:
                own = given_gmem[0][0]
            for group, value in zip(groups, values, strict=True):
                values_gmem[row, group] = (value.astype(f32) * (1 / own)).astype(FP8)
            return ()

        lax.fori_loop(0, lax.div(num_rows_gmem[0] - cta + (ctas - 1), ctas), body, ())

    values, *scales = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((rows, n // BLOCK, BLOCK), FP8), *out_scales],
        scratch_types=[plgpu.SMEM((HEIGHT,), f32)],
        grid=(ctas,),
        grid_names=("cta",),
    )(x.reshape(tokens, n // BLOCK, BLOCK), row_index, num_rows.reshape(1), *given)
    return QuantizedArray(values.reshape(rows, n), scales[0] if scale is None else scale, granularity)


class _Rows:
    """Four rows in a kernel, a warp's each. Short ones are read once, into registers; longer ones in chunks, each time anew."""

    def __init__(self, rows_gmem: Any, here: Any) -> None:
        self.rows_gmem, self.here = rows_gmem, here
        n = rows_gmem.shape[1]
        self.width = _chunk(n)
        self.chunks = n // self.width
        is_held = n * rows_gmem.dtype.itemsize <= _HELD_BYTES
        self.held = [self.load(chunk) for chunk in range(self.chunks)] if is_held else None

    def columns(self, chunk: jax.Array | int) -> Any:
        return pl.ds(chunk * self.width, self.width)

    def load(self, chunk: jax.Array | int) -> jax.Array:
        return _load(self.rows_gmem, self.here, self.columns(chunk))

    def largest(self) -> jax.Array:
        """`[4]` float32: of magnitudes."""
        if self.held is not None:
            return _largest(self.held)
        start = plgpu.layout_cast(jnp.zeros((HEIGHT, self.width), self.rows_gmem.dtype), ROWS_BY_4)
        return _largest(
            [lax.fori_loop(0, self.chunks, lambda chunk, found: _magnitudes([found, self.load(chunk)]), start)]
        )

    def store(self, values_gmem: Any, factors: jax.Array) -> None:
        """The rows in float8, each times its own of `factors [4]`."""
        for chunk, value in enumerate(self.held or ()):
            values_gmem[self.here, self.columns(chunk)] = _scaled(value, factors)
        if self.held is None:

            @pl.loop(0, self.chunks)
            def _(chunk):
                values_gmem[self.here, self.columns(chunk)] = _scaled(self.load(chunk), factors)


def _chunk(n: int) -> int:
    """How many columns a kernel takes at once of so many: multiples of 128 that divide them."""
    blocks = n // BLOCK
    return BLOCK * max(i for i in range(1, _CHUNK // BLOCK + 1) if blocks % i == 0)


def _load(rows_gmem: Any, here: Any, columns: Any) -> jax.Array:
    return plgpu.load(rows_gmem.at[here, columns], layout=ROWS_BY_4, optimized=False)


def _magnitudes(values: Sequence[jax.Array]) -> jax.Array:
    """At each place the largest of all."""
    return functools.reduce(jnp.maximum, map(jnp.abs, values))


def _largest(values: Sequence[jax.Array]) -> jax.Array:
    """`[4]` float32: the largest magnitude in each row of all `values [4, columns]`."""
    return jnp.max(_magnitudes(values).astype(jnp.float32), axis=1)


def _scaled(value: jax.Array, factors: jax.Array) -> jax.Array:
    """`value [4, columns]` in float8, each row times its own of `factors [4]`; the rounding saturates."""
    factors = plgpu.layout_cast(lax.broadcast_in_dim(factors, value.shape, (0,)), ROWS_BY_4)
    return (value.astype(jnp.float32) * factors).astype(FP8)


def _over_rows(
    turn: Callable[..., None],
    rows: jax.Array,
    num_rows: jax.Array,
    more: tuple[jax.Array, ...],
    out: Any,
    *,
    chunks: int = 1,
) -> Any:
    """A kernel that calls `turn(rows_gmem, here, chunk, *refs)` for the first `num_rows` rows, four at a time, and each of `chunks`.

    The references are to `more` and to what comes out.
    """
    total = len(rows)
    ctas = min(pl.cdiv(total, HEIGHT) * chunks, num_sms() * _CTAS)

    def kernel(rows_gmem, num_rows_gmem, *refs):
        cta = lax.axis_index("cta")
        items = lax.div(num_rows_gmem[0] + (HEIGHT - 1), HEIGHT) * chunks

        def body(step, _):
            item = step * ctas + cta
            block = lax.div(item, jnp.int32(chunks))
            first_row = lax.min(block * HEIGHT, total - HEIGHT)  # the last may do some rows again
            turn(rows_gmem, pl.ds(first_row, HEIGHT), item - block * chunks, *refs)
            return ()

        lax.fori_loop(0, lax.div(items - cta + (ctas - 1), ctas), body, ())

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
