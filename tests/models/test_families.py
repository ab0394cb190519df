"""config.json as the hub has it: what each family's file becomes, and one line for what cannot be read."""

import math

import pytest

from jax_epmoe.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig
from jax_epmoe.models.families import FAMILIES, family_of, read_config

MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip
OLMOE_1B_7B = {
    "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
    "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 1024, "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
    "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 50304,
}  # fmt: skip
DEEPSEEK_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, "aux_loss_alpha": 0.001,
    "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1408, "moe_layer_freq": 1,
    "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "pretraining_tp": 1,
    "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
DEEPSEEK_V2 = DEEPSEEK_V2_LITE | {
    "ep_size": 1, "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_group": 8,
    "n_routed_experts": 160, "num_attention_heads": 128, "num_hidden_layers": 60, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "routed_scaling_factor": 16.0, "topk_group": 3, "topk_method": "group_limited_greedy",
    "transformers_version": "4.39.3",
}  # fmt: skip
DEEPSEEK_CODER_V2 = DEEPSEEK_V2 | {"rope_scaling": DEEPSEEK_V2["rope_scaling"] | {"mscale": 1.0, "mscale_all_dim": 1.0}}

YARN = RopeConfig(
    theta=10000.0,
    kind="yarn",
    factor=40.0,
    original_max_position_embeddings=4096,
    softmax_scale_factor=(0.1 * 0.707 * math.log(40) + 1) ** 2,
    interleaved=True,
)

EXPECTED = {
    "Mixtral-8x7B": (
        MIXTRAL_8X7B,
        ModelConfig(
            vocab_size=32000,
            hidden_size=4096,
            attention=GQAConfig(num_heads=32, num_kv_heads=8, head_dim=128),
            rope=RopeConfig(theta=1e6),
            moe=MoEConfig(4096, 14336, num_experts=8, top_k=2, norm_topk_prob=True),
            moe_layers=(True,) * 32,
            rms_norm_eps=1e-5,
            max_position_embeddings=32768,
            bos_token_id=1,
            eos_token_ids=(2,),
        ),
    ),
    "OLMoE-1B-7B": (
        OLMOE_1B_7B,
        ModelConfig(
            vocab_size=50304,
            hidden_size=2048,
            attention=GQAConfig(num_heads=16, num_kv_heads=16, head_dim=128, qk_norm="full"),
            rope=RopeConfig(theta=1e4),
            moe=MoEConfig(2048, 1024, num_experts=64, top_k=8),
            moe_layers=(True,) * 16,
            rms_norm_eps=1e-5,
            max_position_embeddings=4096,
            eos_token_ids=(50279,),
        ),
    ),
    "DeepSeek-V2-Lite": (
        DEEPSEEK_V2_LITE,
        ModelConfig(
            vocab_size=102400,
            hidden_size=2048,
            attention=MLAConfig(
                num_heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
            ),
            rope=YARN,
            moe=MoEConfig(2048, 1408, num_experts=64, top_k=6, shared_intermediate_size=2816),
            moe_layers=(False,) + (True,) * 26,
            dense_intermediate_size=10944,
            rms_norm_eps=1e-6,
            max_position_embeddings=163840,
            bos_token_id=100000,
            eos_token_ids=(100001,),
        ),
    ),
    "DeepSeek-V2": (
        DEEPSEEK_V2,
        ModelConfig(
            vocab_size=102400,
            hidden_size=5120,
            attention=MLAConfig(
                num_heads=128,
                kv_lora_rank=512,
                qk_nope_head_dim=128,
                qk_rope_head_dim=64,
                v_head_dim=128,
                q_lora_rank=1536,
            ),
            rope=YARN,
            moe=MoEConfig(
                5120,
                1536,
                num_experts=160,
                top_k=6,
                routed_scaling_factor=16.0,
                n_group=8,
                topk_group=3,
                shared_intermediate_size=3072,
            ),
            moe_layers=(False,) + (True,) * 59,
            dense_intermediate_size=12288,
            rms_norm_eps=1e-6,
            max_position_embeddings=163840,
            bos_token_id=100000,
            eos_token_ids=(100001,),
        ),
    ),
}


@pytest.mark.parametrize(("hf", "config"), EXPECTED.values(), ids=EXPECTED)
def test_the_hubs_files_become_these_configs(read, hf, config):
    assert read(hf) == config


