"""What a Hopper kernel does with `schedule.py`'s list: a CTA's walk over its tiles, code for each height, rows on their way out."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.kernels.grouped_gemm import schedule
from jax_epmoe.kernels.grouped_gemm.layout import ROW_ALIGNMENT

i32 = jax.numpy.int32
_TMA_ALIGNMENT = 128  # bytes in shared memory; a copy of one row that is not swizzled is a plain one, for which 16 do


class Tile(NamedTuple):
    """Scalars of a tile: its expert, column tile and first row (a multiple of 8); rows [low, high) of it are the expert's."""

    expert: jax.Array
    column_tile: jax.Array
    first_row: jax.Array
    low: jax.Array
    high: jax.Array
    code: jax.Array  # which of the heights it runs with


class Walk:
    """The tiles of one CTA of `num_ctas`, in the order of the schedule, row tiles that share weights side by side (`band` of them)."""

    def __init__(
        self,
        plan_gmem: Any,
        cta: jax.Array,
        *,
        num_ctas: int,
        column_tiles: int,
        heights: Sequence[int],
        band: int | None = None,
    ):
        self._plan, self._cta, self._num_ctas = plan_gmem, cta, num_ctas
        self._column_tiles, self._heights, self._band = column_tiles, heights, band
        self._total = plan_gmem[schedule.TOTAL, 0] * column_tiles
        self.steps = lax.div(self._total - cta + (num_ctas - 1), i32(num_ctas))  # how many tiles

    def over_tiles(self, body: Callable[[jax.Array, Tile], None]) -> None:
        """Runs `body(step, tile)` for all tiles; the next tile's entry is read one tile ahead."""

        def step_body(step, tile):
            following = self._tile(step + 1)
            body(step, tile)
            return following

        lax.fori_loop(0, self.steps, step_body, self._tile(i32(0)))

    def produce(self, k_steps: int, stages: int, empty: Any, begin: Callable[[Tile], Callable[..., None]]) -> None:
        """`begin(tile)(height, k_step, stage)` for all steps of all tiles, each as soon as its stage of the ring is `empty` again.

        Returns when every stage has been released, as it must be before the kernel ends.
        """

        def load_tile(step, tile):
            load = begin(tile)

            def load_steps(height):
                @pl.loop(0, k_steps)
                def _(k_step):
                    count = step * k_steps + k_step
                    stage = lax.rem(count, i32(stages))

                    @pl.when(count >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[stage])

                    load(height, k_step, stage)

            self.for_height(tile.code, load_steps)

        self.over_tiles(load_tile)
        loads = self.steps * k_steps

        @pl.loop(lax.max(loads - stages, i32(0)), loads)
        def _(count):
            plgpu.barrier_wait(empty.at[lax.rem(count, i32(stages))])

    def for_height(self, code: jax.Array, body: Callable[[int], None]) -> None:
        for i, height in enumerate(self._heights):
            pl.when(code == i)(functools.partial(body, height))

    def _tile(self, step: jax.Array) -> Tile:
        # 0 too where there is no tile at all
        index = lax.max(lax.min(step * self._num_ctas + self._cta, self._total - 1), i32(0))
        row = lax.div(index, i32(self._column_tiles))
        expert, first, count, start, end, height = (self._plan[name, row] for name in range(schedule.TOTAL))
        row_tile, column_tile = place(index - first * self._column_tiles, count, self._column_tiles, self._band)
        first_row = lax.div(start, i32(ROW_ALIGNMENT)) * ROW_ALIGNMENT + row_tile * height
        low, high = lax.max(start - first_row, i32(0)), lax.min(end - first_row, height)
        code = sum(((high > h).astype(i32) for h in self._heights[:-1]), start=i32(0))
        return Tile(expert, column_tile, first_row, low, high, code)


def place(within: jax.Array, row_tiles: jax.Array, column_tiles: int, band: int | None) -> tuple[jax.Array, jax.Array]:
    """Row tile and column tile of a group's tile number `within`: `band` row tiles (or all) go through all columns before others."""
    top = i32(0)
    if band:
        top = lax.div(within, i32(band * column_tiles)) * band
        within, row_tiles = within - top * column_tiles, lax.min(row_tiles - top, i32(band))
    column_tile = lax.div(within, row_tiles)
    return top + within - column_tile * row_tiles, column_tile


def store_rows(block_smem: Any, out_gmem: Any, tile: Tile, column: jax.Array) -> None:
    """Copies the expert's rows of a tile's block `[max height, columns]` to `out`; others belong to the neighbouring groups."""
    max_height, columns = block_smem.shape
    first_row, size = pl.multiple_of(tile.first_row, ROW_ALIGNMENT), lax.max(tile.high - tile.low, i32(0))

    def copy(offset, height):
        plgpu.copy_smem_to_gmem(
            block_smem.at[pl.ds(offset, height)],
            out_gmem.at[pl.ds(first_row + offset, height), pl.ds(column, columns)],
            commit_group=False,
        )

    def in_pieces():
        low, rest = tile.low, size
        if columns * out_gmem.dtype.itemsize < _TMA_ALIGNMENT:
            # Rows of half of that: one by itself where the first is odd, so that the others begin at a whole.
            one = low & lax.min(size, i32(1))
            pl.when(one != 0)(lambda: copy(low, 1))
            low, rest = low + one, size - one
        _in_pieces(copy, low, rest, max_height)

    pl.when(size == max_height)(lambda: copy(0, max_height))
    pl.when(size != max_height)(in_pieces)


def store_numbers(numbers_smem: Any, out_gmem: Any, index: jax.Array, tile: Tile) -> None:
    """Copies a number for each of the expert's rows of a tile, `[max height]` float32, to `out[index, rows]`."""
    (max_height,) = numbers_smem.shape
    first_row = pl.multiple_of(tile.first_row, ROW_ALIGNMENT)
    # TMA takes multiples of 16 bytes: it has what is whole eights, and the rest goes one by one.
    low, high = lax.div(tile.low + (ROW_ALIGNMENT - 1), i32(ROW_ALIGNMENT)), lax.div(tile.high, i32(ROW_ALIGNMENT))

    def copy(offset, count):
        row = pl.multiple_of(offset * ROW_ALIGNMENT, ROW_ALIGNMENT)
        here = pl.ds(row, count * ROW_ALIGNMENT)
        there = pl.ds(pl.multiple_of(first_row + row, ROW_ALIGNMENT), count * ROW_ALIGNMENT)
        plgpu.copy_smem_to_gmem(numbers_smem.at[here], out_gmem.at[index, there], commit_group=False)

    def copy_one(row, _):
        out_gmem[index, first_row + row] = numbers_smem[row]

    _in_pieces(copy, low, lax.max(high - low, i32(0)), max_height // ROW_ALIGNMENT)
    lax.fori_loop(tile.low, lax.min(low * ROW_ALIGNMENT, tile.high), copy_one, None)
    lax.fori_loop(lax.max(high, low) * ROW_ALIGNMENT, tile.high, copy_one, None)


def _in_pieces(copy: Callable[[Any, int], None], offset: jax.Array, size: jax.Array, most: int) -> None:
    """Copies `size` in pieces, its binary digits: a copy's height must be static."""
    piece = 1 << (most.bit_length() - 1)
    while piece:
        pl.when((size & piece) != 0)(functools.partial(copy, offset, piece))
        offset = offset + (size & piece)
        piece //= 2
