"""Whether our checkpoint is what a Hugging Face one becomes: both are read again, and every byte is compared."""

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jax_epmoe.checkpoint import quantization_of, read_header
from weights_convert.arrays import chunks, open_array, read
from weights_convert.convert import MANIFEST, PARAMS
from weights_convert.plan import Plan, Reader, find, make_plan
from weights_convert.quantization import read_quantization
from weights_convert.safetensors_file import read_json
from weights_convert.work import advance, in_threads, progress_bar


@dataclass(frozen=True)
class Verified:
    """How much was compared, and how long it took."""

    tensors: int
    nbytes: int
    seconds: float

    def __str__(self) -> str:
        size, rate = map(tqdm.format_sizeof, (self.nbytes, self.nbytes / self.seconds))
        return f"{self.tensors} tensors, {size}B, are the same on both sides; {self.seconds:.1f} s, {rate}B/s"


def verify(
    src: str | os.PathLike, dst: str | os.PathLike, *, revision: str | None = None, progress: bool = True
) -> Verified:
    """Reads the checkpoint `src` and `dst`, which `convert` made of it, and compares every tensor, and arrays with their digests.

    How `dst` is stored and quantised is taken from its epmoe.json. It takes the memory that `convert` does.

    Args:
      src: a folder with config.json and safetensors, or, where no such folder exists, a name on the Hugging Face hub.
      dst: a folder that `convert` wrote, or that `to_hf` read.
      revision: a branch, tag or commit on the hub.
      progress: show a progress bar in bytes, if stderr is a terminal.

    Raises:
      ValueError: a tensor differs, an array is missing or damaged, or one of the folders is not a checkpoint.
    """
    start, folder = time.perf_counter(), Path(dst)
    header = read_header(folder)
    source = find(os.fspath(src), revision)
    quantization = quantization_of(header)
    is_quantised = quantization.name and read_quantization(read_json(source / "config.json")) is not None
    plan = make_plan(source, header["dtype"], None if is_quantised else quantization.name)
    if plan.quantization != quantization:
        raise ValueError(f"{folder / 'epmoe.json'}: quantization is {header['quantization']}; it should be {plan.kind}")
    manifest = read_manifest(folder)
    for name in sorted(plan.arrays.keys() ^ manifest["arrays"].keys()):
        what = "not there; it should be" if name in plan.arrays else "there; it should not be"
        raise ValueError(f"{folder}: array {name} is {what}, as {source} has it")
    with progress_bar("verifying", plan.nbytes, 0, progress) as bar:
        in_threads(lambda name, stop: _compare(folder, plan, name, manifest["arrays"][name], bar, stop), plan.arrays)
    tensors = {tensor.partition("[")[0] for array in plan.arrays.values() for tensor, _ in array.parts}
    return Verified(len(tensors), plan.nbytes, time.perf_counter() - start)


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest.json.

    Raises:
      ValueError: there is none, or it is damaged.
    """
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} has no {MANIFEST}; it should have one: convert the checkpoint again")
    manifest = read_json(folder / MANIFEST)
    match manifest:
        case {"arrays": dict(arrays)} if all(isinstance(entry, dict) for entry in arrays.values()):
            return manifest
    raise ValueError(f"{folder / MANIFEST} is damaged; convert the checkpoint again")


def _compare(folder: Path, plan: Plan, name: str, entry: dict[str, Any], bar: tqdm, stop: Callable[[], None]) -> None:
    array, stored = plan.arrays[name], open_array(folder / PARAMS, name)
    reader, digest = Reader(array, plan.tensors), hashlib.sha256()
    there, wanted = (stored.shape, stored.dtype.numpy_dtype), (array.shape, array.dtype)
    if there != wanted:
        raise ValueError(
            f"{folder}: array {name} is {list(there[0])} of {there[1]}; it should be {list(wanted[0])} of {wanted[1]}"
        )
    for chunk in chunks(array.shape, array.dtype.itemsize):
        stop()
        theirs = reader.read(chunk.start, chunk.stop).view(np.uint8)
        ours = read(stored, chunk.place).reshape(-1).view(np.uint8)
        if not np.array_equal(theirs, ours):
            at = chunk.start + int(np.argmax(theirs != ours)) // array.dtype.itemsize
            tensor = reader.tensors_of(at, at + 1)[0][0]
            raise ValueError(
                f"{folder}: array {name} differs from tensor {tensor}, first in element {at} of the array flattened"
            )
        digest.update(ours)
        advance(bar, ours.nbytes)
    if digest.hexdigest() != entry.get("sha256"):
        raise ValueError(
            f"{folder / MANIFEST}: the sha256 of {name} is {entry.get('sha256')}; it should be {digest.hexdigest()}"
        )
