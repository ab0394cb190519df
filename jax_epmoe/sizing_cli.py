"""`epmoe-plan`: whether a model fits some GPUs, how to lay it over them, and how long its steps must at least take."""

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jax_epmoe.checkpoint import DTYPES, quantization_of, read_header
from jax_epmoe.command_line import Parser, refuse
from jax_epmoe.config import require
from jax_epmoe.models.families import read_config
from jax_epmoe.models.kv_cache import KV_CACHE_DTYPES
from jax_epmoe.sizing import PARTS, Gpu, Plan, Sizes, Step, plans

PROGRAM = "epmoe-plan"
_GIB = 2**30
_DEFAULT_CONTEXT = 4096


class _Card(NamedTuple):
    memory_gib: float  # as nvidia-smi has it
    dense_tflops: dict[int, float]  # by the size of an element in bytes
    copy_gbs: float
    link_gbs: float


# 16-bit products and the H100's copies are what bench/roofline.py's floors are made of, a little under the best measured; the
# H200's memory is faster by the data sheets' ratio. From the data sheets: float32 (without tf32), NVLink one way.
_CARDS = {
    "h100": _Card(79.6, {2: 800, 4: 67}, 3000, 450),
    "h200": _Card(140.4, {2: 800, 4: 67}, 4300, 450),
}

_DESCRIPTION = """\
Print, for every way to lay a model over some GPUs that fits their memory, best first: what each device holds, what it sends
in a prefill call and a decode step, and the least time that they can take: the larger of products / their rate and bytes of
weights and cache / the copy rate, and bytes sent / the link's rate. The cache is taken as full. No GPU is needed.
Exit status: 0 where something fits, 1 where nothing does, 2 after one line on bad arguments.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(PROGRAM, _DESCRIPTION)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="one with a config.json; weights are not read")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of weights, activations, cache; default: the checkpoint's, or bfloat16"
    )
    parser.add_argument(
        "--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
        default="auto",
        help="as epmoe-generate's (default auto: as --dtype)",
    )
    parser.add_argument("--by", choices=("decode", "prefill"), default="decode", help="whose floor orders the layouts")
    parser.add_argument("--json", action="store_true", help="everything, in bytes and seconds, and what does not fit")

    group = parser.add_argument_group("GPUs")
    group.add_argument("--gpus", type=int, default=8, metavar="N", help="how many (default 8)")
    group.add_argument("--gpu", choices=tuple(_CARDS), default="h100", help="gives the next four (default h100)")
    group.add_argument("--memory-gib", type=float, metavar="X", help="of each")
    group.add_argument("--dense-tflops", type=float, metavar="X", help="of large products in this dtype")
    group.add_argument("--copy-gbs", type=float, metavar="X", help="GB/s, read and written")
    group.add_argument("--link-gbs", type=float, metavar="X", help="GB/s that a GPU sends; over hosts, the network's")
    group.add_argument(
        "--memory-fraction",
        type=float,
        default=0.75,
        metavar="X",
        help="what JAX may use: its XLA_CLIENT_MEM_FRACTION (default 0.75, as JAX's)",
    )

    group = parser.add_argument_group("sizes, as for epmoe-generate")
    group.add_argument(
        "--max-batch-size", type=int, default=32, metavar="N", help="sequences run together (default 32)"
    )
    group.add_argument(
        "--context-length",
        type=int,
        metavar="N",
        help=f"positions of the cache (default {_DEFAULT_CONTEXT}, or the model's where that is less)",
    )
    group.add_argument(
        "--prefill-chunk", type=int, default=512, metavar="N", help="tokens of each prompt a prefill call (default 512)"
    )
    group.add_argument(
        "--max-prefill-tokens", type=int, default=8192, metavar="N", help="of all prompts together (default 8192)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status: 1 when nothing fits, 2 after one line when something given was wrong."""
    try:
        args = make_parser().parse_args(argv)
        jax.config.update("jax_platforms", "cpu")  # a plan needs no GPU and must not take the memory of one
        return _plan(args)
    except ValueError as error:
        return refuse(PROGRAM, str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _plan(args: argparse.Namespace) -> int:
    folder = Path(args.model)
    config = read_config(folder)
    header = read_header(folder) if (folder / "epmoe.json").is_file() else {"dtype": "bfloat16"}
    quantization = quantization_of(header).name
    require(
        quantization is None, f"{folder}'s quantization", quantization, "none: quantised weights are not counted yet"
    )
    dtype = args.dtype or header["dtype"]
    require(args.gpus > 0, "--gpus", args.gpus, "a positive integer")
    gpu = _gpu(args, jax.numpy.dtype(dtype).itemsize)
    context = min(_DEFAULT_CONTEXT, config.max_position_embeddings)
    context = context if args.context_length is None else args.context_length
    sizes = Sizes(args.max_batch_size, context, args.prefill_chunk, args.max_prefill_tokens)

    def rank(plan: Plan) -> tuple:
        floor = getattr(plan, args.by).floor_seconds(gpu)
        return plan.total > gpu.memory, float(f"{floor:.3g}"), -plan.layout.ep_size, plan.total

    ranked = sorted(plans(config, args.gpus, sizes, dtype, args.kv_cache_dtype), key=rank)
    fitting = [plan for plan in ranked if plan.total <= gpu.memory]
    cache = "" if args.kv_cache_dtype == "auto" else f" with an {args.kv_cache_dtype} cache"
    if args.json:
        found = [_as_json(plan, gpu) for plan in ranked]
        given = {"model": args.model, "dtype": dtype, "kv_cache_dtype": args.kv_cache_dtype, "gpus": args.gpus}
        print(json.dumps(given | {"gpu": vars(gpu), "sizes": vars(sizes), "plans": found}, indent=1))
    elif fitting:
        print(
            f"{args.model}, {dtype}{cache}, {args.gpus} x {args.gpu}: {args.memory_fraction:g} of their memory is "
            f"{gpu.memory / _GIB:.1f} GiB each\n{sizes.max_batch_size} sequences, {sizes.context_length} positions, {sizes.prefill_chunk} "
            f"tokens of each and {sizes.max_prefill_tokens} of all a prefill call\n\n{_table(fitting, sizes, gpu)}\n"
        )
        if len(fitting) < len(ranked):
            print(f"{len(ranked) - len(fitting)} more do not fit")
        flag = f" --kv-cache-dtype {args.kv_cache_dtype}" if cache else ""
        print(f"best: epmoe-generate {fitting[0].layout.flags}{flag}")
    if fitting:
        return 0
    print(f"{PROGRAM}: {_missing(ranked, gpu)}", file=sys.stderr)
    return 1


def _gpu(args: argparse.Namespace, itemsize: int) -> Gpu:
    """The card, with what was given in its place."""
    card = _CARDS[args.gpu]
    defaults = card._asdict() | {"dense_tflops": card.dense_tflops[itemsize]}
    rates = {}
    for name, default in defaults.items():
        given = getattr(args, name)
        rates[name] = default if given is None else given
        require(0 < rates[name] < math.inf, f"--{name.replace('_', '-')}", given, "a positive number")
    require(0 < args.memory_fraction <= 1, "--memory-fraction", args.memory_fraction, "more than 0 and at most 1")
    return Gpu(
        memory=rates["memory_gib"] * args.memory_fraction * _GIB,
        dense_rate=rates["dense_tflops"] * 1e12,
        copy_rate=rates["copy_gbs"] * 1e9,
        link_rate=rates["link_gbs"] * 1e9,
    )


def _missing(ranked: Sequence[Plan], gpu: Gpu) -> str:
    least = min(ranked, key=lambda plan: plan.total)
    weights = sum(least.weights.values())
    parts = {"weights": weights, "cache": least.cache, "activations": least.total - weights - least.cache}
    told = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in parts.items())
    return (
        f"nothing fits: {least.layout.flags} needs least, {least.total / _GIB:.1f} GiB a device ({told}), "
        f"{(least.total - gpu.memory) / _GIB:.1f} more than the {gpu.memory / _GIB:.1f} that it may use"
    )


