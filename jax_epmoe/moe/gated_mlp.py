"""A gated MLP, its intermediate dimension split over the tensor-parallel group: shared experts and dense layers."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jax_epmoe.config import Activation
from jax_epmoe.kernels.activations import gate
from jax_epmoe.kernels.grouped_gemm import grouped_gemm
from jax_epmoe.kernels.grouped_gemm.quantized import BACKENDS, refuse_gradient
from jax_epmoe.kernels.quantize import quantize_input
from jax_epmoe.parameters import parameter
from jax_epmoe.quant import NOT_QUANTIZED, Quantization, QuantizedWeights, dequantize
from jax_epmoe.quantized_parameters import DenseWeights, dense_weights


class GatedMLP(nnx.Module):
    """`(act(x @ gate.T) * (x @ up.T)) @ down.T`.

    Parameters: `w_gate_up [2, I, H]` (gate first) and `w_down [H, I]`, I over `axes`, zero-padded to divide; quantised or not. With
    `output_gate`, the output is multiplied by `sigmoid(x @ output_gate.T)`: a parameter `[1, H]`, on every device. `backend`: of
    products with quantised weights.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: Activation,
        axes: Sequence[str],
        mesh: Mesh,
        dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
        output_gate: bool = False,
        quantization: Quantization = NOT_QUANTIZED,
        backend: str | None = None,
    ):
        new: dict[str, Any] = {"mesh": mesh, "dtype": dtype, "rngs": rngs}
        gate_up, down = (quantization.of(name) for name in ("w_gate_up", "w_down"))
        self.activation = activation
        self.w_gate_up = dense_weights(
            (2, intermediate_size, hidden_size), (None, tuple(axes), None), gate_up, backend=backend, **new
        )
        self.w_down = dense_weights((hidden_size, intermediate_size), (None, tuple(axes)), down, backend=backend, **new)
        self.output_gate = parameter((1, hidden_size), (None, None), **new) if output_gate else None

    def partial_sum(self, x: jax.Array) -> jax.Array:
        """One device's share of the output, inside a shard_map: `[T, H]` -> `[T, H]`, to be summed over `axes`.

        In float32; where weights are quantised and there is no output gate, in x's dtype.
        """
        hidden = linear(x, self.w_gate_up, self.activation, x.dtype)  # [T, I / devices]
        out = linear(hidden, self.w_down, out_dtype=x.dtype if isinstance(self.w_down, DenseWeights) else jnp.float32)
        if self.output_gate is None:
            return out
        return out * jax.nn.sigmoid(linear(x, self.output_gate))


# With fewer rows XLA may split a sum, and would round its parts to the output's dtype.
_MANY_ROWS = 512


def linear(
    x: jax.Array,
    w: jax.Array | nnx.Param | DenseWeights,
    activation: Activation | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """`x [..., k]` times `w [*out, k]` -> `[..., *out]`, summed in float32; float32 operands are multiplied as float32, not tf32.

    With an activation, `w [2, n, k]`, gate first -> `[..., n]`. Where w is quantised, x is too, both are multiplied so, and the
    sum is rounded to x's dtype; but a part of w that cuts a block is dequantised to that dtype, and x stays as it is.
    """
    weights = w.quantized() if isinstance(w, DenseWeights) else None
    if isinstance(w, DenseWeights) and weights is not None:
        product = _quantized_product(x.reshape(-1, x.shape[-1]), weights, activation, w.backend)
        return product.reshape(*x.shape[:-1], *w.columns).astype(out_dtype)
    return _product(x, w[...], activation, out_dtype)


def _product(x: jax.Array, w: jax.Array, activation: Activation | None, out_dtype: jax.typing.DTypeLike) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    contract = (((x.ndim - 1,), (w.ndim - 1,)), ((), ()))
    # A conversion behind the product keeps XLA from its fastest kernels, or is a kernel more.
    sum_dtype = out_dtype if activation is None and x.size // x.shape[-1] >= _MANY_ROWS else jnp.float32
    out = jax.lax.dot_general(x, w, contract, precision=precision, preferred_element_type=sum_dtype)
    return (out if activation is None else gate(activation, out)).astype(out_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _quantized_product(
    x: jax.Array, weights: QuantizedWeights, activation: Activation | None, backend: str | None
) -> jax.Array:
    """`linear` of `x [rows, k]`: by a kernel if one serves, or else of what both operands stand for, in x's dtype."""
    w, x_quantized = weights.weights, quantize_input(x, weights, backend)
    for kernel in BACKENDS:
        if kernel != "xla" and backend in (None, kernel):
            with suppress(NotImplementedError):
                out = grouped_gemm(
                    x_quantized.values,
                    w.values[None],
                    jnp.array([x.shape[0]], jnp.int32),
                    x_scale=x_quantized.scales,
                    w_scale=w.scales[None],
                    activation=activation,
                    out_dtype=x.dtype,  # float32 makes Hopper's tiles lower: 12 to 37% slower at 8192 rows
                    backend=kernel,
                )
                return out
    return _product(dequantize(x_quantized, x.dtype), dequantize(w, x.dtype), activation, x.dtype)


_quantized_product.defvjp(refuse_gradient, refuse_gradient)
