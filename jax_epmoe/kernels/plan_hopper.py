"""The plan of few pairs in one kernel on Hopper: every pair is compared with every other."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_DOWN = 64  # rows of a warpgroup's layout: a CTA's own pairs, or groups
_ACROSS = 128  # pairs that they are compared with at a time
_MOST_PAIRS = 2**12  # more are sorted sooner; numbers up to this times the groups are exact in float32
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

    def kernel(ids_gmem, first_gmem, sizes_gmem, row_pair_gmem, pair_row_gmem, ids_smem, numbers_smem, arrived):
        block = lax.axis_index("block")
        plgpu.copy_gmem_to_smem(ids_gmem, ids_smem, arrived)
        first = first_gmem[0]
        plgpu.barrier_wait(arrived)

        def load(start, count, layout):
            """Of `count` pairs, which divide 128, numbers of groups, `num_groups` for none, and of pairs."""
            line = lax.div(start, i32(_ACROSS))
            here = pl.ds(start - line * _ACROSS, count)
            ids = plgpu.load(ids_smem.at[line, here], layout=layout, optimized=False) - first
            pair = plgpu.broadcasted_iota(i32, (count,), 0, layout=layout) + start
            return jnp.where((ids >= 0) & (ids < num_groups), ids, num_groups).astype(f32), pair.astype(f32)

        def along(values, axis):
            return plgpu.layout_cast(lax.broadcast_in_dim(values, (_DOWN, _ACROSS), (axis,)), _MATRIX)

        def count(own, key_of, compare):
            """Of how many pairs, for each of `own [64]`, `compare(key_of(group, pair), own)`."""
            own = along(own, 0)

            def body(i, total):
                keys = along(key_of(*load(i * _ACROSS, _ACROSS, _COLUMNS)), 1)
                return total + jnp.where(compare(keys, own), f32(1), f32(0))

            zeros = plgpu.layout_cast(jnp.zeros((_DOWN, _ACROSS), f32), _MATRIX)
            return jnp.sum(lax.fori_loop(0, pairs // _ACROSS, body, zeros), axis=1).astype(i32)

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

            @pl.when(block < blocks + chunks)
            def _whole():
                sizes_gmem[pl.ds(start, _DOWN)] = sizes

            @pl.when(block == blocks + chunks)
            def _rest():
                numbers_smem[...] = sizes
                plgpu.commit_smem()

                @pl.loop(0, rest)
                def _copy(i):
                    sizes_gmem[start + i] = numbers_smem[i]

    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((count,), i32) for count in (num_groups, pairs, pairs)],
        scratch_types=[plgpu.SMEM((pairs // _ACROSS, _ACROSS), i32), plgpu.SMEM((_DOWN,), i32), plgpu.Barrier()],
        grid=(blocks + chunks + bool(rest),),
        grid_names=("block",),
        # What is written is read after `commit_smem`, which waits for the whole warpgroup.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(ids.reshape(-1, _ACROSS), jnp.asarray(first, i32).reshape(1))
