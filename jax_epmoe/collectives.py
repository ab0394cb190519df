"""What a group of devices does with tokens that all of them work on: see them all before, and sum their parts after.

Tokens are either on every device of the group, or split over it by their first dimension (data-parallel attention). All
functions run inside a `shard_map`.
"""

from collections.abc import Sequence

import jax


def gather_tokens(x: jax.Array, axes: Sequence[str], *, split: bool) -> jax.Array:
    """All tokens of the group: `x` itself, or `[B / devices, ...]` -> `[B, ...]` by an all-gather."""
    return jax.lax.all_gather(x, tuple(axes), axis=0, tiled=True) if split else x


def sum_tokens(partial: jax.Array, axes: Sequence[str], *, split: bool) -> jax.Array:
    """The devices' parts summed: an all-reduce, or `[B, ...]` -> `[B / devices, ...]` by a reduce-scatter."""
    if split:
        return jax.lax.psum_scatter(partial, tuple(axes), scatter_dimension=0, tiled=True)
    return jax.lax.psum(partial, tuple(axes))
