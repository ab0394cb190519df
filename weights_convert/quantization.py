"""Quantised checkpoints: what config.json's `quantization_config` says, and how a bf16 one is quantised."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_epmoe.models.families.hf import HFConfig
from jax_epmoe.quant import BLOCK, FORMATS, Granularity, quantize, scales_of

# Formats that need nothing but the weights.
FROM_WEIGHTS = tuple(name for name, format in FORMATS.items() if not format.static)

_WHERE = "config.json: quantization_config"


@dataclass(frozen=True)
class Stored:
    """How a Hugging Face checkpoint is quantised: a name in `FORMATS`, and the ends of its scales' names."""

    format: str
    suffixes: Mapping[str, str]


def read_quantization(hf: Mapping[str, Any]) -> Stored | None:
    """The quantisation that a config.json tells, or None; None too for MXFP4, which is not kept but decoded.

    Raises:
      ValueError: one that is not among those below, with the key that says so.
    """
    if hf.get("quantization_config") is None:
        return None
    values = _object(hf, "quantization_config", "config.json")
    method = HFConfig(values, _WHERE).choice("quant_method", ("fp8", "compressed-tensors", "mxfp4"))
    if method == "mxfp4":
        return None
    return _fp8(HFConfig(values, _WHERE)) if method == "fp8" else _compressed_tensors(values)


def is_mxfp4(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json says that experts are in MXFP4."""
    values = hf.get("quantization_config")
    return isinstance(values, dict) and values.get("quant_method") == "mxfp4"


def _fp8(config: HFConfig) -> Stored:
    """DeepSeek-V3's blocks and its kin's; AutoFP8's and vLLM's scale a tensor."""
    config.must_be("fmt", "e4m3")
    scheme = config.choice("activation_scheme", ("dynamic", "static"))
    if not config.has("weight_block_size"):
        return _stored("fp8-tensor" if scheme == "dynamic" else "fp8-tensor-static")
    config.must_be("weight_block_size", [BLOCK, BLOCK])
    config.must_be("activation_scheme", "dynamic")
    return _stored("fp8-block", ".weight_scale_inv")


def _compressed_tensors(values: Mapping[str, Any]) -> Stored:
    """llm-compressor's FP8, FP8_DYNAMIC and FP8_BLOCK."""
    groups = _object(values, "config_groups", _WHERE)
    if len(groups) != 1:
        raise ValueError(f"{_WHERE}: config_groups has {len(groups)} groups; only one is supported")
    where = f"{_WHERE}: config_groups.{next(iter(groups))}"
    group = _object(groups, next(iter(groups)), f"{_WHERE}: config_groups")
    weights, inputs = (
        HFConfig(_object(group, key, where), f"{where}.{key}") for key in ("weights", "input_activations")
    )
    for part in (weights, inputs):
        part.must_be("type", "float")
        part.must_be("num_bits", 8)
        part.must_be("symmetric", True)
    weights.must_be("dynamic", False)
    of_weights = weights.choice("strategy", ("tensor", "channel", "block"))
    if of_weights == "block":
        weights.must_be("block_structure", [BLOCK, BLOCK])
        inputs.must_be("group_size", BLOCK)
    inputs.choice("strategy", ({"tensor": "tensor", "channel": "token", "block": "group"}[of_weights],))
    is_dynamic = inputs.boolean("dynamic", False)
    if of_weights != "tensor":
        inputs.must_be("dynamic", True)
    return _stored({"channel": "fp8-channel", "block": "fp8-block"}.get(of_weights) or _of_tensor(is_dynamic))


def _of_tensor(is_dynamic: bool) -> str:
    return "fp8-tensor" if is_dynamic else "fp8-tensor-static"


def _stored(format: str, scales: str = ".weight_scale") -> Stored:
    return Stored(format, {"scales": scales, "input_scales": ".input_scale"})


def _object(holder: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = holder.get(key)
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {key} is {value!r}; it should be a JSON object")
    return value


@partial(jax.jit, static_argnums=1)
def _scales_and_whether_finite(x: jax.Array, granularity: Granularity) -> tuple[jax.Array, jax.Array]:
    return scales_of(x, granularity), jnp.all(jnp.isfinite(x))


_quantize = jax.jit(quantize, static_argnums=1)


def _on_cpu() -> Any:
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def scales_from(name: str, tensor: np.ndarray, granularity: Granularity) -> np.ndarray:
    """The float32 scales of a tensor of weights, by its largest absolute values."""
    with _on_cpu():
        scales, is_finite = _scales_and_whether_finite(tensor, granularity)
    if not is_finite:
        raise ValueError(f"tensor {name} has values that are not finite; it cannot be quantised")
    return np.asarray(scales)


def values_from(name: str, tensor: np.ndarray, granularity: Granularity) -> np.ndarray:
    """The float8 values that go with `scales_from`."""
    with _on_cpu():
        return np.asarray(_quantize(tensor, granularity).values)


def check_values(name: str, values: np.ndarray) -> np.ndarray:
    """A file's float8 values, if all are numbers."""
    if ((values.view(np.uint8) & 0x7F) == 0x7F).any():
        raise ValueError(f"tensor {name} has values that are NaN; it should have numbers only")
    return values


def check_scales(name: str, scales: np.ndarray) -> np.ndarray:
    """A file's scales, if all are positive."""
    as_float32 = scales.astype(np.float32)
    if not (np.isfinite(as_float32) & (as_float32 > 0)).all():
        raise ValueError(f"tensor {name} has scales that are not positive numbers; they should be")
    return as_float32
