"""One rank's MoE layer on a Hopper GPU: expert parallelism against tensor parallelism, each part's time, the floor, peers.

    python -m bench.moe_layer                    # all models, tokens and loads; ends after ten minutes, done or not
    python -m bench.moe_layer --add              # and goes on
    python -m bench.moe_layer --quick            # 8192 and 64 tokens, balanced
    python -m bench.moe_layer --models 'deepseek*' --tokens 8192 --loads balanced zipf
    python -m bench.moe_layer --quantize fp8-block     # float8 experts

A rank is one of 8: with EP8 it holds an eighth of the experts, whole, and only pairs of those are work; with TP8 an eighth
of every expert. EP1 is the whole layer. The rank that has most to do is measured: all others wait for it. There is no
communication in these times.

Times are those of a call's kernels, from a profile, and so are the parts, by named scope; `stream` is a call's time on the
stream, gaps included. `floor` is that of both products and of combine, at rates measured here.
Shared experts are measured in a second program, beside the routed ones. Peers are given the routing: `peers` is the time
of the best over ours without the router.

With `--quantize` experts are float8 (and shared ones bfloat16, which does not count), and so is torch's peer, with a scale a row.
Numbers are checked against the same roundings to float8 in float32. The floor has the tokens quantised already.
"""

import argparse
import fnmatch
import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

import jax_epmoe as ep
from bench import layer_tables, layers, roofline, scopes
from bench.environment import environment, require_hopper, result_path
from bench.layer_tables import MOE_SCOPES, OURS, TORCH_PEERS, WITH_SHARED
from bench.layers import LAYOUTS, LOADS, MODELS, TOKENS, Case, layouts
from bench.operands import matrix_of, rows_of
from bench.peers import TorchProcess
from bench.roofline import failure
from bench.timing import Rotation, ceilings, normal
from jax_epmoe.config import MoEConfig
from jax_epmoe.moe.experts import run_experts
from jax_epmoe.moe.gated_mlp import GatedMLP
from jax_epmoe.moe.plan import make_plan
from jax_epmoe.moe.router import route
from jax_epmoe.quant import FORMATS, FP8_MAX, Format, QuantizedWeights, quantize
from jax_epmoe.tune import UNTUNED

DTYPE = jnp.bfloat16
_UNCACHED_BYTES = 200e6  # four times the L2


def main() -> None:
    args = _arguments()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch's process needs memory too
    require_hopper("bench.moe_layer")
    with closing(Bench(args)) as bench:
        bench.run()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="PATTERN", default=["*"], help=f"of {', '.join(MODELS)}")
    parser.add_argument("--tokens", type=int, nargs="+", help=f"default: {' '.join(map(str, TOKENS))}")
    parser.add_argument("--loads", nargs="+", choices=LOADS)
    parser.add_argument("--layouts", nargs="+", choices=[layout.name for layout in LAYOUTS], help="default: all")
    parser.add_argument("--quantize", choices=layers.QUANTIZATIONS, help="the experts' format; default: bfloat16")
    parser.add_argument("--quick", action="store_true", help="8192 and 64 tokens, balanced")
    parser.add_argument("--add", action="store_true", help="to what the output file holds; what it has is left out")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--no-shared", action="store_true", help="leave the second program, with shared experts, out")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="start nothing after (450; quick: 200)")
    parser.add_argument("--jobs", type=int, default=6, help="programs to compile at a time")
    parser.add_argument("--output", type=Path, help="default: a file in bench/results/ named after the device")
    args = parser.parse_args()
    args.models = [name for name in MODELS if any(fnmatch.fnmatch(name, pattern) for pattern in args.models)]
    if not args.models:
        parser.error("--models: none matches")
    args.tokens = args.tokens or ((8192, 64) if args.quick else TOKENS)
    args.loads = args.loads or (LOADS[:1] if args.quick else LOADS)
    args.time_limit = args.time_limit or (200 if args.quick else 450)
    args.output = args.output or result_path("-".join(filter(None, ["moe_layer", args.quantize])))
    if args.add and args.output.exists():
        before = json.loads(args.output.read_text()).get("quantize")
        if before != args.quantize:
            parser.error(f"--add: {args.output} holds results of --quantize {before}")
    return args


