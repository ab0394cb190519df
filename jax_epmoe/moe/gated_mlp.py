"""A gated MLP, its intermediate dimension split over the tensor-parallel group: shared experts and dense layers."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jax_epmoe.config import Activation
from jax_epmoe.kernels.activations import gate
from jax_epmoe.parameters import parameter
from jax_epmoe.quant import NOT_QUANTIZED, Quantization
from jax_epmoe.quantized_parameters import DenseWeights, dense_weights


class GatedMLP(nnx.Module):
    """`(act(x @ gate.T) * (x @ up.T)) @ down.T`.

    Parameters: `w_gate_up [2, I, H]` (gate first) and `w_down [H, I]`, I over `axes`, zero-padded to divide; quantised or not. With
    `output_gate`, the output is multiplied by `sigmoid(x @ output_gate.T)`: a parameter `[1, H]`, on every device.
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
    ):
        new: dict[str, Any] = {"mesh": mesh, "dtype": dtype, "rngs": rngs}
        self.activation = activation
        self.w_gate_up = dense_weights(
            (2, intermediate_size, hidden_size), (None, tuple(axes), None), quantization.of("w_gate_up"), **new
        )
        self.w_down = dense_weights(
            (hidden_size, intermediate_size), (None, tuple(axes)), quantization.of("w_down"), **new
        )
        self.output_gate = parameter((1, hidden_size), (None, None), **new) if output_gate else None

    def partial_sum(self, x: jax.Array) -> jax.Array:
        """One device's share of the output, inside a shard_map: `[T, H]` -> `[T, H]` float32, to be summed over `axes`."""
        gate_up = linear(x, self.w_gate_up)  # [T, 2, I / devices]
        hidden = gate(self.activation, gate_up).astype(x.dtype)
        out = linear(hidden, self.w_down)
        if self.output_gate is None:
            return out
        return out * jax.nn.sigmoid(linear(x, self.output_gate))


def linear(x: jax.Array, w: jax.Array | nnx.Param | DenseWeights) -> jax.Array:
    """`x [..., k]` times `w [*out, k]` -> `[..., *out]` in float32; float32 operands are multiplied as float32, not tf32.

    Quantised weights are dequantised to x's kind of number, and x is not quantised.
    """
    w = w[...]
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    contract = (((x.ndim - 1,), (w.ndim - 1,)), ((), ()))
    return jax.lax.dot_general(x, w, contract, precision=precision, preferred_element_type=jnp.float32)
