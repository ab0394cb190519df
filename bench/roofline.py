"""What a grouped GEMM has to do at the shapes of real models, the time that this must take, and how results are shown.

Nothing here needs JAX or torch: both processes of `bench.grouped_gemm` share it.
"""

import importlib.metadata
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LOADS = ("dirichlet", "balanced", "one-hot")
# Those of `jax_epmoe.quant.FORMATS` that products and models are measured in; static scales are the same work.
QUANTIZATIONS = ("fp8-block", "fp8-channel", "fp8-tensor")
OURS, GATED, GATHER, DENSE = "ours", "ours gated", "ours gather", "dense (jnp.dot)"
TORCH, DEEPGEMM, MGPU, TOKAMAX, RAGGED_DOT, TRITON = (
    "torch._grouped_mm", "DeepGEMM", "jax ragged_dot_mgpu", "tokamax", "lax.ragged_dot", "ours in Triton",
)  # fmt: skip
# Both have a scale a row and a column, whatever the format of ours; the second leaves sums to the tensor cores' few bits.
SCALED, SCALED_FAST, SCALED_DENSE = "torch._scaled_grouped_mm", "torch scaled, fast sums", "dense (torch._scaled_mm)"
TORCH_PEERS = (TORCH, DEEPGEMM, SCALED, SCALED_FAST)
PEERS = (*TORCH_PEERS, MGPU, TOKAMAX, RAGGED_DOT, TRITON)
# What the command line calls them.
IMPLEMENTATIONS = {
    "ours": (OURS, GATED, GATHER),
    "torch": (TORCH,),
    "deepgemm": (DEEPGEMM,),
    "mgpu": (MGPU,),
    "tokamax": (TOKAMAX,),
    "ragged_dot": (RAGGED_DOT,),
    "triton": (TRITON,),
    "dense": (DENSE,),
}
QUANTIZED_IMPLEMENTATIONS = {
    "ours": (OURS, GATED, GATHER),
    "torch": (SCALED, SCALED_FAST),
    "deepgemm": (DEEPGEMM,),
    "triton": (TRITON,),
    "dense": (SCALED_DENSE,),
}

TOLERANCE = 5e-3
_ELEMENT = 2  # bytes, bfloat16
_BLOCK = 128  # values that share a scale, along k and, of weights, along n
_UNCACHED_BYTES = 200e6  # four times the L2


class Model(NamedTuple):
    hidden: int
    intermediate: int
    experts: int
    rows_per_token: Fraction


MODELS = {
    "coder-ep8": Model(5120, 1536, 20, Fraction(6, 8)),  # DeepSeek-Coder-V2, a rank of EP8: 20 of 160 experts, top 6
    "coder-tp8": Model(5120, 192, 160, Fraction(6)),  # the same under TP8
    "qwen3-30b": Model(2048, 768, 128, Fraction(8)),  # Qwen3-30B-A3B on one GPU
    "mixtral": Model(4096, 14336, 8, Fraction(2)),  # Mixtral 8x7B on one GPU
    "olmoe": Model(2048, 1024, 64, Fraction(8)),  # OLMoE-1B-7B on one GPU
    "v3-4": Model(7168, 2048, 4, Fraction(1)),  # 4 experts of DeepSeek-V3, of which DeepGEMM publishes figures
}
# Model, tokens, projections. The first eleven shapes are those of the table that the project measures itself by.
_TABLE = (
    ("coder-ep8", 8192, "up down"), ("coder-ep8", 32768, "up"), ("coder-tp8", 8192, "up down"),
    ("qwen3-30b", 8192, "up down"), ("mixtral", 8192, "up"), ("coder-ep8", 256, "up"), ("qwen3-30b", 64, "up down"),
)  # fmt: skip
_LARGE = (("v3-4", 32768, "up down"),)
_DECODE = tuple((model, tokens, "up down") for model in ("coder-ep8", "qwen3-30b", "olmoe") for tokens in (16, 64, 256))


@dataclass(frozen=True)
class Shape:
    """`rows` rows over `experts` groups, k -> n; n counts gate and up together; `quantize`: one of `QUANTIZATIONS`, or None."""

    model: str
    tokens: int
    projection: str
    quantize: str | None = None

    @property
    def name(self) -> str:
        return f"{self.model}-{self.tokens}-{self.projection}"

    @property
    def rows(self) -> int:
        return int(self.tokens * MODELS[self.model].rows_per_token)

    @property
    def experts(self) -> int:
        return MODELS[self.model].experts

    @property
    def k(self) -> int:
        model = MODELS[self.model]
        return model.hidden if self.is_up else model.intermediate

    @property
    def n(self) -> int:
        model = MODELS[self.model]
        return 2 * model.intermediate if self.is_up else model.hidden

    @property
    def is_up(self) -> bool:
        """The first product of an expert: the one with a gate and a gather."""
        return self.projection == "up"

    @property
    def is_decode(self) -> bool:
        return self.tokens <= 256


