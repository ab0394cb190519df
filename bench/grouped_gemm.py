"""The grouped GEMM on a Hopper GPU beside what people would use instead, on the same loads in one run.

    python -m bench.grouped_gemm                     # all shapes and loads, below ten minutes
    python -m bench.grouped_gemm --quick             # the table's eleven shapes, one load
    python -m bench.grouped_gemm --shapes 'qwen3*' --loads one-hot --implementations ours torch
    python -m bench.grouped_gemm --quantize fp8-block --loads balanced    # float8 operands, and float8 peers

Times are medians of the sums of a call's kernel times (by CUPTI): whatever runs on the device counts, the schedule and
the gather among it; `main` is the longest kernel alone, `stream` a call's time on the stream with all gaps (torch: in a
CUDA graph). `floor` is the larger of operations / dense rate and needed bytes / copy rate (measured here), over time.
With `--quantize` operands are quantised beforehand, scales are among the needed bytes, and results are checked against the
product of the same float8 values.
"""

import argparse
import dataclasses
import fnmatch
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from bench import roofline
from bench.environment import environment, require_hopper, result_path
from bench.operands import matrix_of, rows_of
from bench.peers import Candidate, TorchProcess, jax_peers
from bench.roofline import (
    DENSE,
    GATED,
    GATHER,
    IMPLEMENTATIONS,
    OURS,
    PEERS,
    QUANTIZATIONS,
    QUANTIZED_IMPLEMENTATIONS,
    SCALED_DENSE,
    TRITON,
    Shape,
    failure,
)
from bench.timing import ceilings, normal, times
from jax_epmoe import grouped_gemm
from jax_epmoe.quant import BLOCK, FORMATS, QuantizedArray, quantize
from jax_epmoe.tune import UNTUNED

BACKEND = "hopper"


def main() -> None:
    args = _arguments()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch's process needs memory too
    require_hopper("bench.grouped_gemm")
    with closing(Bench(args)) as bench:
        bench.run()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(shape.name for shape in roofline.SHAPES)
    parser.add_argument("--shapes", nargs="+", metavar="PATTERN", help=f"shapes that match; all are: {names}")
    parser.add_argument("--loads", nargs="+", choices=roofline.LOADS)
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS)
    parser.add_argument("--quantize", choices=QUANTIZATIONS, help="the operands' format; default: bfloat16")
    parser.add_argument("--quick", action="store_true", help="the table's shapes, Dirichlet load, fewer peers' tiles")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="start nothing after (560; quick: 150)")
    parser.add_argument("--jobs", type=int, default=6, help="functions to compile at a time")
    parser.add_argument("--output", type=Path, help="default: a file in bench/results/ named after the device")
    args = parser.parse_args()
    shapes = roofline.SHAPES if args.shapes or not args.quick else roofline.TABLE_SHAPES
    shapes = tuple(dataclasses.replace(shape, quantize=args.quantize) for shape in shapes)
    args.shapes = [s for s in shapes if any(fnmatch.fnmatch(s.name, p) for p in args.shapes or ["*"])]
    if not args.shapes:
        parser.error("--shapes: none matches")
    args.loads = args.loads or (roofline.LOADS[:1] if args.quick else roofline.LOADS)
    implementations = QUANTIZED_IMPLEMENTATIONS if args.quantize else IMPLEMENTATIONS
    default = [name for name in implementations if not (args.quick and name == "ragged_dot")]
    if bfloat16_only := [key for key in args.implementations or () if key not in implementations]:
        parser.error(f"--implementations: {', '.join(bfloat16_only)} cannot be had with --quantize")
    args.wanted = [name for key in args.implementations or default for name in implementations[key]]
    args.time_limit = args.time_limit or (150 if args.quick else 560)
    args.output = args.output or result_path("-".join(filter(None, ["grouped_gemm", args.quantize])))
    return args


_transpose = jax.jit(lambda w: w.mT)
_expert = jax.jit(lambda w, expert: w[expert])
_quantize = jax.jit(quantize, static_argnums=1)


