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
scaling is the tokens a second (of `model`) on all devices over so many times its own. `links` are XLA's collectives alone, through NCCL, at the steps' sizes. NVLink multicast is left
off (NCCL_NVLS_ENABLE=0).
"""

import argparse
import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from bench import multi_gpu_tables as tables
from bench import roofline, scopes
from bench.environment import environment, result_path
from bench.layer_tables import MOE_SCOPES, OTHER
from bench.roofline import failure
from bench.sharded_decoder import (
    DECODE,
    LOADS,
    ONE,
    PREFILL,
    VARIANTS,
    Loads,
    Mode,
    Running,
    ShardedDecoder,
    Step,
    Variant,
    exchanges,
    modes,
    reduced,
)  # fmt: skip
from bench.timing import stream_us
from jax_epmoe import make_mesh

CONFIG = Path(__file__).resolve().parent / "configs" / "deepseek-coder-v2"
BF16 = "bf16"
PARTS = ("attention", *MOE_SCOPES)
_SECONDS = 0.15  # of calls that are timed together
_PROFILED = 4  # calls


def main() -> int:
    # An NCCL that uses multicast can put a host's GPUs out of service for all who share it.
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    args = _arguments()
    if args.check or args.processes > 1:
        from bench import multi_gpu_check

        return multi_gpu_check.run(args)
    try:
        Bench(args).run()
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
    parser.add_argument("--jobs", type=int, default=min(32, os.cpu_count() or 1), help="programs to compile at a time")
    parser.add_argument(
        "--output", type=Path, help="default: a file in bench/results/ named after devices and their number"
    )
    parser.add_argument("--check", action="store_true", help="logits on all devices against one device's, small models")
    parser.add_argument("--processes", type=int, default=1, help="with --check: so many processes of this host")
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

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.deadline = args, time.monotonic() + args.time_limit
        self.devices = args.devices or jax.device_count()
        if self.devices < 2:
            raise ValueError(f"--devices is {self.devices}; it should be at least 2, of those that JAX has")
        self.mesh = make_mesh(self.devices, self.devices)  # refuses too many
        self.whole, self.config = reduced(args.model, args.layers)
        self.output = output_path(args, self.devices)
        known = modes(self.devices)
        wrong = [name for name in args.modes or [] if name not in known]
        if wrong:
            raise ValueError(f"--modes has {wrong[0]!r}; it should be of {', '.join(known)} on {self.devices} devices")
        # XLA on a CPU has no bfloat16 products of the kind that decoding with MLA takes.
        self.dtype = jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
        self.modes = [mode for mode in known.values() if mode.name in (args.modes or known)]
        self.steps = [Step(PREFILL, tokens, args.prompt_length) for tokens in args.prefill]
        self.steps += [Step(DECODE, tokens, args.context) for tokens in args.decode]
        self.loads = Loads(self.config, max(step.tokens for step in self.steps))
        self.result = self.start()
        self.pool = ThreadPoolExecutor(args.jobs)

    def start(self) -> dict[str, Any]:
        config, args = self.config, self.args
        result: dict[str, Any] = {
            "format": 1, **environment(), "devices": self.devices, "model": args.model.name,
            "layers": config.num_layers, "moe_layers": sum(config.moe_layers),
            "dtype": self.dtype.name, "model_layers": self.whole.num_layers, "model_moe_layers": sum(self.whole.moe_layers),
            "prompt_length": args.prompt_length, "context": args.context, "nvlink_multicast": False,
            "links": [], "rows": [], "check": [],
        }  # fmt: skip
        before = json.loads(self.output.read_text()) if self.output.exists() else {"rows": [], "check": []}
        if args.add and before["rows"]:
            for name in ("device", "devices", "model", "layers", "dtype", "prompt_length", "context"):
                if before[name] != result[name]:
                    raise ValueError(
                        f"--add: {name} is {result[name]!r}; it should be {before[name]!r} as in {self.output}"
                    )
            before["command"] += f"; {result['command']}"
            return before
        return result | {"check": before["check"]}

    def run(self) -> None:
        try:
            if not self.args.no_links and not self.result["links"]:
                self.links()
            for quantize in self.args.quantize:
                self.quantized(quantize)
        finally:
            self.pool.shutdown(cancel_futures=True)
        if time.monotonic() > self.deadline:
            print(f"time limit of {self.args.time_limit:.0f} s: what is missing was left out")
        roofline.save(self.result, self.output)
        print(tables.summary(self.result))
        if any("failed" not in row for row in self.result["rows"]):
            roofline.try_plot(tables.plot, self.result, self.output)

    def links(self) -> None:
        """Each kind of collective alone, at the size of each step's activations."""
        sizes = sorted({step.tokens for step in self.steps})
        for tokens in tqdm(sizes, desc="links"):
            try:
                found = exchanges(self.mesh, tokens, self.config.hidden_size, self.dtype)
                for kind, (program, x) in found.items():
                    self.result["links"].append(
                        {"kind": kind, "tokens": tokens, **self.link(program.lower(x).compile(), x)}
                    )
            except Exception as error:  # memory, or devices that do not divide so few tokens
                self.result["links"].append({"kind": "all", "tokens": tokens, **failure(error)})
        roofline.save(self.result, self.output)

    def link(self, program: Any, x: jax.Array) -> dict[str, Any]:
        timed = stream_us(partial(program, x), 10)
        ((_, what),) = scopes.collectives(program.as_text(), self.devices).items()
        seen = Profile(partial(program, x), program.as_text(), self.devices, 0)
        us = sum(us for us, _ in seen.collectives.values()) or timed["stream_us"]
        return {**rate(what, us, self.devices), "stream_us": timed["stream_us"]}

    def quantized(self, quantize: str) -> None:
        """All rows of one format: programs of all modes are compiled at once, then each mode's are measured."""
        done = {key(row) for row in self.result["rows"]}
        plan: dict[Mode, list[dict[str, Any]]] = {}
        for mode in [*([] if self.args.no_one_device else [ONE]), *self.modes]:
            rows = [row for row in self.rows(mode, quantize) if key(row) not in done]
            plan |= {mode: rows} if rows else {}
        if time.monotonic() > self.deadline:
            return
        compiled: dict[Mode, Compiled] = {}
        for mode, rows in plan.items():
            try:
                compiled[mode] = Compiled(self, mode, quantize, rows)
            except Exception as error:  # a layout that the format forbids
                self.add([{**row, **failure(error)} for row in rows])
        with tqdm(total=sum(len(each.futures) for each in compiled.values()), desc=f"{quantize}: compiling") as bar:
            for each in compiled.values():
                for future in each.futures:
                    future.exception()
                    bar.update()
        for mode, programs in tqdm(compiled.items(), desc=f"{quantize}: modes"):
            if time.monotonic() > self.deadline:
                return
            try:
                for row in programs.measure(plan[mode], self.deadline):
                    self.add([row])
            except Exception as error:  # memory: the next mode may fit
                tqdm.write(f"{mode.name}: {failure(error)['failed']}")

    def rows(self, mode: Mode, quantize: str) -> list[dict[str, Any]]:
        """What to measure, without results."""
        named = {
            "quantize": quantize,
            "mode": mode.name,
            **dict(zip(("tp_size", "ep_size", "dp_attention"), mode[1:], strict=True)),
        }
        cases = [
            (step, load, variant)
            for step in self.steps
            for variant in self.args.variants
            for load in (LOADS if step.tokens in self.args.zipf else LOADS[:1])
        ]
        return [
            {**named, "phase": step.phase, "tokens": step.tokens, "load": load, "variant": variant}
            for step, load, variant in cases
            if not (mode == ONE and variant != "default")
        ]

    def add(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self.result["rows"].append(row)
            tqdm.write(tables.row_line(row))
        roofline.save(self.result, self.output)


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("quantize", "mode", "phase", "tokens", "load", "variant"))


