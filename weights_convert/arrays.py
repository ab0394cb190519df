"""Our checkpoint's arrays on disk: Orbax's files around plain zarr3 ones, each written a chunk at a time, in any order.

    params/                     Orbax's own files
    params/state/NAME/          an array: zarr.json, and in c/ a file for each chunk, uncompressed

A chunk is a run of the array's bytes in C order: whole experts, or rows of one. A file is there when all of it is: TensorStore writes
beside it, flushes and renames. So several processes can write one checkpoint, and one that was killed leaves nothing to repair.
"""

import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

CHUNK_BYTES = 2**24


@dataclass(frozen=True)
class Chunk:
    """One file of an array: where it lies, and which elements it holds of the array flattened in C order."""

    key: str
    place: tuple[slice, ...]
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The shape of an array's chunks: at most CHUNK_BYTES, or a single row of the last axis where that is more.

    The last axes are whole, the first have size 1, and the one between is cut into nearly equal parts: a chunk is contiguous.
    """
    chunk = [1] * len(shape)
    for axis in reversed(range(len(shape))):
        fit = max(1, CHUNK_BYTES // (itemsize * math.prod(chunk)))
        if axis == len(shape) - 1 or shape[axis] <= fit:
            chunk[axis] = max(1, shape[axis])
            continue
        chunk[axis] = math.ceil(shape[axis] / math.ceil(shape[axis] / fit))
        break
    return tuple(chunk)


def chunks(shape: tuple[int, ...], itemsize: int) -> Iterator[Chunk]:
    """An array's chunks, in C order."""
    chunk = chunk_shape(shape, itemsize)
    start = 0
    for index in np.ndindex(*(math.ceil(n / c) for n, c in zip(shape, chunk, strict=True))):
        place = tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(index, chunk, shape, strict=True))
        of = Chunk("/".join(["c", *map(str, index)]), place, tuple(s.stop - s.start for s in place), start)
        yield of
        start = of.stop


def lay_out(folder: Path, arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
    """Writes all of a checkpoint to the new folder `params` but the arrays' chunks: their shapes and dtypes, by name."""
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    with context:  # Orbax writes its files for scalars by these names, and then the arrays take the scalars' place
        ocp.save(folder.absolute(), {name: np.zeros(()) for name in arrays})
    for name in arrays:
        shutil.rmtree(folder / "state" / name)
    opening = [
        ts.open(
            _spec(folder, name) | {"create": True},
            dtype=ts.dtype(dtype),
            shape=shape,
            chunk_layout=ts.ChunkLayout(write_chunk_shape=chunk_shape(shape, dtype.itemsize)),
        )
        for name, (shape, dtype) in arrays.items()
    ]
    for array in opening:
        wait(array)


def open_array(folder: Path, name: str, is_cached: bool = False) -> ts.TensorStore:
    """An array of the checkpoint in `params`, for reading and writing; a chunk that is not there cannot be read.

    `is_cached` keeps two chunks in memory, for reading less than one at a time.

    Raises:
      ValueError: there is none, or it is damaged.
    """
    try:
        cache = ts.Context({"cache_pool": {"total_bytes_limit": 2 * CHUNK_BYTES * is_cached}})
        return ts.open(_spec(folder, name) | {"open": True}, context=cache).result()
    except ValueError as error:
        raise ValueError(f"{folder / 'state' / name} cannot be read: {_reason(error)}") from None


def read(array: ts.TensorStore, place: Any) -> np.ndarray:
    """A part of an array.

    Raises:
      ValueError: a chunk is missing or damaged.
    """
    try:
        return array[place].read().result()
    except ValueError as error:
        raise ValueError(f"an array is damaged or cut short: {_reason(error)}") from None


def wait(writing: Any) -> None:
    """Waits until TensorStore has written.

    Raises:
      OSError: the disk is full, or fails. (TensorStore raises ValueError, whatever it is.)
    """
    try:
        writing.result()
    except ValueError as error:
        raise OSError(f"cannot write: {_reason(error)}") from None


def _reason(error: ValueError) -> str:
    """What TensorStore says is wrong, without the specification that it adds."""
    return re.sub(r" \[\w+='.*", "", " ".join(str(error).split()))


def written_chunks(folder: Path, name: str) -> set[str]:
    """The keys of an array's chunks that are there."""
    root = folder / "state" / name
    files = (Path(parent) / file for parent, _, files in os.walk(root / "c") for file in files)
    found = {str(file.relative_to(root)) for file in files if not file.name.endswith(".__lock")}
    return found | ({"c"} if (root / "c").is_file() else set())


def _spec(folder: Path, name: str) -> dict[str, Any]:
    path = f"{folder.absolute() / 'state' / name}/"
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": path},
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }
