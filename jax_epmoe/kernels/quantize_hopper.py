"""Rows quantised in groups of 128 on Hopper: only those that there are, read once."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.kernels.device import num_sms
from jax_epmoe.quant import BLOCK, FP8, FP8_MAX, QuantizedArray

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_ROWS = 64
_CTAS = 8  # a streaming multiprocessor
MAX_ROOM = 1536  # for six registers at a time


def serves(rows: jax.Array) -> bool:
    """Whether `quantize_groups` can take `rows [R, n]`: bfloat16, float16 or float32, at least 64 of them, n a multiple of 128."""
    return rows.dtype in _DTYPES and rows.shape[0] >= _ROWS and rows.shape[1] % BLOCK == 0 and rows.size > 0


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
