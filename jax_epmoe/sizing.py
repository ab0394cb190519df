"""What a model takes of each device, and how long a step must at least take, without weights, devices or compiling.

Weights and cache are those of the abstract model (its parameters, their dtypes and shardings): exact. What collectives move is exact
too, but for a few numbers a sequence (with data-parallel attention, XLA may add one of the logits' size).

Activations are an upper bound: all that a phase of a layer makes, attention in plain XLA with scores against the whole
cache for as many queries as it takes at a time. What XLA fuses and reuses, and the holes that its allocator leaves, cannot be
foreseen within 5%. In 96 programs of small random models compiled for 8 CPUs (float32, scheduled for memory;
`tests/test_sizing.py` has 18 of them) temporaries were 0.87 to 1.21 of the bound in prefill and 0.44 to 0.76 in decoding, to
1.62 with data-parallel attention. Above 1 lies only what is the CPU's own (zeros that the loops of the reference grouped GEMM
begin with, weights turned round) and, there, the iota of sampling's argmax. XLA's default schedule for CPUs makes the first two
for all layers at once: temporaries then grow with the layers. GPUs have not been measured. A call's total, in which weights and cache
count too, is within 5% for four real models (`docs/parallelism.md` has the figures).
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from jax_epmoe.checkpoint import abstract_model
from jax_epmoe.config import GQAConfig, MLAConfig, ModelConfig, require
from jax_epmoe.mesh import DATA, EXPERT, TENSOR
from jax_epmoe.models.attention import queries_at_a_time
from jax_epmoe.models.kv_cache import cache_dtype, check_kv_cache_dtype
from jax_epmoe.moe.experts import default_chunk_rows
from jax_epmoe.moe.plan import ROW_ALIGNMENT

PARTS = ("attention", "experts", "shared_and_dense", "embedding_and_head")


@dataclass(frozen=True)
class Gpu:
    """One device: bytes that a program may use, and rates: FLOP/s of dense products, bytes/s copied, bytes/s sent."""

    memory: float
    dense_rate: float
    copy_rate: float
    link_rate: float


@dataclass(frozen=True)
class Layout:
    """How a model lies on `dp_size * tp_size` devices: `make_mesh`'s arguments and `Decoder`'s `dp_attention`."""

    tp_size: int = 1
    ep_size: int = 1
    dp_size: int = 1
    dp_attention: bool = False

    @property
    def flags(self) -> str:
        """For `epmoe-generate`."""
        sizes = {"tp": self.tp_size, "ep": self.ep_size, "dp": self.dp_size}
        given = [f"--{name}-size {size}" for name, size in sizes.items() if size > 1 or name == "tp"]
        return " ".join([*given, *(["--enable-dp-attention"] if self.dp_attention else [])])


@dataclass(frozen=True)
class Sizes:
    """What runs: sequences together on all devices, positions of the cache, tokens in a prefill call: of each sequence, and of all."""

    max_batch_size: int
    context_length: int
    prefill_chunk: int
    max_prefill_tokens: int = 8192


@dataclass(frozen=True)
class Step:
    """One call on one device, when the cache is full: the last chunk of a prefill, or the last decode step.

    Attributes:
      activations: bytes alive at once beside weights and cache, an upper bound (see the module).
      flops: of matrix products, with the experts' rows dealt evenly.
      bytes: of weights and cache, read or written once: of experts those that get a token when all are as likely.
      collectives: bytes of the whole arrays that cross devices, by the kind of collective.
      sent: bytes that the device sends for them, in a ring.
    """

    activations: int
    flops: int
    bytes: int
    collectives: dict[str, int]
    sent: int

    def floor_seconds(self, gpu: Gpu) -> float:
        """The larger of the times for products and for memory, and the time for sending, at the GPU's rates."""
        return max(self.flops / gpu.dense_rate, self.bytes / gpu.copy_rate) + self.sent / gpu.link_rate


@dataclass(frozen=True)
class Plan:
    """Bytes per device: `weights` by `PARTS`, the `cache`, and each call's; `prefill_rows`: sequences in a prefill call, on all devices."""

    layout: Layout
    weights: dict[str, int]
    cache: int
    prefill_rows: int
    prefill: Step
    decode: Step

    @property
    def total(self) -> int:
        """Bytes at the fuller of the two calls."""
        return sum(self.weights.values()) + self.cache + max(self.prefill.activations, self.decode.activations)


