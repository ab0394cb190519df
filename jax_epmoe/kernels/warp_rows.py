"""How small kernels lay rows over a warpgroup: four at a time, one a warp, so that what is reduced over a row's columns never leaves it."""

import jax
from jax import lax
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

HEIGHT, LANES = 4, 32
ROWS = plgpu.Layout.TILED(Tiling(((HEIGHT, LANES), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def spread(values: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """A vector as a matrix in `ROWS`, along `axis` of it."""
    return plgpu.layout_cast(lax.broadcast_in_dim(values, shape, (axis,)), ROWS)
