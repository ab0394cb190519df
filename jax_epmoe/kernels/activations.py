"""Gate activations by the names that Hugging Face's configs use."""

from collections.abc import Callable

import jax

Activation = Callable[[jax.Array], jax.Array]

ACTIVATIONS: dict[str, Activation] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def gate(activation: str, gate_up: jax.Array) -> jax.Array:
    """act(gate) * up for `gate_up [..., 2, n]`, gate first -> `[..., n]`, in the dtype given."""
    return ACTIVATIONS[activation](gate_up[..., 0, :]) * gate_up[..., 1, :]
