"""Small checkpoints as Hugging Face lays them out, with names written out here, and what they should become."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

BF16 = np.dtype(ml_dtypes.bfloat16)

COMMON = {
    "vocab_size": 11,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
MIXTRAL = COMMON | {
    "model_type": "mixtral",
    "head_dim": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 7,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}
OLMOE = COMMON | {
    "model_type": "olmoe",
    "num_key_value_heads": 4,
    "intermediate_size": 7,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": True,
}
DEEPSEEK_V2 = COMMON | {
    "model_type": "deepseek_v2",
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "kv_lora_rank": 6,
    "q_lora_rank": 9,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 10,
    "moe_intermediate_size": 7,
    "n_routed_experts": 3,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
}
DEEPSEEK_V3 = DEEPSEEK_V2 | {
    "model_type": "deepseek_v3",
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_nextn_predict_layers": 1,
}
GLM4_MOE = COMMON | {
    "model_type": "glm4_moe",
    "attention_bias": True,
    "use_qk_norm": True,
    "num_key_value_heads": 2,
    "first_k_dense_replace": 1,
    "intermediate_size": 10,
    "moe_intermediate_size": 7,
    "n_routed_experts": 3,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
}
DOTS1 = COMMON | {
    "model_type": "dots1",
    "num_key_value_heads": 2,
    "first_k_dense_replace": 1,
    "intermediate_size": 10,
    "moe_intermediate_size": 7,
    "n_routed_experts": 3,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
}
GPT_OSS = COMMON | {
    "model_type": "gpt_oss",
    "head_dim": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 7,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}
QWEN2_MOE = COMMON | {
    "model_type": "qwen2_moe",
    "num_key_value_heads": 2,
    "decoder_sparse_step": 2,
    "intermediate_size": 10,
    "moe_intermediate_size": 7,
    "shared_expert_intermediate_size": 9,
    "num_experts": 3,
    "num_experts_per_tok": 2,
}
QWEN3_MOE = COMMON | {
    "model_type": "qwen3_moe",
    "head_dim": 6,
    "num_key_value_heads": 2,
    "mlp_only_layers": [0],
    "intermediate_size": 10,
    "moe_intermediate_size": 7,
    "num_experts": 3,
    "num_experts_per_tok": 2,
}
CONFIGS = {
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v2_lite": DEEPSEEK_V2 | {"q_lora_rank": None},
    "deepseek_v3": DEEPSEEK_V3,
    "dots1": DOTS1,
    "glm4_moe": GLM4_MOE,
    "gpt_oss": GPT_OSS,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
}


def tensors_and_expected(
    config: dict[str, Any], dtype: np.dtype = BF16
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Random tensors by Hugging Face's names, and the arrays of ours that they should become."""
    rng = np.random.default_rng(0)
    hf: dict[str, np.ndarray] = {}
    ours: dict[str, np.ndarray] = {}

    def new(name: str, *shape: int) -> np.ndarray:
        hf[name] = rng.standard_normal(shape, dtype=np.float32).astype(dtype)
        return hf[name]

    def mlp(name: str, prefix: str, size: int, names=("gate_proj", "up_proj", "down_proj")) -> None:
        gate, up = (new(f"{prefix}.{n}.weight", size, hidden) for n in names[:2])
        ours[f"{name}.w_gate_up"] = np.stack([gate, up])
        ours[f"{name}.w_down"] = new(f"{prefix}.{names[2]}.weight", hidden, size)

    hidden, heads, family = config["hidden_size"], config["num_attention_heads"], config["model_type"]
    is_deepseek = family in ("deepseek_v2", "deepseek_v3")
    ours["embed.table"] = new("model.embed_tokens.weight", config["vocab_size"], hidden)
    ours["norm.scale"] = new("model.norm.weight", hidden)
    if not config["tie_word_embeddings"]:
        ours["head.weight"] = new("lm_head.weight", config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer, attention, to = f"model.layers.{i}", f"model.layers.{i}.self_attn", f"layers.{i}"
        ours[f"{to}.attention_norm.scale"] = new(f"{layer}.input_layernorm.weight", hidden)
        ours[f"{to}.mlp_norm.scale"] = new(f"{layer}.post_attention_layernorm.weight", hidden)

        def per_head(ours_name: str, name: str, count: int, size: int, inputs: int, attention=attention, to=to) -> None:
            weight = new(f"{attention}.{name}.weight", count * size, inputs)
            ours[f"{to}.attention.{ours_name}"] = weight.reshape(count, size, inputs)

        if is_deepseek:
            nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
            latent, q_rank = config["kv_lora_rank"], config["q_lora_rank"]
            if q_rank is None:
                per_head("q", "q_proj", heads, nope + rope, hidden)
            else:
                ours[f"{to}.attention.q_a"] = new(f"{attention}.q_a_proj.weight", q_rank, hidden)
                ours[f"{to}.attention.q_a_norm.scale"] = new(f"{attention}.q_a_layernorm.weight", q_rank)
                per_head("q_b", "q_b_proj", heads, nope + rope, q_rank)
            ours[f"{to}.attention.kv_a"] = new(f"{attention}.kv_a_proj_with_mqa.weight", latent + rope, hidden)
            ours[f"{to}.attention.kv_a_norm.scale"] = new(f"{attention}.kv_a_layernorm.weight", latent)
            per_head("kv_b", "kv_b_proj", heads, nope + value, latent)
            head_dim = value
        else:
            head_dim, kv_heads = config.get("head_dim", hidden // heads), config["num_key_value_heads"]
            per_head("q", "q_proj", heads, head_dim, hidden)
            per_head("k", "k_proj", kv_heads, head_dim, hidden)
            per_head("v", "v_proj", kv_heads, head_dim, hidden)
            if family == "olmoe":
                ours[f"{to}.attention.q_norm.scale"] = new(f"{attention}.q_norm.weight", heads * head_dim)
                ours[f"{to}.attention.k_norm.scale"] = new(f"{attention}.k_norm.weight", kv_heads * head_dim)
            if family in ("qwen2_moe", "glm4_moe", "gpt_oss"):
                for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
                    bias = new(f"{attention}.{name}_proj.bias", count * head_dim)
                    ours[f"{to}.attention.{name}_bias"] = bias.reshape(count, head_dim)
            if family in ("qwen3_moe", "glm4_moe", "dots1"):
                ours[f"{to}.attention.q_norm.scale"] = new(f"{attention}.q_norm.weight", head_dim)
                ours[f"{to}.attention.k_norm.scale"] = new(f"{attention}.k_norm.weight", head_dim)
        output = new(f"{attention}.o_proj.weight", hidden, heads * head_dim)
        ours[f"{to}.attention.o"] = output.reshape(hidden, heads, head_dim)
        if family == "gpt_oss":
            ours[f"{to}.attention.o_bias"] = new(f"{attention}.o_proj.bias", hidden)
            ours[f"{to}.attention.sinks"] = new(f"{attention}.sinks", heads)
            experts, size, mlp_name = config["num_local_experts"], config["intermediate_size"], f"{layer}.mlp"
            ours[f"{to}.moe.router.weight"] = new(f"{mlp_name}.router.weight", experts, hidden)
            ours[f"{to}.moe.router.bias"] = new(f"{mlp_name}.router.bias", experts)
            both = new(f"{mlp_name}.experts.gate_up_proj", experts, hidden, 2 * size)
            ours[f"{to}.moe.w_gate_up"] = np.stack([both[:, :, half::2].swapaxes(1, 2) for half in (0, 1)], axis=1)
            both = new(f"{mlp_name}.experts.gate_up_proj_bias", experts, 2 * size)
            ours[f"{to}.moe.gate_up_bias"] = np.stack([both[:, 0::2], both[:, 1::2]], axis=1)
            ours[f"{to}.moe.w_down"] = new(f"{mlp_name}.experts.down_proj", experts, size, hidden).swapaxes(1, 2)
            ours[f"{to}.moe.down_bias"] = new(f"{mlp_name}.experts.down_proj_bias", experts, hidden)
            continue

        is_sparse = i >= config.get("first_k_dense_replace", 0) and (i + 1) % config.get("decoder_sparse_step", 1) == 0
        if not is_sparse or i in config.get("mlp_only_layers", ()):
            mlp(f"{to}.mlp", f"{layer}.mlp", config["intermediate_size"])
            continue
        moe = f"{layer}.block_sparse_moe" if family == "mixtral" else f"{layer}.mlp"
        names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        size = config.get("moe_intermediate_size", config["intermediate_size"])
        experts = next(config[key] for key in ("num_local_experts", "num_experts", "n_routed_experts") if key in config)
        ours[f"{to}.moe.router.weight"] = new(f"{moe}.gate.weight", experts, hidden)
        for e in range(experts):
            mlp(f"expert.{e}", f"{moe}.experts.{e}", size, names)
        for name in ("w_gate_up", "w_down"):
            ours[f"{to}.moe.{name}"] = np.stack([ours.pop(f"expert.{e}.{name}") for e in range(experts)])
        if family in ("deepseek_v3", "glm4_moe", "dots1"):
            bias = rng.standard_normal(experts, dtype=np.float32)  # float32, whatever the dtype of the rest
            hf[f"{moe}.gate.e_score_correction_bias"] = ours[f"{to}.moe.router.correction_bias"] = bias
        if is_deepseek or family in ("glm4_moe", "dots1"):
            mlp(f"{to}.moe.shared", f"{moe}.shared_experts", size * config["n_shared_experts"])
        if family == "qwen2_moe":
            mlp(f"{to}.moe.shared", f"{moe}.shared_expert", config["shared_expert_intermediate_size"])
            ours[f"{to}.moe.shared.output_gate"] = new(f"{moe}.shared_expert_gate.weight", 1, hidden)
    return hf, ours


def write(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    """Writes a checkpoint of one file, or of several with an index, and some of the files that lie beside it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "generation_config.json").write_text("{}")
    (folder / "modeling_custom.py").write_text("raise SystemExit('remote code ran')")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_index(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
