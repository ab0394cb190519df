"""`epmoe-tune`: measures tilings of the Hopper grouped GEMM at a model's sizes and keeps the best, for all later runs."""

import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import functools
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jax_epmoe.command_line import Parser, refuse
from jax_epmoe.config import MoEConfig, require
from jax_epmoe.kernels.grouped_gemm import hopper, tuning
from jax_epmoe.kernels.grouped_gemm.layout import ROW_ALIGNMENT
from jax_epmoe.kernels.grouped_gemm.tuning import Entry, Tiling
from jax_epmoe.models.families import read_config

PROGRAM = "epmoe-tune"

# hidden_size, intermediate_size of an expert, num_experts, top_k, as in config.json of the Hugging Face repository named.
MODELS = {
    "mixtral-8x7b": MoEConfig(4096, 14336, 8, 2),  # mistralai/Mixtral-8x7B-v0.1
    "deepseek-v2": MoEConfig(5120, 1536, 160, 6),  # deepseek-ai/DeepSeek-V2
    "deepseek-coder-v2": MoEConfig(5120, 1536, 160, 6),  # deepseek-ai/DeepSeek-Coder-V2-Instruct
    "deepseek-v3": MoEConfig(7168, 2048, 256, 8),  # deepseek-ai/DeepSeek-V3
    "qwen3-30b-a3b": MoEConfig(2048, 768, 128, 8),  # Qwen/Qwen3-30B-A3B
    "qwen3-235b-a22b": MoEConfig(4096, 1536, 128, 8),  # Qwen/Qwen3-235B-A22B
    "olmoe-1b-7b": MoEConfig(2048, 1024, 64, 8),  # allenai/OLMoE-1B-7B-0924
    "gpt-oss-20b": MoEConfig(2880, 2880, 32, 4),  # openai/gpt-oss-20b
    "gpt-oss-120b": MoEConfig(2880, 2880, 128, 4),  # openai/gpt-oss-120b
}

TOKENS = (1, 16, 64, 256, 1024, 4096, 8192, 16384, 32768)
TOLERANCE = 5e-3  # of sampled rows against float32, by norms

_QUICK_CANDIDATES = 6
_LEAST_GAIN = 1.01  # what another tiling than the heuristic's must gain: less is noise
_UNCACHED_BYTES = 200e6  # four times the L2
_OUTPUT_BYTES = 2e9  # of the calls timed together: a process keeps the memory, and several may share a GPU
_COMPILING_THREADS = 4
# For `jit` and `compile`: do not try ways to multiply. Of float32 there are many, and checks take it once.
UNTUNED = {"xla_gpu_autotune_level": 0}

_DESCRIPTION = """\
Measure tilings of the Hopper grouped GEMM for both products of a model's experts, at several numbers of tokens, and keep
the best in a table that all later runs on the same kind of GPU look into. The table grows as it goes: interrupt it and
run it again, and it goes on where it was. One GPU is enough, whatever the mesh: it stands for one of its devices.
Compiling takes most of the time: several runs at once, for other models or meshes, compile side by side and measure in turn.
"""