class Compiled:
    """One mode's programs, being compiled; then measured, with weights that are gone after."""

    def __init__(self, bench: Bench, mode: Mode, quantize: str, rows: list[dict[str, Any]]) -> None:
        self.bench, self.parts = bench, bench.devices if mode == ONE else 1
        self.model = ShardedDecoder(
            bench.config, mode, None if quantize == BF16 else quantize, dtype=bench.dtype, loads=bench.loads,
            devices=list(bench.mesh.devices.flat)[: mode.tp_size],
        )  # fmt: skip
        self.weights: Future = bench.pool.submit(lambda: self.model.lower_weights().compile())
        self.programs: dict[tuple[Step, str], Future] = {}
        self.caches: dict[tuple[Step, int], Future] = {}
        self.running: tuple[Any, Running] | None = None
        lowered: dict[tuple[Step, int], Future] = {}
        for row in rows:
            step, batches = self.step(row), VARIANTS[row["variant"]].batches
            if (step, batches) not in lowered:
                lowered[step, batches] = bench.pool.submit(self.model.lower_step, step, batches)
                self.caches[step, batches] = bench.pool.submit(
                    lambda *case: self.model.lower_caches(*case).compile(), step, batches
                )
        for row in rows:
            step, variant = self.step(row), VARIANTS[row["variant"]]
            if (step, row["variant"]) not in self.programs:
                self.programs[step, row["variant"]] = bench.pool.submit(
                    self.compile, lowered[step, variant.batches], variant.options
                )
        self.futures = [self.weights, *self.caches.values(), *self.programs.values()]

    def step(self, row: dict[str, Any]) -> Step:
        (found,) = (step for step in self.bench.steps if (step.phase, step.tokens) == (row["phase"], row["tokens"]))
        return found.share(self.parts)

    @staticmethod
    def compile(lowered: Future, options: dict[str, Any]) -> tuple[Any, Any]:
        """The program, and once more to profile it."""
        program = lowered.result()
        return program.compile(options), program.compile(options | scopes.ONE_BY_ONE)

    def measure(self, rows: list[dict[str, Any]], deadline: float):
        started = time.perf_counter()
        weights = self.model.weights(self.weights.result())
        tqdm.write(
            f"{self.model.mode.name}: {self.model.weight_bytes / 1e9:.1f} GB of weights a device, made in "
            f"{time.perf_counter() - started:.1f} s"
        )
        for row in rows:
            if time.monotonic() > deadline:
                break
            try:
                yield {**row, **self.row(weights, row)}
            except Exception as error:
                self.running = None
                yield {**row, **failure(error)}
        self.running = None

    def arrays(self, weights: list[jax.Array], step: Step, batches: int) -> Running:
        """Those of the last row, if it was the same step."""
        if self.running is None or self.running[0] != (step, batches):
            self.running = None
            caches = self.caches[step, batches].result()()
            self.running = (step, batches), Running(self.model, weights, caches, step)
        return self.running[1]

    def row(self, weights: list[jax.Array], row: dict[str, Any]) -> dict[str, Any]:
        step, variant = self.step(row), VARIANTS[row["variant"]]
        program, profiled = self.programs[step, row["variant"]].result()
        running = self.arrays(weights, step, variant.batches)
        running.use(row["load"])
        run, run_profiled = (partial(running.run, each) for each in (program, profiled))
        timed = stream_us(run, calls_of(run))
        devices = self.model.mesh.devices.size
        result = {
            "tokens_per_s": step.tokens / timed["stream_us"] * 1e6,
            "step_us": timed["stream_us"],
            "dispatch_us": timed["dispatch_us"],
            "step_tokens": step.tokens,
            "weight_bytes": self.model.weight_bytes,
            "rows": spread(np.asarray(running.load), self.model.mode.ep_size),
        }
        try:
            profile = Profile(run_profiled, profiled.as_text() or "", devices, self.model.config.num_layers)
        except Exception as error:
            return result | {"no_parts": failure(error)["failed"]}
        result |= profile.told(self.model.config.moe_layers)
        more = self.bench.result["model_moe_layers"] - self.bench.result["moe_layers"]
        layer_us = timed["stream_us"] * result.pop("layer_share")
        model_us = timed["stream_us"] + more * layer_us
        return result | {
            "layer_us": layer_us, "model_us": model_us, "model_tokens_per_s": step.tokens / model_us * 1e6,
        }  # fmt: skip


