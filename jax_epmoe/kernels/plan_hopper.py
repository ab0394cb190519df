"""The stable order of pairs by group on Hopper.

Few pairs are each compared with all others, in one kernel. Of many, one kernel counts how many of each group every chunk of them
has, another sums the counts and compares the pairs of a chunk with each other, and XLA scatters. Numbers are compared as float32,
in which they are exact: groups times few pairs are less than 2**24.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_DOWN = 64  # rows of a warpgroup's layout: a CTA's own pairs, or groups
_ACROSS = 128  # pairs that they are compared with at a time
_CHUNK = 256  # of many pairs; twice as many where there would be more than 128 chunks, whose counts each CTA reads
_MOST_CHUNKS = 128
_FEW_PAIRS = 2**11
_MOST_PAIRS = 2**16  # more are sorted sooner
_MATRIX = plgpu.Layout.WGMMA
_ROWS, _COLUMNS = _MATRIX.reduce(1), _MATRIX.reduce(0)
# What is written is read after `commit_smem`, which waits for the whole warpgroup.
_NO_BARRIERS = plgpu.CompilerParams(unsafe_no_auto_barriers=True)


def serves(pairs: int, num_groups: int) -> bool:
    """Whether `order` should take so many pairs and groups."""
    return 0 < pairs <= _MOST_PAIRS and num_groups <= (2**11 if pairs <= _FEW_PAIRS else 2**8)


# Under jit of its own, so that a model's layers share one trace and one compilation.
@functools.partial(jax.jit, static_argnames="num_groups")
def order(ids: jax.Array, first: jax.Array | int, num_groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The stable order of pairs by group.

    Args:
      ids: `[P]` int32, a number that it `serves`; those of the groups are `first` to `first + num_groups - 1`, all others come last.
      first: an int32, not negative.
      num_groups: how many groups there are.

    Returns:
      How many pairs each group has `[num_groups]`, the pair in each row `[P]`, and the row of each pair `[P]`, P where it is in no group;
      all int32.
    """
    (pairs,) = ids.shape
    run, multiple = (_by_comparing, _ACROSS) if pairs <= _FEW_PAIRS else (_by_counting, _CHUNK)
    padding = -pairs % multiple
    ids = jnp.pad(ids, (0, padding), constant_values=-1)  # in no group, and after all others in none
    sizes, row_pair, pair_row = run(ids, jnp.asarray(first, jnp.int32).reshape(1), num_groups)
    if padding:
        row_pair, pair_row = row_pair[:pairs], jnp.minimum(pair_row[:pairs], pairs)
    return sizes, row_pair, pair_row


