"""Rows out of expert order and back to their tokens."""

from functools import partial

import jax
import jax.numpy as jnp

from jax_epmoe.kernels import rows_hopper
from jax_epmoe.kernels.device import on_hopper


def dispatch(x: jax.Array, pair_row: jax.Array, num_rows: int) -> jax.Array | None:
    """Each token at all its rows: `out[pair_row[t, j]] = x[t]`. Reads each token once, where a gather reads it once a row.

    Args:
      x: `[T, H]`.
      pair_row: `[T, k]` int32, each row at most once; `num_rows` or more: a pair without a row.

    Returns:
      `[num_rows, H]` in x's dtype, not differentiable; rows that no pair names may hold anything, NaN too. None where no kernel
      of ours serves the call.
    """
    if on_hopper() and rows_hopper.serves(x) and pair_row.size and num_rows:
        return rows_hopper.dispatch(x, pair_row, num_rows)
    return None


def combine(
    y: jax.Array,
    pair_row: jax.Array,
    weights: jax.Array,
    base: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Each token's weighted sum of its rows: `out[t] = base[t] + sum_j weights[t, j] * y[pair_row[t, j]]`, in float32.

    A gather, not a scatter: the order of the sum is fixed, so the bits are the same on every run. Differentiable.

    Args:
      y: `[R, H]`; rows that no pair names may hold anything, NaN too.
      pair_row: `[T, k]` int32; a pair whose row is R adds nothing.
      weights: `[T, k]` float32.
      base: `[T, H]`, what the sum begins with; None: zeros.
      out_dtype: what the sum is rounded to, once, at the end.

    Returns:
      `[T, H]` in out_dtype.
    """
    return _combine(jnp.dtype(out_dtype), y, pair_row, weights, base)


def _reference(out_dtype, y, pair_row, weights, base):
    total = jnp.zeros((pair_row.shape[0], y.shape[1]), jnp.float32) if base is None else base.astype(jnp.float32)
    for rows, weight in zip(pair_row.T, weights.T, strict=True):  # one fused loop; never [T, k, H]
        total += weight[:, None] * y.at[rows].get(mode="fill", fill_value=0)
    return total.astype(out_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(out_dtype, y, pair_row, weights, base):
    if on_hopper() and rows_hopper.serves(y) and pair_row.size:
        return rows_hopper.combine(y, pair_row, weights, base, out_dtype=out_dtype)
    return _reference(out_dtype, y, pair_row, weights, base)


def _forward(out_dtype, y, pair_row, weights, base):
    return _combine(out_dtype, y, pair_row, weights, base), (y, pair_row, weights, base)


def _backward(out_dtype, saved, d_out):
    y, pair_row, weights, base = saved
    _, pull = jax.vjp(lambda y, weights, base: _reference(out_dtype, y, pair_row, weights, base), y, weights, base)
    d_y, d_weights, d_base = pull(d_out)
    return d_y, None, d_weights, d_base


_combine.defvjp(_forward, _backward)
