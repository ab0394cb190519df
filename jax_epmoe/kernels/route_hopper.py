"""From a router's logits to each token's experts in one kernel on Hopper: a warp takes a token, its lanes the experts."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.config import MoEConfig
from jax_epmoe.kernels.warp_rows import HEIGHT, LANES, ROWS, spread

_MAX_EXPERTS = 1024  # 32 a lane


def serves(logits: jax.Array) -> bool:
    """Whether `choose` can take `logits [T, E]`: float32, at most 1024 experts."""
    return logits.dtype == jnp.float32 and logits.shape[1] <= _MAX_EXPERTS and logits.size > 0


# Under jit of its own, so that a model's layers share one trace and one compilation.
@functools.partial(jax.jit, static_argnames="config")
def choose(
    logits: jax.Array, correction_bias: jax.Array | None, mask: jax.Array | None, config: MoEConfig
) -> tuple[jax.Array, jax.Array]:
    """Scores, groups, top k and weights, by the steps that `MoEConfig` lists.

    Args:
      logits: `[T, E]` float32, ones that it `serves`; no NaN.
      correction_bias: `[E]` float32 or None.
      mask: `[T]` bool: the tokens that count; None: all.
      config: of the layer.

    Returns:
      The chosen experts' weights `[T, k]` float32, best first, and their ids `[T, k]` int32; of equals the lower id comes first. Ids
      of tokens that do not count are E.
    """
    tokens, experts = logits.shape
    padding = -tokens % HEIGHT, -experts % LANES
    f32, i32 = jnp.float32, jnp.int32

    def kernel(logits_gmem, *refs):
        *vectors, weights_gmem, ids_gmem = refs
        bias_gmem, mask_gmem = vectors[: len(biases)], vectors[len(biases) :]
        here = pl.ds(lax.axis_index("block") * HEIGHT, HEIGHT)
        scores = left = _scores(plgpu.load(logits_gmem.at[here], layout=ROWS, optimized=False), config.scoring)
        for ref in bias_gmem:
            bias = plgpu.load(ref, layout=ROWS.reduce(0), optimized=False)
            left += spread(bias, left.shape, 1)
        # Negative, so that the first of several columns is the largest; float32 holds them exactly.
        number = -plgpu.broadcasted_iota(i32, left.shape, 1, layout=ROWS).astype(f32)
        if padding[1]:
            left = jnp.where(number > -experts, left, -jnp.inf)
        if config.n_group > 1:
            left = _without_other_groups(left, number, config)
        counts = [plgpu.load(ref.at[here], layout=ROWS.reduce(1), optimized=False) > 0 for ref in mask_gmem]
        weights = []
        for place in range(config.top_k):
            best, first = _best(left, number)
            chosen = number == spread(first, left.shape, 0)
            weights.append(jnp.max(jnp.where(chosen, scores, -jnp.inf), axis=1) if bias_gmem else best)
            own_ids = (-first).astype(i32)
            ids_gmem[here, place] = jnp.where(counts[0], own_ids, experts) if counts else own_ids
            left = jnp.where(chosen, -jnp.inf, left)
        factor: jax.Array | float = config.routed_scaling_factor
        if config.norm_topk_prob:
            factor = factor / (sum(weights[1:], start=weights[0]) + 1e-20)  # sigmoids may all underflow
        for place, weight in enumerate(weights):
            weights_gmem[here, place] = weight * factor

    shape = (tokens + padding[0], config.top_k)
    biases = [] if correction_bias is None else [jnp.pad(correction_bias.astype(f32), (0, padding[1]))]
    masks = [] if mask is None else [jnp.pad(mask.astype(i32), (0, padding[0]))]
    weights, ids = plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct(shape, f32), jax.ShapeDtypeStruct(shape, i32)),
        grid=(shape[0] // HEIGHT,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),  # there is no shared memory
    )(
        jnp.pad(logits, ((0, padding[0]), (0, padding[1])), constant_values=-jnp.inf if padding[1] else 0),
        *biases,
        *masks,
    )
    return weights[:tokens], ids[:tokens]


def _scores(logits: jax.Array, scoring: str) -> jax.Array:
    if scoring == "sigmoid":
        return 1 / (1 + jnp.exp(-logits))
    powers = jnp.exp(logits - spread(jnp.max(logits, axis=1), logits.shape, 0))
    return powers * spread(1 / jnp.sum(powers, axis=1), logits.shape, 0)


def _best(left: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each row's largest value, and the `number` of the first column that has it."""
    best = jnp.max(left, axis=1)
    return best, jnp.max(jnp.where(left == spread(best, left.shape, 0), number, -jnp.inf), axis=1)


def _without_other_groups(left: jax.Array, number: jax.Array, config: MoEConfig) -> jax.Array:
    """-inf for what is not in one of the `topk_group` best groups; of equal groups the first counts."""
    size = config.num_experts // config.n_group
    spans = [slice(i * size, (i + 1) * size) for i in range(config.n_group)]
    apart = size % LANES == 0  # a lane then holds columns of one group side by side
    inside = [(number <= -span.start) & (number > -span.stop) for span in spans]
    scores = []
    for span, own in zip(spans, inside, strict=True):
        group = left[:, span] if apart else jnp.where(own, left, -jnp.inf)
        own_number = number[:, span] if apart else number
        score, first = _best(group, own_number)
        if config.group_score == "top2_sum":
            score += jnp.max(jnp.where(own_number == spread(first, group.shape, 0), -jnp.inf, group), axis=1)
        scores.append(score)
    costs = []
    for i, score in enumerate(scores):
        better = [
            jnp.where(other >= score if j < i else other > score, 1.0, 0.0) for j, other in enumerate(scores) if j != i
        ]
        costs.append(jnp.where(sum(better[1:], start=better[0]) < config.topk_group, 0.0, -jnp.inf))
    if apart:
        groups = [left[:, span] for span in spans]
        return jnp.concatenate(
            [group + spread(cost, group.shape, 0) for group, cost in zip(groups, costs, strict=True)], axis=1
        )
    for own, cost in zip(inside, costs, strict=True):
        left = jnp.where(own, left + spread(cost, left.shape, 0), left)
    return left
