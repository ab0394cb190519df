"""What a conversion will write, from what: worked out from config.json and the files' headers alone, before a byte is written."""

import contextlib
import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jax_epmoe.checkpoint import DTYPES as DTYPES
from jax_epmoe.checkpoint import FORMAT_VERSION, parameter_shapes
from jax_epmoe.config import ModelConfig
from jax_epmoe.models.families import family_of, read_config
from jax_epmoe.quant import FORMATS, NOT_QUANTIZED, Quantization
from weights_convert.expert_stacks import Expert
from weights_convert.names import (
    EMBEDDING,
    IGNORED,
    TIED_HEAD,
    Piece,
    first_tensor,
    has_mxfp4,
    mtp_tensors,
    pieces,
    split_name,
)
from weights_convert.quantization import (
    FROM_WEIGHTS,
    Stored,
    check_scales,
    check_values,
    is_mxfp4,
    read_quantization,
    scales_from,
    values_from,
)
from weights_convert.safetensors_file import BYTES, FLOATS, FP8, Tensor, read_checkpoint, read_json

COPIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
FROM_HUB = ("*.json", "*.safetensors", *COPIED)
NOT_FROM_HUB = ("consolidated*", "*/*")  # Mistral's second copy of the weights; other formats' folders

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Array:
    """One array to write: its shape and dtype, the tensors that go to its parts, and what is taken of a tensor.

    Parts are in order: one after the other, flattened, they are the array flattened.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: tuple[tuple[str, tuple[int, ...]], ...]  # (tensor's name, index)
    take: Callable[[str, np.ndarray], np.ndarray] = lambda name, values: values
    takes_whole: bool = False  # whether `take` needs all of a tensor, not any run of its elements

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """A conversion: from `folder`'s `tensors` to `arrays`, by our names, with `header` as epmoe.json and files to copy."""

    folder: Path
    config: ModelConfig
    header: dict[str, Any]
    quantization: Quantization
    arrays: dict[str, Array]
    tensors: dict[str, Tensor | Expert]  # parts of a tensor by its name and `[expert]`
    copied: tuple[Path, ...]
    skipped: tuple[str, ...]  # tensors of layers for multi-token prediction

    @property
    def nbytes(self) -> int:
        """What the arrays take."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def files_bytes(self) -> int:
        """What arrays and copied files take."""
        return self.nbytes + sum(file.stat().st_size for file in self.copied)

    @property
    def parameters(self) -> int:
        """How many weights there are; scales are none."""
        return sum(a.size for name, a in self.arrays.items() if split_name(name)[1] in ("weight", "values"))

    @property
    def kind(self) -> str:
        """What the weights are stored as."""
        dtype = self.header["dtype"]
        return dtype if self.quantization.name is None else f"{self.quantization.name} and {dtype}"


def make_plan(folder: Path, dtype: str | None = None, quantize: str | None = None) -> Plan:
    """The plan to convert the Hugging Face checkpoint in `folder`; arguments and errors are those of `convert`."""
    hf = _read_hf_config(folder)
    dtype = _choose_dtype(dtype, hf)
    config, tensors = read_config(folder), read_checkpoint(folder)
    stored = read_quantization(hf)
    _check_quantize(quantize, stored)
    skipped = mtp_tensors(tensors, config)
    kept = {name: tensor for name, tensor in tensors.items() if name not in skipped}
    quantization = _quantization(kept, family_of(hf), config, stored)
    as_numpy = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    if is_mxfp4(hf) and not has_mxfp4(family_of(hf)):
        raise ValueError(
            f"config.json: quantization_config: quant_method is 'mxfp4'; a {family_of(hf)} should have another"
        )
    arrays, experts = _match(kept, family_of(hf), config, as_numpy, quantization, stored, is_mxfp4(hf))
    if quantize is not None:
        quantization = Quantization(quantize)
        arrays = _quantized(arrays, config, quantization)
    header = {
        "format_version": FORMAT_VERSION,
        "dtype": dtype,
        "quantization": _in_header(quantization),
        "source": {"fingerprint": _fingerprint(tensors, folder)},
    }
    copied = tuple(folder / name for name in COPIED if (folder / name).is_file())
    return Plan(folder, config, header, quantization, arrays, {**tensors, **experts}, copied, tuple(sorted(skipped)))


class Reader:
    """Makes an array from its tensors, a run of elements at a time, and notes which tensors are not finite.

    It holds the run and what it is made from, and where `array.takes_whole`, one tensor and what is taken of it; of a stack, an expert.
    """

    _one_at_a_time = threading.Lock()  # quantising takes several times a tensor's memory

    def __init__(self, array: Array, tensors: Mapping[str, Tensor | Expert]) -> None:
        self.not_finite: set[str] = set()
        self._array, self._tensors = array, tensors
        self._part = array.size // len(array.parts)
        self._whole: tuple[str, np.ndarray] = ("", np.empty(0))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the array flattened in C order, in its dtype.

        Raises:
          ValueError: a tensor has values that the dtype cannot hold, or float8 values and scales that are no numbers.
        """
        result = np.empty(stop - start, self._array.dtype)
        for name, begin, end in self.tensors_of(start, stop):
            first = begin % self._part
            values = self._taken(name, first, first + end - begin)
            part = result[begin - start : end - start]
            with np.errstate(over="ignore"):  # not every cast would warn; what has overflowed is looked for below
                part[...] = values
            if not is_finite(part):
                self._judge(name, values, part)
        return result

    def look_at(self, start: int, values: np.ndarray) -> None:
        """Notes what is not finite in elements from `start` on that were read elsewhere."""
        for name, begin, end in self.tensors_of(start, start + values.size):
            if not is_finite(values[begin - start : end - start]):
                self.not_finite.add(name)

    def tensors_of(self, start: int, stop: int) -> list[tuple[str, int, int]]:
        """The tensors that elements [start, stop) come from, and which elements of the array each gives."""
        first, last = start // self._part, -(-stop // self._part)
        return [
            (self._array.parts[n][0], max(start, n * self._part), min(stop, (n + 1) * self._part))
            for n in range(first, last)
        ]

    def _taken(self, name: str, start: int, stop: int) -> np.ndarray:
        tensor = self._tensors[name]
        if isinstance(tensor, Tensor) and not self._array.takes_whole:
            return self._array.take(name, tensor.elements(start, stop))
        if self._whole[0] != name:
            with self._one_at_a_time if self._array.takes_whole else contextlib.nullcontext():
                self._whole = (name, self._array.take(name, tensor.read()).reshape(-1))
        return self._whole[1][start:stop]

    def _judge(self, name: str, values: np.ndarray, part: np.ndarray) -> None:
        if (np.isfinite(values) & ~np.isfinite(part)).any():
            raise ValueError(f"tensor {name} has values that {part.dtype} cannot hold; dtype should be a wider one")
        self.not_finite.add(name)


