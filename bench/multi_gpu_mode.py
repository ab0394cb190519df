"""One mode of `bench.multi_gpu` in one format: its programs compiled, then measured. What a run was asked for is its `Setting`."""

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import scopes
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
    reduced,
)
from bench.sharded_decoder import modes as modes_of
from bench.timing import stream_us
from jax_epmoe import make_mesh
from jax_epmoe.config import require

BF16 = "bf16"
PARTS = ("attention", *MOE_SCOPES)
_SECONDS = 0.15  # of calls that are timed together
_PROFILED = 4  # calls

Row = dict[str, Any]


class Setting:
    """The devices, the model, and what there is to measure; the same in every process of a run.

    Raises:
      ValueError: a number of devices, layers or a mode that cannot be.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.devices = args.devices or jax.device_count()
        require(self.devices >= 2, "--devices", self.devices, f"at least 2 of the {jax.device_count()} that JAX has")
        self.mesh = make_mesh(self.devices, self.devices)  # refuses too many
        self.whole, self.config = reduced(args.model, args.layers)
        known = modes_of(self.devices)
        for name in args.modes or []:
            require(name in known, "--modes", name, f"of {', '.join(known)} on {self.devices} devices")
        self.modes = [] if args.no_one_device else [ONE]
        self.modes += [mode for mode in known.values() if mode.name in (args.modes or known)]
        # XLA on a CPU has no bfloat16 products of the kind that decoding with MLA takes.
        self.dtype = jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
        self.steps = [Step(PREFILL, tokens, args.prompt_length) for tokens in args.prefill]
        self.steps += [Step(DECODE, tokens, args.context) for tokens in args.decode]
        require(len(self.steps) > 0, "--prefill and --decode", [], "one number of tokens at least")

    @cached_property
    def loads(self) -> Loads:
        return Loads(self.config, max(step.tokens for step in self.steps))

    def rows(self, mode: Mode, quantize: str) -> list[Row]:
        """What to measure, without results."""
        named: Row = {"quantize": quantize, "mode": mode.name}
        named |= dict(zip(("tp_size", "ep_size", "dp_attention"), mode[1:], strict=True))
        cases = [
            (step, load, variant)
            for step in self.steps
            for variant in self.args.variants
            for load in (LOADS if step.tokens in self.args.zipf else LOADS[:1])
        ]
        return [
            {**named, "phase": step.phase, "tokens": step.tokens, "load": load, "variant": variant}
            for step, load, variant in cases
            if mode != ONE or variant == "default"
        ]

    def step(self, row: Row) -> Step:
        """A row's; one device has a share of the tokens."""
        (found,) = (step for step in self.steps if (step.phase, step.tokens) == (row["phase"], row["tokens"]))
        return found.share(self.devices if row["mode"] == ONE.name else 1)


