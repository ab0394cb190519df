"""What a conversion would write, as a table: `--dry-run`."""

import itertools
import math
import re
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from jax_epmoe.checkpoint import abstract_model
from jax_epmoe.mesh import make_mesh
from weights_convert.arrays import chunk_shape, chunks
from weights_convert.convert import share
from weights_convert.plan import Plan
from weights_convert.to_hf import HFPlan
from weights_convert.work import Work


def describe(plan: Plan, work: Work, processes: int) -> str:
    """Each kind of array, a line: how many, their shape, dtype and bytes, their files, and the mesh axes that shard them.

    After them, all of it, each process's part where there are several, and the room on the disk.
    """
    specs = _specs(plan)
    rows = []
    kinds = {
        name: (re.sub(r"^layers\.\d+\.", "layers.*.", name), plan.arrays[name], specs[name]) for name in plan.arrays
    }
    ordered = sorted(kinds, key=lambda name: (kinds[name][0], kinds[name][1].shape, str(kinds[name][1].dtype)))
    for (kind, shape, dtype), group in itertools.groupby(
        ordered, key=lambda name: (kinds[name][0], kinds[name][1].shape, kinds[name][1].dtype)
    ):
        names = list(group)
        files = sum(1 for _ in chunks(shape, dtype.itemsize))
        nbytes = math.prod(shape) * dtype.itemsize * len(names)
        rows.append(
            (
                kind, str(len(names)), _times(shape), str(dtype), _size(nbytes), str(files * len(names)),
                _times(chunk_shape(shape, dtype.itemsize)), specs[names[0]],
            )
        )  # fmt: skip
    lines = _table(("array", "count", "shape", "dtype", "size", "files", "of", "sharded over"), rows)
    files = sum(int(row[5]) for row in rows)
    lines += ["", f"{len(plan.arrays)} arrays, {_size(plan.nbytes)} of {plan.kind}, in {files} files"]
    if plan.skipped:
        lines.append(f"skips {len(plan.skipped)} tensors of multi-token prediction, such as {plan.skipped[0]}")
    sizes = {name: array.nbytes for name, array in plan.arrays.items()}
    for i in range(processes if processes > 1 else 0):
        mine = share(sizes, (i, processes))
        size = sum(sizes[name] for name in mine)
        first = f", from {mine[0]} to {mine[-1]}" if mine else ""
        lines.append(f"process {i}/{processes}: {len(mine)} arrays, {_size(size)}{first}")
    return "\n".join([*lines, _end(work)])


def describe_hf(plan: HFPlan, work: Work) -> str:
    """Each file, a line: its tensors and bytes; and the room on the disk."""
    rows = [(shard.file, str(len(shard.tensors)), _size(sum(map(plan.nbytes, shard.tensors)))) for shard in plan.shards]
    total = sum(map(plan.nbytes, plan.pieces))
    lines = _table(("file", "tensors", "size"), rows)
    return "\n".join([*lines, "", f"{len(plan.pieces)} tensors, {_size(total)} in {len(rows)} files", _end(work)])


def _end(work: Work) -> str:
    existing, free = work.free()
    goes_on = f"; would go on from {work.folder}" if work.checkpoint.exists() else ""
    return f"{existing} has {_size(free)} free{goes_on}"


def _specs(plan: Plan) -> dict[str, str]:
    """By array, which axes of the mesh shard each of its dimensions when a model is loaded."""
    state = abstract_model(plan.config, make_mesh(), jnp.bfloat16, quantization=plan.quantization)[1]
    specs = {}
    for keys, variable in nnx.to_flat_state(state):
        axes = [("+".join(a) if isinstance(a, tuple) else a) or "-" for a in variable.get_value().sharding.spec]
        specs[".".join(map(str, keys))] = ", ".join(axes) if set(axes) - {"-"} else "nothing"
    return specs


def _size(nbytes: int) -> str:
    return f"{tqdm.format_sizeof(nbytes)}B"


def _times(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    is_number = [all(re.fullmatch(r"[\d.]+([kMGT]?B)?", row[i]) for row in rows) for i in range(len(head))]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, is_number, strict=True)
        ).rstrip()
        for row in (head, *rows)
    ]
