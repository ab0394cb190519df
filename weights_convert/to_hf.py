"""From our checkpoint back to Hugging Face's layout: config.json, safetensors in shards, an index."""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from tqdm import tqdm

from jax_epmoe.checkpoint import parameter_shapes, quantization_of, read_header
from jax_epmoe.models.families import family_of, read_config
from weights_convert.arrays import chunks, open_array, read
from weights_convert.convert import PARAMS, Summary
from weights_convert.names import Piece, pieces
from weights_convert.plan import COPIED
from weights_convert.quantization import is_mxfp4, read_quantization
from weights_convert.safetensors_file import INDEX, SINGLE, header_of, read_json
from weights_convert.verify import read_manifest
from weights_convert.work import Work, advance, in_threads, progress_bar, write_whole

SHARD_BYTES = 5_000_000_000
_PART = ".part"


@dataclass(frozen=True)
class Shard:
    """One safetensors file to write: its name, and its tensors in order."""

    file: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class HFPlan:
    """What `to_hf` will write, from what: by Hugging Face's name, the array, the part of it and the dtype."""

    folder: Path
    header: dict[str, Any]
    config: dict[str, Any]
    pieces: dict[str, Piece]
    dtypes: dict[str, np.dtype]
    shards: tuple[Shard, ...]

    def nbytes(self, name: str) -> int:
        """What a tensor takes."""
        return math.prod(self.pieces[name].shape) * self.dtypes[name].itemsize


def to_hf(src: str | os.PathLike, dst: str | os.PathLike, *, progress: bool = True) -> Summary:
    """Writes our checkpoint `src` to the folder `dst` as Hugging Face lays it out: what `convert` read, bit for bit.

    Tensors have the dtype that `src` stores; config.json's `dtype` is set to it where it says another. Blocks of float8 come back as they
    were; what was in MXFP4 is written as `src` stores it, and config.json no longer says so. What `convert` left out is not there: layers
    for multi-token prediction. Files have up to 5 GB. Memory, `dst` and what a run leaves that
    was killed are as for `convert`.

    Args:
      src: a folder that `convert` wrote.
      dst: the folder to write; it must not exist, or be empty.
      progress: show a progress bar in bytes, if stderr is a terminal.

    Raises:
      ValueError: `src` is not such a folder, or is quantised in a way that cannot be written; or `dst` cannot take it.
      OSError: the disk is full, or fails.
    """
    start = time.perf_counter()
    plan = make_hf_plan(Path(src))
    work = make_hf_work(dst, plan)
    total = sum(map(plan.nbytes, plan.pieces))
    parameters = sum(math.prod(piece.shape) for piece in plan.pieces.values() if piece.kind in ("weight", "values"))
    kind = plan.header["dtype"] if plan.header["quantization"] is None else plan.header["quantization"]["format"]
    if work.is_finished():
        return Summary(parameters, total, kind, time.perf_counter() - start, resumed=total)
    work.begin(total, partial(_lay_out, plan))
    todo = [shard for shard in plan.shards if not (work.checkpoint / shard.file).is_file()]
    resumed = total - sum(plan.nbytes(name) for shard in todo for name in shard.tensors)
    try:
        with progress_bar("converting", total, resumed, progress) as bar:
            in_threads(lambda shard, stop: _write_shard(work.checkpoint, plan, shard, bar, stop), todo)
    except ValueError:
        work.remove()
        raise
    work.end()
    return Summary(parameters, total, kind, time.perf_counter() - start, resumed=resumed)


