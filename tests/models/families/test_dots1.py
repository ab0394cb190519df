"""dots.llm1's config.json as the hub has it, as transformers 5 writes it, and what is refused."""

import pytest

from jax_epmoe.checkpoint import parameter_shapes
from jax_epmoe.config import GQAConfig, ModelConfig, MoEConfig, RopeConfig

DOTS_LLM1 = {
    "architectures": ["Dots1ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": None,
    "eos_token_id": 151649, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 10944, "max_position_embeddings": 32768, "max_window_layers": 62,
    "model_type": "dots1", "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_routed_experts": 128,
    "n_shared_experts": 2, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts_per_tok": 6,
    "num_hidden_layers": 62, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 10000000, "routed_scaling_factor": 2.5, "scoring_func": "noaux_tc",
    "sliding_window": None, "tie_word_embeddings": False, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 152064,
}  # fmt: skip
EXPECTED = ModelConfig(
    vocab_size=152064,
    hidden_size=4096,
    attention=GQAConfig(num_heads=32, num_kv_heads=32, head_dim=128, qk_norm="head"),
    rope=RopeConfig(theta=1e7),
    moe=MoEConfig(
        4096,
        1408,
        num_experts=128,
        top_k=6,
        scoring="sigmoid",
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        correction_bias=True,
        group_score="top2_sum",
        shared_intermediate_size=2816,
    ),
    moe_layers=(False,) + (True,) * 61,
    sliding_layers=(False,) * 62,
    dense_intermediate_size=10944,
    rms_norm_eps=1e-5,
    max_position_embeddings=32768,
    eos_token_ids=(151649,),
)
REQUIRED = (
    "vocab_size hidden_size num_attention_heads intermediate_size moe_intermediate_size n_routed_experts"
    " num_experts_per_tok num_hidden_layers max_position_embeddings"
)


def without(*keys):
    return {key: value for key, value in DOTS_LLM1.items() if key not in keys}


def test_the_hubs_file_becomes_this_config(read):
    assert read(DOTS_LLM1) == EXPECTED


def test_it_has_the_142_billion_parameters_that_are_published():
    assert sum(shape.size for shape in parameter_shapes(EXPECTED).values()) / 1e9 == pytest.approx(142.5, abs=0.5)


def test_what_transformers_5_writes_reads_as_the_hubs_file(read):
    written = without("rope_theta", "rope_scaling", "scoring_func", "topk_method", "max_window_layers")
    written |= {"rope_parameters": {"rope_theta": 10000000, "rope_type": "default"}}
    assert read(written | {"layer_types": ["full_attention"] * 62}) == EXPECTED


def test_layers_from_max_window_layers_on_have_the_window(read):
    config = read(DOTS_LLM1 | {"sliding_window": 4096, "max_window_layers": 60})
    assert config.sliding_layers == (False,) * 60 + (True,) * 2
    assert config.attention.sliding_window == 4096
    kinds = ["sliding_attention"] + ["full_attention"] * 61
    assert read(DOTS_LLM1 | {"layer_types": kinds}).sliding_layers == (True,) + (False,) * 61


def test_attention_bias_is_that_of_all_four_projections(read):
    attention = read(DOTS_LLM1 | {"attention_bias": True}).attention
    assert attention.qkv_bias
    assert attention.o_bias


def test_keys_that_files_leave_out_have_the_familys_defaults(read):
    left_out = (
        "first_k_dense_replace",
        "n_shared_experts",
        "norm_topk_prob",
        "routed_scaling_factor",
        "num_key_value_heads",
    )
    config = read(without(*left_out) | {"num_attention_heads": 64})
    assert config.moe_layers == (True,) * 62
    assert config.attention == GQAConfig(num_heads=64, num_kv_heads=64, head_dim=64, qk_norm="head")
    assert (config.moe.shared_intermediate_size, config.moe.norm_topk_prob, config.moe.routed_scaling_factor) == (
        0,
        False,
        1.0,
    )


@pytest.mark.parametrize("key", REQUIRED.split())
def test_a_missing_key_is_named(refused, key):
    assert refused(without(key)) == f"config.json: {key} is missing; it should be a positive integer"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"scoring_func": "softmax"}, "config.json: scoring_func is 'softmax'; it should be one of noaux_tc, sigmoid"),
        ({"topk_method": "greedy"}, "config.json: topk_method is 'greedy'; only 'noaux_tc' is supported"),
        ({"max_window_layers": -1}, "config.json: max_window_layers is -1; it should be 0 or a positive integer"),
        ({"layer_types": ["full_attention"]},
         "config.json: layer_types is ['full_attention']; it should be a list of 62, as there are layers, each one of"
         " sliding_attention, full_attention"),
        ({"hidden_act": "relu"}, "config.json: hidden_act is 'relu'; it should be one of silu, gelu, gelu_pytorch_tanh"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(refused, changes, line):
    assert refused(DOTS_LLM1 | changes) == line