def test_deepseek_coder_v2_has_its_own_yarn_scales(read):
    """mscale over mscale_all_dim is 1 again; the softmax scale grows with mscale_all_dim."""
    rope = read(DEEPSEEK_CODER_V2).rope
    assert (rope.attention_factor, rope.softmax_scale_factor) == (1.0, (0.1 * math.log(40) + 1) ** 2)
    assert read(DEEPSEEK_CODER_V2).replace(rope=None) == EXPECTED["DeepSeek-V2"][1].replace(rope=None)


@pytest.mark.parametrize("hf", [MIXTRAL_8X7B, OLMOE_1B_7B, DEEPSEEK_V2_LITE], ids=lambda hf: hf["model_type"])
def test_rope_parameters_of_transformers_5_read_as_the_old_keys(read, hf):
    new = {key: value for key, value in hf.items() if key not in ("rope_theta", "rope_scaling")}
    old = dict(hf.get("rope_scaling") or {})
    kind = old.pop("type", "default")
    new["rope_parameters"] = old | {"rope_theta": hf["rope_theta"], "rope_type": kind}
    assert read(new) == read(hf)
    # Also as some files have it: the new object, theta still outside.
    del new["rope_parameters"]["rope_theta"]
    assert read(new | {"rope_theta": hf["rope_theta"]}) == read(hf)


def test_linear_rope_keeps_only_its_factor(read):
    scaled = read(MIXTRAL_8X7B | {"rope_scaling": {"type": "linear", "factor": 4.0}}).rope
    assert scaled == RopeConfig(theta=1e6, kind="linear", factor=4.0)