def rank_layer(case: Case, shared: nnx.GraphDef | None = None) -> Callable[..., jax.Array]:
    """What a rank of `EPMoE` runs (its `_on_device`, without the all-reduce), on one device.

    `(x [T, H], router, experts, first_expert, shared_state) -> [T, H]`, with `router` the weight `[E, H]` and the bias or
    None, `experts` the rank's `[E / ranks, 2, I, H]` and `[E / ranks, H, I]`, arrays or `QuantizedWeights`, `shared_state` of the
    shared experts, if any.
    """
    config = case.config

    def layer(x, router, experts, first_expert, shared_state):
        with jax.named_scope("router"):
            weights, ids = route(x, *router, config)
        with jax.named_scope("plan"):
            plan = make_plan(ids, first_expert, case.experts)
        partial_sum = None
        if shared is not None:
            with jax.named_scope("shared_experts"):
                partial_sum = nnx.merge(shared, shared_state).partial_sum(x)
        return run_experts(
            x, *experts, weights, plan, partial_sum, config.activation, None, case.chunk_rows, case.expected_rows
        )

    return layer


class Weights:
    """A rank's weights, in as many copies of the experts as it takes to find nothing in the L2."""

    def __init__(self, case: Case) -> None:
        config = case.config
        copies = min(4, math.ceil(_UNCACHED_BYTES / case.weight_bytes))
        up, down = (case.experts, 2, case.inner, config.hidden_size), (case.experts, config.hidden_size, case.inner)

        def weights(seed: int, shape: tuple[int, ...], largest_input: float) -> jax.Array | QuantizedWeights:
            w = normal(seed, shape, shape[-1] ** -0.5)
            return _quantize(w, FORMATS[case.quantize], largest_input) if case.quantize else w.astype(DTYPE)

        # Inputs are normal numbers and router logits, both below 8, and then silu of such a number times another.
        self.experts = [(weights(2 * i, up, 8), weights(2 * i + 1, down, 32)) for i in range(copies)]
        # The first E numbers of a token are its logits, but for a little of all the others.
        identity = jnp.eye(config.num_experts, config.hidden_size)
        noise = 1e-3 * normal(9, (config.num_experts, config.hidden_size)).astype(jnp.float32)
        self.router = (
            (identity + noise).astype(DTYPE),
            jnp.zeros(config.num_experts) if config.correction_bias else None,
        )
        self.shared: nnx.GraphDef | None = None
        self.shared_state: nnx.State | None = None
        if case.shared_inner:
            mlp = GatedMLP(
                config.hidden_size,
                case.shared_inner,
                activation=config.activation,
                axes=(),
                mesh=ep.make_mesh(),
                dtype=DTYPE,
                rngs=nnx.Rngs(0),
            )
            self.shared, self.shared_state = nnx.split(mlp)
        jax.block_until_ready(self.experts)


class Tokens:
    """A load: `x [T, H]`, and where its tokens go, `ids [T, k]` and `weights [T, k]`."""

    def __init__(self, model: str, tokens: int, load: str, router: tuple[jax.Array, jax.Array | None]) -> None:
        config = MODELS[model]
        x = normal(7, (tokens, config.hidden_size)).astype(DTYPE)
        self.x = x.at[:, : config.num_experts].set(jnp.asarray(layers.logits(config, tokens, load), DTYPE))
        self.weights, self.device_ids = _route(self.x, router, config)
        self.ids = np.asarray(self.device_ids)


@partial(jax.jit, static_argnames="config")
def _route(x: jax.Array, router: tuple[jax.Array, jax.Array | None], config: MoEConfig) -> tuple[jax.Array, jax.Array]:
    return route(x, *router, config)


@partial(jax.jit, static_argnums=(1, 2))
def _quantize(w: jax.Array, format: Format, largest_input: float) -> QuantizedWeights:
    """`largest_input`: of what they are multiplied with, for static scales."""
    input_scales = jnp.full(len(w), largest_input / FP8_MAX) if format.static else None
    return QuantizedWeights(quantize(w, format.weights), input_scales, format)


