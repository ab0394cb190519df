"""How the next token is chosen: `SamplingParams` says it for one request, `sample` does it for many at once.

Order, as in SGLang and vLLM: tokens that were there before are penalised, logits are divided by the temperature, the `top_k`
likeliest tokens are kept, then the fewest likeliest of those whose probability together reaches `top_p`, then those that are at
least `min_p` as likely as the likeliest, and one is drawn.

The draw is Gumbel's: argmax of the logits plus noise that depends on the request's seed, the request's index and the
output's position, and on nothing else: not on the batch it shares, the mesh or the padding.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import InitVar, dataclass
from numbers import Integral, Real
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jax_epmoe.config import require

# What a batch needs; each can do all that the one before it does, and costs more.
Method = Literal["greedy", "random", "filtered"]

MAX_LOGPROBS = 20  # likeliest tokens whose log-probabilities can be asked for, as vLLM's default
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class SamplingParams:
    """One request's wishes, by the names that vLLM and SGLang use.

    Attributes:
      temperature: 0 is greedy: the likeliest token, the lowest id among equals.
      top_k: draw among this many likeliest tokens (of equals, the lowest ids); 0 is all of them.
      top_p: draw among the likeliest tokens that reach this probability together; 1 is all of them.
      min_p: draw among the tokens at least this many times as likely as the likeliest; 0 is all of them.
      repetition_penalty: of tokens in the prompt or the output so far, positive logits are divided by it and negative ones
        multiplied (Keskar et al., 2019); 1 is none.
      seed: 0 .. 2**32 - 1.
      max_new_tokens: when to stop at the latest. `max_tokens`, vLLM's name, may be given instead.
      stop: strings that end the text, which is cut before the first of them; needs a tokenizer.
      stop_token_ids: tokens that end the text, beside the model's end-of-sequence tokens.
      ignore_eos: the model's end-of-sequence tokens do not end the text; `stop` and `stop_token_ids` still do.
      logprobs: tell the log-probability of every chosen token and of so many likeliest ones, before penalty and temperature;
        None for none.

    Raises:
      ValueError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    max_tokens: InitVar[int | None] = None

    def __post_init__(self, max_tokens: int | None):
        if max_tokens is not None:
            require(_is_int(max_tokens, 1, _INT32_MAX), "max_tokens", max_tokens, "a positive integer")
            object.__setattr__(self, "max_new_tokens", max_tokens)
        require(
            _is_number(self.temperature) and 0 <= self.temperature < float("inf"),
            "temperature", self.temperature, "0 (greedy) or a positive number",
        )  # fmt: skip
        require(_is_int(self.top_k, 0, _INT32_MAX), "top_k", self.top_k, "0 (all tokens) or a positive integer")
        require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "more than 0 and at most 1")
        require(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1")
        penalty = self.repetition_penalty
        require(_is_number(penalty) and 0 < penalty < float("inf"), "repetition_penalty", penalty, "a positive number")
        require(_is_int(self.seed, 0, 2**32 - 1), "seed", self.seed, "an integer from 0 to 2**32 - 1")
        require(
            _is_int(self.max_new_tokens, 1, _INT32_MAX), "max_new_tokens", self.max_new_tokens, "a positive integer"
        )
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        require(
            isinstance(stop, list | tuple) and all(isinstance(s, str) and s for s in stop),
            "stop", self.stop, "a string that is not empty, or a list of them",
        )  # fmt: skip
        object.__setattr__(self, "stop", tuple(stop))
        ids = self.stop_token_ids
        require(
            isinstance(ids, list | tuple) and all(_is_int(i, 0, _INT32_MAX) for i in ids),
            "stop_token_ids", ids, "a list of token ids",
        )  # fmt: skip
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        require(isinstance(self.ignore_eos, bool), "ignore_eos", self.ignore_eos, "True or False")
        require(
            self.logprobs is None or _is_int(self.logprobs, 0, MAX_LOGPROBS),
            "logprobs", self.logprobs, f"None or an integer from 0 to {MAX_LOGPROBS}",
        )  # fmt: skip

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


@dataclass(frozen=True)
class SamplingMode:
    """What a program that chooses tokens must be able to do; a static promise that spares work.

    Attributes:
      method: of drawing.
      penalty: some request has a repetition penalty: which tokens have been there is kept for every sequence, `[B, V]` bool.
      num_logprobs: how many likeliest tokens' log-probabilities come beside the chosen one's; None: no log-probabilities.
    """

    method: Method = "greedy"
    penalty: bool = False
    num_logprobs: int | None = None


def cheapest_mode(params: Iterable[SamplingParams]) -> SamplingMode:
    """The cheapest mode that serves every request."""
    order: tuple[Method, ...] = ("greedy", "random", "filtered")
    params = list(params)
    asked = max((p.logprobs for p in params if p.logprobs is not None), default=None)
    return SamplingMode(
        method=max((p.method for p in params), key=order.index, default="greedy"),
        penalty=any(p.repetition_penalty != 1 for p in params),
        # Few numbers, so that few programs are compiled.
        num_logprobs=asked if asked is None else next(n for n in (0, 1, 5, MAX_LOGPROBS) if asked <= n),
    )


def request_keys(seeds: jax.Array, indices: jax.Array) -> jax.Array:
    """A random key a request, from its seed and its index among the requests: two `[B]` uint32 -> `[B, 2]` uint32."""

    def key(seed: jax.Array, index: jax.Array) -> jax.Array:
        # The implementation is named, so that no user's JAX setting changes what a seed means.
        return jax.random.key_data(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), index))

    return jax.vmap(key)(seeds, indices)


