"""GLM-4.5's config.json as the hub has it, Air's, as transformers 5 writes it, and what is refused."""

import pytest

from jax_epmoe.config import GQAConfig, ModelConfig, MoEConfig, RopeConfig

GLM_4_5 = {
    "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338], "first_k_dense_replace": 3, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 131072,
    "model_type": "glm4_moe", "moe_intermediate_size": 1536, "n_group": 1, "n_routed_experts": 160,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 96, "num_experts_per_tok": 8,
    "num_hidden_layers": 92, "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "pad_token_id": 151329,
    "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000,
    "routed_scaling_factor": 2.5, "tie_word_embeddings": False, "topk_group": 1, "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0", "use_cache": True, "use_qk_norm": True, "vocab_size": 151552,
}  # fmt: skip
EXPECTED = ModelConfig(
    vocab_size=151552,
    hidden_size=5120,
    attention=GQAConfig(num_heads=96, num_kv_heads=8, head_dim=128, qk_norm="head", qkv_bias=True, rotary_dim=64),
    rope=RopeConfig(theta=1e6),
    moe=MoEConfig(
        5120,
        1536,
        num_experts=160,
        top_k=8,
        scoring="sigmoid",
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        correction_bias=True,
        group_score="top2_sum",
        shared_intermediate_size=1536,
    ),
    moe_layers=(False,) * 3 + (True,) * 89,
    dense_intermediate_size=12288,
    num_mtp_layers=1,
    rms_norm_eps=1e-5,
    max_position_embeddings=131072,
    eos_token_ids=(151329, 151336, 151338),
)
REQUIRED = (
    "vocab_size hidden_size num_attention_heads intermediate_size moe_intermediate_size n_routed_experts"
    " num_experts_per_tok num_hidden_layers max_position_embeddings"
)


def without(*keys):
    return {key: value for key, value in GLM_4_5.items() if key not in keys}


def test_the_hubs_file_becomes_this_config(read):
    assert read(GLM_4_5) == EXPECTED


def test_what_transformers_5_writes_reads_as_the_hubs_file(read):
    rope = {"partial_rotary_factor": 0.5, "rope_theta": 1000000, "rope_type": "default"}
    assert read(without("rope_theta", "rope_scaling") | {"rope_parameters": rope}) == EXPECTED
    assert read(without("rope_theta", "partial_rotary_factor") | {"rope_parameters": rope}) == EXPECTED


def test_air_has_no_qk_norm(read):
    assert read(GLM_4_5 | {"use_qk_norm": False}).attention.qk_norm is None


def test_keys_that_files_leave_out_have_the_familys_defaults(read):
    config = read(
        without("partial_rotary_factor", "attention_bias", "use_qk_norm", "first_k_dense_replace", "head_dim")
        | {"num_attention_heads": 80}
    )
    assert config.attention == GQAConfig(num_heads=80, num_kv_heads=8, head_dim=64, rotary_dim=32)
    assert config.moe_layers == (False,) + (True,) * 91


@pytest.mark.parametrize("key", REQUIRED.split())
def test_a_missing_key_is_named(refused, key):
    assert refused(without(key)) == f"config.json: {key} is missing; it should be a positive integer"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"partial_rotary_factor": 0}, "config.json: partial_rotary_factor is 0; it should be more than 0 and at most 1"),
        ({"partial_rotary_factor": 1.5}, "config.json: partial_rotary_factor is 1.5; it should be more than 0 and at most 1"),
        ({"rope_parameters": {"partial_rotary_factor": "half"}},
         "config.json: partial_rotary_factor is 'half'; it should be more than 0 and at most 1"),
        ({"head_dim": 6}, "rotary_dim is 3; it should be an even number, at least 2 and at most head_dim (6)"),
        ({"hidden_act": "relu"}, "config.json: hidden_act is 'relu'; it should be one of silu, gelu, gelu_pytorch_tanh"),
        ({"use_qk_norm": None, "attention_bias": 1}, "config.json: attention_bias is 1; it should be true or false"),
        ({"scoring_func": "softmax"}, "config.json: scoring_func is 'softmax'; only 'sigmoid' is supported"),
        ({"first_k_dense_replace": -1}, "config.json: first_k_dense_replace is -1; it should be 0 or a positive integer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_is_not_supported_or_contradicts_itself_is_refused_by_name(refused, changes, line):
    assert refused(GLM_4_5 | changes) == line
