"""How the next token is chosen: `SamplingParams` says it for one request, `sample` does it for a batch of them.

Order, as in SGLang and vLLM: logits are divided by the temperature, the `top_k` likeliest tokens are kept, then the
fewest likeliest of those whose probability together reaches `top_p`, and one is drawn.

The draw is Gumbel's: argmax of the logits plus noise that depends on the request's seed, the request's index and the
output's position, and on nothing else: not on the batch it shares, the mesh or the padding.
"""

import dataclasses
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jax_epmoe.config import require

# What a batch needs; each can do all that the one before it does, and costs more.
Method = Literal["greedy", "random", "filtered"]

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class SamplingParams:
    """One request's wishes.

    Attributes:
      temperature: 0 is greedy: the likeliest token, the lowest id among equals.
      top_k: draw among this many likeliest tokens (of equals, the lowest ids); 0 is all of them.
      top_p: draw among the likeliest tokens that reach this probability together; 1 is all of them.
      seed: 0 .. 2**32 - 1.
      max_new_tokens: when to stop at the latest.
      stop_token_ids: tokens that end the text, beside the model's end-of-sequence tokens.
      ignore_eos: the model's end-of-sequence tokens do not end the text; `stop_token_ids` still do.

    Raises:
      ValueError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 128
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        require(
            _is_number(self.temperature) and 0 <= self.temperature < float("inf"),
            "temperature", self.temperature, "0 (greedy) or a positive number",
        )  # fmt: skip
        require(_is_int(self.top_k, 0, _INT32_MAX), "top_k", self.top_k, "0 (all tokens) or a positive integer")
        require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "more than 0 and at most 1")
        require(_is_int(self.seed, 0, 2**32 - 1), "seed", self.seed, "an integer from 0 to 2**32 - 1")
        require(
            _is_int(self.max_new_tokens, 1, _INT32_MAX), "max_new_tokens", self.max_new_tokens, "a positive integer"
        )
        ids = self.stop_token_ids
        require(
            isinstance(ids, list | tuple) and all(_is_int(i, 0, _INT32_MAX) for i in ids),
            "stop_token_ids", ids, "a list of token ids",
        )  # fmt: skip
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        require(isinstance(self.ignore_eos, bool), "ignore_eos", self.ignore_eos, "True or False")

    @property
    def method(self) -> Method:
        """The cheapest `method` of `sample` that serves this request."""
        if self.temperature == 0:
            return "greedy"
        return "filtered" if self.top_k > 0 or self.top_p < 1 else "random"

    def replace(self, **changes: Any) -> "SamplingParams":
        return dataclasses.replace(self, **changes)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


def cheapest_method(methods: set[Method]) -> Method:
    """The cheapest method that serves every request of a batch."""
    order: tuple[Method, ...] = ("greedy", "random", "filtered")
    return max(methods, key=order.index, default="greedy")


def request_keys(seeds: jax.Array, indices: jax.Array) -> jax.Array:
    """A random key a request, from its seed and its index among the requests: two `[B]` uint32 -> `[B, 2]` uint32."""

    def key(seed: jax.Array, index: jax.Array) -> jax.Array:
        # The implementation is named, so that no user's JAX setting changes what a seed means.
        return jax.random.key_data(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), index))

    return jax.vmap(key)(seeds, indices)


def sample(
    logits: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    keys: jax.Array,
    step: jax.Array,
    *,
    method: Method = "filtered",
) -> jax.Array:
    """Chooses a token for every row; each row has its own parameters.

    Args:
      logits: `[B, V]` float32.
      temperature: `[B]` float32; 0 is greedy.
      top_k: `[B]` int32; 0 is all.
      top_p: `[B]` float32; 1 is all.
      keys: `[B, 2]` uint32, from `request_keys`.
      step: `[B]` int32: how many tokens the request has so far.
      method: static; a promise about the batch that spares work: "greedy" that all temperatures are 0, "random" that no
        row has top_k or top_p. Where the promise holds, the tokens are the same whichever method chooses them.

    Returns:
      `[B]` int32 token ids.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if method == "greedy":
        return greedy
    # The maximum becomes 0 before the division: no temperature, however small, overflows it.
    safe = jnp.where(temperature > 0, temperature, 1.0)
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / safe[:, None]
    noise = jax.vmap(_gumbel, in_axes=(0, 0, None))(keys, step, logits.shape[-1])  # [B, V]
    drawn = jnp.argmax(scaled + noise, axis=-1).astype(jnp.int32)
    if method == "filtered":
        filtered = (top_k > 0) | (top_p < 1)
        drawn = jnp.where(filtered, _draw_filtered(scaled, noise, top_k, top_p), drawn)
    return jnp.where(temperature > 0, drawn, greedy)


def _gumbel(key: jax.Array, step: jax.Array, vocab_size: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), step)
    return jax.random.gumbel(key, (vocab_size,), jnp.float32)


def _draw_filtered(scaled: jax.Array, noise: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """A token of each row from its top_k and then its top_p: `[B, V]` twice and `[B]` twice -> `[B]` int32."""
    order = jnp.argsort(scaled, axis=-1, descending=True, stable=True)  # likeliest first; of equals, the lowest id
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    rank = jnp.arange(scaled.shape[-1])
    allowed = (top_k[:, None] == 0) | (rank < top_k[:, None])
    probability = jax.nn.softmax(jnp.where(allowed, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # Without top_p no rounding of the sum may drop a token; with it the likeliest always stays.
    allowed &= (top_p[:, None] >= 1) | (before < top_p[:, None])
    allowed |= rank == 0
    choice = jnp.argmax(jnp.where(allowed, ranked + jnp.take_along_axis(noise, order, axis=-1), -jnp.inf), axis=-1)
    return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
