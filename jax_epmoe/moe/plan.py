"""The plan: which row of a rank's work holds which (token, choice) pair. Integers only; no activations pass through here.

Example, 3 tokens with 2 choices each, on a rank that holds experts 2 and 3:

    ids        [[3, 0], [2, 3], [1, 2]]
    row_pair   [2, 5, 0, 3, ...]         expert 2: tokens 1, 2; expert 3: tokens 0, 1; then the pairs of other ranks
    group_sizes [2, 2]
    pair_row   [[2, -], [0, 3], [-, 1]]  "-" (no row here) is `rows`, one past the last
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

ROW_ALIGNMENT = 8  # kernels take rows eight at a time


class Plan(NamedTuple):
    row_pair: jax.Array  # [R] int32: the pair of each row, t * k + j; R = T * k, rounded up to a multiple of 8
    group_sizes: jax.Array  # [E_local] int32: rows of each local expert
    pair_row: jax.Array  # [T, k] int32: the row of each pair, or R where its expert lives elsewhere


def make_plan(ids: jax.Array, first_expert: jax.Array | int, num_local_experts: int) -> Plan:
    """Sorts a rank's (token, choice) pairs by expert; stable, so that a row's place never depends on the run.

    Args:
      ids: `[T, k]` int32 expert ids; an id that no rank holds (such as the number of experts) is a pair without work.
      first_expert: the first expert that this rank holds.
      num_local_experts: how many it holds, `E_local`.
    """
    num_tokens, top_k = ids.shape
    pairs = num_tokens * top_k
    rows = -(-pairs // ROW_ALIGNMENT) * ROW_ALIGNMENT
    local = ids.reshape(pairs) - first_expert
    is_local = (local >= 0) & (local < num_local_experts)
    key = jnp.where(is_local, local, num_local_experts)
    order = jnp.argsort(key, stable=True)  # row -> pair
    group_sizes = jnp.zeros(num_local_experts, jnp.int32).at[key].add(1, mode="drop")
    row_of_pair = jnp.zeros(pairs, jnp.int32).at[order].set(jnp.arange(pairs, dtype=jnp.int32))
    pair_row = jnp.where(is_local, row_of_pair, rows).reshape(num_tokens, top_k)
    row_pair = jnp.pad(order.astype(jnp.int32), (0, rows - pairs))
    return Plan(row_pair, group_sizes, pair_row)
