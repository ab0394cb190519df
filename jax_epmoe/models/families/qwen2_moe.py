"""Qwen2-MoE (Qwen/Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): biases of q, k and v; a shared expert behind a gate of its own."""

from jax_epmoe.config import ACTIVATIONS, GQAConfig, ModelConfig, MoEConfig
from jax_epmoe.models.families.hf import HFConfig


def config(hf: HFConfig) -> ModelConfig:
    hf.must_not_slide()
    hidden_size, num_heads = hf.size("hidden_size"), hf.size("num_attention_heads")
    return ModelConfig(
        **hf.common(),
        attention=GQAConfig(
            num_heads=num_heads,
            num_kv_heads=hf.size("num_key_value_heads", num_heads),
            head_dim=hf.size("head_dim", hidden_size // num_heads),
            qkv_bias=hf.boolean("qkv_bias", True),
        ),
        rope=hf.rope(),
        moe=MoEConfig(
            hidden_size=hidden_size,
            intermediate_size=hf.size("moe_intermediate_size"),
            num_experts=hf.size_of("num_experts", "num_local_experts"),
            top_k=hf.size("num_experts_per_tok"),
            activation=hf.choice("hidden_act", ACTIVATIONS, "silu"),
            norm_topk_prob=hf.boolean("norm_topk_prob", False),
            shared_intermediate_size=hf.size("shared_expert_intermediate_size"),
            shared_expert_gate=True,
        ),
        moe_layers=hf.sparse_layers(),
        dense_intermediate_size=hf.size("intermediate_size"),
        rms_norm_eps=hf.number("rms_norm_eps", 1e-6),
    )
