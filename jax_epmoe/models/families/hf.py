"""Reading Hugging Face's `config.json` as the hub's files really are: keys come and go, and each is checked when read."""

import math
from typing import Any

from jax_epmoe.config import RopeConfig

_REQUIRED = object()


class HFConfig:
    """A config.json's keys, with one clear line for what is missing, mistyped or not supported."""

    def __init__(self, values: dict[str, Any], where: str = "config.json"):
        self._values = values
        self._where = where

    def integer(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._typed(key, default, "an integer", _is_integer)

    def size(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._typed(key, default, "a positive integer", lambda v: _is_integer(v) and v > 0)

    def count(self, key: str, default: Any = _REQUIRED) -> int:
        return self._typed(key, default, "0 or a positive integer", lambda v: _is_integer(v) and v >= 0)

    def size_of(self, key: str, other: str) -> int:
        """A size that files have under either of two keys (transformers 5 renames some when it writes a config.json)."""
        size, again = self.size(key, None), self.size(other, None)
        if size is None and again is None:
            return self.size(key)
        if None not in (size, again) and size != again:
            raise ValueError(f"{self._where}: {other} is {again!r}; it should be {key}'s {size!r}")
        return size or again

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._typed(
            key, default, "a finite number",
            lambda v: _is_number(v) and math.isfinite(v),
        )  # fmt: skip
        return None if value is None else float(value)

    def boolean(self, key: str, default: Any = _REQUIRED) -> bool:
        return self._typed(key, default, "true or false", lambda v: isinstance(v, bool))

    def choice(self, key: str, choices: tuple[str, ...], default: Any = _REQUIRED) -> str:
        return self._typed(key, default, f"one of {', '.join(choices)}", lambda v: v in choices)

    def tokens(self, key: str) -> tuple[int, ...]:
        """A token id, a list of them, or null, as a tuple."""
        value = self._values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(map(_is_integer, ids)):
            raise ValueError(f"{self._where}: {key} is {value!r}; it should be a token id or a list of them")
        return tuple(ids)

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def must_be(self, key: str, supported: Any) -> None:
        """Refuses a value whose meaning is not implemented."""
        value = self._values.get(key, supported)
        if value != supported:
            raise ValueError(f"{self._where}: {key} is {value!r}; only {supported!r} is supported")

    def must_not_slide(self) -> None:
        """Refuses sliding windows in a family whose files turn them on by `use_sliding_window` or `layer_types`."""
        self.must_be("use_sliding_window", False)
        self._typed(
            "layer_types", None, "full_attention in every layer",
            lambda v: isinstance(v, list) and all(kind == "full_attention" for kind in v),
        )  # fmt: skip

    def sliding_layers(self, default: tuple[bool, ...]) -> tuple[bool, ...]:
        """Which layers have a sliding window, by `layer_types`."""
        num_layers, kinds = len(default), ("sliding_attention", "full_attention")
        layers = self._typed(
            "layer_types", [kinds[not slides] for slides in default],
            f"a list of {num_layers}, as there are layers, each one of {', '.join(kinds)}",
            lambda v: isinstance(v, list) and len(v) == num_layers and all(kind in kinds for kind in v),
        )  # fmt: skip
        return tuple(kind == kinds[0] for kind in layers)

    def common(self) -> dict[str, Any]:
        """The fields of `ModelConfig` whose keys and meanings are every family's."""
        return {
            "vocab_size": self.size("vocab_size"),
            "hidden_size": self.size("hidden_size"),
            "tie_word_embeddings": self.boolean("tie_word_embeddings", False),
            "max_position_embeddings": self.size("max_position_embeddings"),
            "bos_token_id": self.integer("bos_token_id", None),
            "eos_token_ids": self.tokens("eos_token_id"),
        }

    def sparse_layers(self) -> tuple[bool, ...]:
        """Which layers hold experts by Qwen's keys: every `decoder_sparse_step`-th, save those in `mlp_only_layers`."""
        num_layers, step = self.size("num_hidden_layers"), self.size("decoder_sparse_step", 1)
        dense = self._typed(
            "mlp_only_layers", (), f"a list of layers, each from 0 to {num_layers - 1}",
            lambda v: isinstance(v, list) and all(_is_integer(i) and 0 <= i < num_layers for i in v),
        )  # fmt: skip
        layers = tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers))
        if not any(layers):
            key, value = ("decoder_sparse_step", step) if step > num_layers else ("mlp_only_layers", dense)
            raise ValueError(f"{self._where}: {key} is {value!r}; it should leave experts in some layer")
        return layers

    def partial_rotary_factor(self, default: float) -> float:
        """Which part of each head is rotated; in `rope_parameters`, or, in older files, beside it."""
        rope = self._values.get("rope_parameters")
        holder = rope if isinstance(rope, dict) and "partial_rotary_factor" in rope else self._values
        return HFConfig(holder, self._where)._typed(
            "partial_rotary_factor", default, "more than 0 and at most 1", lambda v: _is_number(v) and 0 < v <= 1
        )

    def rope(
        self, *, interleaved: bool = False, default: dict[str, Any] | None = None, theta: float = 10000.0
    ) -> RopeConfig:
        """Both `rope_theta` with `rope_scaling`, and transformers 5's `rope_parameters`, which holds both.

        `default` and `theta` are what a family has where a file says nothing.
        """
        values = self._values.get("rope_parameters") or self._values.get("rope_scaling") or default or {}
        if not isinstance(values, dict):
            raise ValueError(f"{self._where}: rope_scaling is {values!r}; it should be a JSON object or null")
        theta = values.get("rope_theta", self._values.get("rope_theta", theta))
        kind = values.get("rope_type", values.get("type", "default"))
        scaling = HFConfig({**values, "rope_theta": theta, "rope_type": kind}, f"{self._where}: rope")
        theta = scaling.number("rope_theta")
        if theta <= 1:
            raise ValueError(f"{self._where}: rope: rope_theta is {theta!r}; it should be more than 1")
        kind = scaling.choice("rope_type", ("default", "linear", "yarn"))
        if kind == "default":
            return RopeConfig(theta=theta, interleaved=interleaved)
        factor = scaling.number("factor")
        if factor < 1:
            raise ValueError(f"{self._where}: rope: factor is {factor!r}; it should be 1 or more")
        if kind == "linear":
            return RopeConfig(theta=theta, kind="linear", factor=factor, interleaved=interleaved)
        # As DeepSeek's published code has it; without either key this is the paper's `0.1 * ln(factor) + 1`.
        # (transformers ignores a lone mscale or mscale_all_dim.)
        mscale, mscale_all_dim = scaling.number("mscale", 1.0), scaling.number("mscale_all_dim", 0.0)
        attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
        return RopeConfig(
            theta=theta,
            kind="yarn",
            factor=factor,
            original_max_position_embeddings=scaling.size(
                "original_max_position_embeddings", self._values.get("max_position_embeddings")
            ),
            beta_fast=scaling.number("beta_fast", 32.0),
            beta_slow=scaling.number("beta_slow", 1.0),
            truncate=scaling.boolean("truncate", True),
            attention_factor=scaling.number("attention_factor", attention_factor),
            softmax_scale_factor=_yarn_mscale(factor, mscale_all_dim) ** 2,
            interleaved=interleaved,
        )

    def _typed(self, key: str, default: Any, expected: str, is_valid) -> Any:
        value = self._values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"{self._where}: {key} is missing; it should be {expected}")
            return default
        if not is_valid(value):
            raise ValueError(f"{self._where}: {key} is {value!r}; it should be {expected}")
        return value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention scaling, `0.1 m ln(factor) + 1`, with DeepSeek's multiplier m."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
