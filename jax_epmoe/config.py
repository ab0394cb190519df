"""What a model is, in numbers: `MoEConfig` for one layer, `ModelConfig` for a decoder.

Both are frozen and know nothing of devices or files. `models/families/` makes them from Hugging Face's `config.json`.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class ClampedSwiGLU:
    """gpt-oss's gate, `(up + 1) * gate * sigmoid(alpha * gate)`: gate is clamped to at most `limit`, up to within `limit` of 0."""

    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self):
        for name in ("alpha", "limit"):
            value = getattr(self, name)
            require(isinstance(value, int | float) and value > 0, name, value, "a positive number")


Activation = str | ClampedSwiGLU


def is_activation(value: Any) -> bool:
    """Whether it is one of `ACTIVATIONS` or a `ClampedSwiGLU`."""
    return isinstance(value, ClampedSwiGLU) or value in ACTIVATIONS


def require(condition: bool, name: str, value: Any, expected: str) -> None:
    """Raises the project's one kind of error line: the argument, what it was, what it should be."""
    if not condition:
        raise ValueError(f"{name} is {value!r}; it should be {expected}")


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(isinstance(value, int) and value > 0, name, value, "a positive integer")


@dataclass(frozen=True)
class MoEConfig:
    """One Mixture-of-Experts layer.

    Routing, in the order in which it happens (`E` experts, `k` choices a token):

    1. `scoring` of the router's logits in float32: "softmax" (Mixtral, OLMoE, DeepSeek-V2) or "sigmoid" (DeepSeek-V3).
    2. With `correction_bias`, a learnt vector is added to the scores for choosing, not for weighting (DeepSeek-V3).
    3. With `n_group` > 1, experts lie in groups of `E / n_group`; a group's score is its best expert's ("max",
       DeepSeek-V2) or the sum of its best two ("top2_sum", DeepSeek-V3); only the best `topk_group` groups are eligible.
    4. The `top_k` best eligible experts; with `norm_topk_prob` their weights are divided by their sum.
    5. All weights are multiplied by `routed_scaling_factor`.

    `shared_intermediate_size` > 0 adds shared experts: one gated MLP that every token passes through, unweighted; or, with
    `shared_expert_gate`, weighted by the sigmoid of a learnt product with the token (Qwen2-MoE).

    `activation`: one of `ACTIVATIONS`, or a `ClampedSwiGLU`. gpt-oss adds learnt vectors: with `router_bias` to the router's logits,
    with `expert_bias` to what each expert's gate, up and down projections give.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    activation: Activation = "silu"
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    correction_bias: bool = False
    n_group: int = 1
    topk_group: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    shared_intermediate_size: int = 0
    shared_expert_gate: bool = False
    router_bias: bool = False
    expert_bias: bool = False

    def __post_init__(self):
        _require_positive(self, "hidden_size", "intermediate_size", "num_experts", "top_k", "n_group", "topk_group")
        require(is_activation(self.activation), "activation", self.activation, f"one of {', '.join(ACTIVATIONS)}")
        require(self.scoring in ("softmax", "sigmoid"), "scoring", self.scoring, "softmax or sigmoid")
        require(self.group_score in ("max", "top2_sum"), "group_score", self.group_score, "max or top2_sum")
        require(
            self.num_experts % self.n_group == 0, "n_group", self.n_group, f"a divisor of {self.num_experts} experts"
        )
        require(self.topk_group <= self.n_group, "topk_group", self.topk_group, f"at most n_group ({self.n_group})")
        group_size = self.num_experts // self.n_group
        require(
            self.group_score == "max" or self.n_group == 1 or group_size >= 2,
            "n_group", self.n_group, f"at most {self.num_experts // 2}, so that a group has the two experts it is scored by",
        )  # fmt: skip
        eligible = self.topk_group * group_size
        require(
            self.top_k <= eligible, "top_k", self.top_k, f"at most the {eligible} experts that a token may choose from"
        )
        shared = self.shared_intermediate_size
        require(isinstance(shared, int) and shared >= 0, "shared_intermediate_size", shared, "0 or a positive integer")
        require(
            shared > 0 or not self.shared_expert_gate,
            "shared_expert_gate", self.shared_expert_gate, "False: there are no shared experts",
        )  # fmt: skip


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al., 2021), optionally stretched by YaRN (Peng et al., 2023) or linearly.

    `attention_factor` multiplies cos and sin (the paper: `0.1 * ln(factor) + 1`); `softmax_scale_factor` multiplies the
    softmax scale (DeepSeek's `mscale_all_dim`, squared, as its published code has it).
    `interleaved` pairs dimensions (0, 1), (2, 3), ... as DeepSeek does; otherwise (0, d/2), (1, d/2 + 1), ...
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "yarn"] = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    softmax_scale_factor: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True)
class GQAConfig:
    """Grouped-query attention. `qk_norm` normalises queries and keys: "full" over all heads together (OLMoE), "head"
    each head by itself (Qwen3). `qkv_bias` adds a learnt vector to q, k and v (Qwen2), `o_bias` to the output (gpt-oss). `clip_qkv`
    clamps q, k and v. `sliding_window`: how many last positions are seen. `rotary_dim`: how many of a head's first dimensions are
    rotated (GLM-4.5: half); None: all. `sinks`: each head's softmax has a learnt score more, of a key whose value is zero (gpt-oss)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: Literal["full", "head"] | None = None
    qkv_bias: bool = False
    clip_qkv: float | None = None
    sliding_window: int | None = None
    rotary_dim: int | None = None
    o_bias: bool = False
    sinks: bool = False

    def __post_init__(self):
        _require_positive(self, "num_heads", "num_kv_heads", "head_dim")
        require(
            self.num_heads % self.num_kv_heads == 0,
            "num_key_value_heads", self.num_kv_heads, f"a divisor of the {self.num_heads} query heads",
        )  # fmt: skip
        require(
            self.rotary_dim is None or (self.rotary_dim in range(2, self.head_dim + 1) and self.rotary_dim % 2 == 0),
            "rotary_dim", self.rotary_dim, f"an even number, at least 2 and at most head_dim ({self.head_dim})",
        )  # fmt: skip

    @property
    def rope_dim(self) -> int:
        """How many dimensions of a head are rotated."""
        return self.rotary_dim or self.head_dim


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, section 2.1). Without `q_lora_rank`, queries are projected directly.

    `latent_norm_eps`: of the norms of the query's and the cache's latents; the published code fixes it at 1e-6.
    """

    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    latent_norm_eps: float = 1e-6

    def __post_init__(self):
        _require_positive(self, "num_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")

    @property
    def rope_dim(self) -> int:
        """How many dimensions of a head are rotated."""
        return self.qk_rope_head_dim


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: `moe_layers[i]` says whether layer i holds experts or a dense MLP of `dense_intermediate_size`.

    `sliding_layers[i]` says whether layer i has attention's sliding window, if there is one; empty: all have.
    `num_mtp_layers`: layers past the last, for predicting further tokens, that checkpoints hold and this decoder leaves out.
    """

    vocab_size: int
    hidden_size: int
    attention: GQAConfig | MLAConfig
    rope: RopeConfig
    moe: MoEConfig
    moe_layers: tuple[bool, ...]
    dense_intermediate_size: int = 0
    sliding_layers: tuple[bool, ...] = ()
    num_mtp_layers: int = 0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 4096
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        _require_positive(self, "vocab_size", "hidden_size", "max_position_embeddings")
        require(any(self.moe_layers), "moe_layers", self.moe_layers, "with experts in at least one layer")
        require(
            len(self.sliding_layers) in (0, self.num_layers),
            "sliding_layers", self.sliding_layers, f"empty, or one for each of the {self.num_layers} layers",
        )  # fmt: skip
        require(
            self.moe.hidden_size == self.hidden_size, "moe.hidden_size", self.moe.hidden_size, str(self.hidden_size)
        )
        require(
            all(self.moe_layers) or self.dense_intermediate_size > 0,
            "intermediate_size", self.dense_intermediate_size, "positive: the model has dense layers",
        )  # fmt: skip

    @property
    def num_layers(self) -> int:
        return len(self.moe_layers)

    def attention_of(self, layer: int) -> GQAConfig | MLAConfig:
        """The attention of a layer: without the window where `sliding_layers` says so."""
        attention = self.attention
        if isinstance(attention, GQAConfig) and self.sliding_layers and not self.sliding_layers[layer]:
            return dataclasses.replace(attention, sliding_window=None)
        return attention

    def replace(self, **changes: Any) -> "ModelConfig":
        return dataclasses.replace(self, **changes)
