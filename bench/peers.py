"""What people would use instead of our kernels: torch's libraries in a process of their own, JAX's beside ours.

`python -m bench.peers` is that process: it reads one request a line from stdin and answers each with one line of JSON,
so that neither framework disturbs the other's memory or profiler. A first line says what is installed.

    {"ceilings": {"quantized": false}} -> {"dense_tflops": ..., "copy_gbs": ...}
    {"products": {...}}                -> {"torch._grouped_mm": {...}, "DeepGEMM": {...}}
    {"layer": {...}}                   -> {"torch layer": {...}, ...}

What is asked is a function of `torch_products` or `torch_layer`, with its arguments.
"""

import contextlib
import importlib
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from typing import Any, NamedTuple

from bench import torch_layer, torch_products
from bench.roofline import MGPU, RAGGED_DOT, TOKAMAX, Shape, failure, version

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
    ((what, arguments),) = request.items()
    answers = {
        "ceilings": torch_products.ceilings,
        "products": torch_products.products_case,
        "layer": torch_layer.layer_case,
    }
    return answers[what](**arguments)


if __name__ == "__main__":
    main()
