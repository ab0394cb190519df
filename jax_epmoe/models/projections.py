"""Attention's projections, quantised: whole matrices, as checkpoints have them, whose scales know nothing of heads."""

from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from jax_epmoe.quant import Quantization
from jax_epmoe.quantized_parameters import DenseWeights

# Where an array has heads and head_dim, which a matrix `[out, in]` holds as one dimension.
_HEADS = {"q": 0, "k": 0, "v": 0, "q_b": 0, "kv_b": 0, "o": 1}
PROJECTIONS = (*_HEADS, "q_a", "kv_a")


def quantize_projections(
    attention: nnx.Module,
    quantization: Quantization,
    *,
    mesh: Mesh,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
    backend: str | None = None,
) -> None:
    """Puts random quantised weights in the place of those parameters of an attention module that are to have them.

    They give by `[...]` what the parameters gave, dequantised to `dtype`; but `o`, which is `[H, heads * head_dim]`. `backend`: of
    products with them.
    """
    new: dict[str, Any] = {"mesh": mesh, "dtype": dtype, "rngs": rngs, "backend": backend}
    partitions: Any = nnx.get_partition_spec(nnx.state(attention))
    for name in PROJECTIONS:
        format = quantization.of(name)
        if format is None or not hasattr(attention, name):
            continue
        shape, partition = getattr(attention, name).shape, tuple(partitions[name].get_value())
        head_dim = None
        if len(shape) == 3:
            at = _HEADS[name]
            head_dim = shape[1] if at == 0 else None
            shape = (*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :])
            partition = (*partition[: at + 1], *partition[at + 2 :])
        setattr(attention, name, DenseWeights(shape, partition, format, head_dim=head_dim, **new))
