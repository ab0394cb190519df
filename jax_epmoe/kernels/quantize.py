"""Activations quantised as the weights ask that they will be multiplied with: by Hopper's kernel, or else by XLA."""

import jax
import jax.numpy as jnp

from jax_epmoe.kernels import quantize_hopper
from jax_epmoe.kernels.device import on_hopper
from jax_epmoe.quant import QuantizedArray, QuantizedWeights


def quantize_input(x: jax.Array, weights: QuantizedWeights, backend: str | None) -> QuantizedArray:
    """`weights.quantize_input(x)` of `x [rows, k]`; `backend`: as `grouped_gemm`'s."""
    by_kernel = backend in (None, "hopper") and on_hopper()
    if by_kernel and weights.format.activations == "group" and quantize_hopper.serves(x):
        return quantize_hopper.quantize_groups(x, jnp.int32(x.shape[0]))
    return weights.quantize_input(x)
