"""Quantised arrays: float8 values, float32 scales, and how many values share a scale. Arrays only: no mesh, no module.

A quantised array stands for `values * scales`, computed in float32. Its last two dimensions are `[n, k]` for weights, k what is
summed over, and `[rows, k]` for activations; dimensions before them (experts; gate and up) never share a scale.

| granularity | a scale for | shape of the scales |
| --- | --- | --- |
| `tensor` | the whole matrix | `[...]` |
| `channel` | a row of weights, an output channel | `[..., n]` |
| `block` | 128 x 128 weights | `[..., ceil(n / 128), ceil(k / 128)]` |
| `token` | a row of activations | `[rows]` |
| `group` | 128 values of a row of activations | `[ceil(k / 128), rows]`: rows are contiguous, as kernels load them |
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jax_epmoe.config import require

FP8 = jnp.dtype(jnp.float8_e4m3fn)
FP8_MAX = 448.0  # the largest finite float8_e4m3fn; what is larger would become NaN
BLOCK = 128

Granularity = Literal["tensor", "channel", "block", "token", "group"]

# Rows and columns that share a scale; None: all of them.
_TILES: dict[str, tuple[int | None, int | None]] = {
    "tensor": (None, None),
    "channel": (1, None),
    "token": (1, None),
    "block": (BLOCK, BLOCK),
    "group": (1, BLOCK),
}


@dataclass(frozen=True)
class Format:
    """How a model's weights are quantised, and what they are multiplied with.

    `weights`: the granularity of weights; `activations`: that of the other operand. Its scales come from the data (dynamic) or,
    with `static`, from the checkpoint.
    """

    weights: Literal["tensor", "channel", "block"]
    activations: Literal["tensor", "token", "group"]
    static: bool = False


FORMATS = {
    "fp8-block": Format("block", "group"),  # DeepSeek-V3
    "fp8-channel": Format("channel", "token"),  # compressed-tensors, "FP8_DYNAMIC"
    "fp8-tensor": Format("tensor", "tensor"),
    "fp8-tensor-static": Format("tensor", "tensor", static=True),
}


@dataclass(frozen=True)
class Quantization:
    """Which of a model's weights are quantised, and how: all that can be, save those whose names `kept` lists.

    Names are those of a checkpoint's parameters (`layers.0.attention.q`), seen from the module that has the quantisation.
    """

    name: str | None = None
    kept: frozenset[str] = frozenset()

    def __post_init__(self):
        require(
            self.name is None or self.name in FORMATS, "quantization", self.name, f"None or one of {', '.join(FORMATS)}"
        )

    @property
    def format(self) -> Format | None:
        return None if self.name is None else FORMATS[self.name]

    def of(self, parameter: str) -> Format | None:
        """The format of a parameter, or None where it is not quantised."""
        return None if parameter in self.kept else self.format

    def inside(self, module: str) -> "Quantization":
        """The same for a part of the module, whose parameters' names begin with `module` and a dot."""
        prefix = f"{module}."
        return Quantization(self.name, frozenset(n.removeprefix(prefix) for n in self.kept if n.startswith(prefix)))


NOT_QUANTIZED = Quantization()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedArray:
    """`values` float8_e4m3fn and `scales` float32, of the shapes in this module's table."""

    values: jax.Array
    scales: jax.Array
    granularity: Granularity = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