def _table(found: Sequence[Plan], sizes: Sizes, gpu: Gpu) -> str:
    """A line a layout under two of headings."""
    above = f"{'':17}{'GiB a device':67}{'sent, MB':16}{'floor, ms':18}tokens/s"
    names = [*(part.replace("_and_", "+").replace("embedding", "embed") for part in PARTS), "cache", "activ.", "total"]
    widths = [11, 9, 14, 12, 7, 8, 8]
    below = f"{'tp':>3}{'ep':>4}{'dp':>4} {'dp-att':6}"
    below += "".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    below += f"{'prefill':>9}{'decode':>7}{'prefill':>10}{'decode':>8}{'prefill':>9}{'decode':>8}"
    lines = [above, below]
    for plan in found:
        layout, steps = plan.layout, (plan.prefill, plan.decode)
        sent, floors = [step.sent / 1e6 for step in steps], [step.floor_seconds(gpu) for step in steps]
        lengths = (min(sizes.prefill_chunk, sizes.context_length), 1)
        rows = plan.prefill_rows, sizes.max_batch_size
        rates = [n * length / floor for n, length, floor in zip(rows, lengths, floors, strict=True)]
        activations = max(step.activations for step in steps)
        values = [*(plan.weights[part] for part in PARTS), plan.cache, activations, plan.total]
        line = f"{layout.tp_size:3}{layout.ep_size:4}{layout.dp_size:4} {'yes' if layout.dp_attention else '-':6}"
        line += "".join(f"{value / _GIB:{width}.2f}" for value, width in zip(values, widths, strict=True))
        line += (
            f"{sent[0]:9.0f}{sent[1]:7.1f}{floors[0] * 1e3:10.1f}{floors[1] * 1e3:8.2f}{rates[0]:9.0f}{rates[1]:8.0f}"
        )
        lines.append(line)
    return "\n".join(lines)


def _as_json(plan: Plan, gpu: Gpu) -> dict[str, Any]:
    def step(step: Step) -> dict[str, Any]:
        return dataclasses.asdict(step) | {"floor_seconds": step.floor_seconds(gpu)}

    return dataclasses.asdict(plan) | {
        "flags": plan.layout.flags,
        "total": plan.total,
        "fits": plan.total <= gpu.memory,
        "prefill": step(plan.prefill),
        "decode": step(plan.decode),
    }


if __name__ == "__main__":
    sys.exit(main())
