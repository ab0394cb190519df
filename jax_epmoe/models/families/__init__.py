"""Model families: a small file each, which reads Hugging Face's `config.json` and says what differs.

To add one: write `families/NAME.py` with `config(hf) -> ModelConfig`, list it here, and give `weights_convert/names.py`
its tensor names.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax_epmoe.config import ModelConfig
from jax_epmoe.models.families import (
    deepseek_v2,
    deepseek_v3,
    dots1,
    glm4_moe,
    gpt_oss,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
)
from jax_epmoe.models.families.hf import HFConfig

FAMILIES: dict[str, Callable[[HFConfig], ModelConfig]] = {
    "mixtral": mixtral.config,
    "olmoe": olmoe.config,
    "deepseek_v2": deepseek_v2.config,
    "deepseek_v3": deepseek_v3.config,
    "dots1": dots1.config,
    "glm4_moe": glm4_moe.config,
    "gpt_oss": gpt_oss.config,
    "qwen2_moe": qwen2_moe.config,
    "qwen3_moe": qwen3_moe.config,
}


def family_of(hf: dict[str, Any]) -> str:
    """The name in `FAMILIES` of a config.json's model.

    Raises:
      ValueError: `model_type` is missing or unknown.
    """
    family = hf.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"config.json: model_type is {family!r}; it should be one of {', '.join(FAMILIES)}")
    return family


def read_config(folder: str | Path) -> ModelConfig:
    """The `ModelConfig` of a model folder, from its `config.json`.

    Raises:
      ValueError: no such file, not JSON, an unknown family, or a key that is missing, of a wrong type or not supported.
    """
    path = Path(folder) / "config.json"
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"model folder {str(folder)!r}: cannot read config.json: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(hf, dict):
        raise ValueError(f"{path}: holds a {type(hf).__name__}; it should be a JSON object")
    family = family_of(hf)
    return FAMILIES[family](HFConfig(hf))
