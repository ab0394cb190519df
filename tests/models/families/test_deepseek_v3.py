"""DeepSeek-V3's config.json as the hub has it, Moonlight's, and what is refused."""

import math

import pytest

from jax_epmoe.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig

DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0, "eos_token_id": 1,
    "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
    "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
EXPECTED = ModelConfig(
    vocab_size=129280,
    hidden_size=7168,
    attention=MLAConfig(
        num_heads=128, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, q_lora_rank=1536
    ),
    rope=RopeConfig(
        theta=10000.0,
        kind="yarn",
        factor=40.0,
        original_max_position_embeddings=4096,
        softmax_scale_factor=(0.1 * math.log(40) + 1) ** 2,
        interleaved=True,
    ),
    moe=MoEConfig(
        7168,
        2048,
        num_experts=256,
        top_k=8,
        scoring="sigmoid",
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        correction_bias=True,
        n_group=8,
        topk_group=4,
        group_score="top2_sum",
        shared_intermediate_size=2048,
    ),
    moe_layers=(False,) * 3 + (True,) * 58,
    dense_intermediate_size=18432,
    num_mtp_layers=1,
    rms_norm_eps=1e-6,
    max_position_embeddings=163840,
    bos_token_id=0,
    eos_token_ids=(1,),
)
REQUIRED = (
    "vocab_size hidden_size num_attention_heads intermediate_size moe_intermediate_size n_routed_experts"
    " num_experts_per_tok num_hidden_layers kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_group topk_group"
    " max_position_embeddings"
)


def without(*keys):
    return {key: value for key, value in DEEPSEEK_V3.items() if key not in keys}


def test_the_hubs_file_becomes_this_config(read):
    assert read(DEEPSEEK_V3) == EXPECTED


def test_what_transformers_5_writes_reads_as_the_hubs_file(read):
    new = without("rope_theta", "rope_scaling", "scoring_func", "topk_method", "moe_layer_freq") | {
        "rope_interleave": True
    }
    rope = {key: value for key, value in DEEPSEEK_V3["rope_scaling"].items() if key != "type"}
    assert read(new | {"rope_parameters": rope | {"rope_theta": 10000, "rope_type": "yarn"}}) == EXPECTED


def test_a_model_of_the_family_without_query_latents_groups_or_yarn(read):
    """As Moonlight-16B-A3B has it."""
    config = read(
        without("rope_scaling", "num_nextn_predict_layers")
        | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2, "first_k_dense_replace": 1}
    )
    assert config.attention.q_lora_rank is None
    assert config.rope == RopeConfig(theta=10000.0, interleaved=True)
    assert (config.moe.n_group, config.moe.shared_intermediate_size, config.num_mtp_layers) == (1, 4096, 0)
    assert config.moe_layers == (False,) + (True,) * 60


def test_a_lone_expert_keeps_its_score(read):
    """Published: `if top_k > 1 and norm_topk_prob`, and the factor in either case."""
    moe = read(DEEPSEEK_V3 | {"num_experts_per_tok": 1}).moe
    assert (moe.norm_topk_prob, moe.routed_scaling_factor) == (False, 2.5)


@pytest.mark.parametrize("key", REQUIRED.split())
def test_a_missing_key_is_named(refused, key):
    assert refused(without(key)) == f"config.json: {key} is missing; it should be a positive integer"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"attention_bias": True}, "config.json: attention_bias is True; only False is supported"),
        ({"scoring_func": "softmax"}, "config.json: scoring_func is 'softmax'; only 'sigmoid' is supported"),
        ({"topk_method": "greedy"}, "config.json: topk_method is 'greedy'; only 'noaux_tc' is supported"),
        ({"hidden_act": "relu"}, "config.json: hidden_act is 'relu'; it should be one of silu, gelu, gelu_pytorch_tanh"),
        ({"first_k_dense_replace": -1}, "config.json: first_k_dense_replace is -1; it should be 0 or a positive integer"),
        ({"num_nextn_predict_layers": "1"},
         "config.json: num_nextn_predict_layers is '1'; it should be 0 or a positive integer"),
        ({"n_shared_experts": 1.5}, "config.json: n_shared_experts is 1.5; it should be 0 or a positive integer"),
        ({"n_group": 7}, "n_group is 7; it should be a divisor of 256 experts"),
        ({"topk_group": 9}, "topk_group is 9; it should be at most n_group (8)"),
        ({"num_experts_per_tok": 129}, "top_k is 129; it should be at most the 128 experts that a token may choose from"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_is_not_supported_or_contradicts_itself_is_refused_by_name(refused, changes, line):
    assert refused(DEEPSEEK_V3 | changes) == line