@pytest.mark.parametrize(
    ("keys", "attention_factor", "softmax_scale_factor"),
    [
        ({}, 0.1 * math.log(8) + 1, 1.0),  # the paper
        ({"mscale": 0.5}, 0.1 * 0.5 * math.log(8) + 1, 1.0),
        ({"mscale_all_dim": 0.5}, (0.1 * math.log(8) + 1) / (0.05 * math.log(8) + 1), (0.05 * math.log(8) + 1) ** 2),
        ({"mscale": 0.5, "mscale_all_dim": 0.5}, 1.0, (0.05 * math.log(8) + 1) ** 2),
        ({"attention_factor": 1.25}, 1.25, 1.0),
        ({"factor": 1}, 1.0, 1.0),
    ],
    ids=str,
)
def test_yarn_scales_follow_deepseeks_published_code(read, keys, attention_factor, softmax_scale_factor):
    yarn = {"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 1024, "truncate": False}
    rope = read(DEEPSEEK_V2 | {"rope_scaling": yarn | keys}).rope
    assert rope.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    assert rope.softmax_scale_factor == pytest.approx(softmax_scale_factor, rel=1e-12)
    assert rope.truncate is False


def test_yarns_original_length_is_the_models_unless_given(read):
    rope = read(DEEPSEEK_V2 | {"rope_scaling": {"type": "yarn", "factor": 4}}).rope
    assert (rope.original_max_position_embeddings, rope.beta_fast, rope.beta_slow) == (163840, 32.0, 1.0)


def test_keys_that_files_leave_out_have_the_families_defaults(read):
    def without(hf, *keys):
        return {key: value for key, value in hf.items() if key not in keys}

    sparse = read(without(MIXTRAL_8X7B, "num_key_value_heads", "hidden_act", "bos_token_id", "tie_word_embeddings"))
    assert (sparse.attention.num_kv_heads, sparse.moe.activation, sparse.bos_token_id) == (32, "silu", None)
    assert read(without(OLMOE_1B_7B, "norm_topk_prob", "eos_token_id", "rope_theta")) == EXPECTED["OLMoE-1B-7B"][
        1
    ].replace(eos_token_ids=())
    bare = read(without(DEEPSEEK_V2_LITE, "n_shared_experts", "first_k_dense_replace", "topk_method", "n_group"))
    assert bare.moe.shared_intermediate_size == 0
    assert all(bare.moe_layers)


def test_families_own_keys_reach_the_config(read):
    mixtral = read(MIXTRAL_8X7B | {"head_dim": 64, "sliding_window": 4096, "eos_token_id": [2, 5]})
    assert (mixtral.attention.head_dim, mixtral.attention.sliding_window, mixtral.eos_token_ids) == (64, 4096, (2, 5))
    olmoe = read(OLMOE_1B_7B | {"clip_qkv": 8, "norm_topk_prob": True, "tie_word_embeddings": True})
    assert (olmoe.attention.clip_qkv, olmoe.moe.norm_topk_prob, olmoe.tie_word_embeddings) == (8.0, True, True)


def test_deepseek_v2_renormalises_instead_of_scaling(read):
    """Published: `if top_k > 1 and norm_topk_prob: divide by the sum, else: multiply by routed_scaling_factor`."""
    normed = read(DEEPSEEK_V2 | {"norm_topk_prob": True}).moe
    assert (normed.norm_topk_prob, normed.routed_scaling_factor) == (True, 1.0)
    top_1 = read(DEEPSEEK_V2 | {"norm_topk_prob": True, "num_experts_per_tok": 1}).moe
    assert (top_1.norm_topk_prob, top_1.routed_scaling_factor) == (False, 16.0)


def test_deepseek_v2_ignores_groups_unless_routing_is_group_limited(read):
    moe = read(DEEPSEEK_V2 | {"topk_method": "greedy"}).moe
    assert (moe.n_group, moe.topk_group) == (1, 1)


def test_moe_layer_freq_puts_dense_layers_between_moe_layers(read):
    layers = read(DEEPSEEK_V2 | {"moe_layer_freq": 3, "num_hidden_layers": 8, "first_k_dense_replace": 2}).moe_layers
    assert [i for i, has_experts in enumerate(layers) if has_experts] == [3, 6]


REQUIRED = {
    "mixtral": (
        "vocab_size hidden_size num_attention_heads intermediate_size num_local_experts num_experts_per_tok"
        " num_hidden_layers rms_norm_eps max_position_embeddings"
    ),
    "olmoe": (
        "vocab_size hidden_size num_attention_heads intermediate_size num_experts num_experts_per_tok num_hidden_layers"
        " max_position_embeddings"
    ),
    "deepseek_v2": (
        "vocab_size hidden_size num_attention_heads intermediate_size moe_intermediate_size n_routed_experts"
        " num_experts_per_tok num_hidden_layers kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_group"
        " topk_group max_position_embeddings"
    ),
}
HUB = {"mixtral": MIXTRAL_8X7B, "olmoe": OLMOE_1B_7B, "deepseek_v2": DEEPSEEK_V2}


@pytest.mark.parametrize(
    ("family", "key"), [(family, key) for family, keys in REQUIRED.items() for key in keys.split()]
)
def test_a_missing_key_is_named(refused, family, key):
    line = refused({k: v for k, v in HUB[family].items() if k != key})
    assert line.startswith(f"config.json: {key} is missing; it should be a")


@pytest.mark.parametrize(
    ("family", "key", "value", "expected"),
    [
        ("mixtral", "hidden_size", "4096", "a positive integer"),
        ("mixtral", "hidden_size", 4096.0, "a positive integer"),
        ("mixtral", "hidden_size", True, "a positive integer"),
        ("mixtral", "hidden_size", [4096], "a positive integer"),
        ("mixtral", "sliding_window", False, "a positive integer"),
        ("mixtral", "rms_norm_eps", "1e-5", "a finite number"),
        ("mixtral", "rms_norm_eps", float("nan"), "a finite number"),
        ("mixtral", "tie_word_embeddings", 0, "true or false"),
        ("mixtral", "hidden_act", "relu2", "one of silu, gelu, gelu_pytorch_tanh"),
        ("mixtral", "hidden_act", ["silu"], "one of silu, gelu, gelu_pytorch_tanh"),
        ("mixtral", "eos_token_id", "</s>", "a token id or a list of them"),
        ("mixtral", "eos_token_id", [2, None], "a token id or a list of them"),
        ("mixtral", "rope_scaling", "yarn", "a JSON object or null"),
        ("olmoe", "clip_qkv", True, "a finite number"),
        ("olmoe", "norm_topk_prob", "false", "true or false"),
        ("deepseek_v2", "topk_method", "noaux_tc", "one of greedy, group_limited_greedy"),
        ("deepseek_v2", "routed_scaling_factor", "16", "a finite number"),
    ],
)  # fmt: skip
def test_a_mistyped_key_is_named_with_its_value(refused, family, key, value, expected):
    assert refused(HUB[family] | {key: value}) == f"config.json: {key} is {value!r}; it should be {expected}"


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("mixtral", "attention_bias", True),
        ("olmoe", "attention_bias", True),
        ("deepseek_v2", "attention_bias", True),
        ("deepseek_v2", "scoring_func", "sigmoid"),
    ],
)
def test_a_value_whose_meaning_is_not_implemented_is_refused(refused, family, key, value):
    assert refused(HUB[family] | {key: value}).startswith(f"config.json: {key} is {value!r}; only ")


