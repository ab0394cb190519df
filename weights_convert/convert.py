"""From a Hugging Face folder or hub name to our checkpoint, a chunk at a time.

All is checked before a byte is written: config.json, every header, every name, shape and dtype, room on the disk. Then threads
make arrays, one each: a chunk is read from the files that hold it while the one before is written. All this is in a folder
beside DST (see `weights_convert.work`). A run that was killed left whole chunks, and a note of each array that was whole; the next
goes on from them.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from weights_convert import arrays
from weights_convert.arrays import Chunk, chunks, lay_out, open_array, read, wait, written_chunks
from weights_convert.plan import Plan, Reader, find, make_plan
from weights_convert.work import Work, advance, in_threads, progress_bar, read_or_none, write_whole

MANIFEST, PARAMS = "manifest.json", "params"


@dataclass(frozen=True)
class Summary:
    """What a conversion wrote, what it left out knowingly, and how long it took.

    With several processes, `nbytes` is this one's part, and `waits_for` counts the arrays that others have yet to write.
    """

    parameters: int
    nbytes: int
    dtype: str
    seconds: float
    skipped: tuple[str, ...] = ()  # tensors of layers for multi-token prediction
    not_finite: tuple[str, ...] = ()  # tensors with values that are NaN or infinite
    resumed: int = 0  # bytes that an earlier run had written
    waits_for: int = 0

    def __str__(self) -> str:
        parameters, size, rate, resumed = (
            tqdm.format_sizeof(n)
            for n in (self.parameters, self.nbytes, (self.nbytes - self.resumed) / self.seconds, self.resumed)
        )
        line = f"{parameters} parameters, {size}B of {self.dtype}, {self.seconds:.1f} s, {rate}B/s"
        if self.resumed:
            line += f"; {resumed}B had been written before"
        if self.skipped:
            line += f"; skipped {len(self.skipped)} tensors of multi-token prediction, such as {self.skipped[0]}"
        if self.waits_for:
            line += f"; {self.waits_for} arrays are still to be written by other processes"
        return line


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    revision: str | None = None,
    process: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> Summary:
    """Writes the checkpoint `src` to the folder `dst` in our format (see `jax_epmoe.checkpoint`).

    Takes the memory of a few chunks of 16 MiB, whatever the model; with `quantize`, that of working on one tensor too. A quantised
    checkpoint's float8 weights and their scales are kept as they are. Layers for multi-token prediction are left out; the
    summary names them. `dst` appears when all of it is written. A run that was killed, interrupted or stopped by the disk leaves
    `.DST.partial` beside it, and the same call goes on from there; one that finds bad values in `src` leaves nothing.

    `dst/manifest.json` has each array's shape, dtype and SHA-256 (of its bytes in C order, little-endian), and the names of
    tensors with values that are NaN or infinite.

    Args:
      src: a folder with config.json and safetensors, or, where no such folder exists, a name on the Hugging Face hub.
      dst: the folder to write; it must not exist, or be empty.
      dtype: of the stored weights: bfloat16, float16 or float32. None takes config.json's `dtype` or `torch_dtype`, or
        bfloat16 if it has neither. A router's correction bias is float32 always, and what is quantised is float8.
      quantize: "fp8-block", "fp8-channel" or "fp8-tensor": quantise the weights of experts, attention and dense MLPs so.
      revision: a branch, tag or commit on the hub.
      process: (i, n): this is process i of n that share the work, each started with the same arguments, on one file system. The
        last to finish gives `dst` its name.
      progress: show a progress bar in bytes, if stderr is a terminal.

    Raises:
      ValueError: `src` is not a checkpoint of a known family, whole and right in every name, shape and dtype; or `dst`
        cannot take it.
      OSError: the disk is full, or fails.
    """
    start = time.perf_counter()
    plan = make_plan(find(os.fspath(src), revision), dtype, quantize)
    work = make_work(dst, plan)
    mine = share({name: array.nbytes for name, array in plan.arrays.items()}, process)
    nbytes = sum(plan.arrays[name].nbytes for name in mine)
    summary = partial(Summary, plan.parameters, nbytes, plan.kind, skipped=plan.skipped)
    alone = process[1] == 1
    if (not alone and is_written(work.target, plan)) or work.is_finished():
        return summary(time.perf_counter() - start, not_finite=_not_finite(work.target), resumed=nbytes)
    work.begin(plan.files_bytes, partial(_lay_out, plan))
    try:
        resumed = _write(work, plan, mine, progress)
        missing, not_finite = _finish(work, plan)
    except ValueError:
        if alone:  # else others may be writing
            work.remove()
        raise
    return summary(time.perf_counter() - start, not_finite=not_finite, resumed=resumed, waits_for=missing)


def make_work(dst: str | os.PathLike, plan: Plan) -> Work:
    """The folder beside `dst` for a plan; it goes on only with the same files in chunks of the same size."""
    stats = {file.name: file.stat() for file in {tensor.file for tensor in plan.tensors.values()}}
    files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in sorted(stats.items())}
    return Work(Path(dst), plan.folder, {"header": plan.header, "files": files, "chunk_bytes": arrays.CHUNK_BYTES})


def share(nbytes: Mapping[str, int], process: tuple[int, int]) -> list[str]:
    """The arrays that process i of n writes: they are cut, layer after layer, into n runs of nearly as many bytes each.

    Args:
      nbytes: what each array takes, by name.
      process: (i, n).

    Raises:
      ValueError: `process` is not 0 <= i < n.
    """
    i, n = process
    if not 0 <= i < n:
        raise ValueError(f"process is {i}/{n}; it should be I/N with I from 0 to N - 1")
    total, before, mine = max(1, sum(nbytes.values())), 0, []
    for name in sorted(nbytes, key=_in_order):
        if min(n - 1, (2 * before + nbytes[name]) * n // (2 * total)) == i:  # where the array's middle lies
            mine.append(name)
        before += nbytes[name]
    return mine


def _in_order(name: str) -> tuple[int, str]:
    """Sorts arrays by layer, as files have them; what belongs to none comes first."""
    first, second, *_ = name.split(".")
    return (int(second) if first == "layers" else -1, name)


def is_written(target: Path, plan: Plan) -> bool:
    """Whether a folder is what this plan makes, whole."""
    return read_or_none(target / "epmoe.json") == plan.header and (target / MANIFEST).is_file()


def _lay_out(plan: Plan, folder: Path) -> None:
    """Writes all but the arrays' chunks."""
    for file in plan.copied:
        shutil.copyfile(file, folder / file.name)
    lay_out(folder / PARAMS, {name: (array.shape, array.dtype) for name, array in plan.arrays.items()})
    write_whole(folder / "epmoe.json", plan.header)


