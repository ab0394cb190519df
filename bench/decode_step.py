"""A whole model's decode step on a Hopper GPU: random weights of a real model's size, against the bytes that it must read.

    python -m bench.decode_step                                  # OLMoE, DeepSeek-V2-Lite, Qwen3-30B-A3B
    python -m bench.decode_step --models bench/configs/olmoe-1b-7b --batch-size 64 --context 1024

The step is the engine's own program (greedy, sampling included), and each call the same step: every sequence at the end of its
context, with the same tokens. With `--num-continuous-decode-steps N` it is an N-th of the engine's program of N steps. `step` is a step's time on the
stream, gaps included; `kernels` the sum of its kernel times. `floor`: the weights that a step uses (of experts, those that some
token chose in it), and the cache up to each sequence's end, once, at the copy rate measured here.
"""

import argparse
import gc
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

import jax_epmoe as ep
from bench import roofline, scopes
from bench.environment import environment, require_hopper, result_path
from bench.layer_tables import MOE_SCOPES
from bench.roofline import failure, number
from bench.timing import ceilings
from jax_epmoe.generate.batching import make_shapes
from jax_epmoe.generate.engine import Engine
from jax_epmoe.generate.programs import Call, Made, Programs, Slots, pack
from jax_epmoe.generate.sampling import SamplingParams
from jax_epmoe.generate.scheduler import Prefill, PrefillRow, Running
from jax_epmoe.models.decoder import Decoder
from jax_epmoe.models.kv_cache import KV_CACHE_DTYPES
from jax_epmoe.quant import FP8

CONFIGS = Path(__file__).resolve().parent / "configs"
MODELS = ("olmoe-1b-7b", "deepseek-v2-lite", "qwen3-30b-a3b")
DTYPE = "bfloat16"
ITERATIONS = 8
CALLS = 4 * ITERATIONS + 3  # of `scopes.measure`, and one that counts experts


