"""What each of our parameters is made from: a table of Hugging Face's tensor names for every family."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jax_epmoe.config import ModelConfig
from weights_convert.expert_stacks import BLOCK_BYTES, GROUP


@dataclass(frozen=True)
class Source:
    """The tensors that make one parameter. `{i}` in a name is the layer; `{e}` stacks the experts on a new first axis.

    Two names are a gate and an up projection, stacked in this order on a new axis (after the experts').
    `heads` is the first of the two axes of ours, heads and head_dim, that the tensor holds as one.
    `axes`: of a tensor that holds all experts, the axes of ours that each of its own is: (2, 1) are two in one, the last runs fastest.
    `mxfp4`: the same where it is in MXFP4, in two tensors whose names end in `_blocks` and `_scales`.
    """

    names: tuple[str, ...]
    heads: int | None = None
    axes: tuple[tuple[int, ...], ...] | None = None
    mxfp4: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class Piece:
    """Where one tensor goes: `parameter[index]`, and the shape that it has in the file, or the other that it may have.

    `kind`: "weight", or the part of a quantised parameter that it is: "values", "scales", "input_scales"; of one in MXFP4, "blocks"
    and "block_scales". `axes` as `Source` has them.
    """

    parameter: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    kind: str = "weight"
    other_shape: tuple[int, ...] | None = None
    axes: tuple[tuple[int, ...], ...] | None = None


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
_O_BIAS = {"layers.{i}.attention.o_bias": _one(LAYER + "self_attn.o_proj.bias")}
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
    "dots1": {
        **_MODEL,
        **_GQA,
        **_QKV_BIAS,
        **_O_BIAS,
        **_QK_NORM,
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
    "gpt_oss": {
        **_MODEL,
        **_GQA,
        **_QKV_BIAS,
        **_O_BIAS,
        "layers.{i}.attention.sinks": _one(LAYER + "self_attn.sinks"),
        "layers.{i}.moe.router.weight": _one(LAYER + "mlp.router.weight"),
        "layers.{i}.moe.router.bias": _one(LAYER + "mlp.router.bias"),
        # Gate and up take turns: of ours, [E, 2, I, H], the file has [E, H, (I, 2)], in MXFP4 [E, (I, 2), H].
        "layers.{i}.moe.w_gate_up": Source(
            (LAYER + "mlp.experts.gate_up_proj",), axes=((0,), (3,), (2, 1)), mxfp4=((0,), (2, 1), (3,))
        ),
        "layers.{i}.moe.w_down": Source(
            (LAYER + "mlp.experts.down_proj",), axes=((0,), (2,), (1,)), mxfp4=((0,), (1,), (2,))
        ),
        "layers.{i}.moe.gate_up_bias": Source((LAYER + "mlp.experts.gate_up_proj_bias",), axes=((0,), (2, 1))),
        "layers.{i}.moe.down_bias": _one(LAYER + "mlp.experts.down_proj_bias"),
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
    family: str,
    shapes: Mapping[str, Sequence[int]],
    suffixes: Mapping[str, str] | None = None,
    is_mxfp4: bool = False,
) -> dict[str, Piece]:
    """By Hugging Face's name, every tensor that a model of `family` with parameters of these `shapes` is made from.

    `suffixes`: what "scales" and "input_scales" of a quantised weight have at the end of their names, for `.weight`.
    `is_mxfp4`: what can be in MXFP4 is.
    """
    found: dict[str, Piece] = {}
    for parameter, shape in shapes.items():
        base, kind = split_name(parameter)
        source, layer = _source(family, base)
        if source.axes is not None:
            if kind != "weight":
                raise ValueError(
                    f"tensor {first_tensor(family, base)} is float8; a {family} should have it in mxfp4 or wider"
                )
            found |= _stack(parameter, source, shape, source.names[0].format(i=layer), is_mxfp4)
            continue
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


def _stack(parameter: str, source: Source, shape: Sequence[int], name: str, is_mxfp4: bool) -> dict[str, Piece]:
    """`pieces` of a parameter whose tensor holds all experts."""

    def stored(axes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
        return tuple(math.prod(shape[axis] for axis in merged) for merged in axes)

    if source.mxfp4 is None or not is_mxfp4:
        assert source.axes is not None
        return {name: Piece(parameter, (), stored(source.axes), axes=source.axes)}
    *rows, numbers = stored(source.mxfp4)
    if numbers % GROUP:
        raise ValueError(f"{parameter} has rows of {numbers}; {GROUP} should divide that, as config.json says mxfp4")
    groups = (*rows, numbers // GROUP)
    return {
        f"{name}_blocks": Piece(parameter, (), (*groups, BLOCK_BYTES), "blocks", axes=source.mxfp4),
        f"{name}_scales": Piece(parameter, (), groups, "block_scales", axes=source.mxfp4),
    }


def has_mxfp4(family: str) -> bool:
    """Whether a family's checkpoints may hold MXFP4."""
    return any(source.mxfp4 is not None for source in FAMILIES[family].values())


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