def is_finite(values: np.ndarray) -> bool:
    """Whether all of an array's values are finite."""
    if values.dtype == ml_dtypes.bfloat16:  # several times as fast as its isfinite
        return not values.size or int((values.view(np.uint16) & 0x7FFF).max()) < 0x7F80
    if values.dtype == ml_dtypes.float8_e4m3fn:
        return not values.size or int((values.view(np.uint8) & 0x7F).max()) < 0x7F
    return bool(np.isfinite(values).all())


def find(src: str, revision: str | None) -> Path:
    """The local folder of `src`: itself, or what the hub's cache holds of it after downloading."""
    if os.path.isdir(src):
        if revision is not None:
            raise ValueError(f"revision is {revision!r}; it should be left out: SRC {src!r} is a local folder")
        return Path(src)
    if os.path.exists(src) or not _HUB_NAME.fullmatch(src):
        raise ValueError(f"SRC is {src!r}; it should be a folder, or a name on the Hugging Face hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"SRC {src!r} is not a folder, and huggingface_hub, which could download it, is not installed;"
            " it should be a folder, or install jax_epmoe[hub]"
        ) from None

    try:
        return Path(
            snapshot_download(src, revision=revision, allow_patterns=list(FROM_HUB), ignore_patterns=list(NOT_FROM_HUB))
        )
    except Exception as error:  # the hub client raises its own, its HTTP library's and the system's
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"SRC {src!r} is not a folder, and cannot be had from the hub: {reason[:300]}") from error


