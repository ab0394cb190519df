"""What every decoder is made of besides attention and experts: norms, rotary embedding, embedding, head, dense MLP."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_epmoe.collectives import gather_tokens, sum_tokens
from jax_epmoe.config import Activation, RopeConfig
from jax_epmoe.mesh import ALL_AXES, DATA, TP_AXES
from jax_epmoe.moe.gated_mlp import GatedMLP, linear
from jax_epmoe.parameters import parameter, run_on_shards
from jax_epmoe.quant import NOT_QUANTIZED, Quantization


def tokens_spec(ndim: int, split: bool = False) -> P:
    """How activations lie on the mesh: the first dimension (sequences) over `data`, the rest on every device.

    With `split`, as between layers with data-parallel attention, sequences lie over all axes.
    """
    return P(ALL_AXES if split else DATA, *[None] * (ndim - 1))


class RMSNorm(nnx.Module):
    """Parameter `scale [size]`, by default on every device."""

    def __init__(self, size: int, eps: float, *, mesh: Mesh, rngs: nnx.Rngs, axes: Any = None, dtype=jnp.float32):
        self.eps = eps
        self.scale = parameter((size,), (axes,), mesh=mesh, dtype=dtype, rngs=rngs, init=nnx.initializers.ones)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., size]`, computed in float32 and rounded once to x's dtype."""
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        return self.scaled(x32, mean_square, self.scale[...]).astype(x.dtype)

    def scaled(self, x: jax.Array, mean_square: jax.Array, scale: jax.Array) -> jax.Array:
        """The norm when its mean square and its scale were found elsewhere (a norm that spans devices)."""
        return x * jax.lax.rsqrt(mean_square + self.eps) * scale.astype(jnp.float32)


def rope_frequencies(config: RopeConfig, dim: int) -> np.ndarray:
    """Radians a position for each of the `dim / 2` rotated pairs, float32.

    YaRN (Peng et al., 2023, section 3.2): pairs that turn more than `beta_fast` times within the original context keep
    their frequency, those that turn less than `beta_slow` times are slowed by `factor`, and a linear ramp lies between.
    """
    pairs = np.arange(dim // 2)
    plain = config.theta ** (-2.0 * pairs / dim)
    if config.kind == "default":
        return plain.astype(np.float32)
    if config.kind == "linear":
        return (plain / config.factor).astype(np.float32)

    def pair_that_turns(times: float) -> float:
        return (
            dim
            * math.log(config.original_max_position_embeddings / (times * 2 * math.pi))
            / (2 * math.log(config.theta))
        )

    low, high = pair_that_turns(config.beta_fast), pair_that_turns(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    slowed = np.clip((pairs - low) / max(high - low, 0.001), 0, 1)
    return (plain / config.factor * slowed + plain * (1 - slowed)).astype(np.float32)


def rope_table(config: RopeConfig, dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each `[B, S, dim / 2]` float32, for absolute `positions [B, S]`."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(config, dim)
    return jnp.cos(angles) * config.attention_factor, jnp.sin(angles) * config.attention_factor


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array], interleaved: bool) -> jax.Array:
    """Turns the pairs of `x [B, S, heads, dim]` by their angles; float32 in and out.

    Where the table is for fewer dimensions than x has, those past them stay as they are.
    """
    rotated = 2 * table[0].shape[-1]
    if rotated < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :rotated], table, interleaved), x[..., rotated:]], axis=-1)
    cos, sin = (t[:, :, None, :] for t in table)
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = jnp.split(x, 2, axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    return jnp.stack(turned, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(turned, axis=-1)


class Embedding(nnx.Module):
    """Parameter `table [vocab, H]`, vocabulary over the tensor-parallel group."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        mesh: Mesh,
        dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
        split_tokens: bool = False,
    ):
        self.mesh = mesh
        self.vocab_size = vocab_size
        self.split_tokens = split_tokens
        self.table = parameter((vocab_size, hidden_size), (TP_AXES, None), mesh=mesh, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """`[B, S]` int32 -> `[B, S, H]`; one all-reduce, or with `split_tokens` one reduce-scatter."""
        out_specs = tokens_spec(3, self.split_tokens)
        return run_on_shards(
            self, Embedding._on_device, tokens, mesh=self.mesh, in_specs=(tokens_spec(2),), out_specs=out_specs
        )

    def _on_device(self, tokens: jax.Array) -> jax.Array:
        local = tokens - jax.lax.axis_index(TP_AXES) * self.table.shape[0]
        # A negative index would count from the end; one past the end is filled with zeros.
        rows = jnp.where(local < 0, self.table.shape[0], local)
        found = self.table[...].at[rows].get(mode="fill", fill_value=0)
        return sum_tokens(found, TP_AXES, split=self.split_tokens)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The head of a model whose embeddings are tied; see `Head`."""
        return _vocab_logits(self, Embedding._local_logits, hidden)

    def _local_logits(self, hidden: jax.Array) -> jax.Array:
        return linear(hidden, self.table[...])


class Head(nnx.Module):
    """Parameter `weight [vocab, H]`, vocabulary over the tensor-parallel group."""

    def __init__(self, vocab_size: int, hidden_size: int, *, mesh: Mesh, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.mesh = mesh
        self.vocab_size = vocab_size
        self.weight = parameter((vocab_size, hidden_size), (TP_AXES, None), mesh=mesh, dtype=dtype, rngs=rngs)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`[B, ..., H]` -> `[B, ..., vocab]` float32, on every device of the tensor-parallel group; one all-gather."""
        return _vocab_logits(self, Head._local_logits, hidden)

    def _local_logits(self, hidden: jax.Array) -> jax.Array:
        return linear(hidden, self.weight[...])


def _vocab_logits(module: Embedding | Head, local_logits, hidden: jax.Array) -> jax.Array:
    def gathered(module, hidden):
        logits = local_logits(module, hidden)
        return jax.lax.all_gather(logits, TP_AXES, axis=logits.ndim - 1, tiled=True)

    spec = tokens_spec(hidden.ndim)
    logits = run_on_shards(module, gathered, hidden, mesh=module.mesh, in_specs=(spec,), out_specs=spec)
    return logits[..., : module.vocab_size]


class DenseMLP(GatedMLP):
    """A decoder layer's MLP without experts: `GatedMLP` over the tensor-parallel group, summed by one all-reduce.

    With `split_tokens`, tokens come and go split over the group: an all-gather before, a reduce-scatter after.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: Activation,
        mesh: Mesh,
        dtype,
        rngs: nnx.Rngs,
        split_tokens: bool = False,
        quantization: Quantization = NOT_QUANTIZED,
        backend: str | None = None,
    ):
        new: dict[str, Any] = {"mesh": mesh, "dtype": dtype, "rngs": rngs}
        new |= {"quantization": quantization, "backend": backend}
        super().__init__(hidden_size, intermediate_size, activation=activation, axes=TP_AXES, **new)
        self.mesh = mesh
        self.split_tokens = split_tokens

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, S, H]` -> `[B, S, H]`."""
        spec = tokens_spec(3, self.split_tokens)
        return run_on_shards(self, DenseMLP._on_device, x, mesh=self.mesh, in_specs=(spec,), out_specs=spec)

    def _on_device(self, x: jax.Array) -> jax.Array:
        partial = self.partial_sum(gather_tokens(x, TP_AXES, split=self.split_tokens))
        return sum_tokens(partial.astype(x.dtype), TP_AXES, split=self.split_tokens)