def penalize(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """The repetition penalty: `logits [B, V]` float32, where `seen [B, V]` bool, by each row's `penalty [B]`."""
    by = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / by, logits * by), logits)


def log_probabilities(logits: jax.Array, token: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the chosen tokens and of the likeliest ones: `logits [B, V]`, `token [B]` -> `[B]`, ids and values `[B, count]`."""
    total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - total
    values, ids = jax.lax.top_k(logits, min(count, logits.shape[-1]))
    return chosen, ids.astype(jnp.int32), values - total[:, None]


def sample(
    logits: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
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
      min_p: `[B]` float32; 0 is all.
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
    likely = scaled >= jnp.log(min_p)[:, None]
    noise = jax.vmap(_gumbel, in_axes=(0, 0, None))(keys, step, logits.shape[-1])  # [B, V]
    drawn = jnp.argmax(jnp.where(likely, scaled + noise, -jnp.inf), axis=-1).astype(jnp.int32)
    if method == "filtered":
        filtered = (top_k > 0) | (top_p < 1)
        drawn = jnp.where(filtered, _draw_filtered(scaled, noise, likely, top_k, top_p), drawn)
    return jnp.where(temperature > 0, drawn, greedy)


def _gumbel(key: jax.Array, step: jax.Array, vocab_size: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), step)
    return jax.random.gumbel(key, (vocab_size,), jnp.float32)


def _draw_filtered(
    scaled: jax.Array, noise: jax.Array, likely: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
    """A token of each row from its top_k, then its top_p, then `likely`: `[B, V]` thrice and `[B]` twice -> `[B]` int32."""
    order = jnp.argsort(scaled, axis=-1, descending=True, stable=True)  # likeliest first; of equals, the lowest id
    ranked, likely, noise = (jnp.take_along_axis(array, order, axis=-1) for array in (scaled, likely, noise))
    rank = jnp.arange(scaled.shape[-1])
    allowed = (top_k[:, None] == 0) | (rank < top_k[:, None])
    probability = jax.nn.softmax(jnp.where(allowed, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # Without top_p no rounding of the sum may drop a token; with it the likeliest always stays.
    allowed &= (top_p[:, None] >= 1) | (before < top_p[:, None])
    allowed = (allowed & likely) | (rank == 0)
    choice = jnp.argmax(jnp.where(allowed, ranked + noise, -jnp.inf), axis=-1)
    return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
