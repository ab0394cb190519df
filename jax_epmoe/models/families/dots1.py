"""dots.llm1 (rednote-hilab): Qwen3's attention, its last layers with a sliding window where asked, DeepSeek-V3's routing."""

from jax_epmoe.config import ACTIVATIONS, GQAConfig, ModelConfig, MoEConfig
from jax_epmoe.models.families.hf import HFConfig


def config(hf: HFConfig) -> ModelConfig:
    hf.choice("scoring_func", ("noaux_tc", "sigmoid"), "sigmoid")  # the hub's files name the method here
    hf.must_be("topk_method", "noaux_tc")
    hidden_size, num_heads = hf.size("hidden_size"), hf.size("num_attention_heads")
    num_layers, first_dense = hf.size("num_hidden_layers"), hf.count("first_k_dense_replace", 0)
    first_sliding = hf.count("max_window_layers", num_layers)
    has_bias = hf.boolean("attention_bias", False)
    intermediate_size = hf.size("moe_intermediate_size")
    return ModelConfig(
        **hf.common(),
        attention=GQAConfig(
            num_heads=num_heads,
            num_kv_heads=hf.size("num_key_value_heads", num_heads),
            head_dim=hf.size("head_dim", hidden_size // num_heads),
            sliding_window=hf.size("sliding_window", None),
            qk_norm="head",
            qkv_bias=has_bias,
            o_bias=has_bias,
        ),
        rope=hf.rope(),
        moe=MoEConfig(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_experts=hf.size_of("n_routed_experts", "num_local_experts"),
            top_k=hf.size("num_experts_per_tok"),
            activation=hf.choice("hidden_act", ACTIVATIONS, "silu"),
            scoring="sigmoid",
            norm_topk_prob=hf.boolean("norm_topk_prob", False),
            routed_scaling_factor=hf.number("routed_scaling_factor", 1.0),
            correction_bias=True,
            n_group=hf.size("n_group", 1),
            topk_group=hf.size("topk_group", 1),
            group_score="top2_sum",
            shared_intermediate_size=intermediate_size * hf.count("n_shared_experts", 0),
        ),
        moe_layers=tuple(i >= first_dense for i in range(num_layers)),
        sliding_layers=hf.sliding_layers(tuple(i >= first_sliding for i in range(num_layers))),
        dense_intermediate_size=hf.size("intermediate_size"),
        rms_norm_eps=hf.number("rms_norm_eps", 1e-6),
    )
