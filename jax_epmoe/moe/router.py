"""The router: which experts a token goes to, and with what weights. All of it in float32, the same bits on every rank."""

from functools import partial

import jax
import jax.numpy as jnp

from jax_epmoe.config import MoEConfig
from jax_epmoe.kernels import route_hopper
from jax_epmoe.kernels.device import on_hopper


def route(
    x: jax.Array,
    router_weight: jax.Array,
    correction_bias: jax.Array | None,
    config: MoEConfig,
    router_bias: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Chooses `k` of `E` experts for each token, by the steps that `MoEConfig` lists.

    Args:
      x: `[T, H]`.
      router_weight: `[E, H]`.
      correction_bias: `[E]` or None.
      config: the layer's.
      router_bias: `[E]`, added to the logits, or None.
      mask: `[T]` bool: the tokens that count; None: all.

    Returns:
      weights `[T, k]` float32 and expert ids `[T, k]` int32, best first; ties go to the lower id. Ids of tokens that do not count are E.
    """
    logits = _logits(x, router_weight)
    if router_bias is not None:
        logits += router_bias.astype(jnp.float32)
    return _choose(logits, correction_bias, mask, config)


# From so many tokens on, throughput counts rather than the number of kernels.
_MANY_TOKENS = 1024


def _logits(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x [T, H]` times `w [E, H]`, both as float32 -> `[T, E]` float32.

    Tensor cores have no float32, but what they multiply in 16 bits is exact in it. Many tokens in bfloat16 are multiplied by two
    bfloat16 that add up to a float32 weight: what is lost is below 2**-17 of it, where x was rounded at 2**-9.
    """
    multiply = partial(jax.lax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())))
    if x.dtype == w.dtype and w.dtype.itemsize == 2:
        return multiply(x, w, preferred_element_type=jnp.float32)
    w = w.astype(jnp.float32)
    if x.dtype != jnp.bfloat16 or x.shape[0] < _MANY_TOKENS:
        return multiply(x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)
    # `reduce_precision`: a compiler may take a cast there and back for nothing.
    high = jax.lax.reduce_precision(w, exponent_bits=8, mantissa_bits=7)
    both = jnp.concatenate([high, w - high]).astype(jnp.bfloat16)
    high, low = jnp.split(multiply(x, both, preferred_element_type=jnp.float32), 2, axis=1)
    return high + low


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _choose(
    logits: jax.Array, correction_bias: jax.Array | None, mask: jax.Array | None, config: MoEConfig
) -> tuple[jax.Array, jax.Array]:
    """The weights of the chosen experts `[T, k]`, and their ids; the weights alone have a gradient."""
    if on_hopper() and route_hopper.serves(logits):
        return route_hopper.choose(logits, correction_bias, mask, config)
    choice = _scores(logits, config)  # [T, E]
    if correction_bias is not None:
        choice += correction_bias.astype(jnp.float32)
    if config.n_group > 1:
        choice = jnp.where(_in_best_groups(choice, config), choice, -jnp.inf)
    ids = jax.lax.top_k(choice, config.top_k)[1].astype(jnp.int32)
    weights = _weights_of(logits, ids, config)
    return weights, ids if mask is None else jnp.where(mask[:, None], ids, config.num_experts)


def _choose_forward(logits, correction_bias, mask, config):
    weights, ids = _choose(logits, correction_bias, mask, config)
    of_any = ids if mask is None else jnp.minimum(ids, config.num_experts - 1)
    return (weights, ids), (logits, correction_bias, of_any)


def _choose_backward(config, saved, d_outputs):
    logits, correction_bias, ids = saved
    (d_logits,) = jax.vjp(lambda logits: _weights_of(logits, ids, config), logits)[1](d_outputs[0])
    return d_logits, jax.tree.map(jnp.zeros_like, correction_bias), None


_choose.defvjp(_choose_forward, _choose_backward)


def _scores(logits: jax.Array, config: MoEConfig) -> jax.Array:
    return jax.nn.softmax(logits, axis=-1) if config.scoring == "softmax" else jax.nn.sigmoid(logits)


def _weights_of(logits: jax.Array, ids: jax.Array, config: MoEConfig) -> jax.Array:
    """Weights `[T, k]` of some experts: their scores, normalised and scaled as the config asks."""
    if config.scoring == "sigmoid":  # of each logit alone
        weights = _scores(jnp.take_along_axis(logits, ids, axis=-1), config)
    else:
        weights = jnp.take_along_axis(_scores(logits, config), ids, axis=-1)
    if config.norm_topk_prob:
        weights /= jnp.sum(weights, axis=-1, keepdims=True) + 1e-20  # sigmoids may all underflow
    return weights * config.routed_scaling_factor


def _in_best_groups(choice: jax.Array, config: MoEConfig) -> jax.Array:
    """`[T, E]` bool: whether an expert's group is among the token's `topk_group` best."""
    group_size = config.num_experts // config.n_group
    grouped = choice.reshape(choice.shape[0], config.n_group, group_size)  # [T, groups, E / groups]
    if config.group_score == "max":
        group_scores = jnp.max(grouped, axis=-1)
    else:
        group_scores = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
    _, best = jax.lax.top_k(group_scores, config.topk_group)  # [T, topk_group]
    chosen = jnp.any(jax.nn.one_hot(best, config.n_group, dtype=bool), axis=1)  # [T, groups]
    return jnp.repeat(chosen, group_size, axis=-1)
