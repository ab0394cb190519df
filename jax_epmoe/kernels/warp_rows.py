"""How small kernels lay rows over a warpgroup: four at a time, one a warp, so that what is reduced over a row's columns never leaves it."""

from typing import Any

import jax
from jax import lax
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

HEIGHT, LANES = 4, 32


def _rows(vector: int) -> Any:
    """Whose lanes have so many columns side by side."""
    tiling = Tiling(((HEIGHT, LANES * vector), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


ROWS, ROWS_BY_4 = _rows(1), _rows(4)


def spread(values: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """A vector as a matrix in `ROWS`, along `axis` of it."""
    return plgpu.layout_cast(lax.broadcast_in_dim(values, shape, (axis,)), ROWS)
