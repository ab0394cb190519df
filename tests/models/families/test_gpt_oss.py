"""gpt-oss's config.json as the hub has it, as transformers 5 writes it, and what is refused."""

import math

import pytest

from jax_epmoe.checkpoint import parameter_shapes
from jax_epmoe.config import ClampedSwiGLU, GQAConfig, ModelConfig, MoEConfig, RopeConfig

GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002,
    "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "initializer_range": 0.02, "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
    "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
    "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0", "use_cache": True, "vocab_size": 201088,
}  # fmt: skip
GPT_OSS_120B = GPT_OSS_20B | {
    "layer_types": ["sliding_attention", "full_attention"] * 18, "num_hidden_layers": 36, "num_local_experts": 128,
}  # fmt: skip
EXPECTED = ModelConfig(
    vocab_size=201088,
    hidden_size=2880,
    attention=GQAConfig(
        num_heads=64, num_kv_heads=8, head_dim=64, sliding_window=128, qkv_bias=True, o_bias=True, sinks=True
    ),
    rope=RopeConfig(
        theta=150000.0,
        kind="yarn",
        factor=32.0,
        original_max_position_embeddings=4096,
        truncate=False,
        attention_factor=0.1 * math.log(32) + 1,
    ),
    moe=MoEConfig(
        2880,
        2880,
        num_experts=32,
        top_k=4,
        activation=ClampedSwiGLU(1.702, 7.0),
        norm_topk_prob=True,
        router_bias=True,
        expert_bias=True,
    ),
    moe_layers=(True,) * 24,
    sliding_layers=(True, False) * 12,
    rms_norm_eps=1e-5,
    max_position_embeddings=131072,
    eos_token_ids=(200002,),
)


def without(*keys):
    return {key: value for key, value in GPT_OSS_20B.items() if key not in keys}


def test_the_hubs_file_becomes_this_config(read):
    assert read(GPT_OSS_20B) == EXPECTED


@pytest.mark.parametrize(("hf", "billions"), [(GPT_OSS_20B, 20.91), (GPT_OSS_120B, 116.83)], ids=["20b", "120b"])
def test_it_has_as_many_parameters_as_published(read, hf, billions):
    assert sum(array.size for array in parameter_shapes(read(hf)).values()) / 1e9 == pytest.approx(billions, abs=0.005)


def test_windows_are_those_of_each_layer(read):
    config = read(GPT_OSS_20B | {"layer_types": ["full_attention"] * 23 + ["sliding_attention"]})
    assert [config.attention_of(i).sliding_window for i in (0, 22, 23)] == [None, None, 128]


def test_what_transformers_5_writes_reads_as_the_hubs_file(read):
    new = without("rope_theta", "rope_scaling", "experts_per_token") | {
        "rope_parameters": GPT_OSS_20B["rope_scaling"] | {"rope_theta": 150000}, "swiglu_alpha": 1.702,
    }  # fmt: skip
    assert read(new) == EXPECTED


def test_keys_that_files_leave_out_have_the_familys_defaults(read):
    bare = without(
        "attention_bias", "experts_per_token", "head_dim", "layer_types", "num_key_value_heads", "rms_norm_eps",
        "rope_scaling", "rope_theta", "sliding_window", "swiglu_limit", "hidden_act", "tie_word_embeddings",
    )  # fmt: skip
    assert read(bare) == EXPECTED


def test_values_of_its_own_keys_reach_the_config(read):
    config = read(GPT_OSS_20B | {"attention_bias": False, "swiglu_alpha": 1.5, "swiglu_limit": 10})
    assert (config.attention.qkv_bias, config.attention.o_bias, config.attention.sinks) == (False, False, True)
    assert config.moe.activation == ClampedSwiGLU(1.5, 10.0)


REQUIRED = (
    "vocab_size hidden_size num_attention_heads intermediate_size num_local_experts num_hidden_layers"
    " max_position_embeddings"
)


@pytest.mark.parametrize("key", REQUIRED.split())
def test_a_missing_key_is_named(refused, key):
    assert refused(without(key)) == f"config.json: {key} is missing; it should be a positive integer"


LAYER_TYPES = "it should be a list of 24, as there are layers, each one of sliding_attention, full_attention"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"hidden_act": "gelu"}, "config.json: hidden_act is 'gelu'; only 'silu' is supported"),
        ({"experts_per_token": 2}, "config.json: experts_per_token is 2; it should be num_experts_per_tok's 4"),
        ({"layer_types": ["full_attention"]}, f"config.json: layer_types is ['full_attention']; {LAYER_TYPES}"),
        ({"layer_types": [["x"]] * 24}, f"config.json: layer_types is {[['x']] * 24}; {LAYER_TYPES}"),
        ({"swiglu_limit": 0}, "limit is 0.0; it should be a positive number"),
        ({"swiglu_alpha": "2"}, "config.json: swiglu_alpha is '2'; it should be a finite number"),
        ({"num_experts_per_tok": 33, "experts_per_token": 33}, "top_k is 33; it should be at most the 32 experts that a token may choose from"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_is_not_supported_or_contradicts_itself_is_refused_by_name(refused, changes, line):
    assert refused(GPT_OSS_20B | changes) == line
