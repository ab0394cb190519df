"""The Hopper kernel's list of row tiles, made on the device from the group sizes by one small kernel.

A group's rows are cut into as few tiles as the largest height allows, all of one height: a multiple of 8, so 130 rows at
most 128 high become two tiles of 72, not 128 and 2. Groups come in falling order of that height, so that the heaviest
tiles start first, and empty groups have no tile. Which largest height suits depends on how the tiles fill the GPU's CTAs:
several are tried on paper, and the one that should finish first is taken.

The kernel sorts and sums by comparing all experts with all experts: 64 down, all across, and a sum over each row.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.kernels.grouped_gemm.layout import ROW_ALIGNMENT

# Rows of the schedule; a column is a tile. The first and last row of a group and where its tiles begin are the same for all
# its tiles, and the number of all tiles is the same everywhere.
EXPERT, FIRST_TILE, NUM_TILES, START, END, HEIGHT, TOTAL = range(7)

# What a tile costs beside its rows (filling the pipeline, storing), in rows.
FIXED_COST = 12

_DOWN = 64  # rows of a warpgroup's layout


def max_tiles(rows: int, experts: int, largest_heights: Sequence[int]) -> int:
    """The most row tiles that any sizes of `experts` groups with `rows` rows in all can give."""
    return -(-rows // min(largest_heights)) + experts


# Under jit of its own, so that a model's layers share one trace and one compilation.
@functools.partial(jax.jit, static_argnames=("rows", "heights", "largest_heights", "column_tiles", "num_ctas"))
def make_schedule(
    group_sizes: jax.Array,
    *,
    rows: int,
    heights: tuple[int, ...],
    largest_heights: tuple[int, ...],
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
      `[7, max_tiles, rounded up to 64]` int32, rows as named above; columns past the number of tiles hold zeros but for it.
    """
    experts = group_sizes.shape[0]
    across = -(-experts // 128) * 128
    blocks = -(-max_tiles(rows, experts, largest_heights) // _DOWN)
    turns = -(-blocks * _DOWN * column_tiles // num_ctas)
    candidates = len(largest_heights)
    matrix, down, over = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

    def kernel(sizes_gmem, schedule_gmem, sizes, starts, ends, tiles, height, cost, first):
        block = lax.axis_index("block")
        for expert in range(across):
            sizes[expert] = sizes_gmem[expert] if expert < experts else jnp.int32(0)
        plgpu.commit_smem()

        def number(axis):
            return plgpu.broadcasted_iota(jnp.int32, (_DOWN, across), axis, layout=matrix)

        def along_rows(ref):
            """`[across]` -> `[64, across]`, the same in every row."""
            values = plgpu.load(ref, layout=over, optimized=False)
            return plgpu.layout_cast(lax.broadcast_in_dim(values, (_DOWN, across), (1,)), matrix)

        def along_columns(ref):
            """`[64]` -> `[64, across]`, the same in every column."""
            values = plgpu.load(ref, layout=down, optimized=False)
            return plgpu.layout_cast(lax.broadcast_in_dim(values, (_DOWN, across), (0,)), matrix)

        def row_sums(values):
            return plgpu.layout_cast(jnp.sum(values, axis=1), down)

        other = number(1)

        @pl.loop(0, across, step=_DOWN)
        def _bounds(part_start):
            part, own = pl.ds(part_start, _DOWN), number(0) + part_start
            start = row_sums(jnp.where(other < own, along_rows(sizes), 0))
            starts[part] = start
            ends[part] = start + plgpu.load(sizes.at[part], layout=down, optimized=False)

        plgpu.commit_smem()

        @pl.loop(0, candidates)
        def _cut(candidate):
            largest = jnp.int32(largest_heights[0])
            for i, value in enumerate(largest_heights[1:], start=1):
                largest = lax.select(candidate == i, jnp.int32(value), largest)

            @pl.loop(0, across, step=_DOWN)
            def _part(part_start):
                part = pl.ds(part_start, _DOWN)
                start = plgpu.load(starts.at[part], layout=down, optimized=False)
                end = plgpu.load(ends.at[part], layout=down, optimized=False)
                # Tiles begin at multiples of 8 rows, so a group's first tile may begin up to 7 rows early.
                span = jnp.where(end == start, 0, end - start // ROW_ALIGNMENT * ROW_ALIGNMENT)
                needed = (span + (largest - 1)) // largest
                some = jnp.maximum(needed, 1)
                even = ((span + some - 1) // some + (ROW_ALIGNMENT - 1)) // ROW_ALIGNMENT * ROW_ALIGNMENT
                even = jnp.where(needed > 0, even, 0)
                run_as = plgpu.layout_cast(jnp.full_like(even, heights[0]), down)
                for low, high in itertools.pairwise(heights):
                    run_as = run_as + jnp.where(even > low, high - low, 0)
                tiles[candidate, part], height[candidate, part], cost[candidate, part] = needed, even, run_as

        plgpu.commit_smem()

        @pl.loop(0, candidates)
        def _sort(candidate):
            costs, counts = along_rows(cost.at[candidate]), along_rows(tiles.at[candidate])

            @pl.loop(0, across, step=_DOWN)
            def _part(part_start):
                part, own = pl.ds(part_start, _DOWN), number(0) + part_start
                own_cost = along_columns(cost.at[candidate, part])
                earlier = (costs > own_cost) | ((costs == own_cost) & (other < own))
                first[candidate, part] = row_sums(jnp.where(earlier, counts, 0))

        plgpu.commit_smem()

        def compare(candidate, chosen):
            """When CTA 0, which gets the heaviest tile of each turn, would be done, in rows; the better of two."""
            costs, counts = along_rows(cost.at[candidate]), along_rows(tiles.at[candidate])
            begin = along_rows(first.at[candidate]) * column_tiles
            end = begin + counts * column_tiles

            def add_turns(turn_block, time):
                index = (number(0) + turn_block * _DOWN) * num_ctas
                return time + jnp.where((index >= begin) & (index < end), costs + FIXED_COST, 0)

            zeros = plgpu.layout_cast(jnp.zeros_like(costs), matrix)
            time = jnp.sum(row_sums(lax.fori_loop(0, pl.cdiv(turns, _DOWN), add_turns, zeros)))
            best, best_time = chosen
            return lax.select(time < best_time, candidate, best), lax.min(time, best_time)

        best = jnp.int32(0)
        if candidates > 1:
            best, _ = lax.fori_loop(0, candidates, compare, (best, jnp.int32(jnp.iinfo(jnp.int32).max)))
        counts, begin = along_rows(tiles.at[best]), along_rows(first.at[best])
        tile, here = number(0) + block * _DOWN, pl.ds(block * _DOWN, _DOWN)
        owner = (tile >= begin) & (tile < begin + counts)  # at most one a row
        columns = (other, begin, counts, along_rows(starts), along_rows(ends), along_rows(height.at[best]))
        for row, column in enumerate(columns):
            schedule_gmem[row, here] = row_sums(jnp.where(owner, column, 0))
        total = jnp.sum(plgpu.load(tiles.at[best], layout=over, optimized=False))
        schedule_gmem[TOTAL, here] = plgpu.layout_cast(jnp.full((_DOWN,), total, jnp.int32), down)

    vector = plgpu.SMEM((across,), jnp.int32)
    of_candidates = plgpu.SMEM((candidates, across), jnp.int32)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((7, blocks * _DOWN), jnp.int32),
        scratch_types=[vector, vector, vector, of_candidates, of_candidates, of_candidates, of_candidates],
        grid=(blocks,),
        grid_names=("block",),
    )(group_sizes.astype(jnp.int32))