class Case(NamedTuple):
    """One product of a layer on one device, and how many rows it has: `rows` over `experts` groups, `k` -> `n`."""

    product: str
    rows: int
    experts: int
    k: int
    n: int
    gated: bool

    def __str__(self) -> str:
        return f"{self.product}, {self.rows} rows"

    @property
    def place(self) -> tuple[int, int, int, bool, int]:
        """`Entry.place`."""
        return (self.experts, self.k, self.n, self.gated, self.rows)

    @property
    def heuristic(self) -> Tiling:
        return tuning.heuristic(rows=self.rows, experts=self.experts, n=self.n, k=self.k, gated=self.gated)

    @property
    def arguments(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """`x [rows, k]`, `w [experts, (2,) n, k]`, `group_sizes [experts]`."""
        parts = (2,) if self.gated else ()
        return (
            jax.ShapeDtypeStruct((self.rows, self.k), jnp.bfloat16),
            jax.ShapeDtypeStruct((self.experts, *parts, self.n, self.k), jnp.bfloat16),
            jax.ShapeDtypeStruct((self.experts,), jnp.int32),
        )


# From a case, its tilings and its loads: for each tiling in turn its microseconds, or why there are none.
Measure = Callable[[Case, Sequence[Tiling], Sequence[np.ndarray]], Iterable[float | str]]


def main(argv: Sequence[str] | None = None, *, measure: Measure | None = None) -> int:
    """Runs the program; returns its exit status: 2 after one line on standard error when something given was wrong.

    `measure` is `measure_on_gpu` but in tests.
    """
    try:
        args = make_parser().parse_args(argv)
        config = model_config(args.model)
        cases = make_cases(config, args.tp_size, args.ep_size, args.tokens)
        device = _hopper_gpu()
        path = args.output or tuning.user_folder() / tuning.table_name(device)
        tuning.write_table(path, device, tuning.read_table(path, device))  # what is wrong with it is told now
    except OSError as error:
        return refuse(PROGRAM, f"{error.filename}: {error.strerror}")
    except ValueError as error:
        return refuse(PROGRAM, str(error))
    print(f"{device}, jax {jax.__version__}; {args.model}, tp_size {args.tp_size}, ep_size {args.ep_size}: {path}")
    deadline = time.monotonic() + args.time_limit
    try:
        tune(cases, path, device, measure or measure_on_gpu, deadline=deadline, quick=args.quick, force=args.force)
        status = 0
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted; run it again to go on", file=sys.stderr)
        status = 130
    print(summary(cases, tuning.read_table(path, device)))
    return status


def _hopper_gpu() -> str:
    """The device's kind.

    Raises:
      ValueError: it is no Hopper GPU, or JAX has none.
    """
    try:
        device = jax.devices()[0].device_kind
    except RuntimeError as error:
        raise ValueError(f"tilings are measured on an NVIDIA Hopper GPU; JAX has no device: {error}") from None
    if not hopper.on_hopper():
        raise ValueError(f"tilings are measured on an NVIDIA Hopper GPU; this is {device}")
    return device


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(PROGRAM, _DESCRIPTION)
    parser.add_argument(
        "--model", required=True, metavar="M", help=f"a folder with a config.json, or one of {', '.join(MODELS)}"
    )
    parser.add_argument("--tp-size", type=int, default=1, metavar="N", help="as for epmoe-generate (default 1)")
    parser.add_argument("--ep-size", type=int, default=1, metavar="N", help="as for epmoe-generate (default 1)")
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=TOKENS,
        metavar="N",
        help=f"in a step, on all devices together (default {' '.join(map(str, TOKENS))})",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.json",
        help="the table (default: this GPU's in $JAX_EPMOE_TUNED or ~/.cache/jax_epmoe/tuned)",
    )
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="SECONDS", help="start nothing after")
    parser.add_argument("--quick", action="store_true", help="few candidates, one load; a run without it does it again")
    parser.add_argument("--force", action="store_true", help="measure again what the table has already")
    return parser


def model_config(name: str) -> MoEConfig:
    """Of a folder with a config.json, or of a name in `MODELS`.

    Raises:
      ValueError: neither, or a config.json that cannot be used.
    """
    if (Path(name) / "config.json").is_file():
        return read_config(name).moe
    require(name in MODELS, "--model", name, f"a folder with a config.json, or one of {', '.join(MODELS)}")
    return MODELS[name]