class ModeBench:
    """A mode's programs for the rows given.

    Raises:
      ValueError: a layout that the format forbids.
    """

    def __init__(self, setting: Setting, mode: Mode, quantize: str, rows: list[Row], jobs: int) -> None:
        self.setting, self.rows = setting, rows
        self.pool = ThreadPoolExecutor(jobs)
        devices = list(setting.mesh.devices.flat)[: mode.tp_size]
        format = None if quantize == BF16 else quantize
        self.model = ShardedDecoder(
            setting.config, mode, format, dtype=setting.dtype, loads=setting.loads, devices=devices
        )
        model, steps = self.model, {self._step(row): None for row in rows}
        self.weights: Future = self.pool.submit(model.lower_weights)
        self.caches: dict[tuple[Step, int], Future] = {
            step: self.pool.submit(model.lower_caches, *step) for step in steps
        }
        self.steps: dict[tuple[Step, int], Future] = {step: self.pool.submit(model.lower_step, *step) for step in steps}
        self.programs: dict[tuple[tuple[Step, int], str], Future] = {}
        self.running: tuple[Any, Running] | None = None

    def _step(self, row: Row) -> tuple[Step, int]:
        """A row's step, and into how many batches it is cut."""
        return self.setting.step(row), VARIANTS[row["variant"]].batches

    def lower(self) -> None:
        """Waits until all programs are lowered; what failed is told by the rows that need it."""
        for future in (self.weights, *self.caches.values(), *self.steps.values()):
            future.exception()

    def compile(self) -> None:
        """Compiles all that is lowered."""
        submit = self.pool.submit
        self.weights = submit(_compile, self.weights, [{}])
        self.caches = {step: submit(_compile, lowered, [{}]) for step, lowered in self.caches.items()}
        for row in self.rows:
            step, options = self._step(row), VARIANTS[row["variant"]].options
            if (step, row["variant"]) not in self.programs:
                both = [options, options | scopes.ONE_BY_ONE]  # the second is profiled
                self.programs[step, row["variant"]] = submit(_compile, self.steps[step], both)
        for future in (self.weights, *self.caches.values(), *self.programs.values()):
            future.exception()

    def measure(self, deadline: float) -> Iterator[Row]:
        """The rows with their results, as they come; none is begun after the deadline."""
        (program,) = self.weights.result()
        weights = self.model.weights(program)
        for row in self.rows:
            if time.monotonic() > deadline:
                break
            try:
                yield {**row, **self._measure(weights, row)}
            except Exception as error:
                self.running = None
                yield {**row, **failure(error)}
        self.running = None

    def _arrays(self, weights: list[jax.Array], step: tuple[Step, int]) -> Running:
        """Those of the last row, if it was the same step."""
        if self.running is None or self.running[0] != step:
            self.running = None
            (draw,) = self.caches[step].result()
            self.running = step, Running(self.model, weights, draw(), step[0])
        return self.running[1]

    def _measure(self, weights: list[jax.Array], row: Row) -> Row:
        step = self._step(row)
        program, profiled = self.programs[step, row["variant"]].result()
        running = self._arrays(weights, step)
        running.use(row["load"])
        run, run_profiled = (partial(running.run, each) for each in (program, profiled))
        timed = stream_us(run, calls_of(run))
        step_us, tokens = timed["stream_us"], step[0].tokens
        result: Row = {
            "tokens_per_s": tokens / step_us * 1e6,
            "step_us": step_us,
            "dispatch_us": timed["dispatch_us"],
            "step_tokens": tokens,
            "weight_bytes": self.model.weight_bytes,
            "rows": spread(np.asarray(running.load), self.model.mode.ep_size),
        }
        own, whole = self.setting.config.moe_layers, self.setting.whole.moe_layers
        try:
            profile = Profile(run_profiled, profiled.as_text() or "", self.model.mesh.devices.size, len(own))
        except Exception as error:
            return result | {"no_parts": failure(error)["failed"]}
        result |= profile.told(own)
        layer_us = step_us * result.pop("layer_share")
        model_us = step_us + (sum(whole) - sum(own)) * layer_us
        return result | {
            "layer_us": layer_us,
            "model_us": model_us,
            "model_tokens_per_s": tokens / model_us * 1e6,
        }


def _compile(lowered: Future, options: list[dict[str, Any]]) -> list[Any]:
    return [lowered.result().compile(each) for each in options]


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
        recorded = [scopes.name_collectives(lines, hlo, list(self.what), _PROFILED) for lines in recorded]
        # Kernels that could not be named count as no layer's.
        of_nccl = {event.op for lines in recorded for line in lines for event in line if event.is_nccl}
        self.what |= {op: scopes.Collective("unknown", 0) for op in of_nccl - self.what.keys()}
        names = [f"layer_{i}" for i in range(num_layers)]
        layer_of, part_of = scopes.scopes(hlo, names), scopes.scopes(hlo, (*PARTS, "head"))
        self.layer_of = {op: names.index(name) for op, name in layer_of.items()}
        self.times: list[Counter] = []
        for lines in recorded:
            own: Counter[Any] = Counter()
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
