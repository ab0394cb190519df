"""OLMoE (allenai/OLMoE-1B-7B-0924 and kin): QK norm over all heads together, 64 experts."""

from jax_epmoe.config import ACTIVATIONS, GQAConfig, ModelConfig, MoEConfig
from jax_epmoe.models.families.hf import HFConfig


def config(hf: HFConfig) -> ModelConfig:
    hf.must_be("attention_bias", False)
    hidden_size, num_heads = hf.int("hidden_size"), hf.int("num_attention_heads")
    return ModelConfig(
        vocab_size=hf.int("vocab_size"),
        hidden_size=hidden_size,
        attention=GQAConfig(
            num_heads=num_heads,
            num_kv_heads=hf.int("num_key_value_heads", num_heads),
            head_dim=hidden_size // num_heads,
            qk_norm="full",
            clip_qkv=hf.float("clip_qkv", None),
        ),
        rope=hf.rope(),
        moe=MoEConfig(
            hidden_size=hidden_size,
            intermediate_size=hf.int("intermediate_size"),
            num_experts=hf.int("num_experts"),
            top_k=hf.int("num_experts_per_tok"),
            activation=hf.choice("hidden_act", ACTIVATIONS, "silu"),
            norm_topk_prob=hf.bool("norm_topk_prob", False),
        ),
        moe_layers=(True,) * hf.int("num_hidden_layers"),
        rms_norm_eps=hf.float("rms_norm_eps", 1e-5),
        tie_word_embeddings=hf.bool("tie_word_embeddings", False),
        max_position_embeddings=hf.int("max_position_embeddings"),
        bos_token_id=hf.int("bos_token_id", None),
        eos_token_ids=hf.tokens("eos_token_id"),
    )
