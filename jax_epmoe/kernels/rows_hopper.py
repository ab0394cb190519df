"""Rows of 16-bit numbers fetched by index on Hopper: gathered, or summed with weights. Both run at copy speed.

A CTA is one warpgroup and makes 256 to 1024 columns of an output row (a gathering one, of a few rows), 16 bytes a thread at a
time. There are many more CTAs than run at once, and all loads of one are issued before any is used: that hides their latency.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_SLABS = (1024, 512, 256)  # columns of a CTA: the widest that divides a row
_GATHERED = 4  # rows of a gathering CTA


def serves(rows: jax.Array) -> bool:
    """Whether the kernels can read rows of such an array `[R, H]`: 16-bit, H a multiple of 256, not empty."""
    return rows.dtype in (jnp.bfloat16, jnp.float16) and rows.shape[1] % _SLABS[-1] == 0 and rows.size > 0


# Both under jit of their own, so that a model's layers share one trace and one compilation.
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
        columns = pl.ds(lax.axis_index("slab") * slab, slab)
        first = lax.axis_index("block") * _GATHERED

        @pl.when(first < num_rows_gmem[0])
        def _copy():
            own = [lax.min(first + i, rows - 1) for i in range(_GATHERED)]
            values = [_load(x_gmem.at[index_gmem[row], columns], layout) for row in own]
            for row, value in zip(own, values, strict=True):
                out_gmem[row, columns] = value

    return _kernel(kernel, jax.ShapeDtypeStruct((rows, x.shape[1]), x.dtype), pl.cdiv(rows, _GATHERED), slab)(
        x, row_index, num_rows.reshape(1)
    )


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
        columns = pl.ds(lax.axis_index("slab") * slab, slab)
        token = lax.axis_index("block")

        def zeros(dtype):
            return plgpu.layout_cast(jnp.zeros((slab,), dtype), layout)

        def row_of(choice):
            row = pair_row_gmem[token, choice]
            return lax.cond(row < rows, lambda: _load(y_gmem.at[row, columns], layout), lambda: zeros(y.dtype))

        values = [row_of(choice) for choice in range(top_k)]
        total = zeros(jnp.float32) if base_gmem is None else _load(base_gmem.at[token, columns], layout)
        for choice, value in enumerate(values):
            total += weights_gmem[token, choice] * value.astype(jnp.float32)
        out_gmem[token, columns] = total.astype(out_dtype)

    operands = [y, pair_row, weights] + ([] if base is None else [base])
    return _kernel(kernel, jax.ShapeDtypeStruct((tokens, width), out_dtype), tokens, slab)(*operands)


def _slab(width: int) -> tuple[int, Any]:
    """How many columns a CTA makes, and how they lie over its threads."""
    slab = next(slab for slab in _SLABS if width % slab == 0)
    return slab, plgpu.Layout.WG_STRIDED((slab,), vec_size=slab // 128)


def _load(ref: Any, layout: Any) -> jax.Array:
    return plgpu.load(ref, layout=layout, optimized=False)


def _kernel(kernel: Any, out: jax.ShapeDtypeStruct, blocks: int, slab: int) -> Any:
    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(blocks, out.shape[1] // slab),
        grid_names=("block", "slab"),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),  # there is no shared memory
    )