@pytest.mark.parametrize(
    ("scaling", "line"),
    [
        ({"type": "llama3", "factor": 8}, "rope_type is 'llama3'; it should be one of default, linear, yarn"),
        ({"rope_type": "dynamic", "factor": 8}, "rope_type is 'dynamic'; it should be one of default, linear, yarn"),
        ({"type": "yarn"}, "factor is missing; it should be a finite number"),
        ({"type": "linear", "factor": "4"}, "factor is '4'; it should be a finite number"),
        ({"type": "yarn", "factor": 0.5}, "factor is 0.5; it should be 1 or more"),
        ({"type": "yarn", "factor": 4, "mscale": "1"}, "mscale is '1'; it should be a finite number"),
        ({"type": "yarn", "factor": 4, "original_max_position_embeddings": 1e3},
         "original_max_position_embeddings is 1000.0; it should be a positive integer"),
        ({"type": "yarn", "factor": 4, "truncate": 1}, "truncate is 1; it should be true or false"),
    ],
    ids=str,
)  # fmt: skip
def test_rope_that_cannot_be_read_is_named(refused, scaling, line):
    assert refused(DEEPSEEK_V2 | {"rope_scaling": scaling}) == f"config.json: rope: {line}"


@pytest.mark.parametrize(
    ("family", "change", "name"),
    [
        ("mixtral", {"num_key_value_heads": 5}, "num_key_value_heads"),
        ("mixtral", {"num_hidden_layers": 0}, "num_hidden_layers"),
        ("mixtral", {"num_experts_per_tok": 9}, "top_k"),
        ("mixtral", {"num_attention_heads": 5000}, "head_dim"),
        ("mixtral", {"hidden_size": -1}, "hidden_size"),
        ("mixtral", {"vocab_size": 0}, "vocab_size"),
        ("mixtral", {"num_attention_heads": 0}, "num_attention_heads"),
        ("olmoe", {"num_attention_heads": 0}, "num_attention_heads"),
        ("mixtral", {"sliding_window": 0}, "sliding_window"),
        ("mixtral", {"rope_theta": 0}, "rope_theta"),
        ("deepseek_v2", {"n_group": 7}, "n_group"),
        ("deepseek_v2", {"topk_group": 9}, "topk_group"),
        ("deepseek_v2", {"n_shared_experts": -1}, "shared_intermediate_size"),
        ("deepseek_v2", {"q_lora_rank": 0}, "q_lora_rank"),
        ("deepseek_v2", {"moe_layer_freq": 0}, "moe_layer_freq"),
        ("deepseek_v2", {"intermediate_size": 0}, "intermediate_size"),
        (
            "deepseek_v2",
            {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 0}},
            "original_max_position_embeddings",
        ),
    ],
    ids=str,
)
def test_numbers_that_make_no_model_are_refused_by_name(refused, family, change, name):
    line = refused(HUB[family] | change)
    assert f"{name} is " in line
    assert "; it should be " in line


@pytest.mark.parametrize("model_type", ["llama", "qwen3", None, 3, ["mixtral"]], ids=str)
def test_an_unknown_family_is_refused_with_the_known_ones(refused, model_type):
    line = f"config.json: model_type is {model_type!r}; it should be one of {', '.join(FAMILIES)}"
    assert refused(MIXTRAL_8X7B | {"model_type": model_type}) == line


def test_family_of_is_the_model_type():
    assert [family_of(hf) for hf in HUB.values()] == list(HUB)


def test_a_folder_without_config_json_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"cannot read config.json: No such file or directory$") as caught:
            read_config(folder)
        assert str(folder) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "{'hidden_size': 1}", "\x00"])
def test_a_config_that_is_not_json_is_refused(refused, text):
    assert "config.json: not valid JSON: " in refused(text)


def test_a_config_that_is_no_json_object_is_refused(refused):
    assert refused("[1, 2]").endswith("config.json: holds a list; it should be a JSON object")
    assert refused("7").endswith("config.json: holds a int; it should be a JSON object")


def test_a_config_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        read_config(tmp_path)