def plans(
    config: ModelConfig, devices: int, sizes: Sizes, dtype: Any = jnp.bfloat16, kv_cache_dtype: str = "auto"
) -> list[Plan]:
    """`plan` for every layout over exactly so many devices that the model's sizes allow; never empty.

    Data-parallel attention is tried with one replica, as `epmoe-generate` has it.

    Raises:
      ValueError: as `plan`, for sizes and `kv_cache_dtype`.
    """
    _check(config, sizes)
    check_kv_cache_dtype(kv_cache_dtype)
    found = []
    for layout in _layouts(config, devices):
        with contextlib.suppress(ValueError):  # heads that do not divide
            found.append(plan(config, layout, sizes, dtype, kv_cache_dtype))
    return found


def _layouts(config: ModelConfig, devices: int) -> Iterator[Layout]:
    for tp_size in _divisors(devices):
        for ep_size in _divisors(math.gcd(tp_size, config.moe.num_experts)):
            yield Layout(tp_size, ep_size, devices // tp_size)
            if tp_size == devices > 1:
                yield Layout(tp_size, ep_size, dp_attention=True)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def plan(
    config: ModelConfig, layout: Layout, sizes: Sizes, dtype: Any = jnp.bfloat16, kv_cache_dtype: str = "auto"
) -> Plan:
    """What one device holds and does, all of them the same.

    Args:
      config: the model's.
      layout: over the devices.
      sizes: of the batch, which is rounded up to a multiple of the model's `batch_multiple`, and of its sequences.
      dtype: of weights, activations and, with "auto", cache.
      kv_cache_dtype: as `Engine`'s.

    Raises:
      ValueError: a size that is not positive or too long for the model, a layout that does not divide it, or a `kv_cache_dtype`
        that does not exist.
    """
    _check(config, sizes)
    device = _Device(config, layout, sizes, jnp.dtype(dtype), kv_cache_dtype)
    weights = dict.fromkeys(PARTS, 0)
    for weight in device.weights:
        weights[weight.part] += weight.bytes * weight.copies
    prefilling = device.for_prefill(sizes.max_prefill_tokens // sizes.prefill_chunk)
    prefill = prefilling.step(min(sizes.prefill_chunk, sizes.context_length))
    # A prefill call works on a copy of its sequences' cache (docs/generation.md).
    prefill = replace(prefill, activations=prefill.activations + prefilling.cache)
    return Plan(layout, weights, device.cache, prefilling.batch * device.multiple, prefill, device.step(1))


def _check(config: ModelConfig, sizes: Sizes) -> None:
    for name, size in vars(sizes).items():
        require(size > 0, name, size, "a positive integer")
    longest = config.max_position_embeddings
    require(sizes.context_length <= longest, "context_length", sizes.context_length, f"at most the model's {longest}")


class _Weight(NamedTuple):
    """A device's shard of a parameter, and how many layers have one like it."""

    name: str  # within its layer
    elements: int
    bytes: int
    copies: int

    @property
    def part(self) -> str:
        module, _, rest = self.name.partition(".")
        if module in ("embed", "head", "norm"):
            return "embedding_and_head"
        if module == "moe" and rest in ("w_gate_up", "w_down", "gate_up_bias", "down_bias"):
            return "experts"
        return "shared_and_dense" if module in ("moe", "mlp", "mlp_norm") else "attention"


class _Device:
    """One device's shards: sizes that a layout divides are the device's own. One layer of each kind stands for all."""

    def __init__(self, config: ModelConfig, layout: Layout, sizes: Sizes, dtype: jnp.dtype, kv_cache_dtype: str):
        self.config, self.layout, self.context, self.itemsize = config, layout, sizes.context_length, dtype.itemsize
        kinds = Counter(config.moe_layers)
        mesh = AbstractMesh(
            (layout.dp_size, layout.ep_size, layout.tp_size // layout.ep_size),
            (DATA, EXPERT, TENSOR),
            axis_types=(AxisType.Auto,) * 3,
        )
        one_of_each = config.replace(moe_layers=tuple(kinds), sliding_layers=())
        graphdef, state = abstract_model(one_of_each, mesh, dtype, "xla", layout.dp_attention)
        model = nnx.merge(graphdef, state)
        self.weights = []
        shards: dict[str, tuple[int, ...]] = {}
        flat: Any = nnx.to_flat_state(state)
        for keys, variable in flat:
            array, copies = variable.get_value(), 1
            if keys[0] == "layers":
                copies, keys = kinds[one_of_each.moe_layers[keys[1]]], keys[2:]
            name = ".".join(map(str, keys))
            shards[name] = array.sharding.shard_shape(array.shape)
            elements = math.prod(shards[name])
            self.weights.append(_Weight(name, elements, elements * array.dtype.itemsize, copies))

        self.multiple = multiple = model.batch_multiple
        self.batch = -(-sizes.max_batch_size // multiple)  # sequences in attention
        self.gathered = self.batch * multiple // layout.dp_size  # sequences in experts and head
        attention = model.layers[0].attention
        cached = cache_dtype(kv_cache_dtype, dtype)
        cache = jax.tree.leaves(attention.abstract_cache(self.batch * multiple, sizes.context_length, cached))
        self.cache = config.num_layers * sum(_local_elements(array) * array.dtype.itemsize for array in cache)
        # What attention reads of a layer's float8 cache: all of it, in the model's dtype.
        self.dequantized = self.itemsize * sum(_local_elements(array) for array in cache if array.dtype == jnp.uint8)
        self.head_parts = 1 if layout.dp_attention else layout.tp_size
        _, self.heads, _ = shards["attention.o"]
        self.vocab, _ = shards["embed.table"]
        # Intermediate sizes: of an expert, of the shared ones, of a dense MLP; 0 where there is none.
        self.inner, self.shared, self.dense = (
            shards.get(name, (0,))[-1] for name in ("moe.w_down", "moe.shared.w_down", "mlp.w_down")
        )

    def for_prefill(self, rows: int) -> "_Device":
        """The device with only so many sequences of all, or as many as there are."""
        other = copy(self)
        other.batch = max(1, min(self.batch, rows // self.multiple))
        other.gathered = self.gathered // self.batch * other.batch
        other.cache = self.cache // self.batch * other.batch
        other.dequantized = self.dequantized // self.batch * other.batch
        return other

    def step(self, length: int) -> Step:
        """A call on the last `length` positions of every sequence."""
        products = [self._work(weight, length) for weight in self.weights]
        written = self.cache // self.context * length
        collectives = self._collectives(length)
        rounds = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}
        group = self.layout.tp_size
        return Step(
            activations=self._activations(length),
            flops=sum(flops for flops, _ in products) + self._attention_flops(length),
            bytes=sum(read for _, read in products) + self.cache + written,
            collectives=collectives,
            sent=sum(rounds[kind] * size * (group - 1) // group for kind, size in collectives.items()),
        )

    def _work(self, weight: _Weight, length: int) -> tuple[int, int]:
        """FLOPs with a weight and bytes of it that are read, over all layers."""
        tokens: float = self.gathered * length
        read = 1.0
        name = weight.name
        if name.endswith(("scale", "bias", "sinks")):
            tokens = 0
        elif weight.part == "experts":
            top_k, experts = self.config.moe.top_k, self.config.moe.num_experts
            read = 1 - (1 - top_k / experts) ** tokens
            tokens *= top_k / experts
        elif name in ("head.weight", "embed.table"):
            if name == "embed.table" and not self.config.tie_word_embeddings:
                return 0, int(tokens * self.config.hidden_size * self.itemsize)
            tokens = self.gathered
        elif name.startswith("attention."):
            tokens = self.batch * (self.context if name == "attention.kv_b" and length > 1 else length)
            if name in ("attention.k", "attention.v"):
                read = self._kv_heads_used()
                tokens *= read
        return int(2 * tokens * weight.elements) * weight.copies, int(weight.bytes * read) * weight.copies

    def _kv_heads_used(self) -> float:
        """The part of the KV heads on a device that its query heads read."""
        attention = self.config.attention
        assert isinstance(attention, GQAConfig)
        return 1 / attention.num_kv_heads if attention.num_kv_heads < self.head_parts else 1.0

    def _attention_flops(self, length: int) -> int:
        attention = self.config.attention
        if isinstance(attention, GQAConfig):
            dims = 2 * attention.head_dim
        elif length == 1:  # absorbed
            dims = 2 * attention.kv_lora_rank + attention.qk_rope_head_dim
        else:
            dims = attention.qk_nope_head_dim + attention.qk_rope_head_dim + attention.v_head_dim
        pairs = self.batch * self.heads * length * self.context
        return 2 * pairs * dims * self.config.num_layers

    def _collectives(self, length: int) -> dict[str, int]:
        config, split = self.config, self.layout.dp_attention
        if self.layout.tp_size == 1:
            return {}
        tokens = self.gathered * length
        hidden = tokens * config.hidden_size * self.itemsize
        logits = 4 * self.gathered * self.vocab * self.layout.tp_size
        layers = config.num_layers
        if split:
            last = self.gathered * config.hidden_size * self.itemsize
            mask = tokens  # of padding: a byte each, once for all layers
            return {"all-gather": layers * hidden + mask + last + logits, "reduce-scatter": (1 + layers) * hidden}
        qk_norm = 8 * tokens if isinstance(config.attention, GQAConfig) and config.attention.qk_norm == "full" else 0
        return {"all-reduce": (1 + 2 * layers) * hidden + layers * qk_norm, "all-gather": logits}

    def _activations(self, length: int) -> int:
        """The most of any phase, beside the residual stream."""
        phases = [self._attention_activations(length), self._experts_activations(length), self._logits_activations()]
        if self.dense:
            phases.append(self._mlp_activations(self.gathered * length, self.dense))
        return self.itemsize * self.batch * length * self.config.hidden_size + max(phases)

    def _attention_activations(self, length: int) -> int:
        """Projections, or scores with what they are made from and applied to, or the output."""
        attention, size, heads = self.config.attention, self.itemsize, self.heads
        tokens, cached, hidden = self.batch * length, self.batch * self.context, self.config.hidden_size
        at_once = queries_at_a_time(self.batch, length, heads, self.context)
        scores = (4 + 4 + size) * self.batch * heads * at_once * self.context  # as they are, masked, and softmax's
        if isinstance(attention, GQAConfig):
            dim = attention.head_dim
            kv_heads = max(1, attention.num_kv_heads // self.head_parts)
            projections = (4 + size) * tokens * (heads + 2 * kv_heads) * dim
            keys_values = size * cached * kv_heads * 2 * dim  # laid out by head
            queries, value_dim = size * tokens * heads * dim, dim
        else:
            projections, queries, keys_values, value_dim = self._latent_activations(attention, length)
        if at_once < length:  # queries and results are also laid out in pieces
            queries = 2 * queries + size * tokens * heads * value_dim
        output = (4 + size) * tokens * (heads * value_dim + hidden)
        read = self.dequantized + keys_values
        return max(size * tokens * hidden + projections, queries + read + scores, output)

    def _latent_activations(self, attention: MLAConfig, length: int) -> tuple[int, int, int, int]:
        """MLA's projections, queries, keys and values, and the size of a value."""
        size, heads, rank = self.itemsize, self.heads, attention.kv_lora_rank
        nope, rope, value = attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.v_head_dim
        tokens, cached = self.batch * length, self.batch * self.context
        latents = (4 + size) * tokens * ((attention.q_lora_rank or 0) + rank + rope)
        projections = latents + (4 + size) * tokens * heads * (nope + rope)
        if length == 1:  # absorbed
            queries = (4 + size) * tokens * heads * (rank + rope)
            return projections, queries, size * cached * (2 * rank + rope), rank
        expanded = (4 + size) * cached * heads * (nope + value)
        keys_values = size * cached * heads * (nope + rope + value)
        return max(projections, expanded), size * tokens * heads * (nope + rope), expanded + keys_values, value

    def _experts_activations(self, length: int) -> int:
        """Tokens, router and sum; beside them a chunk of rows (docs/parallelism.md), or the shared experts."""
        moe, hidden, size = self.config.moe, self.config.hidden_size, self.itemsize
        tokens = self.gathered * length
        pairs = tokens * moe.top_k
        rows = -(-pairs // ROW_ALIGNMENT) * ROW_ALIGNMENT
        chunk_rows = min(rows, default_chunk_rows(pairs, hidden, self.inner, size))
        chunk = size * chunk_rows * (2 * hidden + self.inner)
        shared = self._mlp_activations(tokens, self.shared) if self.shared else 0
        kept = (size + 4) * tokens * hidden + 3 * 4 * tokens * moe.num_experts + 16 * pairs
        return kept + max(chunk, shared)

    def _mlp_activations(self, tokens: int, inner: int) -> int:
        """Input, gate and up in float32, their product, and the output in float32."""
        size, hidden = self.itemsize, self.config.hidden_size
        return (size + 4) * tokens * hidden + (2 * 4 + size) * tokens * inner

    def _logits_activations(self) -> int:
        """A device's part, all parts, and those without padding."""
        return 4 * self.gathered * self.vocab * (1 + 2 * self.layout.tp_size)


def _local_elements(array: Any) -> int:
    return math.prod(array.sharding.shard_shape(array.shape))
