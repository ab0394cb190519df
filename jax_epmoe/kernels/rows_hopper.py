"""Rows of 16-bit numbers moved by index on Hopper: gathered, dealt out, or summed with weights, at about copy speed.

A CTA is one warpgroup. It makes 256 to 1024 columns of an output row (a gathering one, of a few rows) at a time, 16 bytes a
thread, and walks over all there are. All loads of a turn are issued before any is used, with those of the next turn's indices
behind them; several CTAs share a streaming multiprocessor. That hides their latency.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.kernels.device import num_sms

_SLABS = (1024, 512, 256)  # columns of a turn: the widest of those that make the least of a row twice
_ALIGNMENT = 8  # columns that a thread loads at once, at most
_GATHERED = 4  # rows of a gathering turn
_CTAS = 8  # a streaming multiprocessor


def serves(rows: jax.Array) -> bool:
    """Whether the kernels can read rows of such an array `[R, H]`: 16-bit, H a multiple of 8 and at least 256, not empty."""
    is_wide = rows.shape[1] >= _SLABS[-1] and rows.shape[1] % _ALIGNMENT == 0
    return rows.dtype in (jnp.bfloat16, jnp.float16) and is_wide and rows.size > 0


# All under jit of their own, so that a model's layers share one trace and one compilation.
@jax.jit
def gather(x: jax.Array, row_index: jax.Array, num_rows: jax.Array) -> jax.Array:
    """`out[r] = x[row_index[r]]`; what is past `num_rows`, rounded up to a multiple of 4, is left as it is.

    Args:
      x: `[T, H]`, one that `serves`.
      row_index: `[R]` int32, each in range.
      num_rows: an int32.
    """
    (rows,) = row_index.shape
    slab, layout = _slab(x.shape[1])

    def kernel(x_gmem, index_gmem, num_rows_gmem, out_gmem):
        def rows_of(block):
            return [lax.min(block * _GATHERED + i, rows - 1) for i in range(_GATHERED)]

        def indices_of(block):
            return tuple(index_gmem[row] for row in rows_of(block))

        def turn(block, columns, indices, read_next):
            values = [_load(x_gmem.at[index, columns], layout) for index in indices]
            following = read_next()
            for row, value in zip(rows_of(block), values, strict=True):
                out_gmem[row, columns] = value
            return following

        _turns(lax.div(num_rows_gmem[0] + (_GATHERED - 1), _GATHERED), x.shape[1], slab, indices_of, turn)

    return _call(kernel, jax.ShapeDtypeStruct((rows, x.shape[1]), x.dtype), (x, row_index, num_rows.reshape(1)))


@functools.partial(jax.jit, static_argnames="rows")
def dispatch(x: jax.Array, pair_row: jax.Array, rows: int) -> jax.Array:
    """What `rows.dispatch` says, for an x that `serves`; rows that no pair names are left as they are."""
    tokens, top_k = pair_row.shape
    slab, layout = _slab(x.shape[1])

    def kernel(x_gmem, pair_row_gmem, out_gmem):
        def rows_of(token):
            return tuple(pair_row_gmem[token, j] for j in range(top_k))

        def turn(token, columns, own_rows, read_next):
            lowest = functools.reduce(lax.min, own_rows)
            value = lax.cond(
                lowest < rows,
                lambda: _load(x_gmem.at[token, columns], layout),
                lambda: plgpu.layout_cast(jnp.zeros((slab,), x.dtype), layout),
            )
            following = read_next()
            for row in own_rows:

                @pl.when(row < rows)
                def _store(row=row):
                    out_gmem[row, columns] = value

            return following

        _turns(jnp.int32(tokens), x.shape[1], slab, rows_of, turn)

    return _call(kernel, jax.ShapeDtypeStruct((rows, x.shape[1]), x.dtype), (x, pair_row))


@functools.partial(jax.jit, static_argnames="out_dtype")
def combine(
    y: jax.Array,
    pair_row: jax.Array,
    weights: jax.Array,
    base: jax.Array | None,
    *,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """What `rows.combine` says, for a y that `serves`; rows of pairs without one are not read."""
    tokens, top_k = pair_row.shape
    rows, width = y.shape
    slab, layout = _slab(width)

    def kernel(y_gmem, pair_row_gmem, weights_gmem, *rest):
        base_gmem, out_gmem = rest if base is not None else (None, *rest)

        def zeros(dtype):
            return plgpu.layout_cast(jnp.zeros((slab,), dtype), layout)

        def pairs_of(token):
            return tuple((pair_row_gmem[token, j], weights_gmem[token, j]) for j in range(top_k))

        def turn(token, columns, pairs, read_next):
            values = [
                lax.cond(row < rows, lambda row=row: _load(y_gmem.at[row, columns], layout), lambda: zeros(y.dtype))
                for row, _ in pairs
            ]
            total = zeros(jnp.float32)
            if base_gmem is not None:
                total = _load(base_gmem.at[token, columns], layout).astype(jnp.float32)
            following = read_next()
            for (row, weight), value in zip(pairs, values, strict=True):
                add = functools.partial(_add_scaled, total, weight, value)
                total = lax.cond(row < rows, add, lambda total=total: total)  # instructions are what bounds few rows
            out_gmem[token, columns] = total.astype(out_dtype)
            return following

        _turns(jnp.int32(tokens), width, slab, pairs_of, turn)

    operands = (y, pair_row, weights) + (() if base is None else (base,))
    return _call(kernel, jax.ShapeDtypeStruct((tokens, width), out_dtype), operands)


def _slab(width: int) -> tuple[int, Any]:
    """How many columns a turn makes, and how they lie over a CTA's threads."""
    slab = min((slab for slab in _SLABS if slab <= width), key=lambda slab: pl.cdiv(width, slab) * slab)
    return slab, plgpu.Layout.WG_STRIDED((slab,), vec_size=slab // 128)


def _add_scaled(total: jax.Array, weight: jax.Array, value: jax.Array) -> jax.Array:
    return total + weight * value.astype(jnp.float32)


def _load(ref: Any, layout: Any) -> jax.Array:
    return plgpu.load(ref, layout=layout, optimized=False)


def _turns(blocks: jax.Array, width: int, slab: int, read: Callable, turn: Callable) -> None:
    """`turn(block, columns, read(block), read_next)` for this CTA's share of all blocks' slabs; it returns `read_next()`.

    A row's last slab ends with it, and where slabs do not divide its width makes some columns of the one before once more.
    """
    slabs = pl.cdiv(width, slab)
    count, stride, first = blocks * slabs, lax.axis_size("cta"), lax.axis_index("cta")

    def block_of(item):
        return lax.div(lax.min(item, count - 1), jnp.int32(slabs))

    def body(step, values):
        item = first + step * stride
        block = block_of(item)
        first_column = (item - block * slabs) * slab
        if width % slab:
            first_column = lax.min(first_column, jnp.int32(width - slab))
        return turn(block, pl.ds(first_column, slab), values, lambda: read(block_of(item + stride)))

    @pl.when(first < count)
    def _walk():
        lax.fori_loop(0, lax.div(count - first + (stride - 1), stride), body, read(block_of(first)))


def _call(kernel: Any, out: jax.ShapeDtypeStruct, operands: Sequence[jax.Array]) -> jax.Array:
    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(_CTAS * num_sms(),),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),  # there is no shared memory
    )(*operands)
