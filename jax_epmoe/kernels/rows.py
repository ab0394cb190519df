"""Rows out of expert order and back to their tokens."""

import jax
import jax.numpy as jnp


def combine(y: jax.Array, pair_row: jax.Array, weights: jax.Array) -> jax.Array:
    """Each token's weighted sum of its rows: `out[t] = sum_j weights[t, j] * y[pair_row[t, j]]`, in float32.

    A gather, not a scatter: the order of the sum is fixed, so the bits are the same on every run.

    Args:
      y: `[R, H]`; rows that no pair names may hold anything, NaN too.
      pair_row: `[T, k]` int32; a pair whose row is R adds nothing.
      weights: `[T, k]` float32.

    Returns:
      `[T, H]` float32.
    """
    total = jnp.zeros((pair_row.shape[0], y.shape[1]), jnp.float32)
    for rows, weight in zip(pair_row.T, weights.T, strict=True):  # one fused loop; never [T, k, H]
        total += weight[:, None] * y.at[rows].get(mode="fill", fill_value=0)
    return total