# XLA leaves out a rounding to float8 and back where it may: then the numbers would be those of another layer.
@partial(jax.jit, compiler_options={**UNTUNED, "xla_allow_excess_precision": False})
def _expected(x, weights, ids, experts, first_expert) -> jax.Array:
    """The rank's part for a few tokens, `[S, H]`, in float32; quantised where the layer quantises."""
    w_gate_up, w_down = experts
    local_experts = len(jax.tree.leaves(w_down)[0])

    def times(w: jax.Array | QuantizedWeights, at: Any, value: jax.Array) -> jax.Array:
        if isinstance(w, QuantizedWeights):
            quantized = w.quantize_input(value[None])
            w, value = w.weights, rows_of(quantized, jnp.arange(1))[0]
        return jnp.dot(matrix_of(w, at), value, precision="highest")

    def pair(choice: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        row, weight, expert = choice
        local = jnp.clip(expert - first_expert, 0, local_experts - 1)
        gate, up = (times(w_gate_up, (local, i), row) for i in range(2))
        y = times(w_down, local, jax.nn.silu(gate) * up)
        return jnp.where(local == expert - first_expert, weight * y, 0)

    top_k = ids.shape[1]
    rows = jnp.repeat(x.astype(jnp.float32), top_k, axis=0)
    out = jax.lax.map(pair, (rows, weights.reshape(-1), ids.reshape(-1)))
    return out.reshape(-1, top_k, x.shape[1]).sum(axis=1)


@jax.jit
def _error(out: jax.Array, sample: jax.Array, expected: jax.Array) -> jax.Array:
    """By norms; NaN if there is one anywhere in the output."""
    error = jnp.linalg.norm(out[sample].astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
    return jnp.where(jnp.isnan(out).any(), jnp.nan, error)


def sample(tokens: Tokens, case: Case, rank: int, count: int = 8) -> np.ndarray:
    """`[count]` tokens that have rows on the rank, the first and the last of them included."""
    own = np.flatnonzero((tokens.ids // case.experts == rank).any(axis=1))
    return own[np.linspace(0, len(own) - 1, count).astype(int)]


class Bench:
    """One run: what it was asked for and what it has seen."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.deadline = time.monotonic() + args.time_limit
        self.pool = ThreadPoolExecutor(args.jobs)
        self.torch = None if args.no_peers else TorchProcess()
        self.result: dict[str, Any] = {"format": 1, **environment(), "quantize": args.quantize}
        self.result |= {"peer_versions": {}, "cases": []}
        if args.add and args.output.exists():
            self.result["cases"] = json.loads(args.output.read_text())["cases"]

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        if self.torch:
            self.torch.close()

    def run(self) -> None:
        if self.torch:
            self.torch.connect()
            self.result["peer_versions"] = self.torch.told_versions()
        self.result["ceilings"] = self.ceilings()
        print(roofline.head(self.result))
        for model in tqdm(self.args.models, desc="models"):
            try:
                self.model(model)
            except Exception as error:  # memory, or the device is lost: what is there stays
                tqdm.write(f"{model}: {failure(error)['failed']}")
        if time.monotonic() > self.deadline:
            print(f"time limit of {self.args.time_limit:.0f} s: what is missing was left out")
        print(f"\n{roofline.head(self.result)}\n{layer_tables.summary(self.result)}")
        if self.result["cases"]:
            roofline.try_plot(layer_tables.plot, self.result, self.args.output)

    def ceilings(self) -> dict[str, Any]:
        quantized = self.args.quantize is not None
        asked = {"ceilings": {"quantized": quantized}}
        return ceilings(self.torch.ask(asked) if self.torch else {"failed": "not asked for"}, quantized=quantized)

    def model(self, model: str) -> None:
        """All cases of one model that are to be measured; its weights are gone when this returns."""
        done = {(case["model"], case["layout"], case["tokens"], case["load"]) for case in self.result["cases"]}
        todo = [
            (Case(model, layout, tokens, self.args.quantize), load)
            for tokens in self.args.tokens
            for load in self.args.loads
            for layout in layouts(model, self.args.quantize)
            if layout.name in (self.args.layouts or [layout.name])
            if (model, layout.name, tokens, load) not in done
        ]
        if not todo or time.monotonic() > self.deadline:
            return
        used = dict.fromkeys(case.layout for case, _ in todo)
        weights = {layout: Weights(Case(model, layout, 1, self.args.quantize)) for layout in used}
        compiled = cache(lambda case, with_shared: self.compile(case, weights[case.layout], with_shared))
        programs = [(case, self.has_shared(case, load)) for case, load in todo] + [(case, False) for case, _ in todo]
        list(self.pool.map(lambda program: compiled(*program), dict.fromkeys(programs)))
        router = next(iter(weights.values())).router  # the same in every layout
        draw = lru_cache(maxsize=1)(lambda tokens, load: Tokens(model, tokens, load, router))
        for case, load in todo:
            if time.monotonic() > self.deadline:
                return
            seen = self.case(case, load, draw(case.tokens, load), weights[case.layout], compiled)
            self.result["cases"].append(seen)
            tqdm.write(layer_tables.case_table(seen))
            roofline.save(self.result, self.args.output)

    def has_shared(self, case: Case, load: str) -> bool:
        """Whether shared experts are measured too: for one load, which is nothing to them."""
        return bool(case.shared_inner) and load == LOADS[0] and not self.args.no_shared

    def compile(self, case: Case, weights: Weights, with_shared: bool) -> Any:
        """The program, and once more to profile it; or why there is none."""
        layer = rank_layer(case, weights.shared if with_shared else None)
        x = jax.ShapeDtypeStruct((case.tokens, case.config.hidden_size), DTYPE)
        try:
            lowered = jax.jit(layer).lower(*self.arguments(x, weights, 0, with_shared)[0])
            return lowered.compile(), lowered.compile(scopes.ONE_BY_ONE)
        except Exception as error:
            return failure(error)

    @staticmethod
    def arguments(x: Any, weights: Weights, first_expert: int, with_shared: bool) -> list[tuple[Any, ...]]:
        """Those of consecutive calls."""
        shared_state = weights.shared_state if with_shared else None
        first = jnp.int32(first_expert)
        return [(x, weights.router, experts, first, shared_state) for experts in weights.experts]

    def case(self, case: Case, load: str, tokens: Tokens, weights: Weights, compiled: Callable) -> dict[str, Any]:
        rates = {key: self.result["ceilings"][key] for key in ("dense_tflops", "copy_gbs")}
        rank = case.busiest_rank(tokens.ids)
        sizes = case.group_sizes(tokens.ids, rank)
        measure = partial(self.measure, case, rank, tokens, weights, compiled)
        results = {OURS: measure(False)}
        if self.has_shared(case, load):
            results[WITH_SHARED] = measure(True)
        results |= self.ask_torch(case, rank, tokens, len(weights.experts))
        return {
            "model": case.model,
            "layout": case.layout.name,
            "tokens": case.tokens,
            "load": load,
            "quantize": case.quantize,
            "rank": rank,
            "rows": int(sizes.sum()),
            "experts_used": int(np.count_nonzero(sizes)),
            "most_rows_of_an_expert": int(sizes.max()),
            "chunk_rows": case.chunk_rows,
            "floor_us": case.floor_us(tokens.ids, rank, **rates),
            "results": results,
        }

    def measure(
        self, case: Case, rank: int, tokens: Tokens, weights: Weights, compiled: Callable, with_shared: bool
    ) -> dict[str, Any]:
        """Checks (the routed experts), then times."""
        programs, first = compiled(case, with_shared), rank * case.experts
        if isinstance(programs, dict):
            return programs
        program, profiled = programs
        arguments = self.arguments(tokens.x, weights, first, with_shared)
        iterations = -(-iterations_of(case.tokens) // len(arguments)) * len(arguments)
        try:
            error = None if with_shared else self.error(program, arguments[0], case, rank, tokens)
            calls = (Rotation(each, arguments) for each in programs)
            return {**scopes.measure(*calls, profiled.as_text() or "", iterations, MOE_SCOPES), "error": error}
        except Exception as problem:
            return failure(problem)

    @staticmethod
    def error(program: Any, arguments: tuple[Any, ...], case: Case, rank: int, tokens: Tokens) -> float:
        jnp.full(tokens.x.shape, jnp.nan, DTYPE).block_until_ready().delete()  # memory that the output may get
        rows = sample(tokens, case, rank)
        _, _, experts, first_expert, _ = arguments
        few = (value[rows] for value in (tokens.x, tokens.weights, tokens.device_ids))
        expected = _expected(*few, experts, first_expert)
        return float(_error(program(*arguments), rows, expected))

    def ask_torch(self, case: Case, rank: int, tokens: Tokens, copies: int) -> dict[str, Any]:
        if not self.torch:
            return {}
        request = {
            "hidden": case.config.hidden_size,
            "inner": case.inner,
            "experts": case.experts,
            "all_experts": case.config.num_experts,
            "first_expert": rank * case.experts,
            "ids": tokens.ids.tolist(),
            "copies": copies,
            "iterations": iterations_of(case.tokens),
            "peers": TORCH_PEERS,
            "quantized": case.quantize is not None,
        }
        answer = self.torch.ask({"layer": request})
        return dict.fromkeys(TORCH_PEERS, answer) if "failed" in answer else answer


def iterations_of(tokens: int) -> int:
    """How many calls to time: fewer where outputs, which all wait, are large."""
    return 10 if tokens > 1024 else 21


if __name__ == "__main__":
    main()
