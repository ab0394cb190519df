"""The plan of few pairs in one kernel on Hopper: every pair is compared with every other."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_DOWN = 64  # rows of a warpgroup's layout: a CTA's own pairs, or groups
_ACROSS = 128  # pairs that they are compared with at a time
_MOST_PAIRS = 2**11  # more are sorted sooner; numbers up to this times the groups are exact in float32
_MOST_GROUPS = 2**11
_MATRIX = plgpu.Layout.WGMMA
_ROWS, _COLUMNS = _MATRIX.reduce(1), _MATRIX.reduce(0)


def serves(pairs: int, num_groups: int) -> bool:
    """Whether `order` can take so many pairs, a multiple of 128, and groups."""
    return 0 < pairs <= _MOST_PAIRS and pairs % _ACROSS == 0 and num_groups <= _MOST_GROUPS


# Under jit of its own, so that a model's layers share one trace and one compilation.
@functools.partial(jax.jit, static_argnames="num_groups")
def order(ids: jax.Array, first: jax.Array | int, num_groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The stable order of pairs by group.

    Args:
      ids: `[P]` int32, a number that it `serves`; those of the groups are `first` to `first + num_groups - 1`, all others come last.
      first: an int32.
      num_groups: how many groups there are.

    Returns:
      How many pairs each group has `[num_groups]`, the pair in each row `[P]`, and the row of each pair `[P]`, P where it is in no group;
      all int32.
    """
    pairs = ids.shape[0]
    blocks, (chunks, rest) = pairs // _DOWN, divmod(num_groups, _DOWN)
    f32, i32 = jnp.float32, jnp.int32

    def kernel(ids_gmem, first_gmem, sizes_gmem, row_pair_gmem, pair_row_gmem, numbers_smem):
        block = lax.axis_index("block")
        first = first_gmem[0]

        def load(start, count, layout):
            """Numbers of groups, `num_groups` for none, and of pairs."""
            ids = plgpu.load(ids_gmem.at[pl.ds(start, count)], layout=layout, optimized=False) - first
            pair = plgpu.broadcasted_iota(i32, (count,), 0, layout=layout) + start
            return jnp.where((ids >= 0) & (ids < num_groups), ids, num_groups).astype(f32), pair.astype(f32)

        def along(values, axis):
            return plgpu.layout_cast(lax.broadcast_in_dim(values, (_DOWN, _ACROSS), (axis,)), _MATRIX)

        def count(own, key_of, compare):
            """Of how many pairs, for each of `own [64]`, `compare(key_of(group, pair), own)`."""

            def body(i, total):
                keys = along(key_of(*load(i * _ACROSS, _ACROSS, _COLUMNS)), 1)
                ones = jnp.where(compare(keys, along(own, 0)), f32(1), f32(0))
                return total + plgpu.layout_cast(jnp.sum(ones, axis=1), _ROWS)

            zeros = plgpu.layout_cast(jnp.zeros((_DOWN,), f32), _ROWS)
            return lax.fori_loop(0, pairs // _ACROSS, body, zeros)

        @pl.when(block < blocks)
        def _order():
            start = block * _DOWN
            group, pair = load(start, _DOWN, _ROWS)
            row = count(
                group * pairs + pair, lambda group, pair: group * pairs + pair, lambda key, own: key < own
            ).astype(i32)
            numbers_smem[...] = row
            plgpu.commit_smem()
            here = pl.ds(start, _DOWN)
            pair_row_gmem[here] = jnp.where(group < num_groups, row, pairs)

            @pl.loop(0, _DOWN, unroll=8)
            def _scatter(i):
                row_pair_gmem[numbers_smem[i]] = start + i

        @pl.when(block <= chunks if rest else block < chunks)
        def _sizes():
            start = block * _DOWN
            own = (plgpu.broadcasted_iota(i32, (_DOWN,), 0, layout=_ROWS) + start).astype(f32)
            sizes = count(own, lambda group, _: group, lambda key, own: key == own).astype(i32)

            @pl.when(block < chunks)
            def _whole():
                sizes_gmem[pl.ds(start, _DOWN)] = sizes

            @pl.when(block == chunks)
            def _rest():
                plgpu.commit_smem()  # the rows have been read
                numbers_smem[...] = sizes
                plgpu.commit_smem()

                @pl.loop(0, rest)
                def _copy(i):
                    sizes_gmem[start + i] = numbers_smem[i]

    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((count,), i32) for count in (num_groups, pairs, pairs)],
        scratch_types=[plgpu.SMEM((_DOWN,), i32)],
        grid=(max(blocks, chunks + bool(rest)),),
        grid_names=("block",),
        # What is written is read after `commit_smem`, which waits for the whole warpgroup.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(ids, jnp.asarray(first, i32).reshape(1))
