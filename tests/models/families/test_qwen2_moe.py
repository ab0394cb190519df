"""Qwen2-MoE's config.json as the hub has it, as transformers 5 writes it, and what is refused."""

import pytest

from jax_epmoe.config import GQAConfig, ModelConfig, MoEConfig, RopeConfig

QWEN1_5_MOE_A2_7B = {
    "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
    "model_type": "qwen2_moe", "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16,
    "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.39.0.dev0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
EXPECTED = ModelConfig(
    vocab_size=151936,
    hidden_size=2048,
    attention=GQAConfig(num_heads=16, num_kv_heads=16, head_dim=128, qkv_bias=True),
    rope=RopeConfig(theta=1e6),
    moe=MoEConfig(2048, 1408, num_experts=60, top_k=4, shared_intermediate_size=5632, shared_expert_gate=True),
    moe_layers=(True,) * 24,
    dense_intermediate_size=5632,
    rms_norm_eps=1e-6,
    max_position_embeddings=8192,
    bos_token_id=151643,
    eos_token_ids=(151643,),
)
REQUIRED = (
    "vocab_size hidden_size num_attention_heads intermediate_size moe_intermediate_size shared_expert_intermediate_size"
    " num_experts num_experts_per_tok num_hidden_layers max_position_embeddings"
)


def without(*keys):
    return {key: value for key, value in QWEN1_5_MOE_A2_7B.items() if key not in keys}


def test_the_hubs_file_becomes_this_config(read):
    assert read(QWEN1_5_MOE_A2_7B) == EXPECTED


def test_what_transformers_5_writes_reads_as_the_hubs_file(read):
    new = without("rope_theta") | {
        "layer_types": ["full_attention"] * 24, "mlp_only_layers": [], "qkv_bias": True, "sliding_window": 0,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    }  # fmt: skip
    assert read(new) == EXPECTED


def test_the_familys_own_keys_reach_the_config(read):
    config = read(
        QWEN1_5_MOE_A2_7B
        | {"qkv_bias": False, "norm_topk_prob": True, "num_hidden_layers": 6}
        | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
    )
    assert (config.attention.qkv_bias, config.moe.norm_topk_prob) == (False, True)
    assert config.moe_layers == (False, True, False, False, False, True)


@pytest.mark.parametrize("key", REQUIRED.split())
def test_a_missing_key_is_named(refused, key):
    assert refused(without(key)) == f"config.json: {key} is missing; it should be a positive integer"


SLIDING = ["sliding_attention"] + ["full_attention"] * 23


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("use_sliding_window", True, "use_sliding_window is True; only False is supported"),
        ("layer_types", SLIDING, f"layer_types is {SLIDING}; it should be full_attention in every layer"),
        ("layer_types", "all", "layer_types is 'all'; it should be full_attention in every layer"),
        ("hidden_act", "relu", "hidden_act is 'relu'; it should be one of silu, gelu, gelu_pytorch_tanh"),
        ("shared_expert_intermediate_size", 0, "shared_expert_intermediate_size is 0; it should be a positive integer"),
        ("qkv_bias", 1, "qkv_bias is 1; it should be true or false"),
        ("mlp_only_layers", ["0"], "mlp_only_layers is ['0']; it should be a list of layers, each from 0 to 23"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(refused, key, value, line):
    assert refused(QWEN1_5_MOE_A2_7B | {key: value}) == f"config.json: {line}"
