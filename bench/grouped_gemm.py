"""The grouped GEMM on a Hopper GPU beside what people would use instead, on the same loads in one run.

    python -m bench.grouped_gemm                     # all shapes and loads, below ten minutes
    python -m bench.grouped_gemm --quick             # the table's eleven shapes, one load
    python -m bench.grouped_gemm --shapes 'qwen3*' --loads one-hot --implementations ours torch

Times are medians of the sums of a call's kernel times (by CUPTI): whatever runs on the device counts, the schedule and
the gather among it; `main` is the longest kernel alone, `stream` a call's time on the stream with all gaps (torch: in a
CUDA graph). `floor` is the larger of operations / dense rate and needed bytes / copy rate (measured here), over time.
"""

import argparse
import fnmatch
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from bench import roofline
from bench.environment import environment
from bench.peers import ROOT, Candidate, TorchProcess, jax_peers
from bench.roofline import DENSE, GATED, GATHER, IMPLEMENTATIONS, OURS, PEERS, Shape, failure
from jax_epmoe import grouped_gemm

BACKEND = "hopper"


def main() -> None:
    args = _arguments()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch's process needs memory too
    device = jax.devices()[0]
    if device.platform != "gpu" or getattr(device, "compute_capability", "") != "9.0":
        print(f"bench.grouped_gemm needs an NVIDIA Hopper GPU; this is {device.device_kind}", file=sys.stderr)
        sys.exit(2)
    bench = Bench(args)
    try:
        bench.run()
    finally:
        bench.close()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(shape.name for shape in roofline.SHAPES)
    parser.add_argument("--shapes", nargs="+", metavar="PATTERN", help=f"shapes that match; all are: {names}")
    parser.add_argument("--loads", nargs="+", choices=roofline.LOADS)
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS)
    parser.add_argument("--quick", action="store_true", help="the table's shapes, Dirichlet load, fewer peers' tiles")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="start nothing after (560; quick: 150)")
    parser.add_argument("--jobs", type=int, default=6, help="functions to compile at a time")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "grouped_gemm.json")
    args = parser.parse_args()
    shapes = roofline.SHAPES if args.shapes or not args.quick else roofline.TABLE_SHAPES
    args.shapes = [s for s in shapes if any(fnmatch.fnmatch(s.name, p) for p in args.shapes or ["*"])]
    if not args.shapes:
        parser.error("--shapes: none matches")
    args.loads = args.loads or (roofline.LOADS[:1] if args.quick else roofline.LOADS)
    default = [name for name in IMPLEMENTATIONS if not (args.quick and name == "ragged_dot")]
    args.wanted = [name for key in args.implementations or default for name in IMPLEMENTATIONS[key]]
    args.time_limit = args.time_limit or (150 if args.quick else 560)
    return args


_transpose = jax.jit(lambda w: w.mT)
_expert = jax.jit(lambda w, expert: w[expert])


