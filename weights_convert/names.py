"""What each of our parameters is made from: a table of Hugging Face's tensor names for every family."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jax_epmoe.config import ModelConfig


@dataclass(frozen=True)
class Source:
    """The tensors that make one parameter. `{i}` in a name is the layer; `{e}` stacks the experts on a new first axis.

    Two names are a gate and an up projection, stacked in this order on a new axis (after the experts').
    `heads` is the first of the two axes of ours, heads and head_dim, that the tensor holds as one.
    """

    names: tuple[str, ...]
    heads: int | None = None


@dataclass(frozen=True)
class Piece:
    """Where one tensor goes: `parameter[index]`, and the shape that it has in the file, or the other that it may have.

    `kind`: "weight", or the part of a quantised parameter that it is: "values", "scales", "input_scales".
    """

    parameter: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    kind: str = "weight"
    other_shape: tuple[int, ...] | None = None


LAYER = "model.layers.{i}."


def _one(name: str, heads: int | None = None) -> Source:
    return Source((name,), heads)


def _mlp(
    ours: str, prefix: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> dict[str, Source]:
    return {
        f"{ours}.w_gate_up": Source((f"{prefix}.{gate}.weight", f"{prefix}.{up}.weight")),
        f"{ours}.w_down": _one(f"{prefix}.{down}.weight"),
    }


_MODEL = {
    "embed.table": _one("model.embed_tokens.weight"),
    "head.weight": _one("lm_head.weight"),
    "norm.scale": _one("model.norm.weight"),
    "layers.{i}.attention_norm.scale": _one(LAYER + "input_layernorm.weight"),
    "layers.{i}.mlp_norm.scale": _one(LAYER + "post_attention_layernorm.weight"),
    "layers.{i}.attention.q": _one(LAYER + "self_attn.q_proj.weight", heads=0),
    "layers.{i}.attention.o": _one(LAYER + "self_attn.o_proj.weight", heads=1),
}
_GQA = {
    "layers.{i}.attention.k": _one(LAYER + "self_attn.k_proj.weight", heads=0),
    "layers.{i}.attention.v": _one(LAYER + "self_attn.v_proj.weight", heads=0),
}
_QK_NORM = {
    "layers.{i}.attention.q_norm.scale": _one(LAYER + "self_attn.q_norm.weight"),
    "layers.{i}.attention.k_norm.scale": _one(LAYER + "self_attn.k_norm.weight"),
}
_QKV_BIAS = {
    "layers.{i}.attention.q_bias": _one(LAYER + "self_attn.q_proj.bias", heads=0),
    "layers.{i}.attention.k_bias": _one(LAYER + "self_attn.k_proj.bias", heads=0),
    "layers.{i}.attention.v_bias": _one(LAYER + "self_attn.v_proj.bias", heads=0),
}
_MLA = {
    "layers.{i}.attention.q_a": _one(LAYER + "self_attn.q_a_proj.weight"),
    "layers.{i}.attention.q_a_norm.scale": _one(LAYER + "self_attn.q_a_layernorm.weight"),
    "layers.{i}.attention.q_b": _one(LAYER + "self_attn.q_b_proj.weight", heads=0),
    "layers.{i}.attention.kv_a": _one(LAYER + "self_attn.kv_a_proj_with_mqa.weight"),
    "layers.{i}.attention.kv_a_norm.scale": _one(LAYER + "self_attn.kv_a_layernorm.weight"),
    "layers.{i}.attention.kv_b": _one(LAYER + "self_attn.kv_b_proj.weight", heads=0),
}
_MOE = {
    "layers.{i}.moe.router.weight": _one(LAYER + "mlp.gate.weight"),
    **_mlp("layers.{i}.moe", LAYER + "mlp.experts.{e}"),
}
_CORRECTION_BIAS = {"layers.{i}.moe.router.correction_bias": _one(LAYER + "mlp.gate.e_score_correction_bias")}
_SHARED = _mlp("layers.{i}.moe.shared", LAYER + "mlp.shared_experts")
_DENSE = _mlp("layers.{i}.mlp", LAYER + "mlp")

FAMILIES: dict[str, dict[str, Source]] = {
    "mixtral": {
        **_MODEL,
        **_GQA,
        "layers.{i}.moe.router.weight": _one(LAYER + "block_sparse_moe.gate.weight"),
        **_mlp("layers.{i}.moe", LAYER + "block_sparse_moe.experts.{e}", gate="w1", up="w3", down="w2"),
    },
    "olmoe": {**_MODEL, **_GQA, **_QK_NORM, **_MOE},
    "deepseek_v2": {
        **_MODEL,
        **_MLA,
        **_MOE,
        **_SHARED,
        **_DENSE,
    },
    "deepseek_v3": {
        **_MODEL,
        **_MLA,
        **_MOE,
        **_CORRECTION_BIAS,
        **_SHARED,
        **_DENSE,
    },
    "glm4_moe": {
        **_MODEL,
        **_GQA,
        **_QKV_BIAS,
        **_QK_NORM,
        **_MOE,
        **_CORRECTION_BIAS,
        **_SHARED,
        **_DENSE,
    },
    "qwen2_moe": {
        **_MODEL,
        **_GQA,
        **_QKV_BIAS,
        **_MOE,
        **_DENSE,
        **_mlp("layers.{i}.moe.shared", LAYER + "mlp.shared_expert"),
        "layers.{i}.moe.shared.output_gate": _one(LAYER + "mlp.shared_expert_gate.weight"),
    },
    "qwen3_moe": {**_MODEL, **_GQA, **_QK_NORM, **_MOE, **_DENSE},
}

# What old checkpoints carry although it is computed, not learnt; scales for a float8 cache, which this project does not have.
IGNORED = (
    re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
    re.compile(r"model\.layers\.\d+\.self_attn\.(kv_scale|([kv]_proj\.)?[kv]_scale|[kv]_proj\.output_scale)"),
)

TIED_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

_THEIR_LAYER_NUMBER = re.compile(r"^model\.layers\.(\d+)\.")
_LAYER_NUMBER = re.compile(r"^layers\.(\d+)\.")


def mtp_tensors(names: Iterable[str], config: ModelConfig) -> set[str]:
    """Which tensors belong to the layers for multi-token prediction, which follow the model's own."""
    layers = range(config.num_layers, config.num_layers + config.num_mtp_layers)
    found = ((name, _THEIR_LAYER_NUMBER.match(name)) for name in names)
    return {name for name, number in found if number and int(number[1]) in layers}


def pieces(
    family: str, shapes: Mapping[str, Sequence[int]], suffixes: Mapping[str, str] | None = None
) -> dict[str, Piece]:
    """By Hugging Face's name, every tensor that a model of `family` with parameters of these `shapes` is made from.

    `suffixes`: what "scales" and "input_scales" of a quantised weight have at the end of their names, for `.weight`.
    """
    found = {}
    for parameter, shape in shapes.items():
        base, kind = split_name(parameter)
        source, layer = _source(family, base)
        has_experts, is_pair = "{e}" in source.names[0], len(source.names) == 2
        stored = tuple(shape[has_experts + is_pair :])
        if source.heads is not None and kind == "weight":
            axis = source.heads
            stored = (*stored[:axis], stored[axis] * stored[axis + 1], *stored[axis + 2 :])
        # Scales of channels are columns in some files, and a lone scale may have a dimension.
        other = (*stored, 1) if kind in ("scales", "input_scales") and len(stored) < 2 else None
        for expert in range(shape[0]) if has_experts else (None,):
            for half, name in enumerate(source.names):
                index = (*((expert,) if expert is not None else ()), *((half,) if is_pair else ()))
                full = name.format(i=layer, e=expert)
                if suffixes is not None and kind in suffixes:
                    full = full.removesuffix(".weight") + suffixes[kind]
                found[full] = Piece(parameter, index, stored, kind, other)
    return found


def split_name(parameter: str) -> tuple[str, str]:
    """A parameter's name without its last part, where it is a part of a quantised one, and which part; or with "weight"."""
    base, _, kind = parameter.rpartition(".")
    return (base, kind) if kind in ("values", "scales", "input_scales") else (parameter, "weight")


def first_tensor(family: str, parameter: str) -> str:
    """By Hugging Face's name, the first of the tensors that a parameter is made from."""
    source, layer = _source(family, parameter)
    return source.names[0].format(i=layer, e=0)


def _source(family: str, parameter: str) -> tuple[Source, str | None]:
    """Where a parameter comes from, and the number of its layer."""
    number = _LAYER_NUMBER.match(parameter)
    source = FAMILIES[family].get(_LAYER_NUMBER.sub("layers.{i}.", parameter))
    if source is None:
        raise ValueError(f"parameter {parameter} is not in the table of tensor names for {family}")
    return source, number[1] if number else None
