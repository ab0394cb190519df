"""Hugging Face's safetensors, read without torch and without loading: headers are checked, tensors are mapped.

The format: https://huggingface.co/docs/safetensors. Eight bytes say how long the JSON header is, the header says where
each tensor lies in the rest of the file, and tensors fill that rest without gaps.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
FLOATS: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
FP8 = "F8_E4M3"
BYTES = "U8"
_READABLE = FLOATS | {FP8: np.dtype(ml_dtypes.float8_e4m3fn), BYTES: np.dtype(np.uint8)}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: `nbytes` bytes at `offset`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self) -> np.ndarray:
        """The tensor, mapped: its pages are read when touched, and are given back with the last reference."""
        return np.memmap(self.file, _READABLE[self.dtype], mode="r", offset=self.offset, shape=self.shape)

    def elements(self, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the tensor flattened in C order, read into memory.

        Raises:
          ValueError: the file has become too short for them.
        """
        dtype = _READABLE[self.dtype]
        values = np.fromfile(self.file, dtype, stop - start, offset=self.offset + start * dtype.itemsize)
        if values.size < stop - start:
            raise ValueError(f"{self.file} was cut short while it was read; it should stay as it is")
        return values


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}; it should be a JSON object")
    return content


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, checked: a header that can be trusted, and a file of the size it says."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        limit = min(size - 8, MAX_HEADER_BYTES)
        if size < 8 or not 2 <= length <= limit:
            raise ValueError(
                f"{file} ({size} bytes) says its header has {length} bytes; it should be 2 to {max(limit, 2)}"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} has a header that is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{file} has a header that is a {type(header).__name__}; it should be a JSON object")
    header.pop("__metadata__", None)

    start = 8 + length
    tensors = {name: _tensor(file, name, entry, start) for name, entry in header.items()}
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            raise ValueError(
                f"{file}: tensor {name} begins at byte {tensor.offset - start}; it should be {end - start}, where the last ends"
            )
        end += tensor.nbytes
    if end != size:
        raise ValueError(f"{file} has {size} bytes; it should have {end}, by its header: it is cut short or damaged")
    return tensors


def header_of(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> bytes:
    """What a safetensors file begins with that holds tensors of these dtypes and shapes, one after the other in this order."""
    names = {dtype: name for name, dtype in _READABLE.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        name = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{name!r} occurs twice")
    return content


def _tensor(file: Path, name: str, entry: Any, start: int) -> Tensor:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if (
            all(type(n) is int and 0 <= n < 2**63 for n in (*shape[:65], begin, end)) and len(shape) <= 64
        ):
            pass
        case _:
            raise ValueError(f"{file}: tensor {name} is {_short(entry)}; it should have dtype, shape and data_offsets")
    if dtype not in _BITS:
        raise ValueError(f"{file}: tensor {name} has dtype {_short(dtype)}; it should be one of {', '.join(_BITS)}")
    bits = math.prod(shape) * _BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        raise ValueError(
            f"{file}: tensor {name}, {dtype} {_short(shape)}, has data_offsets {_short([begin, end])};"
            f" they should be {_short(bits // 8)} bytes apart"
        )
    return Tensor(file, dtype, tuple(shape), start + begin, end - begin)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint in `folder`, one file or sharded with an index, by name. All files are checked."""
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} has {_weights_found(folder)}; it should have {SINGLE}, or {INDEX} and its shards")

    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} has no weight_map; it should map each tensor to its shard")
    for name, shard in weight_map.items():
        # The name alone is judged: in the hub's cache, files are links that lead out of the folder, rightly.
        if not isinstance(shard, str) or not _is_plain(shard):
            raise ValueError(
                f"{INDEX} puts tensor {name} in {shard!r}; it should be a .safetensors file inside {folder}"
            )

    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise ValueError(f"{folder} has no {shard}; {INDEX} says that it should")
        for name, tensor in read_header(folder / shard).items():
            if name in tensors:
                raise ValueError(
                    f"tensor {name} is in {tensors[name].file.name} and in {shard}; it should be in {weight_map.get(name, 'one')}"
                )
            tensors[name] = tensor
    _check_index(weight_map, tensors, folder)
    return tensors


def _is_plain(name: str) -> bool:
    path = PurePosixPath(name)
    return (
        not path.is_absolute()
        and ".." not in path.parts
        and not set(name) & {"\\", "\0"}
        and path.suffix == ".safetensors"
    )


def _check_index(weight_map: Mapping[str, str], tensors: Mapping[str, Tensor], folder: Path) -> None:
    for name, shard in weight_map.items():
        if name not in tensors:
            raise ValueError(f"{shard} has no tensor {name}; {INDEX} says that it should")
        if tensors[name].file != folder / shard:
            raise ValueError(
                f"tensor {name} is in {tensors[name].file.name}; {INDEX} says that it should be in {shard}"
            )
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise ValueError(
                f"tensor {name} {list(tensor.shape)} is in {tensor.file.name}; it should be in {INDEX} too"
            )


def _weights_found(folder: Path) -> str:
    suffixes = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz"}
    found = sorted(name for name in os.listdir(folder) if Path(name).suffix in suffixes)
    if not found:
        return "no weights"
    pickled = any(Path(name).suffix in {".bin", ".pt", ".pth", ".ckpt"} for name in found)
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"{found[0]}{more}" + (" (a pickle, which can run any code)" if pickled else "")
