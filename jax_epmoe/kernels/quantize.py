"""Activations quantised as the weights ask that they will be multiplied with: by Hopper's kernel, or else by XLA."""

import jax
import jax.numpy as jnp

from jax_epmoe.kernels import quantize_hopper
from jax_epmoe.kernels.device import on_hopper
from jax_epmoe.quant import QuantizedArray, QuantizedWeights

_KERNELS = {"group": quantize_hopper.quantize_groups, "token": quantize_hopper.quantize_tokens}


def quantize_input(x: jax.Array, weights: QuantizedWeights, backend: str | None) -> QuantizedArray:
    """`weights.quantize_input(x)` of `x [rows, k]`; `backend`: as `grouped_gemm`'s."""
    granularity = weights.format.activations
    by_kernel = backend in (None, "hopper") and on_hopper()
    if by_kernel and granularity in _KERNELS and quantize_hopper.serves(x, granularity):
        return _KERNELS[granularity](x, jnp.int32(x.shape[0]))
    return weights.quantize_input(x)
