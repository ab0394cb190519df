"""Gate activations by the names that Hugging Face's configs use, and gpt-oss's."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_epmoe.config import Activation, ClampedSwiGLU

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def gated(activation: Activation, gate: jax.Array, up: jax.Array) -> jax.Array:
    """act(gate) * up, or what `ClampedSwiGLU` says: inside kernels too."""
    if isinstance(activation, ClampedSwiGLU):
        gate = jnp.minimum(gate, activation.limit)
        up = jnp.maximum(jnp.minimum(up, activation.limit), -activation.limit)
        return gate * jax.nn.sigmoid(activation.alpha * gate) * (up + 1)
    return ACTIVATIONS[activation](gate) * up


def gate(activation: Activation, gate_up: jax.Array) -> jax.Array:
    """`gated` of `gate_up [..., 2, n]`, gate first -> `[..., n]`, in the dtype given."""
    return gated(activation, gate_up[..., 0, :], gate_up[..., 1, :])
