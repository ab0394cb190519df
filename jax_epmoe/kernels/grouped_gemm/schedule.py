"""The Hopper kernel's list of row tiles, made on the device from the group sizes.

A group's rows are cut into as few tiles as the largest height allows, all of one height: a multiple of 8, so 130 rows at
most 128 high become two tiles of 72, not 128 and 2. Groups come in falling order of that height, so that the heaviest
tiles start first, and empty groups have no tile. Which largest height suits depends on how the tiles fill the GPU's CTAs:
several are tried on paper, and the one that should finish first is taken.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Columns of the schedule. The first and last row of a group and where its tiles begin are the same for all its tiles.
EXPERT, FIRST_TILE, NUM_TILES, START, END, HEIGHT = range(6)

# What a tile costs beside its rows (filling the pipeline, storing), in rows.
_FIXED_COST = 12


def max_tiles(rows: int, experts: int, largest_heights: Sequence[int]) -> int:
    """The most row tiles that any sizes of `experts` groups with `rows` rows in all can give."""
    return -(-rows // min(largest_heights)) + experts


def make_schedule(
    group_sizes: jax.Array,
    *,
    rows: int,
    heights: Sequence[int],
    largest_heights: Sequence[int],
    column_tiles: int,
    num_ctas: int,
) -> jax.Array:
    """Lists the row tiles.

    Args:
      group_sizes: `[experts]` integers.
      rows: how many rows there are; the sizes' sum is at most that.
      heights: the heights that the kernel has code for, rising; a tile runs in the least that holds it.
      largest_heights: candidates for the largest height of a tile, multiples of 8.
      column_tiles: how many tiles lie side by side in each row tile.
      num_ctas: how many tiles run at a time.

    Returns:
      `[max_tiles + 1, 6]` int32, columns as named above; the last row holds the number of tiles in every column.
    """
    experts = group_sizes.shape[0]
    count = max_tiles(rows, experts, largest_heights)
    sizes = group_sizes.astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    # Tiles begin at multiples of 8 rows, so a group's first tile may begin up to 7 rows early.
    spans = jnp.where(sizes == 0, 0, ends - starts // 8 * 8)

    largest = jnp.array(largest_heights, jnp.int32)[:, None]
    tiles = (spans + largest - 1) // largest  # [candidates, experts]
    per_tile = (spans + jnp.maximum(tiles, 1) - 1) // jnp.maximum(tiles, 1)
    height = jnp.where(tiles > 0, (per_tile + 7) // 8 * 8, 0)
    cost = heights[0] + sum(jnp.where(height > low, high - low, 0) for low, high in itertools.pairwise(heights))
    cost = jnp.broadcast_to(cost, height.shape)  # the height of the code that runs the tile

    number = jnp.arange(experts)
    earlier = (cost[:, None, :] > cost[:, :, None]) | (
        (cost[:, None, :] == cost[:, :, None]) & (number[None, None, :] < number[None, :, None])
    )
    first = jnp.sum(jnp.where(earlier, tiles[:, None, :], 0), axis=2)  # [candidates, experts]
    best: jax.Array | int = 0
    if len(largest_heights) > 1:
        best = jnp.argmin(_first_cta_time(first, tiles, cost, column_tiles, count, num_ctas))
    tiles, height, first = tiles[best], height[best], first[best]

    tile = jnp.arange(count, dtype=jnp.int32)[:, None]
    owner = (tile >= first) & (tile < first + tiles)  # [count, experts], at most one a row
    columns = (number.astype(jnp.int32), first, tiles, starts, ends, height)
    listed = jnp.stack([jnp.sum(jnp.where(owner, column, 0), axis=1) for column in columns], axis=1)
    total = jnp.full((1, len(columns)), jnp.sum(tiles), jnp.int32)
    return jnp.concatenate([listed.astype(jnp.int32), total])


def _first_cta_time(
    first: jax.Array, tiles: jax.Array, cost: jax.Array, column_tiles: int, count: int, num_ctas: int
) -> jax.Array:
    """When CTA 0, which gets the heaviest tile of each round, would be done: `[candidates]`, in rows."""
    turn = jnp.arange(-(-count * column_tiles // num_ctas), dtype=jnp.int32)[None, :, None] * num_ctas
    inside = (turn >= first[:, None, :] * column_tiles) & (turn < (first + tiles)[:, None, :] * column_tiles)
    return jnp.sum(jnp.where(inside, (cost + _FIXED_COST)[:, None, :], 0), axis=(1, 2))
