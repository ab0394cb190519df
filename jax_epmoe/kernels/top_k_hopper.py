"""The k largest of each row on Hopper: a warpgroup takes 64 rows and finds their maxima k times over, all in registers."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_ROWS = 64
_MATRIX = plgpu.Layout.WGMMA
_MAX_COLUMNS = 256  # what a warpgroup's registers hold, with as many again to work with


def serves(scores: jax.Array) -> bool:
    """Whether `top_k` can take `scores [T, E]`: float32, E a multiple of 8 up to 256."""
    columns = scores.shape[1]
    return scores.dtype == jnp.float32 and 0 < columns <= _MAX_COLUMNS and columns % 8 == 0 and scores.size > 0


# Under jit of its own, so that a model's layers share one trace and one compilation.
@functools.partial(jax.jit, static_argnames="k")
def top_k(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """What `jax.lax.top_k` gives, for rows that have at least k numbers larger than -inf and no NaN.

    Args:
      scores: `[T, E]` float32, ones that it `serves`.
      k: up to E.

    Returns:
      Values `[T, k]` float32, largest first, and their columns `[T, k]` int32; of equals the first column comes first.
    """
    tokens, columns = scores.shape
    rows = -(-tokens // _ROWS) * _ROWS
    f32, i32 = jnp.float32, jnp.int32

    def kernel(scores_gmem, values_gmem, columns_gmem):
        here = pl.ds(lax.axis_index("block") * _ROWS, _ROWS)
        left = plgpu.load(scores_gmem.at[here], layout=_MATRIX, optimized=False)
        # Negative, so that the first of several columns is the largest; float32 holds them exactly.
        number = -plgpu.broadcasted_iota(i32, left.shape, 1, layout=_MATRIX).astype(f32)

        def spread(values):
            return lax.broadcast_in_dim(values, left.shape, (0,))

        for place in range(k):
            best = jnp.max(left, axis=1)
            first = jnp.max(jnp.where(left == spread(best), number, f32(-columns)), axis=1)
            values_gmem[place, here] = best
            columns_gmem[place, here] = (-first).astype(i32)
            left = jnp.where(number == spread(first), -jnp.inf, left)

    values, ids = plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((k, rows), f32), jax.ShapeDtypeStruct((k, rows), i32)),
        grid=(rows // _ROWS,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),  # there is no shared memory
    )(jnp.pad(scores, ((0, rows - tokens), (0, 0))))
    return values[:, :tokens].T, ids[:, :tokens].T
