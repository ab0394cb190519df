"""A decoder on several GPUs of one host: expert against tensor parallelism, hybrids, data-parallel attention, one GPU.

    python -m bench.multi_gpu                                # all GPUs, bf16 and fp8-block; ends after the time limit, done or not
    python -m bench.multi_gpu --add                          # and goes on
    python -m bench.multi_gpu --modes TP+DP EP+DP --quantize fp8-block --variants default latency-hiding "two batches"
    python -m bench.multi_gpu --check                        # right on all GPUs? Measures nothing
    python -m bench.multi_gpu --check --processes 2          # as many processes, a share of the GPUs each

Random weights of a real configuration, its first `--layers` layers: the dense ones, then those with experts. TP, EP and hybrid (EP over
half of the devices, each expert over two) are those of docs/parallelism.md; +DP is with data-parallel attention. A step is a prefill of
prompts of `--prompt-length` tokens, or one decode step of sequences at the end of `--context` positions; loads are set by the
token ids (`bench/sharded_decoder.py`) and are told as the run saw them.

`step` is a call's time, calls back to back. Parts are kernel times of one layer with experts from a profile, the mean over such layers
and over devices: `collective` is on the device that comes last, what others wait for it is `wait`. `layer` is such a layer's share of
the step, by kernel times; `model`: the step with as many more of these layers as the whole model has, which was not run. Tokens a second
are tokens / step and tokens / model.

Scaling is weak: `one device` runs the same layers for so many times fewer tokens as there are devices, and holds all experts;
scaling is the tokens a second (of `model`) on all devices over so many times its own. With few tokens it is above 100% for a reason that has
nothing to do with communication: one device reads all experts for a share of the tokens. `comm.` is the share of a layer's kernel times that
collectives and waits take. `links` are XLA's collectives alone, through NCCL, at the steps' sizes. NVLink multicast is left
off (NCCL_NVLS_ENABLE=0).
"""

import argparse
import contextlib
import fcntl
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from bench import multi_gpu_tables as tables
from bench import roofline, scopes
from bench.environment import environment, result_path
from bench.multi_gpu_mode import BF16, ModeBench, Profile, Row, Setting, rate
from bench.multi_gpu_workers import Worker, serve
from bench.roofline import failure
from bench.sharded_decoder import DECODE, PREFILL, VARIANTS, Mode, Variant, exchanges
from bench.timing import stream_us

CONFIG = Path(__file__).resolve().parent / "configs" / "deepseek-coder-v2"
_FOR_COMPILING = 0.7  # of the time that is left


