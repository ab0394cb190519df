"""The decoder: one for all families, driven by its `ModelConfig`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jax_epmoe.config import GQAConfig, MLAConfig, ModelConfig, require
from jax_epmoe.mesh import ALL_AXES, DATA, axes_size
from jax_epmoe.models.attention import GQA, MLA, RopeTable
from jax_epmoe.models.blocks import DenseMLP, Embedding, Head, RMSNorm, rope_table
from jax_epmoe.models.kv_cache import Cache, cache_dtype
from jax_epmoe.models.projections import quantize_projections
from jax_epmoe.moe.layer import EPMoE
from jax_epmoe.quant import NOT_QUANTIZED, Quantization


class DecoderLayer(nnx.Module):
    """Attention and a MoE layer (or a dense MLP), each after its norm and around its residual: two all-reduces.

    With `dp_attention`, sequences lie over the tensor-parallel group between layers and in attention, which then has no collective;
    the MoE gathers them and scatters its sum: an all-gather and a reduce-scatter.
    """

    def __init__(
        self,
        config: ModelConfig,
        has_experts: bool,
        attention: GQAConfig | MLAConfig,
        *,
        mesh: Mesh,
        dtype,
        rngs: nnx.Rngs,
        backend: str | None,
        dp_attention: bool,
        quantization: Quantization = NOT_QUANTIZED,
    ):
        new: dict[str, Any] = {"mesh": mesh, "dtype": dtype, "rngs": rngs}
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(hidden, eps, **new)
        if isinstance(attention, GQAConfig):
            self.attention: GQA | MLA = GQA(attention, config.rope, hidden, eps, data_parallel=dp_attention, **new)
        else:
            self.attention = MLA(attention, config.rope, hidden, data_parallel=dp_attention, **new)
        quantize_projections(self.attention, quantization.inside("attention"), backend=backend, **new)
        self.mlp_norm = RMSNorm(hidden, eps, **new)
        if has_experts:
            self.moe = EPMoE(
                config.moe,
                backend=backend,
                split_tokens=dp_attention,
                quantization=quantization.inside("moe"),
                **new,
            )
        else:
            self.mlp = DenseMLP(
                hidden,
                config.dense_intermediate_size,
                activation=config.moe.activation,
                split_tokens=dp_attention,
                quantization=quantization.inside("mlp"),
                backend=backend,
                **new,
            )
        self.has_experts = has_experts

    def __call__(
        self,
        x: jax.Array,
        rope: RopeTable,
        positions: jax.Array,
        mask: jax.Array | None,
        cache: Cache | None,
        is_start: bool = False,
    ) -> tuple[jax.Array, Cache | None, jax.Array | None]:
        """`x [B, S, H]` -> `[B, S, H]`, the extended cache, and the rows that each expert got (`[E]`, or None)."""
        with jax.named_scope("attention"):
            attended, cache = self.attention(self.attention_norm(x), rope, positions, cache, is_start)
        x = x + attended
        normed = self.mlp_norm(x)
        if not self.has_experts:
            return x + self.mlp(normed), cache, None
        y, load = self.moe.with_load(normed, mask)
        return x + y, cache, load


class Decoder(nnx.Module):
    """A causal language model whose layers hold experts, on a mesh with the axes `data`, `expert` and `tensor`.

    `model(tokens)` is a whole-sequence forward pass. To generate, `init_cache` once, then `hidden` for each piece of the
    sequences and `logits` for the positions that matter.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        mesh: Mesh,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        rngs: nnx.Rngs,
        backend: str | None = None,
        dp_attention: bool = False,
        quantization: Quantization = NOT_QUANTIZED,
    ):
        """
        Args:
          config: the model's sizes.
          mesh: from `make_mesh`.
          dtype: of weights, activations and, unless asked otherwise, cache.
          rngs: whose `params` stream initialises the weights.
          backend: of `grouped_gemm`, and of products with other quantised weights; None picks the fastest.
          dp_attention: deal sequences, not heads, over the tensor-parallel group in attention. Its weights are then on every device, each
            key and value is cached once, and batches are multiples of `dp_size * tp_size`.
          quantization: of the weights of experts, attention and dense MLPs; the router, norms, embedding and head stay as they are.
        """
        self.config = config
        self.mesh = mesh
        self.dtype = jnp.dtype(dtype)
        self.dp_attention = dp_attention
        new: dict[str, Any] = {"mesh": mesh, "dtype": dtype, "rngs": rngs}
        self.embed = Embedding(config.vocab_size, config.hidden_size, split_tokens=dp_attention, **new)
        self.layers = nnx.List(
            [
                DecoderLayer(
                    config,
                    has_experts,
                    config.attention_of(i),
                    backend=backend,
                    dp_attention=dp_attention,
                    quantization=quantization.inside(f"layers.{i}"),
                    **new,
                )
                for i, has_experts in enumerate(config.moe_layers)
            ]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **new)
        self.head = None if config.tie_word_embeddings else Head(config.vocab_size, config.hidden_size, **new)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """`tokens [B, S]` int32 -> logits `[B, S, vocab]` float32. B is a multiple of `batch_multiple`."""
        return self.with_load(tokens)[0]

    def with_load(self, tokens: jax.Array, num_tokens: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Logits, and how many rows each expert of each MoE layer got: `[MoE layers, E]` int32.

        `num_tokens [B]`: how many of a row's tokens are real, as for `hidden`; None: all.
        """
        hidden, _, load = self._run(tokens, jnp.zeros(tokens.shape[0], jnp.int32), None, num_tokens)
        return self.logits(hidden), load

    @property
    def batch_multiple(self) -> int:
        """Over how many devices the sequences of a batch lie."""
        return axes_size(self.mesh, ALL_AXES if self.dp_attention else DATA)

    def init_cache(self, batch_size: int, length: int, kv_cache_dtype: str = "auto") -> list[Cache]:
        """An empty cache for `batch_size` sequences of up to `length` positions, on its shards.

        Args:
          batch_size: a multiple of `batch_multiple`.
          length: positions of each sequence.
          kv_cache_dtype: "auto" is the model's dtype; "fp8", or "fp8_e4m3", is float8 with scales (`kv_cache.py`).

        Raises:
          ValueError: a batch that does not divide, or another `kv_cache_dtype`.
        """
        of = "dp_size * tp_size" if self.dp_attention else "dp_size"
        multiple = self.batch_multiple
        require(batch_size % multiple == 0, "batch_size", batch_size, f"a multiple of {of} ({multiple})")
        dtype = cache_dtype(kv_cache_dtype, self.dtype)
        return [layer.attention.init_cache(batch_size, length, dtype) for layer in self.layers]

    def hidden(
        self,
        tokens: jax.Array,
        start: jax.Array,
        cache: list[Cache],
        num_tokens: jax.Array | None = None,
        *,
        is_start: bool = False,
    ) -> tuple[jax.Array, list[Cache]]:
        """Runs the next piece of each sequence and extends the cache.

        Args:
          tokens: `[B, S]` int32; token s of sequence b stands at position `start[b] + s`.
          start: `[B]` int32.
          cache: from `init_cache` or an earlier call; positions past its length are dropped.
          num_tokens: `[B]` int32: how many of a row's S tokens are real. The rest (padding, on the right) take no routed
            experts and their outputs mean nothing; what they leave in the cache is overwritten by the real tokens of
            those positions before anything can see it. None: all.
          is_start: the tokens begin their sequences: `start` is 0, and nothing in the cache is read, which is quicker.

        Returns:
          The last layer's normalised output `[B, S, H]`, for `logits`, and the cache.
        """
        hidden, cache, _ = self._run(tokens, start, cache, num_tokens, is_start)
        return hidden, cache

    def hidden_with_load(self, *args: Any, **kwargs: Any) -> tuple[jax.Array, list[Cache], jax.Array]:
        """As `hidden`, and how many rows each expert of each MoE layer got: `[MoE layers, E]` int32."""
        return self._run(*args, **kwargs)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`[B, ..., H]` -> `[B, ..., vocab]` float32."""
        return (self.head or self.embed).logits(hidden)

    def _run(self, tokens, start, cache, num_tokens, is_start=False):
        config = self.config
        steps = jnp.arange(tokens.shape[1])
        positions = start[:, None] + steps
        mask = None if num_tokens is None else steps < num_tokens[:, None]
        rope = rope_table(config.rope, config.attention.rope_dim, positions)
        x = self.embed(tokens)
        caches, loads = [], []
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layer_{i}"):
                x, layer_cache, load = layer(x, rope, positions, mask, None if cache is None else cache[i], is_start)
            caches.append(layer_cache)
            loads += [] if load is None else [load]
        return self.norm(x), caches, jnp.stack(loads)
