"""OLMoE (allenai/OLMoE-1B-7B-0924 and kin): QK norm over all heads together, 64 experts."""

from jax_epmoe.config import ACTIVATIONS, GQAConfig, ModelConfig, MoEConfig
from jax_epmoe.models.families.hf import HFConfig


def config(hf: HFConfig) -> ModelConfig:
    hf.must_be("attention_bias", False)
    hidden_size, num_heads = hf.size("hidden_size"), hf.size("num_attention_heads")
    return ModelConfig(
        **hf.common(),
        attention=GQAConfig(
            num_heads=num_heads,
            num_kv_heads=hf.size("num_key_value_heads", num_heads),
            head_dim=hidden_size // num_heads,
            qk_norm="full",
            clip_qkv=hf.number("clip_qkv", None),
        ),
        rope=hf.rope(),
        moe=MoEConfig(
            hidden_size=hidden_size,
            intermediate_size=hf.size("intermediate_size"),
            num_experts=hf.size("num_experts"),
            top_k=hf.size("num_experts_per_tok"),
            activation=hf.choice("hidden_act", ACTIVATIONS, "silu"),
            norm_topk_prob=hf.boolean("norm_topk_prob", False),
        ),
        moe_layers=(True,) * hf.size("num_hidden_layers"),
        rms_norm_eps=hf.number("rms_norm_eps", 1e-5),
    )
