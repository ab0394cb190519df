"""Whether several devices compute what one does: `python -m bench.multi_gpu --check`, in one process or several.

A small model of the given configuration's family, in each mode and format: logits of every position of a prefill, and of a decode step
after it, against the same weights in float32 on one device. An error that rounding explains is at most `_SLACK` times that of
the same format on one device; float32 itself is held to `_FLOAT32`, with float8 weights to `_FLOAT8`.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from bench import multi_gpu_tables as tables
from bench import roofline
from bench.environment import environment
from bench.roofline import failure
from bench.sharded_decoder import ONE, PREFILL, Mode, ShardedDecoder, Step, modes, reduced
from jax_epmoe.config import MLAConfig, ModelConfig
from jax_epmoe.mesh import initialize_distributed
from jax_epmoe.tune import UNTUNED

_SLACK = 1.5
_FLOAT32 = 1e-4
_FLOAT8 = 1e-1  # a scale a token is over a device's own part of k: with others, everything rounds anew
_PROMPT = 64


def run(args: argparse.Namespace) -> int:
    """The program; its exit status is 1 if an error is too large or a process failed."""
    if args.processes > 1 and args.process_id is None:
        return launch(args.processes, args.devices, args.time_limit)
    if args.process_id is not None:
        initialize_distributed(args.coordinator_address, args.processes, args.process_id)
    from bench.multi_gpu import output_path

    devices = args.devices or jax.device_count()
    found = Check(args, devices).run()
    if jax.process_index() == 0:
        path = output_path(args, devices)
        result = {"format": 1, **environment(), "devices": devices, "links": [], "rows": [], "check": []}
        if path.exists():
            result = json.loads(path.read_text())
        kept = [check for check in result["check"] if check["processes"] != jax.process_count()]
        result["check"] = kept + found
        roofline.save(result, path)
        print(tables.checks({"check": found}))
        print(f"wrote {path}")
    return 0 if all(check["right"] for check in found) else 1


def launch(processes: int, devices: int | None, time_limit: float) -> int:
    """Runs this program in so many processes of this host, each with as many GPUs, and waits for them."""
    share = max(1, (devices or processes) // processes)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(share * processes)]
    children = []
    for i in range(processes):
        command = [sys.executable, "-m", "bench.multi_gpu", *sys.argv[1:]]
        command += ["--coordinator-address", address, "--process-id", str(i)]
        environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus[i * share : (i + 1) * share])}
        children.append(subprocess.Popen(command, env=environ))
    deadline = time.monotonic() + time_limit
    try:
        statuses = [child.wait(max(0.0, deadline - time.monotonic())) for child in children]
    except subprocess.TimeoutExpired:
        print(f"bench.multi_gpu: processes did not end within {time_limit:.0f} s", file=sys.stderr)
        return 1
    finally:
        for child in children:
            child.kill()
    return max(map(abs, statuses))


def small(config: ModelConfig) -> ModelConfig:
    """A model of the same kind, with sizes that kernels take and eight devices divide; smaller ones stay."""
    hidden = min(config.hidden_size, 512)
    experts = min(config.moe.num_experts, 32)
    moe = replace(
        config.moe,
        hidden_size=hidden,
        intermediate_size=min(config.moe.intermediate_size, 1024),
        num_experts=experts,
        shared_intermediate_size=min(config.moe.shared_intermediate_size, 1024),
    )
    attention = config.attention
    if isinstance(attention, MLAConfig) and attention.q_lora_rank is not None:
        attention = replace(attention, q_lora_rank=min(attention.q_lora_rank, 512))
    return config.replace(
        vocab_size=min(config.vocab_size, 1024),
        hidden_size=hidden,
        attention=attention,
        moe=moe,
        moe_layers=(True, True) if all(config.moe_layers) else (False, True),
        dense_intermediate_size=min(config.dense_intermediate_size, 1024),
    )


class Check:
    """One run of this process; all processes run the same."""

    def __init__(self, args: argparse.Namespace, devices: int) -> None:
        self.args, self.devices = args, devices
        self.config = small(reduced(args.model, args.layers)[0])
        batch = 2 * devices
        length = min(_PROMPT, self.config.max_position_embeddings // 2)
        self.step = Step(PREFILL, batch * (length + 1), length + 1)
        random = np.random.default_rng(0)
        self.tokens = random.integers(0, self.config.vocab_size, (batch, length + 1), np.int32)
        known = modes(devices)
        self.modes = [mode for mode in known.values() if mode.name in (args.modes or known)]

    def run(self) -> list[dict[str, Any]]:
        # XLA on a CPU has no bfloat16 products of the kind that decoding with MLA takes.
        dtypes = ("float32",) if jax.default_backend() == "cpu" else ("float32", "bfloat16")
        formats = [(dtype, name if name != "bf16" else None) for name in self.args.quantize for dtype in dtypes]
        with ThreadPoolExecutor(self.args.jobs) as pool:
            programs = {
                (mode, *of): pool.submit(self.compile, mode, *of) for of in formats for mode in (ONE, *self.modes)
            }
            references: dict[str | None, np.ndarray] = {}
            found = []
            for dtype, quantize in tqdm(formats, desc="check", disable=jax.process_index() > 0):
                alone = self.logits(programs[ONE, dtype, quantize])
                reference = references.setdefault(quantize, alone)  # float32 is first
                for mode in self.modes:
                    named = {
                        "format": f"{dtype} {quantize}" if quantize else dtype,
                        "mode": mode.name,
                        "processes": jax.process_count(),
                    }
                    try:
                        got = self.logits(programs[mode, dtype, quantize])
                    except Exception as error:
                        found.append({**named, **failure(error), "right": False})
                        continue
                    found.append({**named, **judge(got, alone, reference, dtype, quantize)})
        return found

    def compile(self, mode: Mode, dtype: str, quantize: str | None) -> tuple[ShardedDecoder, Any, Any]:
        devices = jax.local_devices()[:1] if mode == ONE else jax.devices()[: self.devices]
        model = ShardedDecoder(self.config, mode, quantize, dtype=dtype, devices=devices)
        return model, model.lower_weights().compile(UNTUNED), self.lower(model).compile(UNTUNED)

    def lower(self, model: ShardedDecoder) -> jax.stages.Lowered:
        """`(weights, caches, tokens [B, S + 1])` -> logits `[B, S + 1, V]`: S tokens at once, then the last by itself."""
        (caches,) = model.abstract_caches(self.step)
        tokens = jax.ShapeDtypeStruct(self.tokens.shape, jnp.int32, sharding=model.everywhere)

        def run(weights, caches, tokens):
            decoder = model.merged(weights)
            start, length = jnp.zeros(len(tokens), jnp.int32), tokens.shape[1] - 1
            counts = jnp.ones_like(start)
            hidden, caches = decoder.hidden(tokens[:, :-1], start, caches, length * counts, is_start=True)
            last, _ = decoder.hidden(tokens[:, -1:], start + length, caches, counts)
            return decoder.logits(jnp.concatenate([hidden, last], axis=1))

        return jax.jit(run, out_shardings=model.everywhere).lower(model.leaves, caches, tokens)

    def logits(self, program: Future) -> np.ndarray:
        model, weights, run = program.result()
        (abstract,) = model.abstract_caches(self.step)
        caches = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), abstract)
        return np.asarray(run(model.weights(weights), caches, model.put(self.tokens)), np.float64)


def judge(
    got: np.ndarray, alone: np.ndarray, reference: np.ndarray, dtype: str, quantize: str | None
) -> dict[str, Any]:
    """Errors by norms, and whether rounding explains them."""
    error, of_one, difference = (distance(*pair) for pair in ((got, reference), (alone, reference), (got, alone)))
    tolerance = _FLOAT8 if quantize else _FLOAT32
    right = difference < tolerance if dtype == "float32" else error < _SLACK * of_one
    return {"error": error, "error_of_one": of_one, "difference": difference, "right": bool(right)}


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
