"""Activations quantised as the weights ask that they will be multiplied with: by Hopper's kernels, or else by XLA."""

import jax
import jax.numpy as jnp

from jax_epmoe.kernels import quantize_hopper
from jax_epmoe.kernels.device import on_hopper
from jax_epmoe.quant import QuantizedArray, QuantizedWeights

_KERNELS = {"group": quantize_hopper.quantize_groups, "token": quantize_hopper.quantize_tokens}
_MOST_ROWS = 3  # a token: above it, rows quantised once and gathered in float8 cost less
_FEW_VALUES = 2**22  # of all rows: below it, one kernel costs less than two


def quantize_input(x: jax.Array, weights: QuantizedWeights, backend: str | None) -> QuantizedArray:
    """`weights.quantize_input(x)` of `x [rows, k]`; `backend`: as `grouped_gemm`'s."""
    granularity = weights.format.activations
    if _by_kernel(backend) and granularity in _KERNELS and quantize_hopper.serves(x):
        return _KERNELS[granularity](x, jnp.int32(x.shape[0]))
    return weights.quantize_input(x)


def gathers(x: jax.Array, rows: int, weights: QuantizedWeights, backend: str | None) -> bool:
    """Whether `gather_input` of about so many rows can be had, and costs less than a gather of `quantize_input`."""
    is_dynamic_tensor = weights.format.activations == "tensor" and not weights.format.static  # a scale of all rows
    is_cheaper = rows <= _MOST_ROWS * x.shape[0] or rows * x.shape[1] <= _FEW_VALUES
    return _by_kernel(backend) and not is_dynamic_tensor and is_cheaper and quantize_hopper.serves_gather(x)


def gather_input(x: jax.Array, row_index: jax.Array, num_rows: jax.Array, weights: QuantizedWeights) -> QuantizedArray:
    """`weights.quantize_input(x)[row_index]`; what is past the first `num_rows` is left as it is.

    Args:
      x: `[T, k]`, one that `gathers`.
      row_index: `[R]` int32, each in range.
      num_rows: an int32, at most R.
      weights: what the rows are to be multiplied with.
    """
    scale = None if weights.input_scales is None else jnp.max(weights.input_scales)
    return quantize_hopper.gather(x, row_index, num_rows, scale, granularity=weights.format.activations)


def _by_kernel(backend: str | None) -> bool:
    return backend in (None, "hopper") and on_hopper()