def _shapes(entries: Iterable[tuple[str, int, str]]) -> tuple[Shape, ...]:
    return tuple(
        Shape(model, tokens, projection) for model, tokens, projections in entries for projection in projections.split()
    )


TABLE_SHAPES = _shapes(_TABLE)
SHAPES = tuple(dict.fromkeys(TABLE_SHAPES + _shapes(_LARGE + _DECODE)))


def group_sizes(load: str, rows: int, experts: int) -> np.ndarray:
    """`[experts]` int32 that sum to `rows`: even, shares drawn from a Dirichlet(2), or all on one expert."""
    if load == "balanced":
        sizes = np.full(experts, rows // experts)
        sizes[: rows % experts] += 1
    elif load == "dirichlet":
        rng = np.random.default_rng((rows, experts))
        sizes = rng.multinomial(rows, rng.dirichlet(np.full(experts, 2.0)))
    elif load == "one-hot":
        sizes = np.zeros(experts, np.int64)
        sizes[experts // 2] = rows
    else:
        raise ValueError(f"load is {load!r}; it should be one of {', '.join(LOADS)}")
    return sizes.astype(np.int32)


def row_index(tokens: int, sizes: np.ndarray) -> np.ndarray:
    """`[rows]` int32: each expert's tokens, rising; drawn without repetition where there are enough."""
    rng = np.random.default_rng((tokens, len(sizes)))
    groups = [np.sort(rng.choice(tokens, size, replace=size > tokens)) for size in sizes if size]
    return np.concatenate(groups).astype(np.int32)


class Work(NamedTuple):
    """What cannot be avoided: operations, and bytes when each input is read and each output written once."""

    flops: int
    bytes: int

    def floor_us(self, dense_tflops: float, copy_gbs: float) -> float:
        """The larger of the times that the two take at the rates given (TFLOP/s; GB/s, read and written)."""
        return max(self.flops / dense_tflops * 1e-6, self.bytes / copy_gbs * 1e-3)


def work(shape: Shape, sizes: np.ndarray, *, gated: bool = False, index: np.ndarray | None = None) -> Work:
    """`product_work` of a shape."""
    return product_work(sizes, shape.k, shape.n, gated=gated, index=index, quantize=shape.quantize)


def product_work(
    sizes: np.ndarray,
    k: int,
    n: int,
    *,
    gated: bool = False,
    index: np.ndarray | None = None,
    quantize: str | None = None,
    quantize_out: bool = False,
) -> Work:
    """Counts the weights of experts that have rows, and with `index` the tokens that some row is a copy of.

    `quantize`: the format of both operands, and with `quantize_out` of the output; otherwise bfloat16.

    Example: sizes (3, 0, 1), k 16, n 8: 2 * 4 * 16 * 8 = 1024 operations, 2 * (4*16 + 2*8*16 + 4*8) = 704 bytes.
    """
    rows, used = int(sizes.sum()), int(np.count_nonzero(sizes))
    x_rows, index_bytes = (rows, 0) if index is None else (len(np.unique(index)), index.nbytes)
    out_columns = n // 2 if gated else n
    x_bytes, w_bytes = operand_bytes(x_rows, k, quantize), used * operand_bytes(n, k, quantize, weights=True)
    out_bytes = operand_bytes(rows, out_columns, quantize if quantize_out else None)
    return Work(2 * rows * n * k, x_bytes + w_bytes + out_bytes + index_bytes)


def operand_bytes(rows: int, k: int, quantize: str | None, *, weights: bool = False) -> int:
    """Of `[rows, k]` activations, or of an expert's weights (their rows are its output channels), scales included."""
    if quantize is None:
        return _ELEMENT * rows * k
    scales = {
        "fp8-block": -(-rows // (_BLOCK if weights else 1)) * -(-k // _BLOCK),
        "fp8-channel": rows,
        "fp8-tensor": 1,
        "fp8-tensor-static": 1,
    }
    return rows * k + 4 * scales[quantize]


def rotation(shape: Shape, sizes: np.ndarray) -> list[np.ndarray]:
    """`sizes` for consecutive runs, each time over other experts, until together they read four times the L2."""
    copies = min(shape.experts, math.ceil(_UNCACHED_BYTES / work(shape, sizes).bytes))
    return [np.roll(sizes, i * max(1, shape.experts // copies)) for i in range(copies)]


def iterations(shape: Shape, copies: int) -> int:
    """How many runs to time: whole turns through the copies; fewer where outputs, which all wait, are large."""
    least = 10 if shape.rows * shape.n > 2**28 else 21
    return -(-least // copies) * copies


def samples(sizes: np.ndarray, experts: int = 8, rows: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Which rows to check: `experts` experts `[experts]` and their rows `[experts, rows]`, with repetition where few.

    The first and last expert that have rows are among them, the most and the least crowded, and of each the ends.
    """
    rng = np.random.default_rng(0)
    used = np.flatnonzero(sizes)
    wanted = [used[0], used[-1], used[np.argmax(sizes[used])], used[np.argmin(sizes[used])]]
    chosen = np.concatenate([wanted, rng.choice(used, experts - len(wanted))]).astype(np.int32)
    starts = np.cumsum(sizes) - sizes
    within = [np.concatenate([[0, sizes[e] - 1], rng.integers(0, sizes[e], rows - 2)]) for e in chosen]
    return chosen, np.stack([starts[e] + offsets for e, offsets in zip(chosen, within, strict=True)]).astype(np.int32)


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def failure(error: BaseException) -> dict[str, str]:
    """A result that says in one line why there is none."""
    if isinstance(error, ModuleNotFoundError):
        return {"failed": f"not installed: {error.name}"}
    lines = str(error).strip().splitlines() or [""]
    return {"failed": f"{type(error).__name__}: {lines[0][:140]}"}


def rate(result: dict[str, Any], todo: Work, ceilings: dict[str, float]) -> dict[str, Any]:
    """A result with its rates, its floor, and the share of the floor that it reaches (whole; main kernel)."""
    if "failed" in result:
        return result
    floor, us = todo.floor_us(ceilings["dense_tflops"], ceilings["copy_gbs"]), result["device_us"]
    return {
        **result,
        "flops": todo.flops,
        "bytes": todo.bytes,
        "floor_us": floor,
        "tflops": todo.flops / us * 1e-6,
        "gbs": todo.bytes / us * 1e-3,
        "share": floor / us,
        "share_main": floor / result["main_us"] if result.get("main_us") else None,
    }


def rank(result: dict[str, Any], tolerance: float = TOLERANCE) -> tuple[bool, bool, float]:
    """Orders results: right before wrong (NaN is) before failed, then by time."""
    return "failed" in result, not result.get("error", 1) < tolerance, result.get("device_us", math.inf)


def tolerance(name: str) -> float:
    """Which errors are right: sums that are left to tensor cores may be off by less than a rounding to float8 (2.6e-2)."""
    return 2e-2 if name == SCALED_FAST else TOLERANCE


def best_of(
    results: dict[str, dict[str, Any]], tolerance: Callable[[str], float] = tolerance
) -> tuple[str, dict[str, Any]] | None:
    """The fastest of the results whose numbers are right, and its name."""
    best = min(results.items(), key=lambda item: rank(item[1], tolerance(item[0])), default=None)
    return best if best and rank(best[1], tolerance(best[0]))[:2] == (False, False) else None


def best_peer(case: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The fastest peer whose numbers are right."""
    return best_of({name: result for name, result in case["results"].items() if name in PEERS})


def ratio(case: dict[str, Any], key: str = "device_us") -> float | None:
    """The best peer's time over ours."""
    ours, best = case["results"].get(OURS, {}), best_peer(case)
    return best[1][key] / ours[key] if best and "failed" not in ours and key in ours else None


def head(result: dict[str, Any]) -> str:
    """What it ran on, with which versions, and the two ceilings."""
    versions = {**result["versions"], **result["peer_versions"]}
    ceilings = result["ceilings"]
    return (
        f"{result['device']}; {', '.join(f'{name} {version}' for name, version in versions.items())}\n"
        f"{precision(result)}; ceilings: {ceilings['dense_tflops']:.0f} TFLOP/s dense, {ceilings['copy_gbs']:.0f} GB/s copied"
    )


def precision(result: dict[str, Any]) -> str:
    """Of a run's weights: their format, or bf16."""
    return result.get("quantize") or "bf16"


def case_table(case: dict[str, Any]) -> str:
    """One case: a line for each implementation."""
    sizes = case["group_sizes"]
    lines = [
        f"{case['shape']}, {case['load']}: {case['rows']} rows, {case['experts']} experts of "
        f"{min(sizes)}-{max(sizes)}, {case['k']} -> {case['n']}",
        f"  {'':26}{'device us':>10}{'main':>9}{'stream':>9}{'TFLOP/s':>9}{'GB/s':>7}{'floor':>7}{'error':>9}  ",
    ]
    for name, result in case["results"].items():
        if "failed" in result:
            lines.append(f"  {name:26}{result['failed']}")
            continue
        wrong = "" if result["error"] < tolerance(name) else "  WRONG"
        lines.append(
            f"  {name:26}{result['device_us']:10.1f}{number(result['main_us'], 9)}{number(result['stream_us'], 9)}"
            f"{result['tflops']:9.1f}{result['gbs']:7.0f}{result['share']:7.0%}{result['error']:9.1e}"
            f"  {result.get('config') or ''}{wrong}"
        )
    return "\n".join(lines)


def summary_table(result: dict[str, Any]) -> str:
    """One line a case: ours, its share of the floor, the best peer, what the gate and the gather cost."""
    lines = [
        f"{'shape':22}{'load':10}{'us':>8}{'TFLOP/s':>8}{'GB/s':>6}{'floor':>6}{'main':>6}{'peers':>7}"
        f"{'gate':>7}{'gather':>7}  best peer"
    ]
    for case in result["cases"]:
        results = case["results"]
        ours, best = results.get(OURS, {"failed": "not run"}), best_peer(case)
        line = f"{case['shape']:22}{case['load']:10}"
        if "failed" in ours:
            lines.append(f"{line}{ours['failed'][:60]}")
            continue
        line += f"{ours['device_us']:8.1f}{ours['tflops']:8.1f}{ours['gbs']:6.0f}{ours['share']:6.0%}"
        line += f"{number(ours['share_main'], 6, '.0%')}{number(ratio(case), 7, '.2f')}"
        for name in (GATED, GATHER):
            other = results.get(name, {}).get("device_us")
            line += number(other / ours["device_us"] - 1 if other else None, 7, "+.0%")
        lines.append(f"{line}  {best[0] if best else '-'}")
    return "\n".join(lines)


def number(value: float | None, width: int, spec: str = ".1f") -> str:
    return f"{'-' if value is None else format(value, spec):>{width}}"


def save(result: dict[str, Any], path: Path) -> None:
    """Writes `path`, a JSON file, so that whoever reads it finds the whole of it or the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(path)


def try_plot(draw: Callable[[dict[str, Any], Path], None], result: dict[str, Any], output: Path) -> None:
    """Draws a result that was saved as `output` beside it, and says what was written."""
    path = output.with_suffix(".png")
    try:
        draw(result, path)
        print(f"wrote {output} and {path}")
    except ImportError:
        print(f"wrote {output}; no plot: matplotlib is not installed")


def plot(result: dict[str, Any], path: Path) -> None:
    """Draws the first load's cases under the roof: ours, and the best peer below or above it.

    Raises:
      ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ceilings = result["ceilings"]
    dense, copy = ceilings["dense_tflops"], ceilings["copy_gbs"]
    load = result["cases"][0]["load"]
    cases = [c for c in result["cases"] if c["load"] == load and "failed" not in c["results"].get(OURS, {"failed": ""})]
    figure, axes = pyplot.subplots(figsize=(10, 6), layout="constrained")
    intensity = np.geomspace(1, 8000, 200)
    axes.plot(intensity, np.minimum(dense, intensity * copy / 1e3), color="0.3", linewidth=1.5)
    for number, case in enumerate(cases, 1):
        ours, best = case["results"][OURS], best_peer(case)
        x = ours["flops"] / ours["bytes"]
        if best:
            axes.plot([x, x], [best[1]["tflops"], ours["tflops"]], color="0.7", linewidth=1, zorder=1)
            axes.plot(x, best[1]["tflops"], "o", color="tab:orange", markersize=6, label="best peer", zorder=2)
        axes.plot(x, ours["tflops"], "o", color="tab:blue", markersize=6, label="jax_epmoe", zorder=3)
        axes.annotate(str(number), (x, ours["tflops"]), (-4, 5), textcoords="offset points", fontsize=7, ha="right")
    names = [f"{number:2} {case['shape']}" for number, case in enumerate(cases, 1)]
    axes.text(1.02, 1, "\n".join(names), transform=axes.transAxes, fontsize=7, va="top", family="monospace")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="TFLOP/s")
    roof = f"{dense:.0f} TFLOP/s dense, {copy:.0f} GB/s copied"
    axes.set_title(
        f"Grouped GEMM, {precision(result)}, {load} load, {result['device']}: {roof}", fontsize=10, loc="left"
    )
    axes.grid(alpha=0.3, which="both")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(list(unique.values()), list(unique), loc="lower right")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
