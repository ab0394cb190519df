"""Small float8 checkpoints in the layouts that the hub has, and what their weights stand for."""

import copy
import itertools
import re
from typing import Any

import ml_dtypes
import numpy as np
from hf_checkpoint import DEEPSEEK_V3, MIXTRAL, QWEN3_MOE, tensors_and_expected

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)

_SIZES = {"hidden_size": 192, "num_attention_heads": 8, "vocab_size": 61}
SMALL_MIXTRAL = MIXTRAL | _SIZES | {
    "head_dim": 24, "num_key_value_heads": 4, "intermediate_size": 256, "num_local_experts": 8,
    "num_experts_per_tok": 4,
}  # fmt: skip
SMALL_QWEN3 = QWEN3_MOE | _SIZES | {
    "head_dim": 24, "num_key_value_heads": 4, "intermediate_size": 320, "moe_intermediate_size": 256, "num_experts": 8,
}  # fmt: skip
SMALL_DEEPSEEK = DEEPSEEK_V3 | _SIZES | {
    "kv_lora_rank": 40, "q_lora_rank": 136, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 20,
    "intermediate_size": 330, "moe_intermediate_size": 256, "n_routed_experts": 8, "n_shared_experts": 1,
    "num_nextn_predict_layers": 0,
}  # fmt: skip


def _group(weights: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    of_all = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": of_all | {"dynamic": False} | weights,
        "input_activations": of_all | inputs,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head", "re:.*gate$"],
        "config_groups": {"group_0": group},
    }


# By name: the model, its quantization_config, the granularity of weights, the ends of the scales' names, our format.
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], str, tuple[str, ...], str]] = {
    "deepseek_blocks": (
        SMALL_DEEPSEEK,
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        "block", (".weight_scale_inv",), "fp8-block",
    ),
    "static_tensors": (
        SMALL_MIXTRAL,
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        "tensor", (".weight_scale", ".input_scale"), "fp8-tensor-static",
    ),
    "dynamic_tensors": (
        SMALL_MIXTRAL, {"quant_method": "fp8", "activation_scheme": "dynamic"},
        "tensor", (".weight_scale",), "fp8-tensor",
    ),
    "compressed_channels": (
        SMALL_QWEN3, _group({"strategy": "channel"}, {"strategy": "token", "dynamic": True}),
        "channel", (".weight_scale",), "fp8-channel",
    ),
    "compressed_static": (
        SMALL_MIXTRAL, _group({"strategy": "tensor"}, {"strategy": "tensor", "dynamic": False}),
        "tensor", (".weight_scale", ".input_scale"), "fp8-tensor-static",
    ),
    "compressed_blocks": (
        SMALL_MIXTRAL,
        _group(
            {"strategy": "block", "block_structure": [128, 128]},
            {"strategy": "group", "group_size": 128, "dynamic": True},
        ),
        "block", (".weight_scale",), "fp8-block",
    ),
}  # fmt: skip

LINEAR = re.compile(r"model\.layers\.\d+\..*(_proj|_proj_with_mqa|\.w[123])\.weight")


def tensors_of(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Tensors as `tensors_and_expected` has them, of such sizes that the model is a quiet one and its router decides sharply."""
    tensors, _ = tensors_and_expected(config)
    quiet = {}
    for name, tensor in tensors.items():
        wide = tensor.astype(np.float32)
        if "norm" in name:
            wide = 1 + wide / 10
        elif wide.ndim == 2 and "embed" not in name:
            wide = wide / np.sqrt(wide.shape[-1]) * (3 if name.endswith("gate.weight") else 1)
        quiet[name] = wide.astype(tensor.dtype)
    return quiet


def quantize(w: np.ndarray, granularity: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, scales in the file's shape, and what they stand for: a tile at a time."""
    n, k = w.shape
    height, width = {"tensor": (n, k), "channel": (1, k), "block": (128, 128)}[granularity]
    scales = np.zeros((-(-n // height), -(-k // width)), np.float32)
    values, stand_for = np.zeros(w.shape, FP8), np.zeros(w.shape, np.float32)
    for i, j in itertools.product(range(scales.shape[0]), range(scales.shape[1])):
        tile = np.s_[i * height : (i + 1) * height, j * width : (j + 1) * width]
        scales[i, j] = np.abs(w[tile].astype(np.float32)).max() / 448
        values[tile] = np.clip(w[tile].astype(np.float32) / scales[i, j], -448, 448).astype(FP8)
        stand_for[tile] = values[tile].astype(np.float32) * scales[i, j]
    return values, scales.reshape(()) if granularity == "tensor" else scales, stand_for


def in_fp8(layout: str) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """config.json, the tensors of the float8 checkpoint, and those of the float32 one that it stands for."""
    config, quantization, granularity, suffixes, _ = LAYOUTS[layout]
    tensors, stand_for = {}, {}
    for name, tensor in tensors_of(config).items():
        if not LINEAR.fullmatch(name):
            tensors[name], stand_for[name] = tensor, tensor.astype(np.float32)
            continue
        base = name.removesuffix(".weight")
        tensors[name], scales, stand_for[name] = quantize(tensor, granularity)
        tensors[base + suffixes[0]] = scales
        if len(suffixes) > 1:
            largest = 10 if re.search(r"down_proj|w2", base) else 6
            tensors[base + suffixes[1]] = np.full((1,), largest / 448 * (1 + len(base) % 3 / 10), np.float32)
    return config | {"quantization_config": copy.deepcopy(quantization)}, tensors, stand_for