def _read_hf_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; it should be a Hugging Face checkpoint")
    return read_json(folder / "config.json")


def _check_quantize(quantize: str | None, stored: Stored | None) -> None:
    if quantize is not None and quantize not in FROM_WEIGHTS:
        raise ValueError(f"quantize is {quantize!r}; it should be one of {', '.join(FROM_WEIGHTS)}")
    if quantize is not None and stored is not None:
        raise ValueError(f"quantize is {quantize!r}; it should be left out: SRC is quantised already, {stored.format}")


def _quantization(
    tensors: Mapping[str, Tensor], family: str, config: ModelConfig, stored: Stored | None
) -> Quantization:
    """What of a checkpoint is quantised: the parameters whose tensors are float8, an expert's all or none."""
    if stored is None:
        return NOT_QUANTIZED
    whole = Quantization(stored.format)
    can_be = {base for base, kind in map(split_name, parameter_shapes(config, whole)) if kind == "values"}

    def is_kept(parameter: str) -> bool:
        name = first_tensor(family, parameter.replace("moe.w_down", "moe.w_gate_up"))
        return name in tensors and tensors[name].dtype != FP8

    kept = frozenset(parameter for parameter in can_be if is_kept(parameter))
    if kept == can_be:
        raise ValueError(f"config.json has a quantization_config ({stored.format}), but no tensor is {FP8}")
    return Quantization(stored.format, kept)


def _in_header(quantization: Quantization) -> dict[str, Any] | None:
    if quantization.name is None:
        return None
    return {"format": quantization.name, "kept": sorted(quantization.kept)}


def _choose_dtype(dtype: str | None, hf: Mapping[str, Any]) -> str:
    name, value = "dtype", dtype
    if dtype is None:
        name = "config.json's dtype"
        value = next((hf[key] for key in ("dtype", "torch_dtype") if hf.get(key) is not None), "bfloat16")
    if value not in DTYPES:
        raise ValueError(f"{name} is {value!r}; it should be one of {', '.join(DTYPES)} (--dtype sets it)")
    return value


def _match(
    tensors: Mapping[str, Tensor],
    family: str,
    config: ModelConfig,
    dtype: np.dtype,
    quantization: Quantization = NOT_QUANTIZED,
    stored: Stored | None = None,
    mxfp4: bool = False,
) -> tuple[dict[str, Array], dict[str, Expert]]:
    """The arrays to write, by our names, once every tensor has been found to be what the model needs; and experts to make them of."""
    shapes = parameter_shapes(config, quantization)
    suffixes = None if stored is None else stored.suffixes
    wanted = pieces(family, {name: struct.shape for name, struct in shapes.items()}, suffixes, mxfp4)
    if config.tie_word_embeddings and TIED_HEAD in tensors:
        wanted[TIED_HEAD] = wanted[EMBEDDING]
    tensors = {name: tensor for name, tensor in tensors.items() if not any(p.fullmatch(name) for p in IGNORED)}

    def dtypes(name: str) -> tuple[str, ...]:
        return {"values": (FP8,), "blocks": (BYTES,), "block_scales": (BYTES,)}.get(wanted[name].kind, tuple(FLOATS))

    _refuse(
        [name for name in wanted if name not in tensors],
        lambda name: f"tensor {name} is missing; it should be there, {list(wanted[name].shape)}",
    )
    _refuse(
        [name for name in tensors if name not in wanted],
        lambda name: (
            f"tensor {name} {_describe(tensors[name])}; it should not be there: a {family} of this config has none"
        ),
    )
    _refuse(
        [name for name, piece in wanted.items() if tensors[name].shape not in (piece.shape, piece.other_shape)],
        lambda name: f"tensor {name} {_describe(tensors[name])}; it should be {list(wanted[name].shape)}",
    )
    _refuse(
        [name for name in wanted if tensors[name].dtype not in dtypes(name)],
        lambda name: (
            f"tensor {name} {_describe(tensors[name])}; it should be {list(wanted[name].shape)}"
            f" of a dtype among {', '.join(dtypes(name))}"
        ),
    )
    if TIED_HEAD in tensors and config.tie_word_embeddings:
        _check_tied(tensors[TIED_HEAD], tensors[EMBEDDING])
        del wanted[TIED_HEAD]

    parts: dict[str, list[tuple[str, tuple[int, ...]]]] = {name: [] for name in shapes}
    experts: dict[str, Expert] = {}
    for name, piece in wanted.items():
        if piece.axes is None:
            parts[piece.parameter].append((name, piece.index))
        elif piece.kind != "block_scales":
            own = _experts(name, piece, shapes[piece.parameter].shape, tensors)
            parts[piece.parameter] += [(part, (expert.number,)) for part, expert in own.items()]
            experts |= own
    arrays = {
        name: _array(name, struct, dtype, tuple(sorted(parts[name], key=lambda part: part[1])))
        for name, struct in shapes.items()
    }
    return arrays, experts


