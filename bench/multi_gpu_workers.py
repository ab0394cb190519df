"""Processes that compile side by side and measure in turn, one for each mode and phase: most of a run's time goes into lowering, in Python.

A worker is `bench.multi_gpu` with the same arguments and `--worker`. It is told its rows, lowers and compiles their programs, says
that it is ready, and waits; when it is told to, it measures and writes a row a line. All lines are JSON.

XLA times alternatives on the first GPU while it compiles, so each worker counts the GPUs from another one, and one at a time
compiles on each.
"""

import contextlib
import fcntl
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.multi_gpu_mode import ModeBench, Row, Setting
from bench.roofline import failure
from bench.sharded_decoder import ONE, modes


class Worker:
    """The parent's side of one."""

    def __init__(self, mode: str, quantize: str, rows: list[Row], gpus: list[str], number: int, locks: Path) -> None:
        self.mode, self.rows = mode, rows
        first = number % max(len(gpus), 1)
        environ = dict(os.environ)
        if gpus:
            environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first:] + gpus[:first])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.multi_gpu", *sys.argv[1:], "--worker", mode, quantize],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self._tell({"rows": rows, "lock": str(locks / str(first))})

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _tell(self, what: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has died, which `_hear` tells
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()

    def _hear(self, deadline: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise TimeoutError("the time limit") from None
        if not line:
            raise RuntimeError(f"the process ended with status {self.process.wait()}")
        return json.loads(line)

    def ready(self, deadline: float) -> dict[str, Any]:
        """Waits until everything is compiled; how long that took, or {"failed": why}.

        Raises:
          TimeoutError: it was not, in time; the process is ended then, or it would go on compiling on GPUs that others are timed on.
          RuntimeError: the process has ended.
        """
        try:
            return self._hear(deadline)
        except TimeoutError:
            self.close()
            raise

    def measure(self, deadline: float, patience: float = 60) -> Iterator[Row]:
        """Its rows as they come. Raises as `ready`; a row that was begun has so many seconds more."""
        self._tell({"seconds": deadline - time.monotonic()})
        while row := self._hear(deadline + patience):
            yield row

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def serve(setting: Setting) -> None:
    """A worker's side."""
    tell = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed is no answer

    def say(what: dict[str, Any]) -> None:
        tell.write(json.dumps(what) + "\n")
        tell.flush()

    name, quantize = setting.args.worker
    mode = ONE if name == ONE.name else modes(setting.devices)[name]
    asked = json.loads(sys.stdin.readline())
    started = time.perf_counter()
    try:
        bench = ModeBench(setting, mode, quantize, asked["rows"], setting.args.jobs)
    except Exception as error:
        return say(failure(error))
    bench.lower()
    lowered = time.perf_counter()
    with open(asked["lock"], "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        begun = time.perf_counter()
        bench.compile()
    say({"lower_s": lowered - started, "turn_s": begun - lowered, "compile_s": time.perf_counter() - begun})
    go = sys.stdin.readline()
    if not go:  # the parent is gone
        return None
    try:
        for row in bench.measure(time.monotonic() + json.loads(go)["seconds"]):
            say(row)
    except Exception as error:  # no memory for the weights
        for row in bench.rows:
            say({**row, **failure(error)})
    return say({})