def _finish(work: Work, plan: Plan) -> tuple[int, tuple[str, ...]]:
    """Gives the checkpoint its name, if all arrays are whole: how many are not, and the tensors that are not finite."""
    done = {name: entry for name in plan.arrays if (entry := work.done(name)) is not None}
    missing = len(plan.arrays) - len(done)
    if not missing:
        entries = {
            name: {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": done[name]["sha256"]}
            for name, array in sorted(plan.arrays.items())
        }
        not_finite = sorted({tensor for entry in done.values() for tensor in entry["not_finite"]})
        new = work.folder / f"{MANIFEST}-{os.getpid()}"
        try:
            write_whole(new, {"not_finite": not_finite, "arrays": entries})
            new.replace(work.checkpoint / MANIFEST)
            work.end()
        except OSError:
            if not is_written(work.target, plan):
                raise
            shutil.rmtree(work.folder, ignore_errors=True)  # another process was first
    if is_written(work.target, plan):
        return 0, _not_finite(work.target)
    return missing, ()


def _not_finite(folder: Path) -> tuple[str, ...]:
    return tuple(json.loads((folder / MANIFEST).read_text())["not_finite"])


def _write(work: Work, plan: Plan, names: list[str], progress: bool) -> int:
    """Writes the chunks that are missing of these arrays; returns how many bytes were there."""
    todo, resumed = [], 0
    for name in names:
        array = plan.arrays[name]
        if work.done(name) is not None:
            resumed += array.nbytes
            continue
        there = written_chunks(work.checkpoint / PARAMS, name)
        of_array = list(chunks(array.shape, array.dtype.itemsize))
        resumed += sum(c.stop - c.start for c in of_array if c.key in there) * array.dtype.itemsize
        todo.append((name, of_array, there))
    total = sum(plan.arrays[name].nbytes for name in names)
    with progress_bar("converting", total, resumed, progress) as bar:
        in_threads(lambda item, stop: _write_array(work, plan, *item, bar, stop), todo)
    return resumed


def _write_array(
    work: Work, plan: Plan, name: str, of_array: list[Chunk], there: set[str], bar: tqdm, stop: Callable[[], None]
) -> None:
    reader, stored = Reader(plan.arrays[name], plan.tensors), open_array(work.checkpoint / PARAMS, name)
    digest, writing = hashlib.sha256(), None
    try:
        for chunk in of_array:
            stop()
            if chunk.key in there:
                values = read(stored, chunk.place)
                reader.look_at(chunk.start, values.reshape(-1))
                digest.update(values.reshape(-1).view(np.uint8))
                continue
            values = reader.read(chunk.start, chunk.stop).reshape(chunk.shape)
            if writing is not None:
                wait(writing)
            writing = stored[chunk.place].write(values, can_reference_source_data_indefinitely=True).commit
            writing.force()  # starts now, while the digest takes its time and the next chunk is read
            digest.update(values.reshape(-1).view(np.uint8))
            advance(bar, values.nbytes)
    finally:
        if writing is not None:
            wait(writing)
    work.set_done(name, {"sha256": digest.hexdigest(), "not_finite": sorted(reader.not_finite)})
