"""From a router's logits to each token's experts in one kernel on Hopper: a warpgroup takes 64 tokens, all in registers."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.config import MoEConfig

_TOKENS = 64
_MATRIX = plgpu.Layout.WGMMA
_MAX_EXPERTS = 256  # what a warpgroup's registers hold, with as many again to work with
_TILE = 8  # columns that a slice of registers begins and ends at


def serves(logits: jax.Array) -> bool:
    """Whether `choose` can take `logits [T, E]`: float32, E a multiple of 8 up to 256."""
    experts = logits.shape[1]
    return logits.dtype == jnp.float32 and 0 < experts <= _MAX_EXPERTS and experts % _TILE == 0 and logits.size > 0


# Under jit of its own, so that a model's layers share one trace and one compilation.
@functools.partial(jax.jit, static_argnames="config")
def choose(logits: jax.Array, correction_bias: jax.Array | None, config: MoEConfig) -> tuple[jax.Array, jax.Array]:
    """Scores, groups and top k, by the steps that `MoEConfig` lists.

    Args:
      logits: `[T, E]` float32, ones that it `serves`; no NaN.
      correction_bias: `[E]` float32 or None.
      config: of the layer.

    Returns:
      What the chosen experts were chosen by, `[T, k]` float32 (their scores, where there is no bias), best first, and their ids
      `[T, k]` int32; of equals the lower id comes first.
    """
    tokens, experts = logits.shape
    padded = -(-tokens // _TOKENS) * _TOKENS
    f32, i32 = jnp.float32, jnp.int32

    def kernel(logits_gmem, *refs):
        *bias_gmem, values_gmem, ids_gmem = refs
        here = pl.ds(lax.axis_index("block") * _TOKENS, _TOKENS)
        left = _scores(plgpu.load(logits_gmem.at[here], layout=_MATRIX, optimized=False), config.scoring)
        for ref in bias_gmem:
            left += lax.broadcast_in_dim(plgpu.load(ref, layout=_MATRIX.reduce(0), optimized=False), left.shape, (1,))
        # Negative, so that the first of several columns is the largest; float32 holds them exactly.
        number = -plgpu.broadcasted_iota(i32, left.shape, 1, layout=_MATRIX).astype(f32)
        if config.n_group > 1:
            left = _without_other_groups(left, number, config)
        for place in range(config.top_k):
            best, first = _best(left, number)
            values_gmem[place, here] = best
            ids_gmem[place, here] = (-first).astype(i32)
            left = jnp.where(number == _spread(first, experts), -jnp.inf, left)

    shape = (config.top_k, padded)
    bias = [] if correction_bias is None else [correction_bias.astype(f32)]
    values, ids = plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct(shape, f32), jax.ShapeDtypeStruct(shape, i32)),
        grid=(padded // _TOKENS,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),  # there is no shared memory
    )(jnp.pad(logits, ((0, padded - tokens), (0, 0))), *bias)
    return values[:, :tokens].T, ids[:, :tokens].T


def _spread(values: jax.Array, columns: int) -> jax.Array:
    return lax.broadcast_in_dim(values, (_TOKENS, columns), (0,))


def _scores(logits: jax.Array, scoring: str) -> jax.Array:
    if scoring == "sigmoid":
        return 1 / (1 + jnp.exp(-logits))
    powers = jnp.exp(logits - _spread(jnp.max(logits, axis=1), logits.shape[1]))
    return powers * _spread(1 / jnp.sum(powers, axis=1), logits.shape[1])


def _best(left: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each row's largest value, and the `number` of the first column that has it."""
    best = jnp.max(left, axis=1)
    return best, jnp.max(jnp.where(left == _spread(best, left.shape[1]), number, -jnp.inf), axis=1)


def _without_other_groups(left: jax.Array, number: jax.Array, config: MoEConfig) -> jax.Array:
    """-inf for what is not in one of the `topk_group` best groups; of equal groups the first counts."""
    experts, size = left.shape[1], left.shape[1] // config.n_group
    scores = []
    for start in range(0, experts, size):
        columns = slice(start // _TILE * _TILE, -(-(start + size) // _TILE) * _TILE)
        group, own = left[:, columns], number[:, columns]
        if columns != slice(start, start + size):
            group = jnp.where((own <= -start) & (own > -start - size), group, -jnp.inf)
        score, first = _best(group, own)
        if config.group_score == "top2_sum":
            score += jnp.max(jnp.where(own == _spread(first, own.shape[1]), -jnp.inf, group), axis=1)
        scores.append(score)
    costs = []  # 0, or -inf for a group that is out
    for i, score in enumerate(scores):
        better = [
            jnp.where(other >= score if j < i else other > score, 1.0, 0.0) for j, other in enumerate(scores) if j != i
        ]
        costs.append(jnp.where(sum(better[1:], start=better[0]) < config.topk_group, 0.0, -jnp.inf))
    tiles = []
    for start in range(0, experts, _TILE):
        cost = _spread(costs[start // size], _TILE)
        for i in range(start // size + 1, (start + _TILE - 1) // size + 1):
            cost = jnp.where(number[:, start : start + _TILE] <= -i * size, _spread(costs[i], _TILE), cost)
        tiles.append(left[:, start : start + _TILE] + cost)
    return jnp.concatenate(tiles, axis=1)
