"""Parameters that are quantised: modules that stand where a parameter would.

Each has the parameters `values` (float8_e4m3fn), `scales` and, in a static format, `input_scales` (float32).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jax_epmoe.kernels.device import backend_on
from jax_epmoe.kernels.grouped_gemm.quantized import refuse_gradient
from jax_epmoe.parameters import parameter
from jax_epmoe.quant import (
    BLOCK,
    FP8,
    Format,
    QuantizedArray,
    QuantizedWeights,
    expand_scales,
    scale_shape,
    slice_scales,
)

# Random values as a dummy model has them: weights of standard deviation 0.02 that use float8's range, inputs of up to 22.
SPREAD = 64.0
SCALE, _INPUT_SCALE = 0.02 / SPREAD, 0.05


def _random_values(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
    return (SPREAD * jax.random.normal(key, shape)).astype(dtype)


class _Quantized(nnx.Module):
    """Values laid out by `partition`, scales and input scales by partitions of their own."""

    def __init__(
        self,
        shape: Sequence[int],
        partition: Sequence[Any],
        scale_partition: Sequence[Any],
        input_partition: Sequence[Any],
        format: Format,
        *,
        mesh: Mesh,
        rngs: nnx.Rngs,
    ):
        self.format = format
        scales, inputs = scale_shape(tuple(shape), format.weights), shape[:-2]
        of_scales: dict[str, Any] = {"mesh": mesh, "rngs": rngs, "dtype": jnp.float32}
        constant = nnx.initializers.constant
        self.values = parameter(shape, partition, dtype=FP8, init=_random_values, mesh=mesh, rngs=rngs)
        self.scales = parameter(scales, scale_partition, init=constant(SCALE), **of_scales)
        self.input_scales = (
            parameter(inputs, input_partition, init=constant(_INPUT_SCALE), **of_scales) if format.static else None
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values: the whole array's, or, inside a shard_map, that of this device's part."""
        return self.values.shape


class ExpertWeights(_Quantized):
    """`[E, ..., n, k]`: scales lie beside the values that they are of, so a device's part must not cut a block.

    Input scales are every expert's on every device where all experts share their input, and else lie as the experts do.
    """

    def __init__(
        self,
        shape: Sequence[int],
        partition: Sequence[Any],
        format: Format,
        *,
        shared_input: bool,
        mesh: Mesh,
        rngs: nnx.Rngs,
    ):
        dimensions = len(scale_shape(tuple(shape), format.weights))
        inputs = [None] * (len(shape) - 2) if shared_input else partition[:-2]
        super().__init__(shape, partition, partition[:dimensions], inputs, format, mesh=mesh, rngs=rngs)

    def __getitem__(self, key: Any) -> QuantizedWeights:
        array = QuantizedArray(self.values[key], self.scales[key], self.format.weights)
        return QuantizedWeights(array, None if self.input_scales is None else self.input_scales[key], self.format)


class DenseWeights(_Quantized):
    """`[..., n, k]` whose scales, few as they are, lie on every device: any split will do.

    `quantized()` is this device's part with its own scales, what `moe.gated_mlp.linear` multiplies by; `[...]` the part
    dequantised to `dtype`. With `head_dim`, n is that of heads: products and `[...]` have heads and head_dim in its place.
    """

    def __init__(
        self,
        shape: Sequence[int],
        partition: Sequence[Any],
        format: Format,
        *,
        dtype: jax.typing.DTypeLike,
        mesh: Mesh,
        rngs: nnx.Rngs,
        backend: str | None = None,
        head_dim: int | None = None,
    ):
        """`backend`: of products with these weights, as `grouped_gemm`'s."""
        scales = [None] * len(scale_shape(tuple(shape), format.weights))
        super().__init__(shape, partition, scales, [None] * (len(shape) - 2), format, mesh=mesh, rngs=rngs)
        self.dtype = jnp.dtype(dtype)
        self.backend = backend_on(mesh, backend)
        self.whole = self.values.shape[-2:]
        self.axes = tuple(partition[-2:])
        self.head_dim = head_dim

    def __getitem__(self, key: Any) -> jax.Array:
        values = self.values[...]
        scales = expand_scales(self.scales[...], self.format.weights, values.shape, self._start())
        w = _dequantized(values, scales, self.dtype)
        return w.reshape(*w.shape[:-2], *self.columns, w.shape[-1])[key]

    @property
    def columns(self) -> tuple[int, ...]:
        """What a product with this device's part has in the place of k: n, or heads and head_dim."""
        n = self.shape[-2]
        return (n,) if self.head_dim is None else (n // self.head_dim, self.head_dim)

    def quantized(self) -> QuantizedWeights | None:
        """This device's part, `[..., n, k]`, and the scales of it alone; None where it begins or ends within a block."""
        values, granularity = self.values[...], self.format.weights
        cut = any(size < whole and size % BLOCK for size, whole in zip(values.shape[-2:], self.whole, strict=True))
        if granularity == "block" and cut:
            return None
        scales = slice_scales(self.scales[...], granularity, values.shape, self._start())
        input_scales = None if self.input_scales is None else self.input_scales[...]
        return QuantizedWeights(QuantizedArray(values, scales, granularity), input_scales, self.format)

    def _start(self) -> tuple[jax.Array | int, jax.Array | int]:
        """The row and the column of the whole at which this device's part begins."""
        row, column = (
            jax.lax.axis_index(axes) * size if size < whole else 0
            for axes, size, whole in zip(self.axes, self.values.shape[-2:], self.whole, strict=True)
        )
        return row, column


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dequantized(values: jax.Array, scales: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return (values.astype(jnp.float32) * scales).astype(dtype)


_dequantized.defvjp(refuse_gradient, refuse_gradient)


def expert_weights(
    shape: Sequence[int],
    partition: Sequence[Any],
    format: Format | None,
    *,
    shared_input: bool,
    dtype: jax.typing.DTypeLike,
    mesh: Mesh,
    rngs: nnx.Rngs,
) -> nnx.Param | ExpertWeights:
    """A parameter `[E, ..., n, k]`, quantised if there is a format."""
    if format is None:
        return parameter(shape, partition, mesh=mesh, dtype=dtype, rngs=rngs)
    return ExpertWeights(shape, partition, format, shared_input=shared_input, mesh=mesh, rngs=rngs)


def dense_weights(
    shape: Sequence[int],
    partition: Sequence[Any],
    format: Format | None,
    *,
    dtype: jax.typing.DTypeLike,
    mesh: Mesh,
    rngs: nnx.Rngs,
    backend: str | None = None,
) -> nnx.Param | DenseWeights:
    """A parameter `[..., n, k]`, quantised if there is a format; `backend`: as `DenseWeights`'."""
    if format is None:
        return parameter(shape, partition, mesh=mesh, dtype=dtype, rngs=rngs)
    return DenseWeights(shape, partition, format, dtype=dtype, mesh=mesh, rngs=rngs, backend=backend)
