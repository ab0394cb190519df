"""What people would use instead of our kernels: torch's libraries in a process of their own, JAX's beside ours.

`python -m bench.peers` is that process: it reads one request a line from stdin and answers each with one line of JSON,
so that neither framework disturbs the other's memory or profiler. A first line says what is installed.

    {"ceilings": true}                                             -> {"dense_tflops": ..., "copy_gbs": ...}
    {"sizes": [[...], ...], "k": ..., "n": ..., "iterations": ...} -> {"torch._grouped_mm": {...}, "DeepGEMM": {...}}
    {"layer": {...}}, the arguments of `torch_layer.layer_case`    -> {"torch layer": {...}, ...}
"""

import contextlib
import importlib
import json
import os
import queue
import statistics
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from typing import Any, NamedTuple

import numpy as np

from bench import roofline, torch_layer
from bench.roofline import DEEPGEMM, MGPU, RAGGED_DOT, TOKAMAX, TORCH, Shape, failure, version
from bench.torch_timing import graph_us, torch_times

ROOT = Path(__file__).resolve().parents[1]


class Candidate(NamedTuple):
    """A JAX function to time, the names of the arrays that it takes, and whether compiling it runs on the GPU."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[str, ...]
    config: str = ""
    autotunes: bool = False


class TileConfig(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    max_concurrent_steps: int
    grid_block_n: int


# For JAX's example, a one-warpgroup kernel: what its registers and shared memory allow, best guesses first.
PREFILL_CONFIGS = (
    TileConfig(128, 128, 64, 5, 4),
    TileConfig(128, 192, 64, 4, 4),
    TileConfig(64, 256, 64, 4, 2),
    TileConfig(128, 128, 64, 5, 1),
)
DECODE_CONFIGS = (TileConfig(64, 128, 64, 6, 1), TileConfig(64, 128, 64, 6, 4), TileConfig(64, 64, 64, 6, 4))


def jax_peers(shape: Shape, wanted: Sequence[str], quick: bool) -> tuple[list[Candidate], dict[str, Any]]:
    """The functions to time for one shape, and for each peer that has none a result that says why."""
    makers = {MGPU: _mgpu, TOKAMAX: _tokamax, RAGGED_DOT: _ragged_dot}
    candidates, failed = [], {}
    for name in filter(wanted.__contains__, makers):
        try:
            candidates += makers[name](shape, quick)
        except Exception as error:
            failed[name] = failure(error)
    return candidates, failed


def _mgpu(shape: Shape, quick: bool) -> list[Candidate]:
    module = importlib.import_module("jax.experimental.pallas.ops.gpu.ragged_dot_mgpu")
    fitting = (_narrowed(config, shape.n) for config in (DECODE_CONFIGS if shape.is_decode else PREFILL_CONFIGS))
    configs = list(dict.fromkeys(config for config in fitting if config and shape.k % config.block_k == 0))
    if not configs:
        raise NotImplementedError("no tile divides n and k")
    return [
        Candidate(MGPU, partial(_call_mgpu, module.ragged_dot, config), ("x", "w", "sizes"), "x".join(map(str, config)))
        for config in configs[: 2 if quick else None]
    ]


def _narrowed(config: TileConfig, n: int) -> TileConfig | None:
    """The configuration with the widest raster up to its own that divides n; None if not even one tile does."""
    widths = range(config.grid_block_n, 0, -1)
    return next((config._replace(grid_block_n=w) for w in widths if n % (config.block_n * w) == 0), None)


def _call_mgpu(ragged_dot: Callable[..., Any], config: TileConfig, x: Any, w: Any, sizes: Any) -> Any:
    rows = len(x)
    x = importlib.import_module("jax.numpy").pad(x, ((0, -rows % 8), (0, 0)))  # it takes rows eight at a time
    return ragged_dot(x, w, group_sizes=sizes, transpose_rhs=True, **config._asdict())[:rows]


def _tokamax(shape: Shape, quick: bool) -> list[Candidate]:
    function = importlib.import_module("tokamax").ragged_dot
    return [Candidate(TOKAMAX, lambda x, w, sizes: function(x, w, sizes), ("x", "w_transposed", "sizes"))]


def _ragged_dot(shape: Shape, quick: bool) -> list[Candidate]:
    if shape.experts > 64:
        raise NotImplementedError("skipped: it copies x once an expert, and there are more than 64")
    function = importlib.import_module("jax.lax").ragged_dot
    return [Candidate(RAGGED_DOT, function, ("x", "w_transposed", "sizes"), autotunes=True)]


class TorchProcess:
    """The other process, as seen from this one; started again (three times at most) after it dies."""

    def __init__(self) -> None:
        self._starts_left = 3
        self.versions: dict[str, Any] = {}
        self._start()

    def _start(self) -> None:
        self._starts_left -= 1
        self._process = Popen([sys.executable, "-m", "bench.peers"], cwd=ROOT, stdin=PIPE, stdout=PIPE, text=True)
        self._requests: Any = self._process.stdin
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(self._process.stdout, self._lines), daemon=True).start()

    def connect(self) -> None:
        """Waits for its first line: `versions`, or `{"failed": why}`."""
        self.versions = self._receive(180)

    def told_versions(self) -> dict[str, Any]:
        """`versions`; none, after a line that says why, where there is no torch to ask."""
        if "failed" not in self.versions:
            return self.versions
        print(f"torch's peers: {self.versions['failed']}")
        return {}

    @staticmethod
    def _read(stream: Any, lines: queue.Queue[str]) -> None:
        for line in stream:
            lines.put(line)
        lines.put("")  # it ended

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request; `{"failed": why}` if the process is missing, dies or keeps silent."""
        if "failed" in self.versions:
            return self.versions
        if self._process.poll() is not None and self._starts_left:
            self._start()
            self.connect()
        with contextlib.suppress(OSError):
            print(json.dumps(request), file=self._requests, flush=True)
        return self._receive(120)

    def _receive(self, timeout: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            self._process.kill()
            self._process.wait()
            return {"failed": f"torch's process did not answer within {timeout:.0f} s"}
        if not line:
            self._process.wait()
            self._lines.put("")
            return {"failed": f"torch's process ended with status {self._process.returncode}"}
        return json.loads(line)

    def close(self) -> None:
        """Lets the process end, and ends it if it does not."""
        with contextlib.suppress(OSError, TimeoutExpired):
            self._requests.close()
            self._process.wait(10)
        self._process.kill()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        import torch

        torch.zeros(1, device="cuda")
        torch.backends.cuda.matmul.allow_tf32 = False
    except Exception as error:
        answer(failure(error))
        return
    answer({name: found for name in ("torch", "deep_gemm", "triton", "vllm", "sglang") if (found := version(name))})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer(_torch_answer(request))
        except Exception as error:
            answer(failure(error))
        torch.cuda.empty_cache()


def _torch_answer(request: dict[str, Any]) -> dict[str, Any]:
    if "ceilings" in request:
        return _torch_ceilings()
    return torch_layer.layer_case(**request["layer"]) if "layer" in request else _torch_case(**request)


def _torch_ceilings() -> dict[str, float]:
    import torch

    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    product_us = statistics.median(graph_us([lambda: torch.mm(a, b)], 10))
    copy_us = statistics.median(graph_us([lambda: target.copy_(source)], 10))
    return {"dense_tflops": 2 * 8192**3 / product_us * 1e-6, "copy_gbs": 2 * source.nbytes / copy_us * 1e-3}


def _torch_case(sizes: list[list[int]], k: int, n: int, iterations: int, peers: list[str]) -> dict[str, Any]:
    """Times torch's peers on one case; `sizes` are those of consecutive runs."""
    import torch

    torch.manual_seed(0)
    w = torch.randn(len(sizes[0]), n, k, device="cuda", dtype=torch.bfloat16).mul_(k**-0.5)
    xs = [torch.randn(sum(each), k, device="cuda", dtype=torch.bfloat16) for each in sizes]
    results: dict[str, Any] = {}
    for name in peers:
        try:
            prepared = {TORCH: _grouped_mm, DEEPGEMM: _deep_gemm}[name](xs, w, sizes)
            error = _torch_error(prepared.read, xs[0], w, np.array(sizes[0]))
            results[name] = {**torch_times(prepared.calls, iterations), "error": error, "config": prepared.config}
        except Exception as problem:
            results[name] = failure(problem)
            torch.cuda.synchronize()  # raises, and so ends the process, if the device is lost
    return results


class Prepared(NamedTuple):
    """What to time, in turn; and the first call's output with the rows as they were given."""

    calls: Sequence[Callable[[], Any]]
    read: Callable[[], Any]
    config: str = ""


def _grouped_mm(xs: list[Any], w: Any, sizes: list[list[int]]) -> Prepared:
    """Offsets are made beforehand: to the peer's advantage."""
    import torch

    ends = [torch.tensor(np.cumsum(each), device="cuda", dtype=torch.int32) for each in sizes]
    calls = [partial(torch._grouped_mm, x, w.mT, offs=end) for x, end in zip(xs, ends, strict=True)]
    return Prepared(calls, calls[0])


def _deep_gemm(xs: list[Any], w: Any, sizes: list[list[int]]) -> Prepared:
    """Its contiguous layout: each group padded to a multiple of 128 rows beforehand, to the peer's advantage."""
    deep_gemm = importlib.import_module("deep_gemm")
    alignment = getattr(deep_gemm, "get_mk_alignment_for_contiguous_layout", lambda: 128)()
    calls, places = [], []
    for x, each in zip(xs, sizes, strict=True):
        x_padded, layout, place = _padded(x, np.array(each), alignment)
        out = x.new_full((len(x_padded), w.shape[1]), float("nan"))
        calls.append(partial(_call_deep_gemm, deep_gemm, x_padded, w, out, layout))
        places.append(place)
    return Prepared(calls, lambda: calls[0]()[places[0]], f"rows padded to {len(x_padded)}")


def _padded(x: Any, sizes: np.ndarray, alignment: int) -> tuple[Any, Any, Any]:
    """Rows with each group padded, which expert each padded row belongs to (-1: none), and where the rows went."""
    import torch

    spaces = -(-sizes // alignment) * alignment
    shift = np.repeat(np.cumsum(spaces) - spaces - (np.cumsum(sizes) - sizes), sizes)
    place = torch.tensor(np.arange(len(x)) + shift, device="cuda")
    expert = torch.tensor(np.repeat(np.arange(len(sizes)), sizes), device="cuda", dtype=torch.int32)
    x_padded = x.new_zeros(int(spaces.sum()), x.shape[1])
    x_padded[place] = x
    layout = torch.full((len(x_padded),), -1, device="cuda", dtype=torch.int32)
    layout[place] = expert
    return x_padded, layout, place


def _call_deep_gemm(deep_gemm: Any, x: Any, w: Any, out: Any, layout: Any) -> Any:
    deep_gemm.m_grouped_bf16_gemm_nt_contiguous(x, w, out, layout)
    return out


def _torch_error(read: Callable[[], Any], x: Any, w: Any, sizes: np.ndarray) -> float:
    """Of sampled rows against float32, by norms. Memory that the output may get holds NaN before."""
    import torch

    poison = torch.full((len(x), w.shape[1]), float("nan"), device="cuda", dtype=x.dtype)
    del poison
    out = read()
    if bool(torch.isnan(out).any()):
        raise RuntimeError("there is NaN in its output")
    difference = reference = 0.0
    for expert, rows in zip(*roofline.samples(sizes), strict=True):
        index = torch.tensor(rows, device="cuda", dtype=torch.int64)
        expected = (x[index].float() @ w[int(expert)].float().T).double()
        difference += float((out[index].double() - expected).square().sum())
        reference += float(expected.square().sum())
    return (difference / reference) ** 0.5


if __name__ == "__main__":
    main()