def make_hf_plan(folder: Path) -> HFPlan:
    """The plan to write our checkpoint in `folder` for Hugging Face; errors are those of `to_hf`."""
    header = read_header(folder)
    quantization = quantization_of(header)
    hf, config = read_json(folder / "config.json"), read_config(folder)
    stored = read_quantization(hf)
    if quantization.name is not None and (stored is None or quantization.name != "fp8-block"):
        how = f"{quantization.name}, made by --quantize" if stored is None else quantization.name
        raise ValueError(
            f"SRC {str(folder)!r} is quantised ({how}); it should be fp8-block as read from a checkpoint, or not at all"
        )
    read_manifest(folder)  # there is none where arrays are in Orbax's OCDBT
    shapes = {name: struct.shape for name, struct in parameter_shapes(config, quantization).items()}
    arrays = {name: open_array(folder / PARAMS, name) for name in shapes}
    for name, array in arrays.items():
        if array.shape != shapes[name]:
            raise ValueError(
                f"{folder}: array {name} is {list(array.shape)}; it should be {list(shapes[name])}, by config.json"
            )
    found = pieces(family_of(hf), shapes, None if stored is None else stored.suffixes)
    dtypes = {name: arrays[piece.parameter].dtype.numpy_dtype for name, piece in found.items()}
    keys = [key for key in ("dtype", "torch_dtype") if hf.get(key) is not None] or ["dtype"]
    if is_mxfp4(hf):
        hf = {key: value for key, value in hf.items() if key != "quantization_config"}
    if any(hf.get(key, "bfloat16") != header["dtype"] for key in keys):
        hf |= dict.fromkeys(keys, header["dtype"])
    shards = _shards(found, dtypes)
    return HFPlan(folder, header, hf, found, dtypes, shards)


def make_hf_work(dst: str | os.PathLike, plan: HFPlan) -> Work:
    """The folder beside `dst` for a plan."""
    made_from = {"to_hf": plan.header, "manifest": read_manifest(plan.folder), "shard_bytes": SHARD_BYTES}
    return Work(Path(dst), plan.folder, made_from)


def _shards(found: Mapping[str, Piece], dtypes: Mapping[str, np.dtype]) -> tuple[Shard, ...]:
    """Tensors in files of up to SHARD_BYTES, layer after layer; in a file those of wide dtypes first, so that all are aligned."""
    groups: list[list[str]] = [[]]
    nbytes = {name: math.prod(piece.shape) * dtypes[name].itemsize for name, piece in found.items()}
    filled = 0
    for name in found:
        if filled and filled + nbytes[name] > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += nbytes[name]
    files = (
        [SINGLE]
        if len(groups) == 1
        else [f"model-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
    )
    aligned = (tuple(sorted(group, key=lambda name: -dtypes[name].itemsize)) for group in groups)
    return tuple(map(Shard, files, aligned))


def _lay_out(plan: HFPlan, folder: Path) -> None:
    """Writes all but the tensors."""
    for name in COPIED:
        if name != "config.json" and (plan.folder / name).is_file():
            shutil.copyfile(plan.folder / name, folder / name)
    if read_json(plan.folder / "config.json") == plan.config:
        shutil.copyfile(plan.folder / "config.json", folder / "config.json")
    else:
        write_whole(folder / "config.json", plan.config)
    if len(plan.shards) > 1:
        weight_map = {name: shard.file for shard in plan.shards for name in shard.tensors}
        total = sum(map(plan.nbytes, plan.pieces))
        write_whole(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_shard(folder: Path, plan: HFPlan, shard: Shard, bar: tqdm, stop: Callable[[], None]) -> None:
    part = folder / (shard.file + _PART)
    opened: dict[str, ts.TensorStore] = {}
    with open(part, "wb") as stream:
        stream.write(header_of({name: (plan.dtypes[name], plan.pieces[name].shape) for name in shard.tensors}))
        for name in shard.tensors:
            piece = plan.pieces[name]
            place: Any = (*piece.index, ...)
            if piece.parameter not in opened:
                opened = {piece.parameter: open_array(plan.folder / PARAMS, piece.parameter, is_cached=True)}
            array = opened[piece.parameter][place]
            if piece.axes is not None:
                array = array.transpose([axis for merged in piece.axes for axis in merged])
            for values in _runs(array):
                stop()
                stream.write(values)
                advance(bar, len(values))
        stream.flush()
        os.fsync(stream.fileno())
    part.rename(folder / shard.file)


def _runs(array: ts.TensorStore) -> Iterator[np.ndarray]:
    """An array's bytes in C order, a chunk at a time."""
    for chunk in chunks(array.shape, array.dtype.numpy_dtype.itemsize):
        yield read(array, chunk.place).reshape(-1).view(np.uint8)
