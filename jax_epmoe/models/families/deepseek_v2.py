"""DeepSeek-V2, V2-Lite and Coder-V2: latent attention, dense first layers, shared experts, group-limited routing.

Where transformers' own implementation and the code that DeepSeek published with the weights differ, this follows the
published code: the softmax scale carries YaRN's `mscale_all_dim` (see `HFConfig.rope`), and `routed_scaling_factor` is
not applied where the weights are renormalised.
"""

from jax_epmoe.config import ACTIVATIONS, MLAConfig, ModelConfig, MoEConfig
from jax_epmoe.models.families.hf import HFConfig


def latent_attention(hf: HFConfig) -> MLAConfig:
    """DeepSeek's latent attention, the same in V2 and V3."""
    hf.must_be("attention_bias", False)
    return MLAConfig(
        num_heads=hf.size("num_attention_heads"),
        kv_lora_rank=hf.size("kv_lora_rank"),
        qk_nope_head_dim=hf.size("qk_nope_head_dim"),
        qk_rope_head_dim=hf.size("qk_rope_head_dim"),
        v_head_dim=hf.size("v_head_dim"),
        q_lora_rank=hf.size("q_lora_rank", None),
    )


def config(hf: HFConfig) -> ModelConfig:
    hf.must_be("scoring_func", "softmax")
    hidden_size, num_layers = hf.size("hidden_size"), hf.size("num_hidden_layers")
    first_dense, every = hf.integer("first_k_dense_replace", 0), hf.size("moe_layer_freq", 1)
    intermediate_size = hf.size("moe_intermediate_size")
    grouped = hf.choice("topk_method", ("greedy", "group_limited_greedy"), "greedy") == "group_limited_greedy"
    # Published: `if top_k > 1 and norm_topk_prob: renormalise, else: multiply by routed_scaling_factor`.
    renormalise = hf.boolean("norm_topk_prob", False) and hf.size("num_experts_per_tok") > 1
    return ModelConfig(
        **hf.common(),
        attention=latent_attention(hf),
        rope=hf.rope(interleaved=True),
        moe=MoEConfig(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_experts=hf.size("n_routed_experts"),
            top_k=hf.size("num_experts_per_tok"),
            activation=hf.choice("hidden_act", ACTIVATIONS, "silu"),
            norm_topk_prob=renormalise,
            routed_scaling_factor=1.0 if renormalise else hf.number("routed_scaling_factor", 1.0),
            n_group=hf.size("n_group") if grouped else 1,
            topk_group=hf.size("topk_group") if grouped else 1,
            shared_intermediate_size=intermediate_size * hf.integer("n_shared_experts", 0),
        ),
        moe_layers=tuple(i >= first_dense and i % every == 0 for i in range(num_layers)),
        dense_intermediate_size=hf.size("intermediate_size"),
        rms_norm_eps=hf.number("rms_norm_eps", 1e-6),
    )
