"""The Hopper kernel's list of row tiles, made on the device from the group sizes by one small kernel.

A group's rows are cut into as few tiles as the largest height allows, all of one height: a multiple of 8, so 130 rows at
most 128 high become two tiles of 72, not 128 and 2. Groups come in falling order of that height, so that the heaviest
tiles start first, and empty groups have no tile. Which largest height suits depends on how the tiles fill the GPU's CTAs:
several are tried on paper, and the one that should finish first is taken.

The kernel sorts and sums by comparing all experts with all experts: 64 down, all across, and a sum over each row. Its
numbers are float32, whole and small enough to be exact: a comparison gives 1.0 or 0.0, and to multiply by that and add is
one instruction, where int32 takes two or three of half the speed.
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
# its tiles, and the numbers of all tiles and of all groups' rows are the same everywhere.
EXPERT, FIRST_TILE, NUM_TILES, START, END, HEIGHT, TOTAL, NUM_ROWS = range(8)

# What a tile costs beside its rows (filling the pipeline, storing), in rows.
FIXED_COST = 12

_MAX_ROWS = 2**22  # below that, the GPU's division, which may be two units in the last place off, is exact here
# From here on, float32's bits count in steps of one: a quick way to int32.
_BIAS, _BIAS_BITS = 2.0**23, 0x4B000000

_DOWN = 64  # rows of a warpgroup's layout
_MATRIX = plgpu.Layout.WGMMA
_DOWNWARDS, _ACROSS = _MATRIX.reduce(1), _MATRIX.reduce(0)
# [32 m, 4 n]: a warp's lanes lie along the first dimension, the four warps along the second.
_BY_CANDIDATE = plgpu.Layout.TILED(plgpu.Tiling(((32, 4), (32, 1))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
# [64 n]: along the lanes of two warps; the other two hold the same.
_BY_EXPERT = plgpu.Layout.TILED(
    plgpu.Tiling(((64,), (32,), (1,))), warp_dims=(plgpu.Replicated(2), -3), lane_dims=(-2,), vector_dim=-1
)


def max_tiles(rows: int, experts: int, largest_heights: Sequence[int]) -> int:
    """The most row tiles that any sizes of `experts` groups with `rows` rows in all can give."""
    return -(-rows // min(largest_heights)) + experts


def make_schedule(
    group_sizes: jax.Array,
    *,
    rows: int,
    heights: tuple[int, ...],
    largest_heights: tuple[int, ...],
    column_tiles: int,
    num_ctas: int,
    rest_apart: bool = False,
) -> jax.Array:
    """Lists the row tiles.

    Args:
      group_sizes: `[experts]` integers.
      rows: how many rows there are; the sizes' sum is at most that.
      heights: the heights that the kernel has code for, rising multiples of 8; a tile runs in the least that holds it.
      largest_heights: candidates for the largest height of a tile, multiples of 8.
      column_tiles: how many tiles lie side by side in each row tile.
      num_ctas: how many tiles run at a time.
      rest_apart: do not cut groups evenly: into tiles of the largest height (one candidate) and a rest, which is listed as if it
        were a group of its own.

    Returns:
      `[8, max_tiles, rounded up to 64]` int32, rows as named above; columns past the number of tiles hold zeros but for both numbers.

    Raises:
      NotImplementedError: there are 2**22 rows or more.
    """
    if rows >= _MAX_ROWS:
        raise NotImplementedError(f"grouped_gemm's hopper backend: {rows} rows are not fewer than {_MAX_ROWS}")
    if len(largest_heights) == 1:
        column_tiles = 1  # there is nothing to pick, and both products of a layer ask for the same, which XLA may see
    return _make_schedule(group_sizes, rows, heights, largest_heights, column_tiles, num_ctas, rest_apart)


# Under jit of its own, so that a model's layers share one trace and one compilation.
@functools.partial(jax.jit, static_argnums=range(1, 7))
def _make_schedule(group_sizes, rows, heights, largest_heights, column_tiles, num_ctas, rest_apart):
    experts = group_sizes.shape[0]
    across = -(-experts // _DOWN) * _DOWN
    blocks = -(-max_tiles(rows, experts, largest_heights) // _DOWN)
    if experts == len(largest_heights) == 1:
        return _one_group(group_sizes[0].astype(jnp.int32), largest_heights[0], blocks * _DOWN, evenly=not rest_apart)
    candidates = -(-len(largest_heights) // 4) * 4
    assert len(largest_heights) == 1 or not rest_apart, largest_heights
    entries = 2 * across if rest_apart else across  # groups to list
    # Several CTAs share the rows of a block where all of them can run at once.
    shares = next(shares for shares in (6, 3, 2, 1) if shares * blocks <= num_ctas or shares == 1)
    slab_heights = [height // ROW_ALIGNMENT for height in heights]
    largest_slabs = [height // ROW_ALIGNMENT for height in largest_heights]
    f32, i32 = jnp.float32, jnp.int32

    def kernel(sizes_gmem, schedule_gmem, sizes, slabs, times, keys, centres, columns):
        block, share = lax.axis_index("block"), lax.axis_index("share")

        def load(ref, layout):
            return plgpu.load(ref, layout=layout, optimized=False)

        def spread(values, shape, axis, layout):
            """A vector as a matrix, along `axis` of it."""
            return plgpu.layout_cast(lax.broadcast_in_dim(values, shape, (axis,)), layout)

        def along_rows(values):
            """`[n]` -> `[64, n]`, the same in every row."""
            return spread(values, (_DOWN, values.shape[0]), 1, _MATRIX)

        def row_sums(values):
            return plgpu.layout_cast(jnp.sum(values, axis=1), _DOWNWARDS)

        def number(shape, axis, layout):
            return plgpu.broadcasted_iota(i32, shape, axis, layout=layout)

        def one_where(condition):
            return jnp.where(condition, f32(1), f32(0))

        def floor(x):
            return x.astype(i32).astype(f32)

        def divide_up(x, y):
            return floor((x + (y - 0.5)) / y)  # whole x and y: at least 0.5 / y away from the next whole number

        # The loads come before the stores, so that they wait together.
        whole = experts // _DOWN * _DOWN
        places = [*(pl.ds(i, _DOWN) for i in range(0, whole, _DOWN)), *range(whole, experts)]
        loaded = [sizes_gmem[i] if isinstance(i, int) else load(sizes_gmem.at[i], _DOWNWARDS) for i in places]
        for i in range(experts, across):
            sizes[i] = f32(0)
        for i, size in zip(places, loaded, strict=True):
            sizes[i] = size.astype(f32)
        plgpu.commit_smem()

        parts = [pl.ds(i, _DOWN) for i in range(0, across, _DOWN)]
        is_earlier = one_where(number((_DOWN, _DOWN), 1, _MATRIX) < number((_DOWN, _DOWN), 0, _MATRIX))
        before, starts = plgpu.layout_cast(jnp.zeros((_DOWN,), f32), _ACROSS), []
        for part in parts:
            own = load(sizes.at[part], _ACROSS)
            starts.append(row_sums(along_rows(before) + is_earlier * along_rows(own)))
            before = before + own
        for part, start in zip(parts, starts, strict=True):
            columns[START, part] = start
        ends = [start + load(sizes.at[part], _DOWNWARDS) for part, start in zip(parts, starts, strict=True)]
        for part, start, end in zip(parts, starts, ends, strict=True):
            columns[END, part] = end
            # Tiles begin at multiples of 8 rows, so a group's first tile may begin up to 7 rows early. A slab is 8 rows.
            slabs[part] = jnp.where(end > start, divide_up(end, ROW_ALIGNMENT) - floor(start / ROW_ALIGNMENT), 0)
        plgpu.commit_smem()

        largest = f32(largest_slabs[0])
        if len(largest_slabs) > 1:
            shape = (_DOWN // 2, candidates)
            candidate = number((candidates,), 0, _BY_CANDIDATE.reduce(0))
            own_largest = plgpu.layout_cast(jnp.full((candidates,), largest, f32), _BY_CANDIDATE.reduce(0))
            for i, value in enumerate(largest_slabs[1:], start=1):
                own_largest = jnp.where(candidate == i, f32(value), own_largest)
            own_largest = spread(own_largest, shape, 1, _BY_CANDIDATE)
            none = plgpu.layout_cast(jnp.full(shape, _BIAS, f32), _BY_CANDIDATE)

            @pl.loop(0, across, step=shape[0], init_carry=(none,) * len(heights), unroll=2)
            def tiles_above(first, counts):
                """Tiles in all, and those too high for each height but the last; lanes and `_BIAS` are still to be summed."""
                slab = spread(load(slabs.at[pl.ds(first, shape[0])], _BY_CANDIDATE.reduce(1)), shape, 0, _BY_CANDIDATE)
                tiles = divide_up(slab, own_largest)
                above = (tiles, *(tiles * one_where(slab > tiles * low) for low in slab_heights[:-1]))
                return tuple(count + more for count, more in zip(counts, above, strict=True))

            # When CTA 0, which gets the heaviest tile of each turn, would be done, in rows. Tiles too high for some height
            # come before all others, so it gets one in `num_ctas` of them, rounded up, and pays the step to the next height.
            time: jax.Array | int = 0
            for count, (low, high) in zip(tiles_above, itertools.pairwise((-FIXED_COST, *heights)), strict=True):
                count = lax.bitcast_convert_type(count, i32) - _BIAS_BITS
                tiles = plgpu.layout_cast(jnp.sum(count, axis=0), _BY_CANDIDATE.reduce(0)) * column_tiles
                time += lax.div(tiles + (num_ctas - 1), i32(num_ctas)) * (high - low)
            times[...] = time
            plgpu.commit_smem()
            best = times[0]
            for i, value in enumerate(largest_slabs[1:], start=1):
                largest = lax.select(times[i] < best, f32(value), largest)
                best = lax.min(times[i], best)

        slab, expert = load(slabs, _BY_EXPERT), number((across,), 0, _BY_EXPERT).astype(f32)

        def enter(first, tiles, height):
            part = pl.ds(first, across)
            key = -first - expert
            for low in slab_heights[:-1]:
                key = key + jnp.where(height > low, f32(entries), 0)
            keys[part] = key
            columns[EXPERT, part], columns[NUM_TILES, part], columns[HEIGHT, part] = (
                expert,
                tiles,
                height * ROW_ALIGNMENT,
            )

        if rest_apart:
            whole = floor((slab + 0.5) / largest)
            rest = slab - whole * largest
            enter(0, whole, jnp.where(whole > 0, largest, 0))
            enter(across, one_where(rest > 0), rest)
            start, end = (load(columns.at[name, pl.ds(0, across)], _BY_EXPERT) for name in (START, END))
            start_of_rest = (floor(start / ROW_ALIGNMENT) + whole * largest) * ROW_ALIGNMENT
            columns[START, pl.ds(across, across)] = jnp.maximum(start, start_of_rest)
            columns[END, pl.ds(across, across)] = end
        else:
            tiles = divide_up(slab, largest)
            enter(0, tiles, divide_up(slab, jnp.maximum(tiles, 1)))
        plgpu.commit_smem()

        @pl.loop(0, entries, step=_DOWN)
        def _sort(part_start):
            part = pl.ds(part_start, _DOWN)
            own = spread(load(keys.at[part], _DOWNWARDS), (_DOWN, entries), 0, _MATRIX)
            is_earlier = one_where(along_rows(load(keys, _ACROSS)) > own)
            first = row_sums(is_earlier * along_rows(load(columns.at[NUM_TILES], _ACROSS)))
            columns[FIRST_TILE, part] = first
            # Twice the centre of the group's tiles: a tile is one of them if its distance, doubled, is less than their number.
            centres[part] = 2 * first + (load(columns.at[NUM_TILES, part], _DOWNWARDS) - 1)

        plgpu.commit_smem()
        tiles = along_rows(load(columns.at[NUM_TILES], _ACROSS))
        tile = (number((_DOWN, entries), 0, _MATRIX) + block * _DOWN).astype(f32)
        is_owner = one_where(jnp.abs(2 * tile - along_rows(load(centres, _ACROSS))) < tiles)  # at most one a row
        here = pl.ds(block * _DOWN, _DOWN)
        for i in range(TOTAL // shares):
            name = share * (TOTAL // shares) + i
            schedule_gmem[name, here] = row_sums(is_owner * along_rows(load(columns.at[name], _ACROSS))).astype(i32)

        @pl.when(share == 0)
        def _total():
            schedule_gmem[TOTAL, here] = row_sums(tiles).astype(i32)
            schedule_gmem[NUM_ROWS, here] = row_sums(along_rows(before)).astype(i32)

    vector, entry, table = (plgpu.SMEM(shape, f32) for shape in ((across,), (entries,), (TOTAL, entries)))
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((8, blocks * _DOWN), i32),
        scratch_types=[vector, vector, plgpu.SMEM((candidates,), i32), entry, entry, table],
        grid=(blocks, shares),
        grid_names=("block", "share"),
        # What is written is read after `commit_smem`, which waits for the whole warpgroup.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(group_sizes.astype(i32))


def _one_group(size: jax.Array, largest_height: int, columns: int, *, evenly: bool) -> jax.Array:
    """`make_schedule` of a single group of `size` rows: a constant where that is one, and nothing to run.

    If not `evenly`, all tiles but the last are of the largest height; that is where a rest would come anyway.
    """
    slabs = pl.cdiv(size, ROW_ALIGNMENT)
    tiles = pl.cdiv(slabs, largest_height // ROW_ALIGNMENT)
    height = pl.cdiv(slabs, jnp.maximum(tiles, 1)) * ROW_ALIGNMENT if evenly else jnp.int32(largest_height)
    of_tiles = {NUM_TILES: tiles, END: size, HEIGHT: height}
    entries = jnp.stack([of_tiles.get(name, jnp.int32(0)) for name in range(TOTAL)])
    everywhere = jnp.stack([tiles, size])
    return jnp.concatenate(
        [
            jnp.where(jnp.arange(columns) < tiles, entries[:, None], 0),
            jnp.broadcast_to(everywhere[:, None], (2, columns)),
        ]
    )
