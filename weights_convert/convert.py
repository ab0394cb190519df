"""From a Hugging Face folder or hub name to our checkpoint, a layer at a time.

All is checked before a byte is written: config.json, every header, every name, shape and dtype, room on the disk. Then one
layer's tensors are copied from the mapped files into our arrays, saved, and let go; the result gets its name at the end.
"""

import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint.experimental.v1 import partial as ocp_partial
from tqdm import tqdm

from jax_epmoe.checkpoint import DTYPES as DTYPES
from jax_epmoe.checkpoint import FORMAT_VERSION, by_layer, parameter_shapes
from jax_epmoe.config import ModelConfig
from jax_epmoe.models.families import family_of, read_config
from jax_epmoe.quant import FORMATS, NOT_QUANTIZED, Quantization
from weights_convert.names import EMBEDDING, IGNORED, TIED_HEAD, first_tensor, mtp_tensors, pieces, split_name
from weights_convert.quantization import (
    FROM_WEIGHTS,
    Stored,
    check_scales,
    check_values,
    read_quantization,
    scales_from,
    values_from,
)
from weights_convert.safetensors_file import FLOATS, FP8, Tensor, read_checkpoint, read_json

COPIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
FROM_HUB = ("*.json", "*.safetensors", *COPIED)
NOT_FROM_HUB = ("consolidated*", "*/*")  # Mistral's second copy of the weights; other formats' folders

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Summary:
    """What a conversion wrote, what it left out knowingly, and how long it took."""

    parameters: int
    nbytes: int
    dtype: str
    seconds: float
    skipped: tuple[str, ...] = ()  # tensors of layers for multi-token prediction

    def __str__(self) -> str:
        parameters, size, rate = (
            tqdm.format_sizeof(n) for n in (self.parameters, self.nbytes, self.nbytes / self.seconds)
        )
        line = f"{parameters} parameters, {size}B of {self.dtype}, {self.seconds:.1f} s, {rate}B/s"
        if not self.skipped:
            return line
        return f"{line}; skipped {len(self.skipped)} tensors of multi-token prediction, such as {self.skipped[0]}"


@dataclass(frozen=True)
class _Array:
    """One array to write: its shape and dtype, the tensors that go to its parts, and what is taken of a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: tuple[tuple[str, tuple[int, ...]], ...]  # (tensor's name, index)
    take: Callable[[str, np.ndarray], np.ndarray] = lambda name, tensor: tensor

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Lent(np.ndarray):
    """An array that Orbax writes in place. It deep-copies NumPy arrays first, which would take a layer's memory twice."""

    def __deepcopy__(self, memo: dict[int, Any] | None) -> "_Lent":
        return self


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> Summary:
    """Writes the checkpoint `src` to the folder `dst` in our format (see `jax_epmoe.checkpoint`).

    Takes the memory of one layer. A quantised checkpoint's float8 weights and their scales are kept as they are. Layers for multi-token prediction are left out; the summary names them. `dst` appears when
    all of it is written; a run that fails or is interrupted leaves nothing.

    Args:
      src: a folder with config.json and safetensors, or, where no such folder exists, a name on the Hugging Face hub.
      dst: the folder to write; it must not exist, or be empty.
      dtype: of the stored weights: bfloat16, float16 or float32. None takes config.json's `dtype` or `torch_dtype`, or
        bfloat16 if it has neither. A router's correction bias is float32 always, and what is quantised is float8.
      quantize: "fp8-block", "fp8-channel" or "fp8-tensor": quantise the weights of experts, attention and dense MLPs so.
      revision: a branch, tag or commit on the hub.
      progress: show a progress bar, if stderr is a terminal.

    Raises:
      ValueError: `src` is not a checkpoint of a known family, whole and right in every name, shape and dtype; or `dst`
        cannot take it.
    """
    start = time.perf_counter()
    folder = _find(os.fspath(src), revision)
    target = _check_target(Path(dst), folder)
    hf = _read_hf_config(folder)
    dtype = _choose_dtype(dtype, hf)
    config, tensors = read_config(folder), read_checkpoint(folder)
    stored = read_quantization(hf)
    _check_quantize(quantize, stored)
    skipped = mtp_tensors(tensors, config)
    kept = {name: tensor for name, tensor in tensors.items() if name not in skipped}
    quantization = _quantization(kept, family_of(hf), config, stored)
    as_numpy = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    arrays = _match(kept, family_of(hf), config, as_numpy, quantization, stored)
    if quantize is not None:
        quantization = Quantization(quantize)
        arrays = _quantized(arrays, config, quantization)
    copied = [folder / name for name in COPIED if (folder / name).is_file()]
    nbytes = sum(array.nbytes for array in arrays.values())
    _check_space(target, nbytes + sum(file.stat().st_size for file in copied))

    header = {
        "format_version": FORMAT_VERSION,
        "dtype": dtype,
        "quantization": _in_header(quantization),
        "source": {"fingerprint": _fingerprint(tensors, folder)},
    }
    with _folder_that_appears(target) as temporary:
        for file in copied:
            shutil.copyfile(file, temporary / file.name)
        _write_arrays(temporary / "params", arrays, tensors, progress)
        (temporary / "epmoe.json").write_text(json.dumps(header, indent=2) + "\n")
    weights = [array for name, array in arrays.items() if split_name(name)[1] in ("weight", "values")]
    parameters = sum(math.prod(array.shape) for array in weights)
    kind = dtype if quantization.name is None else f"{quantization.name} and {dtype}"
    return Summary(parameters, nbytes, kind, time.perf_counter() - start, tuple(sorted(skipped)))