def calls_of(run: Callable[[], Any]) -> int:
    """How many calls to time together."""
    jax.block_until_ready(run())
    started = time.perf_counter()
    jax.block_until_ready(run())
    return min(20, max(3, int(_SECONDS / (time.perf_counter() - started))))


def spread(load: np.ndarray, ep_size: int) -> dict[str, float]:
    """Of the rows of each expert in each MoE layer, `[layers, E]`: the fullest device's and expert's over the mean, the worst layer."""
    devices = load.reshape(len(load), ep_size, -1).sum(axis=2)

    def worst(counts: np.ndarray) -> float:
        return float((counts.max(axis=1) / counts.mean(axis=1)).max())

    return {"total": int(load[0].sum()), "device_max_over_mean": worst(devices), "expert_max_over_mean": worst(load)}


def rate(what: scopes.Collective, us: float, devices: int) -> dict[str, Any]:
    """GB/s: what each device sends, in a ring, by the time ("bus bandwidth")."""
    return {"bytes": what.bytes, "us": us, "gbs": what.sent(devices) / us * 1e-3}


class Profile:
    """Microseconds of a call on each device, by layer (None: outside) and part."""

    def __init__(self, call: Callable[[], Any], hlo: str, devices: int, num_layers: int) -> None:
        recorded = scopes.record(call, _PROFILED)
        calls = _PROFILED * (devices if len(recorded) == 1 else 1)  # without GPUs all devices are one
        self.devices = devices
        self.what = scopes.collectives(hlo, devices)
        # Kernels that do not tell which instruction's they are count as no layer's.
        unknown = {event.op for lines in recorded for line in lines for event in line if event.op.startswith("nccl")}
        self.what |= {op: scopes.Collective("unknown", 0) for op in unknown}
        names = [f"layer_{i}" for i in range(num_layers)]
        layer_of, part_of = scopes.scopes(hlo, names), scopes.scopes(hlo, (*PARTS, "head"))
        self.layer_of = {op: names.index(name) for op, name in layer_of.items()}
        self.times: list[Counter] = []
        for lines in recorded:
            own: Counter = Counter()
            for op, us in scopes.divide(lines).items():
                if op not in self.what:
                    own[self.layer_of.get(op), part_of.get(op, OTHER)] += us / calls
            self.times.append(own)
        self.collectives = {
            op: (us / calls, wait / calls) for op, (us, wait) in scopes.collective_us(recorded, self.what).items()
        }

    def told(self, moe_layers: tuple[bool, ...]) -> dict[str, Any]:
        """What a row keeps: of a layer with experts, on the mean of such layers."""
        count = sum(moe_layers)
        has_experts = {i for i, flag in enumerate(moe_layers) if flag}
        of_devices = [
            {part: sum(own[i, part] for i in has_experts) / count for part in (*PARTS, OTHER)} for own in self.times
        ]
        parts = {part: float(np.mean([own[part] for own in of_devices])) for part in (*PARTS, OTHER)}
        exchanged: dict[scopes.Collective, list[float]] = defaultdict(list)
        for op, (us, wait) in self.collectives.items():
            if self.layer_of.get(op) in has_experts:
                parts["collective"] = parts.get("collective", 0.0) + us / count
                parts["wait"] = parts.get("wait", 0.0) + wait / count
                exchanged[self.what[op]].append(us)
        compute = [sum(own.values()) for own in self.times]
        total = float(np.mean(compute)) + sum(us + wait for us, wait in self.collectives.values())
        return {
            "kernels_us": total,
            "layer_share": sum(parts.values()) / total,
            "parts": {part: us for part, us in parts.items() if us > 0},
            "slowest_parts": of_devices[int(np.argmax(compute))],
            "compute_us": compute,
            "outside_layers_us": float(
                np.mean([sum(us for (i, _), us in own.items() if i is None) for own in self.times])
            ),
            "collectives": [
                {"kind": what.kind, "count": len(each) / count, **rate(what, sum(each) / len(each), self.devices)}
                for what, each in exchanged.items()
            ],
        }


if __name__ == "__main__":
    sys.exit(main())