def scale_shape(shape: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """The shape of the scales of an array of `shape`."""
    *lead, n, k = shape
    (rows, _), (columns, _) = _tiles(granularity, n, k)
    return _packed((*lead, rows, columns), granularity)


def scales_of(x: jax.Array, granularity: Granularity) -> jax.Array:
    """The float32 scales that put each tile's largest absolute value at 448; 1 where a tile holds nothing but zeros.

    Values too small for such a scale to be a normal number (below 1e-35) count as zeros; all should be finite.
    """
    *lead, n, k = x.shape
    (rows, height), (columns, width) = _tiles(granularity, n, k)
    padding = [(0, 0)] * len(lead) + [(0, rows * height - n), (0, columns * width - k)]
    tiles = jnp.pad(x.astype(jnp.float32), padding).reshape(*lead, rows, height, columns, width)
    largest = jnp.max(jnp.abs(tiles), axis=(-3, -1))
    # A product, not a quotient: XLA makes one of the other where the divisor is a constant, and not elsewhere.
    scales = jnp.where(largest <= FP8_MAX * jnp.finfo(jnp.float32).tiny, 1.0, largest * (1 / FP8_MAX))
    if granularity == "group":
        return jnp.swapaxes(scales, -1, -2)
    return scales.reshape(_packed(scales.shape, granularity))


def quantize(x: jax.Array, granularity: Granularity, scales: jax.Array | None = None) -> QuantizedArray:
    """`x * (1 / scales)`, rounded to the nearest float8_e4m3fn (ties to even); what is past its range becomes the largest one.

    The reciprocal is rounded to float32 first: what a kernel does, and what no compiler turns into something else.

    Args:
      x: `[..., n, k]`, any floating type, finite.
      granularity: see the module's table.
      scales: positive; None takes `scales_of(x)`.
    """
    scales = scales_of(x, granularity) if scales is None else scales
    scaled = x.astype(jnp.float32) * expand_scales(1 / scales, granularity, x.shape)
    return QuantizedArray(jnp.clip(scaled, -FP8_MAX, FP8_MAX).astype(FP8), scales, granularity)


def dequantize(array: QuantizedArray, dtype: Any = jnp.float32) -> jax.Array:
    """`values * scales` in float32, rounded once to `dtype`."""
    scales = expand_scales(array.scales, array.granularity, array.shape)
    return (array.values.astype(jnp.float32) * scales).astype(dtype)


def expand_scales(
    scales: jax.Array,
    granularity: Granularity,
    shape: tuple[int, ...],
    start: tuple[jax.Array | int, jax.Array | int] = (0, 0),
) -> jax.Array:
    """A scale for each value of `[..., n, k]`, or a dimension of 1 where a whole row or column has the same.

    `start`: where the array's first row and column lie in the larger one that the scales are of.
    """
    if granularity == "tensor":
        return scales[..., None, None]
    if granularity == "group":
        scales = jnp.swapaxes(scales, -1, -2)
    elif granularity in ("channel", "token"):
        scales = scales[..., None]
    for axis, first, size, tile in zip((-2, -1), start, shape[-2:], _TILES[granularity], strict=True):
        if tile is None:
            continue
        if isinstance(first, int) and first == 0 and tile == 1 and scales.shape[axis] == size:
            continue
        index = (first + jnp.arange(size)) // tile
        scales = jnp.take(scales, index, axis=axis, mode="clip")  # past the end lies padding: zeros, whatever the scale
    return scales


def slice_scales(
    scales: jax.Array,
    granularity: Granularity,
    shape: tuple[int, ...],
    start: tuple[jax.Array | int, jax.Array | int],
) -> jax.Array:
    """Of the scales of weights, those of a part of them of `shape [..., n, k]`, in the shape that `scale_shape` gives it.

    `start`: where the part's first row and column lie, both at borders of tiles.
    """
    cut = [
        (first // tile, -(-size // tile))
        for first, size, tile in zip(start, shape[-2:], _TILES[granularity], strict=True)
        if tile is not None
    ]
    for axis, (first, count) in enumerate(cut, start=-len(cut)):
        if isinstance(first, int) and first == 0 and scales.shape[axis] == count:
            continue
        scales = jnp.take(scales, first + jnp.arange(count), axis=axis, mode="clip")  # past the end lies padding
    return scales


def _tiles(granularity: Granularity, n: int, k: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """How many tiles a matrix `[n, k]` has one below the other and how high they are; how many side by side and how wide."""

    def cut(size: int, tile: int | None) -> tuple[int, int]:
        return (1, max(size, 1)) if tile is None else (-(-size // tile), tile)

    height, width = _TILES[granularity]
    return cut(n, height), cut(k, width)


def _packed(shape: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """`[..., tiles of n, tiles of k]` without the dimensions that are always 1; groups lie the other way round."""
    *lead, rows, columns = shape
    match granularity:
        case "tensor":
            return tuple(lead)
        case "channel" | "token":
            return (*lead, rows)
        case "group":
            return (*lead, columns, rows)
        case _:
            return shape


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedWeights:
    """Quantised weights, and how their other operand is quantised: `input_scales` are its scales in a static format."""

    weights: QuantizedArray
    input_scales: jax.Array | None
    format: Format = dataclasses.field(metadata={"static": True})

    def quantize_input(self, x: jax.Array) -> QuantizedArray:
        """`x [rows, k]` as these weights, all of them, are multiplied with it; in a static format by the largest of their scales."""
        scales = None if self.input_scales is None else jnp.max(self.input_scales)
        return quantize(x, self.format.activations, scales)