def _by_comparing(ids: jax.Array, first: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    pairs = ids.shape[0]
    blocks = pairs // _DOWN
    f32, i32 = jnp.float32, jnp.int32

    def kernel(ids_gmem, first_gmem, sizes_gmem, row_pair_gmem, pair_row_gmem, ids_smem, numbers_smem, arrived):
        block = lax.axis_index("block")
        plgpu.copy_gmem_to_smem(ids_gmem, ids_smem, arrived)
        first = first_gmem[0]
        plgpu.barrier_wait(arrived)

        def load(start, count, layout):
            """Of `count` pairs, which divide 128, numbers of groups, `num_groups` for none, and of pairs."""
            line = lax.div(start, i32(_ACROSS))
            here = pl.ds(start - line * _ACROSS, count)
            group = _group_of(plgpu.load(ids_smem.at[line, here], layout=layout, optimized=False) - first, num_groups)
            return group, (plgpu.broadcasted_iota(i32, (count,), 0, layout=layout) + start).astype(f32)

        def count(own, key_of, compare):
            """Of how many pairs, for each of `own [64]`, `compare(key_of(group, pair), own)`."""
            own = _along(own, 0, _ACROSS)

            def body(i, total):
                keys = _along(key_of(*load(i * _ACROSS, _ACROSS, _COLUMNS)), 1, _ACROSS)
                return total + jnp.where(compare(keys, own), f32(1), f32(0))

            return jnp.sum(lax.fori_loop(0, pairs // _ACROSS, body, _zeros(_ACROSS)), axis=1).astype(i32)

        @pl.when(block < blocks)
        def _order():
            start = block * _DOWN
            group, pair = load(start, _DOWN, _ROWS)
            row = count(group * pairs + pair, lambda group, pair: group * pairs + pair, lambda key, own: key < own)
            numbers_smem[...] = row
            plgpu.commit_smem()
            pair_row_gmem[pl.ds(start, _DOWN)] = jnp.where(group < num_groups, row, pairs)

            @pl.loop(0, _DOWN, unroll=8)
            def _scatter(i):
                row_pair_gmem[numbers_smem[i]] = start + i

        @pl.when(block >= blocks)
        def _sizes():
            start = (block - blocks) * _DOWN
            own = (plgpu.broadcasted_iota(i32, (_DOWN,), 0, layout=_ROWS) + start).astype(f32)
            sizes = count(own, lambda group, _: group, lambda key, own: key == own)
            _store_sizes(sizes, start, sizes_gmem, numbers_smem)

    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((count,), i32) for count in (num_groups, pairs, pairs)],
        scratch_types=[plgpu.SMEM((pairs // _ACROSS, _ACROSS), i32), plgpu.SMEM((_DOWN,), i32), plgpu.Barrier()],
        grid=(blocks + -(-num_groups // _DOWN),),
        grid_names=("block",),
        compiler_params=_NO_BARRIERS,
    )(ids.reshape(-1, _ACROSS), first)


def _by_counting(ids: jax.Array, first: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    pairs = ids.shape[0]
    chunk = math.gcd(pairs, _CHUNK if pairs <= _CHUNK * _MOST_CHUNKS else 2 * _CHUNK)
    lines, chunks, blocks = chunk // _DOWN, pairs // chunk, -(-num_groups // _DOWN)
    tiles = -(-chunks // _DOWN)
    f32, i32 = jnp.float32, jnp.int32
    operands = ids.reshape(chunks, lines, _DOWN), first
    ids_smem, numbers_smem = plgpu.SMEM((lines, _DOWN), i32), plgpu.SMEM((_DOWN,), i32)

    def group_of(ids_smem, line, first_gmem, layout):
        return _group_of(plgpu.load(ids_smem.at[line], layout=layout, optimized=False) - first_gmem[0], num_groups)

    def numbers(layout):
        return plgpu.broadcasted_iota(i32, (_DOWN,), 0, layout=layout)

    def count_kernel(ids_gmem, first_gmem, counts_gmem, ids_smem, arrived):
        """Of a chunk, the pairs of 64 groups; 0 for groups that are none."""
        chunk, block = lax.axis_index("chunk"), lax.axis_index("block")
        plgpu.copy_gmem_to_smem(ids_gmem.at[chunk], ids_smem, arrived)
        number = numbers(_ROWS) + block * _DOWN
        own = _along(jnp.where(number < num_groups, number, -1).astype(f32), 0, _DOWN)
        plgpu.barrier_wait(arrived)

        def body(line, total):
            groups = _along(group_of(ids_smem, line, first_gmem, _COLUMNS), 1, _DOWN)
            return total + jnp.where(groups == own, f32(1), f32(0))

        total = lax.fori_loop(0, lines, body, _zeros(_DOWN))
        counts_gmem[chunk, pl.ds(block * _DOWN, _DOWN)] = jnp.sum(total, axis=1)

    counts = plgpu.kernel(
        count_kernel,
        out_type=jax.ShapeDtypeStruct((tiles * _DOWN, blocks * _DOWN), f32),
        scratch_types=[ids_smem, plgpu.Barrier()],
        grid=(chunks, blocks),
        grid_names=("chunk", "block"),
        compiler_params=_NO_BARRIERS,
    )(*operands)

    def place_kernel(
        ids_gmem,
        first_gmem,
        counts_gmem,
        sizes_gmem,
        row_gmem,
        pair_row_gmem,
        ids_smem,
        groups_smem,
        earlier_smem,
        sizes_smem,
        numbers_smem,
        arrived,
    ):
        """The rows of a chunk's pairs: after all of lower groups, those of its group in earlier chunks, and those in its own."""
        chunk = lax.axis_index("chunk")
        plgpu.copy_gmem_to_smem(ids_gmem.at[chunk], ids_smem, arrived)
        number, column = numbers(_ROWS), numbers(_COLUMNS).astype(f32)
        tile_chunk = _along(number, 0, _DOWN)
        all_earlier = _zeros(_DOWN)
        for block in range(blocks):
            here = pl.ds(block * _DOWN, _DOWN)

            def tile_body(tile, sums, here=here):
                counts = plgpu.load(counts_gmem.at[pl.ds(tile * _DOWN, _DOWN), here], layout=_MATRIX, optimized=False)
                own_chunk = tile_chunk + tile * _DOWN
                kept = (jnp.where(own_chunk < end, counts, f32(0)) for end in (chunk, chunks))
                return tuple(total + each for total, each in zip(sums, kept, strict=True))

            sums = lax.fori_loop(0, tiles, tile_body, (_zeros(_DOWN),) * 2, unroll=math.gcd(tiles, 4))
            earlier, sizes = (plgpu.layout_cast(jnp.sum(each, axis=0), _COLUMNS) for each in sums)
            earlier_smem[here], sizes_smem[here] = earlier, sizes
            all_earlier += _along(earlier, 1, _DOWN)
        plgpu.barrier_wait(arrived)
        for line in range(lines):
            groups_smem[pl.ds(line * _DOWN, _DOWN)] = group_of(ids_smem, line, first_gmem, _ROWS)
        plgpu.commit_smem()
        # Pairs of no group come after all that are in one (as the highest group they would), and after earlier ones of none.
        of_none = (chunk * lines * _DOWN).astype(f32) - plgpu.layout_cast(jnp.sum(all_earlier, axis=1), _ROWS)
        comes_before = _along(column, 1, _DOWN) < _along(number.astype(f32), 0, _DOWN)

        def columns(ref, i):
            values = plgpu.load(ref.at[pl.ds(i * _DOWN, _DOWN)], layout=_COLUMNS, optimized=False)
            return _along(values, 1, _DOWN)

        @pl.loop(0, lines)
        def _line(line):
            # From `ids_smem`: two layouts of one load, as of what `columns` reads below, are more than Mosaic infers.
            group = group_of(ids_smem, line, first_gmem, _ROWS)
            own = _along(group, 0, _DOWN)

            def groups_body(block, total):
                other = _along(column + (block * _DOWN).astype(f32), 1, _DOWN)
                total += jnp.where(other < own, columns(sizes_smem, block), f32(0))
                return total + jnp.where(other == own, columns(earlier_smem, block), f32(0))

            def earlier_body(earlier, total):
                return total + jnp.where(columns(groups_smem, earlier) == own, f32(1), f32(0))

            total = lax.fori_loop(0, blocks, groups_body, _zeros(_DOWN))
            total = lax.fori_loop(0, line, earlier_body, total)
            total += jnp.where((columns(groups_smem, line) == own) & comes_before, f32(1), f32(0))
            row = plgpu.layout_cast(jnp.sum(plgpu.layout_cast(total, _MATRIX), axis=1), _ROWS)
            row = (row + plgpu.layout_cast(jnp.where(group < num_groups, f32(0), of_none), _ROWS)).astype(i32)
            here = pl.ds((chunk * lines + line) * _DOWN, _DOWN)
            row_gmem[here] = row
            pair_row_gmem[here] = jnp.where(group < num_groups, row, pairs)

        @pl.when(chunk == 0)
        def _sizes():
            @pl.loop(0, blocks)
            def _block(block):
                start = block * _DOWN
                sizes = plgpu.load(sizes_smem.at[pl.ds(start, _DOWN)], layout=_ROWS, optimized=False)
                _store_sizes(sizes.astype(i32), start, sizes_gmem, numbers_smem)

    sizes, row, pair_row = plgpu.kernel(
        place_kernel,
        out_type=[jax.ShapeDtypeStruct((count,), i32) for count in (num_groups, pairs, pairs)],
        scratch_types=[
            ids_smem,
            plgpu.SMEM((chunk,), f32),
            *[plgpu.SMEM((blocks * _DOWN,), f32)] * 2,
            numbers_smem,
            plgpu.Barrier(),
        ],
        grid=(chunks,),
        grid_names=("chunk",),
        compiler_params=_NO_BARRIERS,
    )(*operands, counts)
    row_pair = lax.empty((pairs,), i32).at[row].set(lax.iota(i32, pairs), unique_indices=True)
    return sizes, row_pair, pair_row


def _store_sizes(sizes, start, sizes_gmem, numbers_smem) -> None:
    """64 numbers from `start`, but what is past the end of `sizes_gmem`."""
    (num_groups,) = sizes_gmem.shape

    @pl.when(start + _DOWN <= num_groups)
    def _whole():
        sizes_gmem[pl.ds(start, _DOWN)] = sizes

    @pl.when(start + _DOWN > num_groups)
    def _rest():
        numbers_smem[...] = sizes
        plgpu.commit_smem()

        @pl.loop(0, num_groups - start)
        def _copy(i):
            sizes_gmem[start + i] = numbers_smem[i]


def _group_of(number: jax.Array, num_groups: int) -> jax.Array:
    """In float32; `num_groups` for what is in none."""
    return jnp.where((number >= 0) & (number < num_groups), number, num_groups).astype(jnp.float32)


def _along(values: jax.Array, axis: int, across: int) -> jax.Array:
    return plgpu.layout_cast(lax.broadcast_in_dim(values, (_DOWN, across), (axis,)), _MATRIX)


def _zeros(across: int) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((_DOWN, across), jnp.float32), _MATRIX)