class Inputs:
    """One case's arrays, as many copies of x and of the sizes as it takes to find nothing in the L2."""

    def __init__(self, shape: Shape, load: str, names: set[str]) -> None:
        self.shape = shape
        self.group_sizes = roofline.group_sizes(load, shape.rows, shape.experts)
        self.rotation = roofline.rotation(shape, self.group_sizes)
        self.iterations = roofline.iterations(shape, len(self.rotation))
        self.index = roofline.row_index(shape.tokens, self.group_sizes)
        copies = range(len(self.rotation))
        w = _normal(0, (shape.experts, shape.n, shape.k), shape.k**-0.5)
        self.arrays: dict[str, list[Any]] = {
            "x": [_normal(2 * i + 1, (shape.rows, shape.k)) for i in copies],
            "tokens": [_normal(2 * i + 2, (shape.tokens, shape.k)) if shape.is_up else None for i in copies],
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
        if name == DENSE:
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


@partial(jax.jit, static_argnums=(1, 2))
def _normal(seed: jax.typing.ArrayLike, shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
    return (jax.random.normal(jax.random.key(seed, impl="rbg"), shape, jnp.bfloat16) * scale).astype(jnp.bfloat16)


@jax.jit
def _read(out: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    return out[rows], jnp.isnan(out).any()


@partial(jax.jit, static_argnums=4)
def _expected(x: jax.Array, w: jax.Array, experts: jax.Array, rows: jax.Array, gated: bool) -> jax.Array:
    def one(sample: tuple[jax.Array, jax.Array]) -> jax.Array:
        expert, index = sample
        product = jnp.dot(x[index].astype(jnp.float32), w[expert].astype(jnp.float32).T, precision="highest")
        gate, up = jnp.split(product, 2, axis=1)
        return jax.nn.silu(gate) * up if gated else product

    return jax.lax.map(one, (experts, rows))  # [experts, rows, n]


def ours(shape: Shape) -> list[Candidate]:
    """Our three: plain; the gated pair over the same weights; the plain product with its rows gathered."""
    half = (shape.experts, 2, shape.n // 2, shape.k)
    plain = partial(grouped_gemm, backend=BACKEND)
    candidates = [Candidate(OURS, plain, ("x", "w", "sizes"))]
    if shape.is_up:
        candidates += [
            Candidate(GATED, lambda x, w, s: plain(x, w.reshape(half), s, activation="silu"), ("x", "w", "sizes")),
            Candidate(GATHER, lambda x, w, s, i: plain(x, w, s, row_index=i), ("tokens", "w", "sizes", "index")),
        ]
    return candidates


class Rotation:
    """A compiled function that takes its next arguments from a list whenever it is called: what `measure` can time."""

    def __init__(self, compiled: Callable[..., Any], arguments: Sequence[tuple[jax.Array, ...]]) -> None:
        self._compiled, self._arguments, self._calls = compiled, arguments, 0

    def __call__(self) -> Any:
        self._calls += 1
        return self._compiled(*self._arguments[self._calls % len(self._arguments)])

    trace = lower = __call__  # never called; `measure` would jit what lacks them


def times(compiled: Callable[..., Any], arguments: Sequence[tuple[jax.Array, ...]], iterations: int) -> dict[str, Any]:
    """Microseconds a call: all kernels, the longest kernel, and on the stream."""
    stream = _stream_us(compiled, arguments, iterations)
    result: dict[str, Any] = {"device_us": stream["stream_us"], "main_us": None, **stream, "method": "stream"}
    try:
        result.update(_kernel_us(compiled, arguments, iterations))
    except Exception as error:  # another profiler is attached, or not every call launched the same kernels
        tqdm.write(f"  no kernel times: {failure(error)['failed']}")
    return result


def _stream_us(
    compiled: Callable[..., Any], arguments: Sequence[tuple[jax.Array, ...]], iterations: int
) -> dict[str, float]:
    """Calls back to back. Where `dispatch_us` comes near `stream_us`, it is the host that the calls wait for."""
    call, runs = Rotation(compiled, arguments), []
    jax.block_until_ready(call())
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(iterations):
            out = call()
        dispatched = time.perf_counter()
        jax.block_until_ready(out)
        runs.append((time.perf_counter() - start, dispatched - start))
    stream, dispatch = (1e6 * value / iterations for value in min(runs))
    return {"stream_us": stream, "dispatch_us": dispatch}


def _kernel_us(
    compiled: Callable[..., Any], arguments: Sequence[tuple[jax.Array, ...]], iterations: int
) -> dict[str, Any]:
    from jax.experimental.mosaic.gpu import profiler

    _, runs = profiler.measure(Rotation(compiled, arguments), aggregate=False, iterations=iterations)()
    if not runs:
        raise RuntimeError("CUPTI saw no kernel")
    totals = [1e3 * sum(ms for _, ms in run) for run in runs]
    each = [1e3 * statistics.median(kernel) for kernel in zip(*([ms for _, ms in run] for run in runs), strict=True)]
    names = [name for name, _ in runs[0]]
    return {
        "device_us": statistics.median(totals),
        "device_us_min": min(totals),
        "device_us_max": max(totals),
        "main_us": max(each),
        "kernels": [{"name": name[:60], "us": us} for name, us in zip(names, each, strict=True)][:20],
        "method": "kernel times",
    }


class Bench:
    """One run: what it was asked for, what it has seen, the functions that it has compiled."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.deadline = time.monotonic() + args.time_limit
        self.compiled: dict[tuple[str, str, str], Any] = {}
        self.pool = ThreadPoolExecutor(args.jobs)
        asked = [name for name in roofline.TORCH_PEERS if name in args.wanted]
        self.torch, self.torch_peers = TorchProcess() if asked else None, asked
        self.result: dict[str, Any] = {"format": 1, **environment(), "cases": []}

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        if self.torch:
            self.torch.close()

    def run(self) -> None:
        if self.torch:
            self.torch.connect()
        versions = self.torch.versions if self.torch else {}
        if "failed" in versions:
            print(f"torch's peers: {versions['failed']}")
            versions = {}
        tokamax = roofline.version("tokamax")
        self.result["peer_versions"] = {**versions, **({"tokamax": tokamax} if tokamax else {})}
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
            self.plot()

    def ceilings(self) -> dict[str, Any]:
        """The dense bf16 rate and the copy rate: the better of JAX's and torch's."""
        a, b = (_normal(i, (8192, 8192)) for i in range(2))
        big = _normal(2, (2**29,))
        dense = times(jax.jit(jnp.dot).lower(a, b).compile(), [(a, b)], 21)["device_us"]
        copy = times(jax.jit(jnp.negative).lower(big).compile(), [(big,)], 11)["device_us"]
        seen = {"jax": {"dense_tflops": 2 * 8192**3 / dense * 1e-6, "copy_gbs": 2 * big.nbytes / copy * 1e-3}}
        answer = self.torch.ask({"ceilings": True}) if self.torch else {"failed": "not asked for"}
        if "failed" not in answer:
            seen["torch"] = answer
        return {key: max(each[key] for each in seen.values()) for key in ("dense_tflops", "copy_gbs")} | {"seen": seen}

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
            for name in (OURS, GATED, GATHER, *PEERS, DENSE)
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
        request = {"sizes": sizes, "k": shape.k, "n": shape.n, "iterations": inputs.iterations}
        answer = self.torch.ask({**request, "peers": self.torch_peers})
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

    def plot(self) -> None:
        path = self.args.output.with_suffix(".png")
        try:
            roofline.plot(self.result, path)
            print(f"wrote {self.args.output} and {path}")
        except ImportError:
            print(f"wrote {self.args.output}; no plot: matplotlib is not installed")


if __name__ == "__main__":
    main()
