"""Which tiling the Hopper kernel runs with, by a call's static sizes: what was measured, or else a heuristic's choice.

Measured tilings lie in tables, `<device>.json`, in `tuned/` beside this file and in the user's folder (`user_folder`), whose
entries win. `epmoe-tune` writes them:

    {"format": 1, "device": "NVIDIA H100 80GB HBM3", "entries": [{"experts": 20, "k": 5120, ..., "tiling": {...}}, ...]}
"""

import functools
import json
import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from jax_epmoe.config import require
from jax_epmoe.kernels.grouped_gemm.layout import ROW_ALIGNMENT

# Raise it with any change to the kernel or to `Tiling` that makes what was measured before worthless: it is then ignored.
KERNEL_VERSION = 1

SHARED_MEMORY_LIMIT = 227 * 1024  # bytes that a CTA may have on Hopper

_FORMAT = 1
_PACKAGED = Path(__file__).parent / "tuned"
_NUM_SMS = 132
_REACH = 1.25  # of a measured tiling, in rows: 1.33 times fewer were 7% slower with one than with the heuristic's


@dataclass(frozen=True)
class Tiling:
    """How the kernel cuts its work.

    Attributes:
      columns: output columns of a tile (with a gate: as many gate and up columns each), a multiple of 128 or of 192.
      heights: the row heights that code is made for, rising multiples of 8; the last is the largest.
      block_k: how much of k a stage holds.
      stages: how many stages the ring has.
      largest_heights: candidates for a tile's largest height; () for `heights[-1]` alone.
      lag: release a stage one step late, so that one wgmma is always in flight.
      slots: 64-column blocks of output that wait in shared memory, a warpgroup.
    """

    columns: int = 256
    heights: tuple[int, ...] = (128,)
    block_k: int = 64
    stages: int = 4
    largest_heights: tuple[int, ...] = ()
    lag: bool = False
    slots: int = 1

    @property
    def consumers(self) -> int:
        """How many warpgroups share a tile's columns, 64 or a multiple each."""
        return 3 if self.columns % 128 else 2


def choose_tiling(*, rows: int, experts: int, n: int, k: int, gated: bool) -> Tiling:
    """A tiling for `rows` rows over `experts` groups of unknown sizes, `k` -> `n` (with a gate: n of each half).

    The one measured at the nearest number of rows (by ratio), if that is within a factor of 1.25; else `heuristic`'s.
    """
    measured = _measured(jax.devices()[0].device_kind, user_folder()).get((experts, k, n, gated), {})
    rows = max(rows, ROW_ALIGNMENT)
    nearest = min(measured, key=lambda there: abs(math.log(there / rows)), default=0)
    if max(rows, nearest) <= _REACH * min(rows, nearest):
        return measured[nearest]
    return heuristic(rows=rows, experts=experts, n=n, k=k, gated=gated)


