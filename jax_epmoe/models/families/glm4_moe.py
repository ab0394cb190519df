"""GLM-4.5, 4.6 and their Air models: half of each head rotated, biases of q, k and v, DeepSeek-V3's routing."""

from jax_epmoe.config import ACTIVATIONS, GQAConfig, ModelConfig, MoEConfig
from jax_epmoe.models.families.hf import HFConfig


def config(hf: HFConfig) -> ModelConfig:
    hf.must_be("scoring_func", "sigmoid")
    hf.must_be("topk_method", "noaux_tc")
    hidden_size, num_heads = hf.size("hidden_size"), hf.size("num_attention_heads")
    head_dim = hf.size("head_dim", hidden_size // num_heads)
    num_layers, first_dense = hf.size("num_hidden_layers"), hf.count("first_k_dense_replace", 1)
    intermediate_size = hf.size("moe_intermediate_size")
    return ModelConfig(
        **hf.common(),
        attention=GQAConfig(
            num_heads=num_heads,
            num_kv_heads=hf.size("num_key_value_heads", num_heads),
            head_dim=head_dim,
            rotary_dim=int(head_dim * hf.partial_rotary_factor(0.5)),
            qk_norm="head" if hf.boolean("use_qk_norm", False) else None,
            qkv_bias=hf.boolean("attention_bias", False),
        ),
        rope=hf.rope(),
        moe=MoEConfig(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_experts=hf.size("n_routed_experts"),
            top_k=hf.size("num_experts_per_tok"),
            activation=hf.choice("hidden_act", ACTIVATIONS, "silu"),
            scoring="sigmoid",
            norm_topk_prob=hf.boolean("norm_topk_prob", True),
            routed_scaling_factor=hf.number("routed_scaling_factor", 1.0),
            correction_bias=True,
            n_group=hf.size("n_group", 1),
            topk_group=hf.size("topk_group", 1),
            group_score="top2_sum",
            shared_intermediate_size=intermediate_size * hf.count("n_shared_experts", 1),
        ),
        moe_layers=tuple(i >= first_dense for i in range(num_layers)),
        dense_intermediate_size=hf.size("intermediate_size"),
        num_mtp_layers=hf.count("num_nextn_predict_layers", 0),
        rms_norm_eps=hf.number("rms_norm_eps", 1e-5),
    )