class Inputs:
    """One case's arrays, as many copies of x and of the sizes as it takes to find nothing in the L2."""

    def __init__(self, shape: Shape, load: str, names: set[str]) -> None:
        self.shape = shape
        self.group_sizes = roofline.group_sizes(load, shape.rows, shape.experts)
        self.rotation = roofline.rotation(shape, self.group_sizes)
        self.iterations = roofline.iterations(shape, len(self.rotation))
        self.index = roofline.row_index(shape.tokens, self.group_sizes)
        copies = range(len(self.rotation))
        format = FORMATS[shape.quantize] if shape.quantize else None

        def rows(seed: int, count: int) -> jax.Array | QuantizedArray:
            x = normal(seed, (count, shape.k))
            return _quantize(x, format.activations) if format else x

        w = normal(0, (shape.experts, shape.n, shape.k), shape.k**-0.5)
        w = _quantize(w, format.weights) if format else w
        self.arrays: dict[str, list[Any]] = {
            "x": [rows(2 * i + 1, shape.rows) for i in copies],
            "tokens": [rows(2 * i + 2, shape.tokens) if shape.is_up else None for i in copies],
            "index": [jnp.asarray(self.index)] * len(copies),
            "sizes": [jnp.asarray(sizes) for sizes in self.rotation],
            "w": [w] * len(copies),
            "w_transposed": [_transpose(w) if "w_transposed" in names else None] * len(copies),
            "one_w": [_expert(w, i % shape.experts) if "one_w" in names else None for i in copies],
        }
        jax.block_until_ready(self.arrays)

    def of(self, candidate: Candidate) -> list[tuple[jax.Array, ...]]:
        """The arguments of consecutive runs."""
        return list(zip(*(self.arrays[name] for name in candidate.arguments), strict=True))

    def work(self, name: str) -> roofline.Work:
        if name in (DENSE, SCALED_DENSE):
            return roofline.work(self.shape, np.array([self.shape.rows]))
        index = self.index if name == GATHER else None
        return roofline.work(self.shape, self.group_sizes, gated=name == GATED, index=index)

    def error(self, candidate: Candidate, out: jax.Array) -> float:
        """Of sampled rows against float32, by norms."""
        experts, rows = roofline.samples(self.group_sizes)
        experts = np.zeros_like(experts) if candidate.name == DENSE else experts
        source = self.index[rows] if candidate.name == GATHER else rows
        x = self.arrays["tokens" if candidate.name == GATHER else "x"][0]
        got, any_nan = _read(out, rows)
        if any_nan:
            raise RuntimeError("there is NaN in its output")
        expected = np.asarray(_expected(x, self.arrays["w"][0], experts, source, candidate.name == GATED), np.float64)
        return float(np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected))