def _find(src: str, revision: str | None) -> Path:
    """The local folder of `src`: itself, or what the hub's cache holds of it after downloading."""
    if os.path.isdir(src):
        if revision is not None:
            raise ValueError(f"revision is {revision!r}; it should be left out: SRC {src!r} is a local folder")
        return Path(src)
    if os.path.exists(src) or not _HUB_NAME.fullmatch(src):
        raise ValueError(f"SRC is {src!r}; it should be a folder, or a name on the Hugging Face hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(src, revision=revision, allow_patterns=list(FROM_HUB), ignore_patterns=list(NOT_FROM_HUB))
        )
    except Exception as error:  # the hub client raises its own, its HTTP library's and the system's
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"SRC {src!r} is not a folder, and cannot be had from the hub: {reason[:300]}") from error


def _check_target(dst: Path, folder: Path) -> Path:
    target, source = dst.resolve(), folder.resolve()
    if target.is_relative_to(source):
        raise ValueError(f"DST is {str(dst)!r}; it should not be inside SRC, {str(folder)!r}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"DST {str(dst)!r} exists; it should be a new or an empty folder")
    return target


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
) -> dict[str, _Array]:
    """The arrays to write, by our names, once every tensor has been found to be what the model needs."""
    shapes = parameter_shapes(config, quantization)
    suffixes = None if stored is None else stored.suffixes
    wanted = pieces(family, {name: struct.shape for name, struct in shapes.items()}, suffixes)
    if config.tie_word_embeddings and TIED_HEAD in tensors:
        wanted[TIED_HEAD] = wanted[EMBEDDING]
    tensors = {name: tensor for name, tensor in tensors.items() if not any(p.fullmatch(name) for p in IGNORED)}

    def dtypes(name: str) -> tuple[str, ...]:
        return (FP8,) if wanted[name].kind == "values" else tuple(FLOATS)

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
    for name, piece in wanted.items():
        parts[piece.parameter].append((name, piece.index))
    return {name: _array(name, struct, dtype, tuple(parts[name])) for name, struct in shapes.items()}


def _array(name: str, struct: jax.ShapeDtypeStruct, dtype: np.dtype, parts: tuple) -> _Array:
    kind = split_name(name)[1]
    if kind != "weight":
        return _Array(struct.shape, struct.dtype, parts, check_values if kind == "values" else check_scales)
    return _Array(struct.shape, np.dtype(np.float32) if name.endswith(".correction_bias") else dtype, parts)


def _quantized(arrays: Mapping[str, _Array], config: ModelConfig, quantization: Quantization) -> dict[str, _Array]:
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
            arrays[name] if kind == "weight" else _Array(struct.shape, struct.dtype, arrays[base].parts, take[kind])
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
    a, b = head.read(), embedding.read()
    rows = max(1, 2**24 // a.shape[1])
    if not all(np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, len(a), rows)):
        raise ValueError(
            f"tensor {TIED_HEAD} {_describe(head)} and differs from {EMBEDDING}; it should equal it, as config.json ties them"
        )


def _check_space(target: Path, needed: int) -> None:
    existing = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"{existing} has {free / 1e9:.1f} GB free; it should have {needed / 1e9:.1f} GB for {target.name}"
        )


def _fingerprint(tensors: Mapping[str, Tensor], folder: Path) -> str:
    """Of config.json, of what tensors there are, and of how big their files are."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    files = {tensor.file for tensor in tensors.values()}
    lines = sorted(json.dumps([name, tensor.dtype, tensor.shape]) for name, tensor in tensors.items())
    lines += sorted(json.dumps([file.name, file.stat().st_size]) for file in files)
    digest.update("\n".join(lines).encode())
    return digest.hexdigest()


@contextmanager
def _folder_that_appears(target: Path) -> Iterator[Path]:
    """A temporary sibling, which takes the name `target` if the body succeeds and is removed if it does not."""
    temporary = target.parent / f".{target.name}.tmp-{os.getpid()}"
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.mkdir()
        yield temporary
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_arrays(folder: Path, arrays: Mapping[str, _Array], tensors: Mapping[str, Tensor], progress: bool) -> None:
    total = sum(array.nbytes for array in arrays.values())
    disable = None if progress else True  # None: where stderr is not a terminal
    # Orbax runs in a thread, so that Ctrl-C never stops it half-way: leaving the `with` waits until nothing writes any more.
    with (
        tqdm(total=total, desc="converting", unit="B", unit_scale=True, disable=disable) as bar,
        ThreadPoolExecutor(max_workers=1) as thread,
    ):
        for layer in by_layer(arrays):
            thread.submit(_save, folder, {name: _assemble(arrays[name], tensors, bar) for name in layer}).result()
        thread.submit(ocp_partial.finalize, folder).result()


def _save(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Adds arrays to the checkpoint."""
    context = ocp.Context()
    # Uncompressed: compression halves the rate and saves a fifth, and shards can then be read without reading whole arrays.
    context.array.saving.use_compression = False
    with context:
        ocp_partial.save(folder, arrays)


def _assemble(array: _Array, tensors: Mapping[str, Tensor], bar: tqdm) -> np.ndarray:
    """The array, filled from its tensors."""
    result = np.empty(array.shape, array.dtype)
    for name, index in array.parts:
        tensor = array.take(name, tensors[name].read())
        place: Any = (*index, ...)
        part = result[place]
        with np.errstate(over="ignore"):  # not every cast would warn; what has overflowed is looked for below
            part[...] = tensor.reshape(part.shape)
        if not np.can_cast(tensor.dtype, part.dtype) and np.isinf(part).any():
            raise ValueError(f"tensor {name} has values that {part.dtype} cannot hold; dtype should be a wider one")
        bar.update(part.nbytes)
    return result.view(_Lent)
