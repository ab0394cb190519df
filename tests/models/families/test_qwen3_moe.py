"""Qwen3-MoE's config.json as the hub has it, as transformers 5 writes it, and what is refused."""

import pytest

from jax_epmoe.config import GQAConfig, ModelConfig, MoEConfig, RopeConfig

QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
    "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
EXPECTED = ModelConfig(
    vocab_size=151936,
    hidden_size=2048,
    attention=GQAConfig(num_heads=32, num_kv_heads=4, head_dim=128, qk_norm="head"),
    rope=RopeConfig(theta=1e6),
    moe=MoEConfig(2048, 768, num_experts=128, top_k=8, norm_topk_prob=True),
    moe_layers=(True,) * 48,
    dense_intermediate_size=6144,
    rms_norm_eps=1e-6,
    max_position_embeddings=40960,
    bos_token_id=151643,
    eos_token_ids=(151645,),
)
REQUIRED = (
    "vocab_size hidden_size num_attention_heads intermediate_size moe_intermediate_size num_experts num_experts_per_tok"
    " num_hidden_layers max_position_embeddings"
)


def without(*keys):
    return {key: value for key, value in QWEN3_30B_A3B.items() if key not in keys}


def test_the_hubs_file_becomes_this_config(read):
    assert read(QWEN3_30B_A3B) == EXPECTED


def test_what_transformers_5_writes_reads_as_the_hubs_file(read):
    """It calls the experts `num_local_experts` and keeps rope in one object; a file may hold both names."""
    new = without("num_experts", "rope_theta", "rope_scaling") | {
        "num_local_experts": 128, "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    }  # fmt: skip
    assert read(new) == EXPECTED
    assert read(QWEN3_30B_A3B | {"num_local_experts": 128}) == EXPECTED


def test_keys_that_files_leave_out_have_the_familys_defaults(read):
    bare = read(
        without(
            "norm_topk_prob",
            "num_key_value_heads",
            "head_dim",
            "mlp_only_layers",
            "decoder_sparse_step",
            "rms_norm_eps",
        )
    )
    assert (bare.moe.norm_topk_prob, bare.attention.num_kv_heads, bare.attention.head_dim) == (False, 32, 64)
    assert (bare.moe_layers, bare.rms_norm_eps) == ((True,) * 48, 1e-6)


@pytest.mark.parametrize(
    ("step", "dense", "with_experts"),
    [(1, [], [0, 1, 2, 3, 4, 5]), (2, [], [1, 3, 5]), (3, [2], [5]), (1, [0, 5], [1, 2, 3, 4]), (1, None, [*range(6)])],
)
def test_decoder_sparse_step_and_mlp_only_layers_say_which_layers_hold_experts(read, step, dense, with_experts):
    layers = read(
        QWEN3_30B_A3B | {"num_hidden_layers": 6, "decoder_sparse_step": step, "mlp_only_layers": dense}
    ).moe_layers
    assert [i for i, has_experts in enumerate(layers) if has_experts] == with_experts


@pytest.mark.parametrize("key", REQUIRED.split())
def test_a_missing_key_is_named(refused, key):
    assert refused(without(key)) == f"config.json: {key} is missing; it should be a positive integer"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"attention_bias": True}, "attention_bias is True; only False is supported"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window is True; only False is supported"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; it should be one of silu, gelu, gelu_pytorch_tanh"),
        ({"num_local_experts": 64}, "num_local_experts is 64; it should be num_experts's 128"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0; it should be a positive integer"),
        ({"mlp_only_layers": [48]}, "mlp_only_layers is [48]; it should be a list of layers, each from 0 to 47"),
        ({"mlp_only_layers": 3}, "mlp_only_layers is 3; it should be a list of layers, each from 0 to 47"),
        ({"mlp_only_layers": [*range(48)]}, f"mlp_only_layers is {[*range(48)]}; it should leave experts in some layer"),
        ({"decoder_sparse_step": 49}, "decoder_sparse_step is 49; it should leave experts in some layer"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1; it should be true or false"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_is_not_supported_or_contradicts_itself_is_refused_by_name(refused, changes, line):
    assert refused(QWEN3_30B_A3B | changes) == f"config.json: {line}"
