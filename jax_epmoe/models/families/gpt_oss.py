"""gpt-oss (openai/gpt-oss-20b, gpt-oss-120b): attention sinks, sliding windows in every other layer, a clamped SwiGLU, biases.

Its softmax over the k chosen logits equals a softmax over all, renormalised over the k.
"""

from jax_epmoe.config import ClampedSwiGLU, GQAConfig, ModelConfig, MoEConfig
from jax_epmoe.models.families.hf import HFConfig

_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def config(hf: HFConfig) -> ModelConfig:
    hf.must_be("hidden_act", "silu")
    has_bias = hf.boolean("attention_bias", True)
    num_layers = hf.size("num_hidden_layers")
    return ModelConfig(
        **hf.common(),
        attention=GQAConfig(
            num_heads=hf.size("num_attention_heads"),
            num_kv_heads=hf.size("num_key_value_heads", 8),
            head_dim=hf.size("head_dim", 64),
            sliding_window=hf.size("sliding_window", 128),
            qkv_bias=has_bias,
            o_bias=has_bias,
            sinks=True,
        ),
        rope=hf.rope(default=_YARN, theta=150000.0),
        moe=MoEConfig(
            hidden_size=hf.size("hidden_size"),
            intermediate_size=hf.size("intermediate_size"),
            num_experts=hf.size_of("num_local_experts", "num_experts"),
            top_k=hf.size_of("num_experts_per_tok", "experts_per_token"),
            activation=ClampedSwiGLU(hf.number("swiglu_alpha", 1.702), hf.number("swiglu_limit", 7.0)),
            norm_topk_prob=True,
            router_bias=True,
            expert_bias=True,
        ),
        moe_layers=(True,) * num_layers,
        sliding_layers=hf.sliding_layers(tuple(i % 2 == 0 for i in range(num_layers))),
        rms_norm_eps=hf.number("rms_norm_eps", 1e-5),
    )