def make_cases(config: MoEConfig, tp_size: int, ep_size: int, tokens: Iterable[int]) -> list[Case]:
    """Both products of a layer on one device of a mesh, each for balanced routing's rows, rounded up to a multiple of 8, rising.

    Raises:
      ValueError: numbers that are not positive, or sizes of the mesh that do not divide.
    """
    for name, value in (("--tp-size", tp_size), ("--ep-size", ep_size), *(("--tokens", count) for count in tokens)):
        require(value > 0, name, value, "positive")
    require(tp_size % ep_size == 0, "--ep-size", ep_size, f"a divisor of --tp-size ({tp_size})")
    require(config.num_experts % ep_size == 0, "--ep-size", ep_size, f"a divisor of the {config.num_experts} experts")
    experts, hidden = config.num_experts // ep_size, config.hidden_size
    inner = -(-config.intermediate_size // (tp_size // ep_size))
    all_rows = sorted({-(-count * config.top_k // (ep_size * ROW_ALIGNMENT)) * ROW_ALIGNMENT for count in tokens})
    return [
        case
        for rows in all_rows
        for case in (Case("up", rows, experts, hidden, inner, True), Case("down", rows, experts, inner, hidden, False))
    ]


def candidates(case: Case) -> list[Tiling]:
    """The tilings to try, the likely ones first; the first is the heuristic's choice."""
    make = _low if case.rows <= 48 * case.experts else _high
    return [tiling for tiling in dict.fromkeys([case.heuristic, *make(case)]) if tuning.is_valid(tiling, case.gated)]


def _low(case: Case) -> Iterator[Tiling]:
    """For few rows an expert, where reading the weights is all: low tiles and as much on its way as fits."""
    lowest: tuple[tuple[int, ...], ...] = ((16, 32), (16,), (16, 32, 64), (8, 16, 32), (8,))
    higher = ((16, 32, 64), (16, 32), (32, 64), (16, 32, 48, 64), (16, 32, 64, 96))
    for less in (1, 1.5):
        for block_k in (128, 64):
            for heights in lowest if case.rows <= 16 * case.experts else higher:
                tiling = dataclasses.replace(
                    case.heuristic, columns=128, heights=heights, block_k=block_k, largest_heights=(), lag=False
                )
                yield _staged(tiling, case.gated, less)


def _high(case: Case) -> Iterator[Tiling]:
    """For many rows an expert: between few padded rows, which many heights give, and an undisturbed main loop."""
    own = case.heuristic
    ladders: tuple[tuple[Sequence[int], tuple[int, ...]], ...] = (
        ((64, 88, 112, 128), ()),
        (range(16, 129, 16), ()),
        ((32, 64, 80, 96, 104, 112, 120, 128), (128, 120, 112, 104)),
        ((128,), ()),
        (range(48, 129, 8), ()),
        ((16, 32, 64), ()),
    )
    wide = [] if case.gated or case.n <= 128 else [256]  # with a gate, the accumulators of 256 columns are too many
    for columns in (*wide, 128):
        for heights, largest_heights in ladders if case.rows <= 128 * case.experts else ladders[:-1]:
            for lag in (False, True) if len(heights) <= 4 else (False,):
                tiling = dataclasses.replace(
                    own, columns=columns, heights=tuple(heights), block_k=64, largest_heights=largest_heights, lag=lag
                )
                yield _staged(tiling, case.gated)
    for heights in (tuple(range(16, 129, 16)), (64, 88, 112, 128)):
        tiling = dataclasses.replace(own, columns=128, heights=heights, block_k=128, largest_heights=(), lag=False)
        yield _staged(tiling, case.gated)
    yield dataclasses.replace(own, stages=own.stages - 1)
    if own.columns > 128:  # each warpgroup has two blocks of columns
        yield _staged(dataclasses.replace(own, slots=2), case.gated)


def _staged(tiling: Tiling, gated: bool, less: float = 1) -> Tiling:
    """With the most stages that fit, 8 at most, divided by `less`."""
    fitting = (dataclasses.replace(tiling, stages=stages) for stages in range(8, 1, -1))
    most = next((fit.stages for fit in fitting if tuning.is_valid(fit, gated)), 2)
    return dataclasses.replace(tiling, stages=max(2, int(most / less)))


def make_loads(case: Case, *, quick: bool) -> list[np.ndarray]:
    """Group sizes `[experts]` int32 that sum to the rows: shares drawn from a Dirichlet(2), twice, and even ones."""
    skewed = []
    for seed in range(2):
        rng = np.random.default_rng((case.rows, case.experts, seed))
        skewed.append(rng.multinomial(case.rows, rng.dirichlet(np.full(case.experts, 2.0))))
    even = np.full(case.experts, case.rows // case.experts)
    even[: case.rows % case.experts] += 1
    return [sizes.astype(np.int32) for sizes in ([skewed[0]] if quick else [*skewed, even])]


def tune(
    cases: Sequence[Case],
    path: Path,
    device: str,
    measure: Measure,
    *,
    deadline: float = math.inf,
    quick: bool = False,
    force: bool = False,
) -> None:
    """Measures what the table at `path` lacks for this jax and kernel, and writes it after each case.

    Args:
      deadline: of `time.monotonic`, past which no case is begun.
      quick: fewer candidates and one load.
      force: measure all cases.
    """
    there = {entry.place: entry for entry in tuning.read_table(path, device)}
    todo = {
        case: candidates(case)[: _QUICK_CANDIDATES if quick else None]
        for case in cases
        if force or not _is_current(there.get(case.place), quick)
    }
    total = sum(map(len, todo.values()))
    with tqdm(total=total, unit="tiling", file=sys.stderr, disable=None) as bar:
        for number, (case, tilings) in enumerate(todo.items()):
            if time.monotonic() > deadline:
                _tell(f"time limit: {len(todo) - number} of {len(todo)} left out; run it again to go on")
                break
            bar.set_description(str(case))
            times: dict[Tiling, float] = {}
            notes: dict[Tiling, str] = {}
            results = measure(case, tilings, make_loads(case, quick=quick))
            for tiling, result in zip(tilings, results, strict=True):
                if isinstance(result, str):
                    notes[tiling] = result
                else:
                    times[tiling] = result
                bar.update()
            if not times:
                _tell(f"{case}: nothing ran: {notes[tilings[0]]}")
                continue
            for tiling, note in notes.items():
                _tell(f"{case}: left out {tiling}: {note}")
            entry = _entry(case, times, device, quick)
            with in_turn():
                there = {entry.place: entry for entry in tuning.read_table(path, device)}  # others may have written
                tuning.write_table(path, device, {**there, entry.place: entry}.values())


def _is_current(entry: Entry | None, quick: bool) -> bool:
    return entry is not None and entry.versions == tuning.versions() and (quick or not entry.quick)


def _entry(case: Case, times: dict[Tiling, float], device: str, quick: bool) -> Entry:
    best = min(times, key=lambda tiling: times[tiling])
    own = times.get(case.heuristic)
    if own is not None and own < _LEAST_GAIN * times[best]:
        best = case.heuristic
    return Entry(
        experts=case.experts,
        k=case.k,
        n=case.n,
        gated=case.gated,
        rows=case.rows,
        tiling=dataclasses.asdict(best),
        us=round(times[best], 2),
        heuristic_us=None if own is None else round(own, 2),
        quick=quick,
        device=device,
        versions=tuning.versions(),
        date=datetime.date.today().isoformat(),
    )


def _tell(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def summary(cases: Iterable[Case], entries: Iterable[Entry]) -> str:
    """A line for each case: the heuristic's and the tuned tiling's microseconds, and the time saved."""
    there = {entry.place: entry for entry in entries if entry.versions == tuning.versions()}
    lines = [f"{'product':8}{'rows':>8}{'heuristic us':>14}{'tuned us':>10}{'gain':>7}  tiling"]
    for case in cases:
        line, entry = f"{case.product:8}{case.rows:8}", there.get(case.place)
        if entry is None:
            lines.append(f"{line}{'-':>14}{'-':>10}{'-':>7}  not measured")
            continue
        own = entry.heuristic_us
        heuristic, gain = ("-", "-") if own is None else (f"{own:.1f}", f"{1 - entry.us / own:.1%}")
        changed = tuning.parse_tiling(entry.tiling, entry.gated)
        told = "the heuristic's" if changed == case.heuristic else str(changed).removeprefix("Tiling")
        lines.append(f"{line}{heuristic:>14}{entry.us:10.1f}{gain:>7}  {told}")
    return "\n".join(lines)


def measure_on_gpu(case: Case, tilings: Sequence[Tiling], loads: Sequence[np.ndarray]) -> Iterator[float | str]:
    """A `Measure`: the median over the loads of the kernel times of a call, the tile list's among them.

    The next tilings are compiled by a few threads while one is measured; its output is checked before.
    """
    pool = ThreadPoolExecutor(_COMPILING_THREADS)
    try:
        compiled = [pool.submit(_compile, case, tiling) for tiling in tilings]
        inputs, is_first = None, True
        for future in compiled:
            try:
                run = future.result()
                with in_turn():
                    inputs = inputs or _Inputs(case, loads)
                    if is_first:  # the GPU's clocks rise
                        inputs.microseconds(run)
                    is_first = False
                    result: float | str = inputs.microseconds(run)
            except Exception as error:
                lines = str(error).strip().splitlines() or [""]
                result = f"{type(error).__name__}: {lines[0][:200]}"
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """One of this user's runs at a time: for the GPU while it is timed, and for the table."""
    with open(Path(tempfile.gettempdir()) / f"epmoe-tune-{os.getuid()}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield


def _compile(case: Case, tiling: Tiling) -> Callable[..., jax.Array]:
    def run(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
        activation = "silu" if case.gated else None
        return hopper.matmul(x, w, group_sizes, activation=activation, out_dtype=x.dtype, tiling=tiling)

    return jax.jit(run).lower(*case.arguments).compile()


class _Inputs:
    """A case's arrays. Consecutive calls read other weights, so that none finds its own in the L2."""

    def __init__(self, case: Case, loads: Sequence[np.ndarray]) -> None:
        self.case, self.loads = case, loads
        x, w, _ = case.arguments
        bytes_of_w = 2 * math.prod(w.shape)
        self.x = normal(0, x.shape, 1.0)
        self.w = [normal(1 + i, w.shape, case.k**-0.5) for i in range(math.ceil(_UNCACHED_BYTES / bytes_of_w))]

    def microseconds(self, run: Callable[..., jax.Array]) -> float:
        """The median over the loads.

        Raises:
          RuntimeError: a wrong output, or no times.
        """
        times = []
        for sizes in self.loads:
            self.check(run, sizes)
            calls = self.calls(sizes)
            bytes_of_output = 2 * self.case.rows * self.case.n  # of which `kernel_us` keeps one for each call
            least = min(21, max(5, int(_OUTPUT_BYTES / bytes_of_output)))
            times.append(statistics.median(kernel_us(Rotation(run, calls), -(-least // len(calls)) * len(calls))))
        return statistics.median(times)

    def calls(self, sizes: np.ndarray) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
        """The arguments of consecutive calls: the weights in turn, each time with the sizes over other experts."""
        copies, experts = len(self.w), self.case.experts
        bytes_read = 2 * self.w[0].size * np.count_nonzero(sizes) / experts
        count = min(experts * copies, math.ceil(_UNCACHED_BYTES / bytes_read))
        shift = max(1, experts * copies // count)
        return [
            (self.x, self.w[i % copies], jnp.asarray(np.roll(sizes, i // copies * shift), jnp.int32))
            for i in range(count)
        ]

    def check(self, run: Callable[..., jax.Array], sizes: np.ndarray) -> None:
        """Compares rows of some experts, their first and last among them, with products in float32."""
        used = np.flatnonzero(sizes)
        experts = np.append(used[np.linspace(0, len(used) - 1, 7).astype(int)], np.argmax(sizes))
        starts = np.cumsum(sizes) - sizes
        rows = np.stack([starts[e] + np.linspace(0, sizes[e] - 1, 16).astype(int) for e in experts])
        poison = jnp.full((self.case.rows, self.case.n), jnp.nan, jnp.bfloat16)  # memory that the output may get
        poison.block_until_ready().delete()
        out = run(self.x, self.w[0], jnp.asarray(sizes, jnp.int32))
        error = float(_error(out, self.x, self.w[0], jnp.asarray(experts), jnp.asarray(rows)))
        if not error < TOLERANCE:  # NaN, too
            raise RuntimeError(f"its result is wrong: error {error:.1e}")


class Rotation:
    """A compiled function that takes its next arguments from a list whenever it is called: what a profiler can time."""

    def __init__(self, run: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> None:
        self._run, self._calls, self._count = run, calls, 0

    def __call__(self) -> Any:
        self._count += 1
        return self._run(*self._calls[self._count % len(self._calls)])

    trace = lower = __call__  # never called; the profiler would jit what lacks them


def kernel_us(call: Callable[[], jax.Array], iterations: int) -> list[float]:
    """Microseconds of each of `iterations` calls, summed over its kernels, by CUPTI.

    Raises:
      RuntimeError: another profiler is attached, or not every call launched the same kernels.
    """
    from jax.experimental.mosaic.gpu import profiler  # imports what only GPUs need

    # Detaching CUPTI after each measurement (`finalize`) takes time, and threads that compile may be in its way.
    _, milliseconds = profiler.Cupti(finalize=False).measure(call, iterations=iterations)()
    if not milliseconds:
        raise RuntimeError("CUPTI saw no kernel")
    return [1e3 * each for each in milliseconds]


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(seed: jax.typing.ArrayLike, shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
    """bfloat16, of standard deviation `scale`."""
    draw = jax.random.normal(jax.random.key(seed, impl="rbg"), shape, jnp.bfloat16)
    return (draw * scale).astype(jnp.bfloat16)


@functools.partial(jax.jit, compiler_options=UNTUNED)
def _error(out: jax.Array, x: jax.Array, w: jax.Array, experts: jax.Array, rows: jax.Array) -> jax.Array:
    """Of `experts [S]` and their `rows [S, R]`, by norms; NaN if there is one anywhere in the output."""

    def expected(sample: tuple[jax.Array, jax.Array]) -> jax.Array:
        expert, row = sample
        product = jnp.dot(x[row].astype(jnp.float32), w[expert].astype(jnp.float32).mT, precision="highest")
        return product if w.ndim == 3 else jax.nn.silu(product[:, 0]) * product[:, 1]  # [R, n]

    right = jax.lax.map(expected, (experts, rows))
    error = jnp.linalg.norm(out[rows].astype(jnp.float32) - right) / jnp.linalg.norm(right)
    return jnp.where(jnp.isnan(out).any(), jnp.nan, error)


if __name__ == "__main__":
    sys.exit(main())