@jax.jit
def _read(out: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    return out[rows], jnp.isnan(out).any()


@partial(jax.jit, static_argnums=4, compiler_options=UNTUNED)
def _expected(x: Any, w: Any, experts: jax.Array, rows: jax.Array, gated: bool) -> jax.Array:
    def one(sample: tuple[jax.Array, jax.Array]) -> jax.Array:
        expert, index = sample
        product = jnp.dot(rows_of(x, index), matrix_of(w, expert).T, precision="highest")
        gate, up = jnp.split(product, 2, axis=1)
        return jax.nn.silu(gate) * up if gated else product

    return jax.lax.map(one, (experts, rows))  # [experts, rows, n]


def multiply(
    x: Any, w: Any, sizes: jax.Array, index: jax.Array | None = None, *, gated: bool = False, backend: str
) -> Any:
    """`grouped_gemm` of arrays, or of quantised ones; with `gated`, half of w's n is gate's and half up's."""
    if gated:
        w = jax.tree.map(_gate_and_up, w)
    options: dict[str, Any] = {"row_index": index, "activation": "silu" if gated else None, "backend": backend}
    if isinstance(x, QuantizedArray):
        return grouped_gemm(x.values, w.values, sizes, x_scale=x.scales, w_scale=w.scales, **options)
    return grouped_gemm(x, w, sizes, **options)


def _gate_and_up(array: jax.Array) -> jax.Array:
    """Values or scales of `[experts, n, k]` for `[experts, 2, n / 2, k]`; both halves get a scale that the whole matrix has."""
    if array.ndim == 1:
        return jnp.broadcast_to(array[:, None], (len(array), 2))
    return array.reshape(len(array), 2, array.shape[1] // 2, *array.shape[2:])


def ours(shape: Shape) -> list[Candidate]:
    """Ours: plain; the same in Triton; the gated pair over the same weights; the plain product with its rows gathered.

    Blocks of weights that gate and up would share leave the gated pair out.
    """
    plain = partial(multiply, backend=BACKEND)
    candidates = [Candidate(OURS, plain, ("x", "w", "sizes"))]
    candidates.append(Candidate(TRITON, partial(multiply, backend="triton"), ("x", "w", "sizes")))
    if shape.is_up and not (shape.quantize == "fp8-block" and shape.n % (2 * BLOCK)):
        candidates.append(Candidate(GATED, partial(plain, gated=True), ("x", "w", "sizes")))
    if shape.is_up:
        candidates.append(Candidate(GATHER, plain, ("tokens", "w", "sizes", "index")))
    return candidates


class Bench:
    """One run: what it was asked for, what it has seen, the functions that it has compiled."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.deadline = time.monotonic() + args.time_limit
        self.compiled: dict[tuple[str, str, str], Any] = {}
        self.pool = ThreadPoolExecutor(args.jobs)
        asked = [name for name in (*roofline.TORCH_PEERS, SCALED_DENSE) if name in args.wanted]
        self.torch, self.torch_peers = TorchProcess() if asked else None, asked
        self.result: dict[str, Any] = {"format": 1, **environment(), "quantize": args.quantize, "cases": []}

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        if self.torch:
            self.torch.close()

    def run(self) -> None:
        if self.torch:
            self.torch.connect()
        versions = self.torch.told_versions() if self.torch else {}
        here = {name: version for name in ("tokamax", "jax-triton", "triton") if (version := roofline.version(name))}
        self.result["peer_versions"] = {**versions, **here}
        self.result["ceilings"] = self.ceilings()
        print(roofline.head(self.result))
        cases = [(shape, load) for load in self.args.loads for shape in self.args.shapes]
        for number, (shape, load) in enumerate(tqdm(cases, desc="cases", unit="case")):
            if time.monotonic() > self.deadline:
                left_out = f"{len(cases) - number} of {len(cases)} cases left out"
                tqdm.write(f"time limit of {self.args.time_limit:.0f} s: {left_out}")
                break
            try:
                self.result["cases"].append(self.case(shape, load))
            except Exception as error:  # memory, or the device is lost: what is there stays
                tqdm.write(f"{shape.name}, {load}: {failure(error)['failed']}")
                continue
            tqdm.write(roofline.case_table(self.result["cases"][-1]))
            roofline.save(self.result, self.args.output)
        print(f"\n{roofline.head(self.result)}\n{roofline.summary_table(self.result)}")
        if self.result["cases"]:
            roofline.try_plot(roofline.plot, self.result, self.args.output)

    def ceilings(self) -> dict[str, Any]:
        quantized = self.args.quantize is not None
        asked = {"ceilings": {"quantized": quantized}}
        return ceilings(self.torch.ask(asked) if self.torch else {"failed": "not asked for"}, quantized=quantized)

    def case(self, shape: Shape, load: str) -> dict[str, Any]:
        """Times everything on one shape and load; its arrays are gone when this returns."""
        candidates, results = jax_peers(shape, self.args.wanted, self.args.quick)
        candidates = [c for c in ours(shape) if c.name in self.args.wanted] + candidates
        if DENSE in self.args.wanted:
            candidates.append(Candidate(DENSE, lambda x, w: jnp.dot(x, w.T), ("x", "one_w"), autotunes=True))
        inputs = Inputs(shape, load, {name for candidate in candidates for name in candidate.arguments})
        results |= self.ask_torch(inputs)
        list(self.pool.map(partial(self.compile, inputs), [c for c in candidates if not c.autotunes]))
        for candidate in candidates:
            if candidate.name in PEERS and time.monotonic() > self.deadline:
                results.setdefault(candidate.name, {"failed": "left out: time limit"})
                continue
            seen = [self.measure(candidate, inputs), *filter(None, [results.get(candidate.name)])]
            results[candidate.name] = min(seen, key=roofline.rank)
        rated = {
            name: roofline.rate(results[name], inputs.work(name), self.result["ceilings"])
            for name in (OURS, GATED, GATHER, *PEERS, DENSE, SCALED_DENSE)
            if name in results
        }
        return {
            "shape": shape.name,
            "load": load,
            **{name: getattr(shape, name) for name in ("tokens", "rows", "experts", "k", "n")},
            "group_sizes": inputs.group_sizes.tolist(),
            "copies": len(inputs.rotation),
            "results": rated,
        }

    def ask_torch(self, inputs: Inputs) -> dict[str, Any]:
        if not self.torch:
            return {}
        sizes, shape = [each.tolist() for each in inputs.rotation], inputs.shape
        request = {
            "sizes": sizes,
            "k": shape.k,
            "n": shape.n,
            "iterations": inputs.iterations,
            "peers": self.torch_peers,
        }
        answer = self.torch.ask({"products": {**request, "quantized": shape.quantize is not None}})
        return dict.fromkeys(self.torch_peers, answer) if "failed" in answer else answer

    def compile(self, inputs: Inputs, candidate: Candidate) -> Any:
        """The function, compiled and called once (Pallas may compile then), or why not; once for each shape."""
        key = (inputs.shape.name, candidate.name, candidate.config)
        if key not in self.compiled:
            arguments = inputs.of(candidate)[0]
            try:
                compiled = jax.jit(candidate.function).lower(*arguments).compile()
                jax.block_until_ready(compiled(*arguments))
                self.compiled[key] = compiled
            except Exception as error:
                self.compiled[key] = failure(error)
        return self.compiled[key]

    def measure(self, candidate: Candidate, inputs: Inputs) -> dict[str, Any]:
        """Checks, then times; memory that the output may get holds NaN before."""
        compiled, arguments = self.compile(inputs, candidate), inputs.of(candidate)
        if isinstance(compiled, dict):
            return compiled
        try:
            n = inputs.shape.n // 2 if candidate.name == GATED else inputs.shape.n
            jnp.full((inputs.shape.rows, n), jnp.nan, jnp.bfloat16).block_until_ready().delete()
            error = inputs.error(candidate, compiled(*arguments[0]))
            return {**times(compiled, arguments, inputs.iterations), "error": error, "config": candidate.config}
        except Exception as problem:
            return failure(problem)


if __name__ == "__main__":
    main()
