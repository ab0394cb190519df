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

from jax_epmoe.kernels import plan_hopper
from jax_epmoe.kernels.device import on_hopper

ROW_ALIGNMENT = 8  # kernels take rows eight at a time


class Plan(NamedTuple):
    row_pair: jax.Array  # [R] int32: the pair of each row, t * k + j; R = T * k, rounded up to a multiple of 8
    group_sizes: jax.Array  # [E_local] int32: rows of each local expert
    pair_row: jax.Array  # [T, k] int32: the row of each pair, or R where its expert lives elsewhere
    pair_expert: jax.Array  # [T, k] int32: the local expert of each pair; out of range where it lives elsewhere


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
    pair_expert = ids - first_expert
    if on_hopper() and plan_hopper.serves(pairs, num_local_experts):
        group_sizes, row_pair, pair_row = plan_hopper.order(ids.reshape(pairs), first_expert, num_local_experts)
        return Plan(row_pair, group_sizes, pair_row.reshape(num_tokens, top_k), pair_expert)
    local = pair_expert.reshape(pairs)
    is_local = (local >= 0) & (local < num_local_experts)
    key = jnp.where(is_local, local, num_local_experts)
    group_sizes = jnp.sum(key[:, None] == jnp.arange(num_local_experts), axis=0, dtype=jnp.int32)
    row_pair, row_of_pair = _compare(key) if pairs <= _FEW_PAIRS else _sort(key, num_local_experts)
    pair_row = jnp.where(is_local, row_of_pair, rows).reshape(num_tokens, top_k)
    return Plan(jnp.pad(row_pair, (0, rows - pairs)), group_sizes, pair_row, pair_expert)


# Up to here all pairs are compared with all: a few small kernels on a GPU, where a sort is many.
_FEW_PAIRS = 2048


def _compare(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The stable order of `key [P]`, as row -> pair and pair -> row."""
    number = jnp.arange(key.size, dtype=jnp.int32)
    other, own = key[None, :], key[:, None]
    before = (other < own) | ((other == own) & (number[None, :] < number[:, None]))
    row = jnp.sum(before, axis=1, dtype=jnp.int32)
    pair = jnp.sum(jnp.where(row[None, :] == number[:, None], number[None, :], 0), axis=1, dtype=jnp.int32)
    return pair, row


def _sort(key: jax.Array, num_keys: int) -> tuple[jax.Array, jax.Array]:
    """`_compare` for many. A GPU's radix sort goes over the keys once a byte, so they have as few as they need."""
    number = jnp.arange(key.size, dtype=jnp.int32)
    narrow = jnp.uint8 if num_keys < 2**8 else jnp.uint16 if num_keys < 2**16 else jnp.uint32
    _, pair = jax.lax.sort((key.astype(narrow), number), num_keys=1, is_stable=True)
    return pair, jnp.zeros_like(number).at[pair].set(number, unique_indices=True)