def main() -> int:
    # An NCCL that uses multicast can put a host's GPUs out of service for all who share it.
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share the GPUs
    args = _arguments()
    if args.check or args.processes > 1:
        from bench import multi_gpu_check

        return multi_gpu_check.run(args)
    try:
        setting = Setting(args)
        if args.worker:
            serve(setting)
        else:
            Bench(setting).run()
    except ValueError as error:
        print(f"bench.multi_gpu: {error}", file=sys.stderr)
        return 2
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=CONFIG, help="a folder with a config.json")
    parser.add_argument("--layers", type=int, default=3, help="how many of the model's layers (default 3)")
    parser.add_argument("--devices", type=int, help="default: all")
    parser.add_argument("--modes", nargs="+", metavar="MODE", help="TP+DP EP+DP hybrid+DP TP EP hybrid; default: all")
    parser.add_argument("--no-one-device", action="store_true", help="leave out what scaling is measured against")
    parser.add_argument("--quantize", nargs="+", choices=(BF16, *roofline.QUANTIZATIONS), default=[BF16, "fp8-block"])
    parser.add_argument("--prefill", type=int, nargs="*", default=[8192, 32768], metavar="TOKENS")
    parser.add_argument("--decode", type=int, nargs="*", default=[64, 256, 1024], metavar="TOKENS")
    parser.add_argument("--prompt-length", type=int, default=1024)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument(
        "--zipf", type=int, nargs="*", default=[8192, 256], metavar="TOKENS", help="also with a Zipf load"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["default"], help="ways to compile a step")
    parser.add_argument(
        "--xla", nargs="+", default=[], metavar="NAME:FLAG=VALUE,...", help="further variants: XLA's flags, without --"
    )
    parser.add_argument("--no-links", action="store_true", help="do not measure collectives alone")
    parser.add_argument("--add", action="store_true", help="to what the output file holds; what it has is left out")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", default=420, help="start nothing after")
    parser.add_argument(
        "--jobs", type=int, default=min(12, os.cpu_count() or 1), help="programs that a process compiles at a time"
    )
    parser.add_argument(
        "--output", type=Path, help="default: a file in bench/results/ named after devices and their number"
    )
    parser.add_argument("--check", action="store_true", help="logits on all devices against one device's, small models")
    parser.add_argument("--processes", type=int, default=1, help="with --check: so many processes of this host")
    parser.add_argument(
        "--one-process", action="store_true", help="no process for each mode: slower, but for tiny models"
    )
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--coordinator-address", help=argparse.SUPPRESS)
    parser.add_argument("--process-id", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for text in args.xla:
        name, _, options = text.partition(":")
        try:
            VARIANTS[name] = Variant(dict(_flag(option) for option in options.split(",")))
        except ValueError:
            parser.error(f"--xla has {text!r}; it should be NAME:FLAG=VALUE,FLAG=VALUE")
        args.variants = [*args.variants, name]
    return args


def _flag(option: str) -> tuple[str, Any]:
    name, value = option.split("=")
    return name, {"true": True, "false": False}.get(value, int(value) if value.isdigit() else value)


def output_path(args: argparse.Namespace, devices: int) -> Path:
    named = result_path("multi_gpu")
    return args.output or named.with_name(f"{named.stem}x{devices}.json")


class Bench:
    """One run: what it was asked for and what it has seen."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.args = setting, setting.args
        self.deadline = time.monotonic() + self.args.time_limit
        self.output = output_path(self.args, setting.devices)
        self.result = self.start()

    def start(self) -> dict[str, Any]:
        setting, args = self.setting, self.args
        result: dict[str, Any] = {
            "format": 1, **environment(), "devices": setting.devices, "model": args.model.name,
            "layers": setting.config.num_layers, "moe_layers": sum(setting.config.moe_layers),
            "model_layers": setting.whole.num_layers, "model_moe_layers": sum(setting.whole.moe_layers),
            "dtype": setting.dtype.name, "prompt_length": args.prompt_length, "context": args.context,
            "nvlink_multicast": False, "links": [], "compile": [], "rows": [], "check": [],
        }  # fmt: skip
        before = json.loads(self.output.read_text()) if self.output.exists() else {"rows": [], "check": []}
        if not args.add or not before["rows"]:
            return result | {"check": before["check"]}
        for name in ("device", "devices", "model", "layers", "dtype", "prompt_length", "context"):
            if before[name] != result[name]:
                raise ValueError(
                    f"--add: {name} is {result[name]!r}; it should be {before[name]!r} as in {self.output}"
                )
        before["command"] += f"; {result['command']}"
        before["rows"] = [row for row in before["rows"] if "failed" not in row]
        return before

    def run(self) -> None:
        for quantize in self.args.quantize:
            if time.monotonic() < self.deadline:
                (self.here if self.args.one_process else self.side_by_side)(quantize)
        if time.monotonic() > self.deadline:
            print(f"time limit of {self.args.time_limit:.0f} s: what is missing was left out")
        roofline.save(self.result, self.output)
        print(tables.summary(self.result))
        if any("failed" not in row for row in self.result["rows"]):
            roofline.try_plot(tables.plot, self.result, self.output)

    def todo(self, quantize: str) -> dict[Mode, list[Row]]:
        """The rows of each mode that are not there yet."""
        done = {key(row) for row in self.result["rows"]}
        rows = {
            mode: [row for row in self.setting.rows(mode, quantize) if key(row) not in done]
            for mode in self.setting.modes
        }
        return {mode: each for mode, each in rows.items() if each}

    def here(self, quantize: str) -> None:
        """One format's rows, all in this process."""
        self.links()
        for mode, rows in self.todo(quantize).items():
            with self.failing(rows):
                bench = ModeBench(self.setting, mode, quantize, rows, self.args.jobs)
                bench.lower()
                bench.compile()
                for row in bench.measure(self.deadline):
                    self.add(row)

    def side_by_side(self, quantize: str) -> None:
        """One format's rows, a process for each mode and phase: all compile, then each measures."""
        now = time.monotonic()
        compiled = now + _FOR_COMPILING * (self.deadline - now)
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            with contextlib.ExitStack() as locks:  # while links are measured, workers lower and do not compile
                for gpu in range(self.setting.devices):
                    fcntl.flock(locks.enter_context(open(Path(folder) / str(gpu), "w")), fcntl.LOCK_EX)
                workers, todo = [], self.todo(quantize)
                tasks = [
                    (mode, own)
                    for phase in (PREFILL, DECODE)
                    for mode, rows in todo.items()
                    if (own := [row for row in rows if row["phase"] == phase])
                ]
                for number, (mode, rows) in enumerate(tasks):
                    worker = Worker(mode.name, quantize, rows, self.gpus(), number, Path(folder))
                    stack.callback(worker.close)
                    workers.append(worker)
                self.links()
            ready = []
            for worker in tqdm(workers, desc=f"{quantize}: compiling"):
                with self.failing(worker.rows):
                    answer = worker.ready(compiled)
                    told = {"quantize": quantize, "mode": worker.mode, "phase": worker.rows[0]["phase"]}
                    self.result["compile"].append({**told, **answer})
                    if "failed" in answer:
                        self.add(*({**row, **answer} for row in worker.rows))
                    else:
                        ready.append(worker)
            for worker in tqdm(ready, desc=f"{quantize}: modes"):
                with self.failing(worker.rows):
                    for row in worker.measure(self.deadline):
                        self.add(row)
                worker.close()

    @contextlib.contextmanager
    def failing(self, rows: list[Row]) -> Iterator[None]:
        """What is raised is why there are no more of these rows."""
        try:
            yield
        except Exception as error:
            done = {key(row) for row in self.result["rows"]}
            self.add(*({**row, **failure(error)} for row in rows if key(row) not in done))

    def gpus(self) -> list[str]:
        """As CUDA_VISIBLE_DEVICES names those that are used; none on a CPU."""
        if jax.default_backend() == "cpu":
            return []
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(jax.local_device_count())]
        return names[: self.setting.devices]

    def links(self) -> None:
        """Each kind of collective alone, at the size of each step's activations; once."""
        if self.args.no_links or self.result["links"]:
            return
        for tokens in tqdm(sorted({step.tokens for step in self.setting.steps}), desc="links"):
            try:
                found = exchanges(self.setting.mesh, tokens, self.setting.config.hidden_size, self.setting.dtype)
                for kind, (program, x) in found.items():
                    link = self.link(program.lower(x).compile(), x)
                    self.result["links"].append({"kind": kind, "tokens": tokens, **link})
            except Exception as error:  # memory, or devices that do not divide so few tokens
                self.result["links"].append({"kind": "all", "tokens": tokens, **failure(error)})
        roofline.save(self.result, self.output)

    def link(self, program: Any, x: jax.Array) -> dict[str, Any]:
        timed = stream_us(partial(program, x), 10)
        ((_, what),) = scopes.collectives(program.as_text(), self.setting.devices).items()
        seen = Profile(partial(program, x), program.as_text(), self.setting.devices, 0)
        us = sum(us for us, _ in seen.collectives.values()) or timed["stream_us"]
        return {**rate(what, us, self.setting.devices), "stream_us": timed["stream_us"]}

    def add(self, *rows: Row) -> None:
        for row in rows:
            self.result["rows"].append(row)
            tqdm.write(tables.row_line(row))
        roofline.save(self.result, self.output)


def key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("quantize", "mode", "phase", "tokens", "load", "variant"))


if __name__ == "__main__":
    sys.exit(main())
