"""DeepSeek-V3, R1 and kin (Moonlight): V2's latent attention; experts chosen by sigmoid scores and a learnt correction bias.

The groups that a token may choose from are those whose two best experts sum highest. Weights are renormalised, then scaled.
"""

from jax_epmoe.config import ACTIVATIONS, ModelConfig, MoEConfig
from jax_epmoe.models.families.deepseek_v2 import latent_attention
from jax_epmoe.models.families.hf import HFConfig


def config(hf: HFConfig) -> ModelConfig:
    hf.must_be("scoring_func", "sigmoid")
    hf.must_be("topk_method", "noaux_tc")
    num_layers, first_dense = hf.size("num_hidden_layers"), hf.count("first_k_dense_replace", 0)
    every, top_k = hf.size("moe_layer_freq", 1), hf.size("num_experts_per_tok")
    intermediate_size = hf.size("moe_intermediate_size")
    return ModelConfig(
        **hf.common(),
        attention=latent_attention(hf),
        rope=hf.rope(interleaved=hf.boolean("rope_interleave", True)),
        moe=MoEConfig(
            hidden_size=hf.size("hidden_size"),
            intermediate_size=intermediate_size,
            num_experts=hf.size("n_routed_experts"),
            top_k=top_k,
            activation=hf.choice("hidden_act", ACTIVATIONS, "silu"),
            scoring="sigmoid",
            # Published: a lone expert keeps its score.
            norm_topk_prob=hf.boolean("norm_topk_prob", True) and top_k > 1,
            routed_scaling_factor=hf.number("routed_scaling_factor", 1.0),
            correction_bias=True,
            n_group=hf.size("n_group"),
            topk_group=hf.size("topk_group"),
            group_score="top2_sum",
            shared_intermediate_size=intermediate_size * hf.count("n_shared_experts", 0),
        ),
        moe_layers=tuple(i >= first_dense and i % every == 0 for i in range(num_layers)),
        dense_intermediate_size=hf.size("intermediate_size"),
        num_mtp_layers=hf.count("num_nextn_predict_layers", 0),
        rms_norm_eps=hf.number("rms_norm_eps", 1e-6),
    )
