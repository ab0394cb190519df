"""`Scorer`: the log-probabilities that a decoder gives to known texts, in batches of few shapes.

What is scored is the end of each sequence. Only those positions go through the head, a chunk of them at a time, and only sums leave
the devices: logits of a whole sequence are never there at once. Requests that read the same tokens, such as the four
letters that may answer one question, are read once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_epmoe.config import require
from jax_epmoe.generate.batching import bucket
from jax_epmoe.mesh import DATA

_MIN_LENGTH = 16
_LOGITS_BYTES = 2**28  # of one chunk's logits, float32


@dataclass(frozen=True)
class Score:
    """`logprob`: of the scored tokens together, in nats. `is_greedy`: each of them is the likeliest of its position."""

    logprob: float
    is_greedy: bool


@dataclass(frozen=True)
class _Row:
    """Tokens to read, how many of the last positions are scored, and for each request that shares them its place and targets."""

    tokens: tuple[int, ...]
    count: int
    places: list[int]
    targets: list[tuple[int, ...]]


class Scorer:
    """Scores with a decoder, on its mesh; compiled programs are kept from call to call."""

    def __init__(self, model: Any, *, batch_tokens: int = 16384, max_batch_size: int = 256):
        """
        Args:
          model: a `Decoder`.
          batch_tokens: how many positions a call reads, padding included, unless a single sequence is longer.
          max_batch_size: the most sequences of a call.

        Raises:
          ValueError: a size that is not positive.
        """
        require(batch_tokens > 0, "batch_tokens", batch_tokens, "a positive integer")
        require(max_batch_size > 0, "max_batch_size", max_batch_size, "a positive integer")
        self.config = model.config
        self._multiple = model.batch_multiple
        self._batch_tokens = batch_tokens
        self._max_rows = max_batch_size
        self._graphdef, self._state = nnx.split(model)
        self._by_row = NamedSharding(model.mesh, P(DATA))
        replicated = NamedSharding(model.mesh, P())
        self._program = jax.jit(partial(_score, self._graphdef), out_shardings=replicated)

    def score(
        self,
        requests: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        progress: Callable[[int], object] | None = None,
    ) -> list[Score]:
        """How likely each continuation is after its context.

        Args:
          requests: pairs of a context and a continuation, token ids; none is empty, and together, without the last token,
            they fit the model's positions.
          progress: is told of finished requests as they come.

        Returns:
          A score each, in their order.

        Raises:
          ValueError: an empty part, too long a request, or a token id outside the vocabulary.
        """
        for i, (context, continuation) in enumerate(requests):
            self._check(i, context, continuation)
        scores: dict[int, Score] = {}
        for rows, shape in self._batches(_rows(requests)):
            logprobs, greedy = self._run(rows, *shape)
            for i, row in enumerate(rows):
                for j, place in enumerate(row.places):
                    scores[place] = Score(float(logprobs[i, j]), bool(greedy[i, j]))
            if progress is not None:
                progress(sum(len(row.places) for row in rows))
        return [scores[i] for i in range(len(requests))]

    def _check(self, i: int, context: Sequence[int], continuation: Sequence[int]) -> None:
        require(
            len(context) > 0 and len(continuation) > 0,
            f"requests[{i}]",
            (context, continuation),
            "two parts, not empty",
        )
        length, most = len(context) + len(continuation) - 1, self.config.max_position_embeddings
        require(length <= most, f"requests[{i}]: number of tokens", length + 1, f"at most {most + 1}")
        for token in (*context, *continuation):
            in_range = 0 <= token < self.config.vocab_size
            require(in_range, f"requests[{i}]: token id", token, f"from 0 to {self.config.vocab_size - 1}")

    def _batches(self, rows: list[_Row]) -> Iterator[tuple[list[_Row], tuple[int, int, int, int]]]:
        """Rows of one shape together, the longest first: what does not fit the memory fails at once."""
        groups: dict[tuple[int, int, int], list[_Row]] = {}
        longest = self.config.max_position_embeddings
        for row in rows:
            length = bucket(len(row.tokens), min(_MIN_LENGTH, longest), longest)
            scored = min(4 ** math.ceil(math.log(row.count, 4) - 1e-9), length)
            choices = 4 ** math.ceil(math.log(len(row.places), 4) - 1e-9)
            groups.setdefault((length, scored, choices), []).append(row)
        for (length, scored, choices), group in sorted(groups.items(), reverse=True):
            most = max(1, min(self._max_rows, self._batch_tokens // length) // self._multiple) * self._multiple
            size = min(most, self._multiple * bucket(-(-len(group) // self._multiple), 1, 2**31))
            for i in range(0, len(group), size):
                yield group[i : i + size], (size, length, scored, choices)

    def _run(
        self, rows: list[_Row], size: int, length: int, scored: int, choices: int
    ) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.zeros((size, length), np.int32)
        num_tokens, count = np.zeros((2, size), np.int32)
        targets = np.zeros((size, scored, choices), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row.tokens)] = row.tokens
            num_tokens[i], count[i] = len(row.tokens), row.count
            targets[i, : row.count, : len(row.places)] = np.array(row.targets).T
        arrays = [self._put(array) for array in (tokens, num_tokens, count, targets)]
        logprobs, greedy = self._program(self._state, *arrays)
        return np.asarray(logprobs), np.asarray(greedy)

    def _put(self, value: np.ndarray) -> jax.Array:
        """Rows to their replicas, from the same value in every process."""
        return jax.make_array_from_callback(value.shape, self._by_row, lambda index: value[index])


def _rows(requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[_Row]:
    """Requests that read the same tokens and score as many of them share a row."""
    rows: dict[tuple[tuple[int, ...], int], _Row] = {}
    for place, (context, continuation) in enumerate(requests):
        tokens, count = (*context, *continuation[:-1]), len(continuation)
        row = rows.setdefault((tokens, count), _Row(tokens, count, [], []))
        row.places.append(place)
        row.targets.append(tuple(continuation))
    return list(rows.values())


def _score(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    tokens: jax.Array,
    num_tokens: jax.Array,
    count: jax.Array,
    targets: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Tokens `[B, S]`, of which `num_tokens [B]` are real and the last `count [B]` of these are scored against `targets [B, K, A]`
    -> log-probabilities, and whether all are the likeliest: `[B, A]` each."""
    model = nnx.merge(graphdef, state)
    size, scored, choices = targets.shape
    hidden, _ = model.hidden(tokens, jnp.zeros(size, jnp.int32), None, num_tokens)  # [B, S, H]
    position = jnp.clip((num_tokens - count)[:, None] + jnp.arange(scored), 0, tokens.shape[1] - 1)  # [B, K]
    hidden = jnp.take_along_axis(hidden, position[..., None], axis=1)  # [B, K, H]
    is_scored = jnp.arange(scored) < count[:, None]  # [B, K]
    chunk = _chunk(scored, size * model.config.vocab_size * 4)

    def chunks(array: jax.Array) -> jax.Array:  # [B, K, ...] -> [K / chunk, B, chunk, ...]
        return jnp.moveaxis(array.reshape(size, scored // chunk, chunk, *array.shape[2:]), 1, 0)

    def step(
        sums: tuple[jax.Array, jax.Array], parts: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        hidden, targets, is_scored = parts
        with jax.named_scope("logits"):
            logits = model.logits(hidden)  # [B, chunk, V] float32
        chosen = jnp.take_along_axis(logits, targets, axis=-1) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        likeliest = jnp.argmax(logits, axis=-1, keepdims=True) == targets
        logprob, greedy = sums
        logprob += jnp.sum(jnp.where(is_scored[..., None], chosen, 0), axis=1)
        return (logprob, greedy & jnp.all(likeliest | ~is_scored[..., None], axis=1)), None

    start = jnp.zeros((size, choices), jnp.float32), jnp.ones((size, choices), bool)
    sums, _ = jax.lax.scan(step, start, (chunks(hidden), chunks(targets), chunks(is_scored)))
    return sums


def _chunk(scored: int, bytes_a_position: int) -> int:
    """How many of `scored` positions go through the head at a time: a divisor that keeps the logits within `_LOGITS_BYTES`."""
    fitting = [n for n in range(1, scored + 1) if scored % n == 0 and n * bytes_a_position <= _LOGITS_BYTES]
    return max(fitting, default=1)
