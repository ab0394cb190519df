"""What decode's attention kernels share: tiles of a sequence's positions, dealt over CTAs whose parts are merged."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

POSITIONS = 64  # of a tile
STAGES = 2


def operand(columns: int, dtype: jax.typing.DTypeLike) -> tuple[Any, Any]:
    """How rows of `columns` numbers lie in shared memory for wgmma."""
    itemsize = jnp.dtype(dtype).itemsize
    row = min(128, columns * itemsize)  # bytes
    return (plgpu.TilingTransform((8, row // itemsize)), plgpu.SwizzleTransform(row))  # type: ignore[abstract]


def num_splits(parts: int, length: int, num_ctas: int) -> int:
    """Over how many CTAs the positions of each of `parts` are dealt: the quickest, if all have `length` positions."""
    most = min(-(-length // POSITIONS), num_ctas)
    rounds = {splits: -(-parts * splits // num_ctas) for splits in range(1, most + 1)}
    # A split costs about as much as one more tile to start and end.
    return min(rounds, key=lambda splits: rounds[splits] * (-(-length // (splits * POSITIONS)) + 1))


def own_tiles(
    length: jax.Array, split: jax.Array, splits: int, start: jax.Array | int = 0
) -> tuple[jax.Array, jax.Array]:
    """The first tile of one of the splits of the positions from `start` to `length`, and how many it has; each tile holds a position."""
    i32 = jnp.int32
    before = lax.div(i32(start), i32(POSITIONS))
    all_tiles = lax.div(length + (POSITIONS - 1), i32(POSITIONS)) - before
    first = lax.div(all_tiles * split, i32(splits))
    return before + first, lax.div(all_tiles * (split + 1), i32(splits)) - first


def merged(out: jax.Array, largest: jax.Array, total: jax.Array, sinks: jax.Array | None = None) -> jax.Array:
    """The splits' parts as one.

    Args:
      out: each split's sum, `[splits, B, heads, D]`.
      largest, total: its largest score, in powers of two, and sum of `exp2`, `[splits, B, heads]`.
      sinks: `[heads]` scores of their own, in powers of two, of a value that is zero.

    Returns:
      `[B, heads, D]`.
    """
    top = jnp.max(largest, axis=0)
    weight = jnp.exp2(largest - top)
    total = jnp.sum(weight * total, axis=0)
    if sinks is not None:
        total += jnp.exp2(sinks - top)
    return jnp.sum(weight[..., None] * out, axis=0) / total[..., None]