def main() -> None:
    args = _arguments()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # Qwen3-30B takes 57 GiB
    require_hopper("bench.decode_step")
    run(args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = [CONFIGS / name for name in MODELS]
    parser.add_argument("--models", type=Path, nargs="+", default=defaults, help="folders with a config.json")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024, help="at least N + 2")
    parser.add_argument(
        "--num-continuous-decode-steps", type=int, default=1, metavar="N", help="steps a call (default 1)"
    )
    parser.add_argument("--quantize", choices=roofline.QUANTIZATIONS, help="the weights' format; default: bfloat16")
    parser.add_argument("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help="as epmoe-generate's")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", default=420, help="start no model after")
    parser.add_argument("--output", type=Path, help="default: a file in bench/results/ named after the device")
    args = parser.parse_args()
    least = args.num_continuous_decode_steps + 2
    if args.context < least:
        parser.error(
            f"--context is {args.context}; it should be at least {least}, for a prompt and the steps of a call"
        )
    return args


def run(args: argparse.Namespace) -> None:
    deadline = time.monotonic() + args.time_limit
    cached = None if args.kv_cache_dtype == "auto" else f"{args.kv_cache_dtype}-cache"
    output = args.output or result_path("-".join(filter(None, ["decode_step", args.quantize, cached])))
    result: dict[str, Any] = {"format": 1, **environment(), "peer_versions": {}, "ceilings": ceilings_here()}
    result |= {
        "quantize": args.quantize,
        "kv_cache_dtype": args.kv_cache_dtype,
        "batch_size": args.batch_size,
        "context": args.context,
        "models": [],
    }
    result["num_continuous_decode_steps"] = args.num_continuous_decode_steps
    for folder in tqdm(args.models, desc="models"):
        if time.monotonic() > deadline:
            tqdm.write(f"time limit of {args.time_limit:.0f} s: {folder.name} and what follows left out")
            break
        try:
            steps, copy_gbs = args.num_continuous_decode_steps, result["ceilings"]["copy_gbs"]
            seen = measure(folder, args.quantize, args.batch_size, args.context, steps, args.kv_cache_dtype, copy_gbs)
        except Exception as error:  # memory: the next model may fit
            seen = failure(error)
        gc.collect()
        result["models"].append({"model": folder.name, **seen})
        roofline.save(result, output)
    print(f"{roofline.head(result)}\n{table(result)}\nwrote {output}")


def ceilings_here() -> dict[str, Any]:
    return ceilings({"failed": "not asked for"})


class Step:
    """A decode call of `steps` steps, the last of which is at the end of the context; every call is the same."""

    def __init__(self, model: Decoder, batch_size: int, context: int, steps: int, kv_cache_dtype: str = "auto") -> None:
        new = steps + 1  # the first new token comes with the prompt
        start = context - new
        engine = Engine(
            model,
            max_batch_size=batch_size,
            context_length=context,
            num_continuous_decode_steps=steps,
            kv_cache_dtype=kv_cache_dtype,
        )
        random = np.random.default_rng(0)
        prompts = random.integers(0, model.config.vocab_size, (batch_size, start)).tolist()
        requests = engine.requests(prompts, SamplingParams(max_new_tokens=new, ignore_eos=True))
        shapes = make_shapes(requests, engine.limits, batch_size)
        rows = tuple(PrefillRow(Running(r, []), i, 0, start) for i, r in enumerate(requests))
        tokens, _, ints, floats = pack(Prefill(rows, start, True, ()), shapes.num_stop_ids)
        column = np.full(batch_size, start, np.int32), np.ones(batch_size, np.int32), np.ones(batch_size, bool)
        programs = engine.programs
        arrays = tokens[:, -1], *column, ints, floats
        self._slots = [Slots(*map(programs.put, arrays), seen=None) for _ in range(CALLS)]  # a call takes its own
        self._everyone = programs.put(np.ones(batch_size, bool))
        call = Call("decode", length=steps)
        lowered = programs.lower(shapes, call)
        self.program, self.profiled = lowered.compile(), lowered.compile(scopes.ONE_BY_ONE)
        self._counting = Programs(model, kv_cache_dtype, with_load=True).lower(shapes, call)
        self._weights = programs.weights
        self.cache = jax.tree.map(_random_like, programs.init_cache(shapes.slots, shapes.cache_length))
        self.positions_read = start + (steps + 1) / 2

    def run(self, program: Callable) -> Made:
        self.cache, _, made = program(self._weights, self.cache, self._slots.pop(), self._everyone)
        return made

    def experts_used(self) -> np.ndarray:
        """How many experts of each MoE layer a step reads; the mean where a call has several."""
        return np.count_nonzero(self.run(self._counting.compile()).load, axis=-1).mean(axis=0)


def _random_like(zeros: jax.Array) -> jax.Array:
    """Normally distributed; of bytes, which are float8, and of float32, which are their scales, what those may be."""

    def draw(like: jax.Array) -> jax.Array:
        dtype = jnp.bfloat16 if like.dtype == jnp.uint8 else like.dtype
        values = jax.random.normal(jax.random.key(0, impl="rbg"), like.shape, dtype)
        if like.dtype == jnp.uint8:
            return jax.lax.bitcast_convert_type(values.astype(FP8), jnp.uint8)
        return jnp.abs(values) if dtype == jnp.float32 else values

    return jax.jit(draw, donate_argnums=0, out_shardings=zeros.sharding)(zeros)


def measure(
    folder: Path, quantize: str | None, batch_size: int, context: int, steps: int, kv_cache_dtype: str, copy_gbs: float
) -> dict[str, Any]:
    """One model's times and what they should be, in microseconds; its weights are gone when this returns."""
    model = ep.dummy_model(folder, mesh=ep.make_mesh(), dtype=DTYPE, quantization=quantize)
    started = time.perf_counter()
    step = Step(model, batch_size, context, steps, kv_cache_dtype)
    compile_seconds = time.perf_counter() - started
    run, profiled = (partial(step.run, program) for program in (step.program, step.profiled))
    timed = scopes.measure(
        run, profiled, step.profiled.as_text() or "", ITERATIONS, (*MOE_SCOPES, "attention", "sample")
    )
    for name in ("stream_us", "device_us", "dispatch_us"):
        timed[name] /= steps
    parts = {name: us / steps for name, us in timed["parts"].items()}
    kernels = [{**kernel, "us": kernel["us"] / steps} for kernel in timed["kernels"]]
    used = step.experts_used()
    weight_bytes = weight_bytes_read(model, used, batch_size)
    cache_bytes = cache_bytes_read(step.cache, step.positions_read)
    return {
        "step_us": timed["stream_us"],
        "kernels_us": timed["device_us"],
        "method": timed["method"],
        "dispatch_us": timed["dispatch_us"],
        "floor_us": (weight_bytes + cache_bytes) / copy_gbs * 1e-3,
        "weight_bytes": weight_bytes,
        "cache_bytes": cache_bytes,
        "experts_used": float(used.mean()),
        "parts": parts,
        "moe_us": sum(parts.get(name, 0) for name in MOE_SCOPES) if parts else None,
        "kernels": kernels,
        "compile_seconds": round(compile_seconds, 1),
    }


def weight_bytes_read(model: Decoder, used: np.ndarray, batch_size: int) -> int:
    """Of all weights; of `used[i]` experts in the i-th MoE layer; of an embedding that is no head, a row for each sequence."""
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    table = model.embed.table[...]
    if model.head is not None:
        total -= (len(table) - batch_size) * (table.nbytes // len(table))
    moe_layers = [layer.moe for layer in model.layers if layer.has_experts]
    for moe, count in zip(moe_layers, used, strict=True):
        for experts in jax.tree.leaves((moe.w_gate_up[...], moe.w_down[...])):  # with their scales
            total -= round((len(experts) - count) * (experts.nbytes // len(experts)))
    return total


def cache_bytes_read(cache: Any, positions: float) -> int:
    """Of every sequence's first `positions`; arrays are `[B, L, ...]`."""
    return round(sum(leaf.nbytes // leaf.shape[1] for leaf in jax.tree.leaves(cache)) * positions)


def table(result: dict[str, Any]) -> str:
    """One line a model, in ms."""
    lines = [
        f"batch {result['batch_size']}, context {result['context']}; ms",
        f"{'model':18}{'step':>8}{'kernels':>9}{'floor':>8}{'x floor':>9}{'MoE':>8}{'weights GB':>12}{'cache GB':>10}",
    ]
    for row in result["models"]:
        if "failed" in row:
            lines.append(f"{row['model']:18}{row['failed']}")
            continue
        moe = None if row["moe_us"] is None else row["moe_us"] / 1e3
        lines.append(
            f"{row['model']:18}{row['step_us'] / 1e3:8.3f}{row['kernels_us'] / 1e3:9.3f}{row['floor_us'] / 1e3:8.3f}"
            f"{row['step_us'] / row['floor_us']:9.2f}{number(moe, 8, '.3f')}{row['weight_bytes'] / 1e9:12.2f}"
            f"{row['cache_bytes'] / 1e9:10.2f}"
        )
        parts = ", ".join(f"{name} {us / 1e3:.3f}" for name, us in row["parts"].items())
        lines += [f"  {parts}"] if parts else []
    return "\n".join(lines)


if __name__ == "__main__":
    main()
