"""The router: which experts a token goes to, and with what weights. All of it in float32, the same bits on every rank."""

import jax
import jax.numpy as jnp

from jax_epmoe.config import MoEConfig
from jax_epmoe.kernels import top_k_hopper
from jax_epmoe.kernels.device import on_hopper


def route(
    x: jax.Array, router_weight: jax.Array, correction_bias: jax.Array | None, config: MoEConfig
) -> tuple[jax.Array, jax.Array]:
    """Chooses `k` of `E` experts for each token, by the steps that `MoEConfig` lists.

    Args:
      x: `[T, H]`.
      router_weight: `[E, H]`.
      correction_bias: `[E]` or None.
      config: the layer's.

    Returns:
      weights `[T, k]` float32 and expert ids `[T, k]` int32, best first; ties go to the lower id.
    """
    logits = _logits(x, router_weight.astype(jnp.float32))
    scores = jax.nn.softmax(logits, axis=-1) if config.scoring == "softmax" else jax.nn.sigmoid(logits)  # [T, E]
    choice = scores if correction_bias is None else scores + correction_bias.astype(jnp.float32)
    if config.n_group > 1:
        choice = jnp.where(_in_best_groups(choice, config), choice, -jnp.inf)
    ids = _largest(jax.lax.stop_gradient(choice), config.top_k)
    weights = jnp.take_along_axis(scores, ids, axis=-1)  # [T, k]
    if config.norm_topk_prob:
        weights /= jnp.sum(weights, axis=-1, keepdims=True) + 1e-20  # sigmoids may all underflow
    return weights * config.routed_scaling_factor, ids.astype(jnp.int32)


# From so many tokens on, throughput counts rather than the number of kernels.
_MANY_TOKENS = 1024


def _logits(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x [T, H]` times `w [E, H]`, both as float32 -> `[T, E]` float32.

    Tensor cores have no float32. Many tokens in bfloat16 are multiplied by two bfloat16 that add up to a weight, which is
    exact in float32 for weights that came from bfloat16; others lose what is below 2**-17 of them, where x was rounded at 2**-9.
    """
    contract = (((1,), (1,)), ((), ()))
    if x.dtype != jnp.bfloat16 or x.shape[0] < _MANY_TOKENS:
        return jax.lax.dot_general(x.astype(jnp.float32), w, contract, precision=jax.lax.Precision.HIGHEST)
    # `reduce_precision`: a compiler may take a cast there and back for nothing.
    high = jax.lax.reduce_precision(w, exponent_bits=8, mantissa_bits=7)
    both = jnp.concatenate([high, w - high]).astype(jnp.bfloat16)
    high, low = jnp.split(jax.lax.dot_general(x, both, contract, preferred_element_type=jnp.float32), 2, axis=1)
    return high + low


def _largest(choice: jax.Array, k: int) -> jax.Array:
    """The columns of the k largest of each row, best first; ties go to the lower column."""
    if len(choice) >= _MANY_TOKENS and on_hopper() and top_k_hopper.serves(choice):
        return top_k_hopper.top_k(choice, k)[1]
    return jax.lax.top_k(choice, k)[1]


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