def _experts(name: str, piece: Piece, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> dict[str, Expert]:
    """A stack of experts, one by one, for a parameter of `shape`."""
    assert piece.axes is not None
    lie_as = [axis for merged in piece.axes for axis in merged][1:]  # the first is the experts'
    sizes, order = tuple(shape[axis] for axis in lie_as), tuple(map(lie_as.index, range(1, len(shape))))
    scales = tensors[name.removesuffix("blocks") + "scales"] if piece.kind == "blocks" else None
    return {f"{name}[{e}]": Expert(tensors[name], scales, e, sizes, order) for e in range(shape[0])}


def _array(name: str, struct: jax.ShapeDtypeStruct, dtype: np.dtype, parts: tuple) -> Array:
    kind = split_name(name)[1]
    if kind != "weight":
        return Array(struct.shape, struct.dtype, parts, check_values if kind == "values" else check_scales)
    return Array(struct.shape, np.dtype(np.float32) if name.endswith(".correction_bias") else dtype, parts)


def _quantized(arrays: Mapping[str, Array], config: ModelConfig, quantization: Quantization) -> dict[str, Array]:
    """The arrays to write instead, for weights that are quantised on the way."""
    format = FORMATS[quantization.name or ""]
    take = {
        "values": partial(values_from, granularity=format.weights),
        "scales": partial(scales_from, granularity=format.weights),
    }
    result = {}
    for name, struct in parameter_shapes(config, quantization).items():
        base, kind = split_name(name)
        result[name] = (
            arrays[name]
            if kind == "weight"
            else Array(struct.shape, struct.dtype, arrays[base].parts, take[kind], True)
        )
    return result


def _describe(tensor: Tensor) -> str:
    return f"in {tensor.file.name} is {list(tensor.shape)} of {tensor.dtype}"


def _refuse(names: list[str], line: Callable[[str], str]) -> None:
    if names:
        more = f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""
        raise ValueError(line(names[0]) + more)


def _check_tied(head: Tensor, embedding: Tensor) -> None:
    """A tied model has no head of its own; a file may repeat the embedding as one."""
    size = math.prod(head.shape)
    runs = [(i, min(i + 2**24, size)) for i in range(0, size, 2**24)]
    if not all(np.array_equal(head.elements(*run), embedding.elements(*run)) for run in runs):
        raise ValueError(
            f"tensor {TIED_HEAD} {_describe(head)} and differs from {EMBEDDING}; it should equal it, as config.json ties them"
        )


def _fingerprint(tensors: Mapping[str, Tensor], folder: Path) -> str:
    """Of config.json, of what tensors there are, and of how big their files are."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    files = {tensor.file for tensor in tensors.values()}
    lines = sorted(json.dumps([name, tensor.dtype, tensor.shape]) for name, tensor in tensors.items())
    lines += sorted(json.dumps([file.name, file.stat().st_size]) for file in files)
    digest.update("\n".join(lines).encode())
    return digest.hexdigest()