def heuristic(*, rows: int, experts: int, n: int, k: int, gated: bool) -> Tiling:
    """`choose_tiling` where nothing was measured. Found on one H100 with loads drawn from a Dirichlet(2) distribution."""
    rows_per_expert = rows / experts
    # Decoding reads weights and little else: low tiles, deep stages. A crowded expert gets the higher tile.
    if rows_per_expert <= 16:
        return Tiling(columns=128, heights=(16, 32), block_k=128, stages=3 if gated else 5)
    if rows_per_expert <= 48:
        return Tiling(columns=128, heights=(16, 32, 64), stages=5 if gated else 8)
    if gated and -(-n // 192) * 192 < 0.95 * -(-n // 128) * 128:  # less of the last tile is padding
        return Tiling(columns=192, heights=tuple(range(16, 97, 16)), stages=3)
    narrow = gated or -(-n // 256) * 256 > 1.15 * n
    columns = 128 if narrow else 256
    if k <= 512:  # hardly any main loop: what counts is how few rows are padded
        return Tiling(columns=columns, heights=tuple(range(16, 129, 16)), stages=3)
    if narrow and not gated:  # half as many products a byte: weights and rows come in longer pieces
        return Tiling(columns=128, heights=tuple(range(16, 129, 16)), block_k=128, stages=3)
    rounds = rows / 128 * -(-n // columns) / _NUM_SMS  # of tiles, if all were full
    if rounds <= 8:  # much of the time goes into the last round: heights that fit the groups, the best of them picked
        heights, candidates = (32, 64, 80, 96, 104, 112, 120, 128), (128, 120, 112, 104)
        return Tiling(columns=columns, heights=heights, largest_heights=candidates)
    if rows_per_expert <= 768 and gated and k >= 4096 and rounds > 20:
        # CTAs drift apart in a long call, and weights come from memory again; one height keeps them together (one H200).
        return Tiling(columns=columns, lag=k <= 5120)
    if rows_per_expert <= 768:
        return Tiling(columns=columns, heights=(64, 88, 112, 128), lag=k >= 1024)
    return Tiling(columns=columns, lag=k >= 4096)  # each further height costs the main loop a little


def shared_memory_bytes(tiling: Tiling, gated: bool) -> int:
    """What the kernel asks for: the ring's two buffers, the output slots, each from a multiple of 1024, and its barriers."""
    height, slots = tiling.heights[-1], min(tiling.slots, tiling.columns // (64 * tiling.consumers))
    parts = 2 if gated else 1
    elements = (
        tiling.stages * height * tiling.block_k,
        tiling.stages * parts * tiling.columns * tiling.block_k,
        tiling.consumers * slots * height * 64,
    )
    return sum(-(-2 * count // 1024) * 1024 for count in elements) + 2 * tiling.stages * 8


def is_valid(tiling: Tiling, gated: bool) -> bool:
    """Whether the kernel can run so: the rules of `Tiling`, and what fits into shared memory."""
    heights, stages = tiling.heights, tiling.stages
    return (
        tiling.columns > 0
        and tiling.columns % (64 * tiling.consumers) == 0
        and tiling.block_k > 0
        and tiling.block_k % 64 == 0
        and tiling.slots > 0
        and stages >= (2 if tiling.lag else 1)
        and list(heights) == sorted(set(heights))
        and all(0 < height <= 256 and height % ROW_ALIGNMENT == 0 for height in (*heights, *tiling.largest_heights))
        and max(tiling.largest_heights, default=0) <= max(heights, default=0)
        and heights != ()
        and shared_memory_bytes(tiling, gated) <= SHARED_MEMORY_LIMIT
    )


@dataclass(frozen=True)
class Entry:
    """What was measured for one product, `k` -> `n`, at `rows` rows over `experts` groups.

    Attributes:
      tiling: the best one's fields, as JSON has them.
      us: microseconds that its kernels take; heuristic_us: the heuristic's, None if that did not run.
      quick: few candidates were tried.
      versions: of `jax` and of the `kernel` (`KERNEL_VERSION`).
    """

    experts: int
    k: int
    n: int
    gated: bool
    rows: int
    tiling: dict[str, Any]
    us: float
    heuristic_us: float | None
    quick: bool
    device: str
    versions: dict[str, Any]
    date: str

    @property
    def place(self) -> tuple[int, int, int, bool, int]:
        """What a table holds one entry for."""
        return (self.experts, self.k, self.n, self.gated, self.rows)


def versions() -> dict[str, Any]:
    """Of what entries measured by this process depend on."""
    return {"jax": jax.__version__, "kernel": KERNEL_VERSION}


def user_folder() -> Path:
    """Where the user's own tables lie: `$JAX_EPMOE_TUNED`, or ~/.cache/jax_epmoe/tuned."""
    return Path(os.path.expanduser(os.environ.get("JAX_EPMOE_TUNED") or "~/.cache/jax_epmoe/tuned"))


def table_name(device: str) -> str:
    """The file name of a device's table. Example: "NVIDIA H200" -> "nvidia-h200.json"."""
    return f"{device.lower().replace(' ', '-')}.json"


def read_table(path: Path, device: str) -> list[Entry]:
    """The entries of a table, of any kernel version; none where there is no file.

    Raises:
      ValueError: the file cannot be read, is damaged, or is no table for the device.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    is_table = isinstance(table, dict) and {"format", "device", "entries"} <= table.keys()
    require(is_table, str(path), type(table).__name__, "a JSON object with format, device and entries")
    require(table["format"] == _FORMAT, f"{path}: format", table["format"], str(_FORMAT))
    require(table["device"] == device, f"{path}: device", table["device"], repr(device))
    try:
        entries = [Entry(**fields) for fields in table["entries"]]
        for entry in entries:
            *sizes, gated, rows = entry.place
            right = all(type(size) is int and size > 0 for size in (*sizes, rows)) and type(gated) is bool
            require(
                right, "an entry's (experts, k, n, gated, rows)", entry.place, "positive integers, gated true or false"
            )
            if entry.versions["kernel"] == KERNEL_VERSION:
                parse_tiling(entry.tiling, entry.gated)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return entries


def write_table(path: Path, device: str, entries: Iterable[Entry]) -> None:
    """Writes `path` so that whoever reads it finds the whole of it or the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(entries, key=lambda entry: entry.place)
    table = {"format": _FORMAT, "device": device, "entries": [asdict(entry) for entry in ordered]}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def parse_tiling(fields: dict[str, Any], gated: bool) -> Tiling:
    """A tiling from its fields as JSON has them (lists for tuples); fields that are missing have their defaults.

    Raises:
      ValueError, TypeError: a field that there is not or of another type, or a tiling that `is_valid` refuses.
    """
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    tiling = Tiling(**values)
    for name, default in vars(Tiling()).items():
        value = getattr(tiling, name)
        whole = all(type(part) is int for part in value) if isinstance(value, tuple) else True
        same_type = default is None or type(value) is type(default)
        require(same_type and whole, f"tiling's {name}", value, f"like {default!r}")
    require(is_valid(tiling, gated), "tiling", tiling, "one that the kernel can run")
    return tiling


@functools.cache
def _measured(device: str, folder: Path) -> dict[tuple[int, int, int, bool], dict[int, Tiling]]:
    """The tiling for each number of rows measured, by (experts, k, n, gated). A table that is of no use gives a warning."""
    found: dict[tuple[int, int, int, bool], dict[int, Tiling]] = {}
    for path in (_PACKAGED / table_name(device), folder / table_name(device)):
        try:
            entries = read_table(path, device)
        except ValueError as error:
            warnings.warn(f"a table of tuned tilings is ignored: {error}", stacklevel=2)
            continue
        current = [entry for entry in entries if entry.versions["kernel"] == KERNEL_VERSION]
        if len(current) < len(entries):
            stale = f"{len(entries) - len(current)} of {len(entries)} tunings are of another kernel version and ignored"
            warnings.warn(f"{path}: {stale}; run epmoe-tune again", stacklevel=2)
        for entry in current:
            product = (entry.experts, entry.k, entry.n, entry.gated)
            found.setdefault(product, {})[entry.rows] = parse_tiling(entry.tiling, entry.gated)
    return found
