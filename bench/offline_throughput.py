"""How fast a whole run of many prompts is: SGLang's `bench_offline_throughput`, with its options and its figures.

    python -m bench.offline_throughput                       # OLMoE-1B-7B on a GPU; the demo's small model on a CPU
    python -m bench.offline_throughput --model qwen3-30b-a3b --num-prompts 1000 --random-input-len 512 --random-output-len 256 \\
        --random-range-ratio 1 --peer transformers
    python -m bench.offline_throughput --model FOLDER --dataset-name sharegpt --dataset-path sharegpt.json --tp-size 8 --ep-size 8

The model is a converted checkpoint, or a folder with only a config.json or its name in bench/configs: then its weights are random.
Programs are compiled before the clock starts. `prefill` and `decode` are the seconds between results of calls of these kinds;
`host` the seconds of both in which the host was not waiting for a device. After the run that is timed, a profile of some seconds out
of the middle of another like it says how busy the devices are. `--peer transformers` first runs its `generate` and its continuous batching
on the same prompts, in a process of its own, on a model of the same size with random weights.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import transformers_peer
from bench.requests import Request, measured, random_requests, shared_prefix_requests, sharegpt_requests

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "bench/configs"
DATASETS = ("random", "sharegpt", "generated-shared-prefix")
ENGINE_SIZES = (
    "max_batch_size",
    "prefill_chunk",
    "max_prefill_tokens",
    "num_continuous_decode_steps",
    "context_length",
)

# Where nothing else is asked for, on a GPU as SGLang has it, and on a CPU something small.
GPU_DEFAULTS = {
    "model": "olmoe-1b-7b",
    "num_prompts": 1000,
    "random_input_len": 1024,
    "random_output_len": 1024,
    "dtype": "bfloat16",
}
CPU_DEFAULTS = {
    "model": "examples/demo/checkpoint",
    "num_prompts": 16,
    "random_input_len": 64,
    "random_output_len": 16,
    "dtype": "float32",
}


def main() -> int:
    args = _arguments()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # before JAX sees a GPU
    try:
        _fill(args)
        result = run(args)
    except (ValueError, OSError) as error:
        print(f"bench.offline_throughput: error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model", "--model-path", help="a folder, or a name in bench/configs; default olmoe-1b-7b, on a CPU the demo's"
    )
    add(
        "--load-format",
        choices=("auto", "dummy"),
        default="auto",
        help="dummy: random weights; auto: if there are no others",
    )
    add("--dtype", help="default: bfloat16, on a CPU float32")
    add("--kv-cache-dtype", default="auto")
    add("--tp-size", type=int, default=1)
    add("--ep-size", type=int, default=1)
    add("--dp-size", type=int, default=1)
    add("--enable-dp-attention", action="store_true", help="as epmoe-generate's; leave --dp-size out")
    add("--max-batch-size", "--max-running-requests", type=int, default=256)
    add("--prefill-chunk", "--chunked-prefill-size", type=int, default=512)
    add("--max-prefill-tokens", type=int, default=8192)
    add("--num-continuous-decode-steps", type=int, default=4)
    add("--mem-fraction-static", type=float, default=0.85)
    add("--context-length", type=int, help="default: what the longest request needs")
    add("--disable-radix-cache", action="store_true")
    add("--dataset-name", choices=DATASETS, default="random")
    add("--dataset-path", type=Path, help="of sharegpt: a JSON file")
    add("--num-prompts", type=int, help="default 1000, on a CPU 16")
    add("--sharegpt-output-len", type=int, help="default: that of each answer")
    add("--random-input-len", type=int, help="default 1024, on a CPU 64")
    add("--random-output-len", type=int, help="default 1024, on a CPU 16")
    add(
        "--random-range-ratio",
        type=float,
        default=0.0,
        help="lengths from this part of them up; 1: all alike (default 0)",
    )
    add("--gsp-num-groups", type=int, default=64)
    add("--gsp-prompts-per-group", type=int, default=16)
    add("--gsp-system-prompt-len", type=int, default=2048)
    add("--gsp-question-len", type=int, default=128)
    add("--gsp-output-len", type=int, default=256)
    add("--disable-ignore-eos", action="store_true", help="end at the model's end-of-sequence tokens")
    add("--seed", type=int, default=1)
    add("--profile", metavar="FOLDER", help="keep the profile there, for XProf or Perfetto")
    add("--profile-seconds", type=float, default=5.0, help="how long it is; 0: none (default 5)")
    add("--peer", choices=("transformers",), help="run it too, on the same prompts; needs torch and CUDA")
    add("--peer-num-prompts", type=int, help="only so many of the prompts for the peer")
    add("--peer-batch-size", type=int, default=128)
    add("--peer-time-limit", type=float, metavar="SECONDS", default=300)
    add("--result-filename", type=Path, help="append the result to it as a line of JSON")
    add("--output", type=Path, help="default: a file in bench/results/ named after model and device")
    return parser.parse_args()


def _fill(args: argparse.Namespace) -> None:
    """Defaults of this kind of device. With a peer, which has the GPU first, JAX must not touch it to find out."""
    if args.peer is None:
        import jax

        on_gpu = jax.default_backend() == "gpu"
    else:
        on_gpu = True
    for name, value in (GPU_DEFAULTS if on_gpu else CPU_DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    given = Path(args.model)
    args.model = next((f for f in (given, CONFIGS / given, ROOT / given) if (f / "config.json").is_file()), given)
    if not (args.model / "config.json").is_file():
        names = ", ".join(sorted(path.name for path in CONFIGS.iterdir()))
        raise ValueError(f"--model is {str(given)!r}; it should be a folder with a config.json, or one of {names}")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The peer, then ours; what was measured, which is saved too."""
    from jax_epmoe.models.families import read_config

    config = read_config(args.model)
    requests = make_requests(args, config)
    longest = max(len(request.prompt) + request.output_len for request in requests)
    if args.context_length is None:
        args.context_length = min(longest, config.max_position_embeddings)
    if longest > args.context_length:
        raise ValueError(
            f"the longest request has {longest} tokens; it should fit the context of {args.context_length}"
        )
    peers = {}
    if args.peer is not None:
        some = requests[: args.peer_num_prompts]
        how = {"dtype": args.dtype, "batch_size": args.peer_batch_size, "seconds": args.peer_time_limit}
        peers = transformers_peer.ask(args.model, some, **how)
    # From here on JAX has the devices.
    from bench.environment import environment, result_path
    from bench.roofline import save

    result = {
        "format": 1,
        **environment(),
        "model": args.model.resolve().name,
        **_asked(args),
        **measure(args, requests),
    }
    result["peers"] = peers
    save(result, args.output or result_path(f"offline_throughput_{args.model.resolve().name}"))
    if args.result_filename is not None:
        with open(args.result_filename, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    return result


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    names = (
        "dtype",
        "kv_cache_dtype",
        "tp_size",
        "ep_size",
        "dp_size",
        "enable_dp_attention",
        "dataset_name",
        "seed",
        *ENGINE_SIZES,
    )
    return {name: getattr(args, name) for name in names}


def make_requests(args: argparse.Namespace, config: Any) -> list[Request]:
    """The requests of the dataset that was asked for."""
    if args.dataset_name == "random":
        lengths = args.random_input_len, args.random_output_len, args.random_range_ratio
        return random_requests(args.num_prompts, *lengths, config.vocab_size, args.seed)
    if args.dataset_name == "generated-shared-prefix":
        sizes = (args.gsp_num_groups, args.gsp_prompts_per_group, args.gsp_system_prompt_len, args.gsp_question_len)
        return shared_prefix_requests(*sizes, args.gsp_output_len, config.vocab_size, args.seed)
    from jax_epmoe.generate.text import load_tokenizer

    tokenizer = load_tokenizer(args.model)
    if tokenizer is None:
        raise ValueError(f"--dataset-name sharegpt needs a tokenizer; {args.model} has none")
    if args.dataset_path is None:
        raise ValueError("--dataset-name sharegpt needs --dataset-path; nothing is downloaded")
    context = args.context_length or config.max_position_embeddings
    return sharegpt_requests(
        args.dataset_path, args.num_prompts, tokenizer, context, args.sharegpt_output_len, args.seed
    )


def measure(args: argparse.Namespace, requests: Sequence[Request]) -> dict[str, Any]:
    """Loads, compiles, runs and profiles."""
    from jax_epmoe.generate import Engine, SamplingParams

    began = time.perf_counter()
    engine = Engine(
        _load(args),
        **{name: getattr(args, name) for name in ENGINE_SIZES},
        kv_cache_dtype=args.kv_cache_dtype,
        prefix_cache=not args.disable_radix_cache,
        mem_fraction_static=args.mem_fraction_static,
    )
    loaded = time.perf_counter()
    prompts = [request.prompt for request in requests]
    ignore_eos = not args.disable_ignore_eos
    sampling = [SamplingParams(max_new_tokens=request.output_len, ignore_eos=ignore_eos) for request in requests]
    engine.warm_up(prompts, sampling)
    compiled = time.perf_counter()
    completions = engine.generate(prompts, sampling)
    seconds = time.perf_counter() - compiled
    stats = engine.stats
    phases = {
        "prefill_seconds": stats.prefill_seconds,
        "decode_seconds": stats.decode_seconds,
        "host_seconds": stats.host_seconds,
        "load_seconds": loaded - began,
        "compile_seconds": compiled - loaded,
        "first_token_seconds": stats.first_token_seconds,
        "cached_tokens": stats.cached_tokens,
        "decode_tokens_per_second": stats.output_tokens_per_second,
        "prefill_tokens_per_second": stats.prompt_tokens_per_second,
        "slots": stats.slots,
        "occupancy": stats.occupancy,
        "memory_gib": stats.memory_bytes / 2**30,
        "programs": engine.num_programs,
    }
    made = sum(len(completion.token_ids) for completion in completions)
    return {
        **measured("jax_epmoe", requests, made, seconds),
        "phases": phases,
        "device_share": _device_share(args, engine, prompts, sampling, made) if args.profile_seconds > 0 else None,
    }


def _load(args: argparse.Namespace) -> Any:
    from jax_epmoe.checkpoint import load_on_mesh

    load_format = args.load_format if (args.model / "epmoe.json").is_file() else "dummy"
    names = ("tp_size", "ep_size", "dp_size", "enable_dp_attention", "dtype")
    return load_on_mesh(args.model, load_format=load_format, **{name: getattr(args, name) for name in names})


def _device_share(
    args: argparse.Namespace, engine: Any, prompts: list[list[int]], sampling: list[Any], tokens: int
) -> dict[str, Any]:
    """`device_busy` of a profile that begins when a third of the output is there, of another run of the same requests."""
    import jax

    from bench.device_busy import device_busy
    from bench.roofline import failure

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow the host down
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.profile or temporary
        made, end = 0, float("inf")
        updates = engine.stream_tokens(prompts, sampling)
        try:
            for update in updates:
                made += len(update.token_ids)
                if end == float("inf") and 3 * made >= tokens:
                    jax.profiler.start_trace(folder, profiler_options=options)
                    end = time.perf_counter() + args.profile_seconds
                if time.perf_counter() > end:
                    break
        finally:
            if end < float("inf"):
                jax.profiler.stop_trace()
            updates.close()
        try:
            return device_busy(folder)
        except RuntimeError as error:
            return failure(error)


def table(result: dict[str, Any]) -> str:
    """The run in lines, the peers' below."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"{result['model']}, {result['dtype']}, {result['devices']} x {result['device']}; {versions}",
        f"{'':34}{'requests':>9}{'seconds':>9}{'in, tokens/s':>14}{'out, tokens/s':>15}{'all, tokens/s':>15}",
        _line(result),
    ]
    for name, peer in result["peers"].items():
        if "failed" in peer:
            lines.append(f"{name:34}{peer['failed'][:120]}")
            continue
        ratio = result["output_throughput"] / peer["output_throughput"]
        lines.append(f"{_line(peer)}   ours: {ratio:.1f} x")
    phases = result["phases"]
    lines.append(
        f"prefill {phases['prefill_seconds']:.2f} s, decode {phases['decode_seconds']:.2f} s ({phases['decode_tokens_per_second']:.0f} "
        f"tokens/s), host {phases['host_seconds']:.2f} s; {phases['slots']} slots, {phases['occupancy']:.0%} at work; "
        f"{phases['cached_tokens']} prompt tokens copied"
    )
    lines.append(
        f"load {phases['load_seconds']:.1f} s, compile {phases['compile_seconds']:.1f} s ({phases['programs']} programs), first token "
        f"{phases['first_token_seconds']:.2f} s; {phases['memory_gib']:.1f} GiB at most on a device"
    )
    share = result["device_share"]
    if share is not None and "failed" in share:
        lines.append(f"devices: {share['failed']}")
    elif share is not None:
        parts = ", ".join(f"{name} {share[name]:.1%}" for name in ("prefill", "decode", "other", "idle"))
        lines.append(f"devices busy {share['busy']:.1%} of {share['seconds']:.1f} s: {parts}")
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    figures = f"{row['input_throughput']:14.0f}{row['output_throughput']:15.0f}{row['total_throughput']:15.0f}"
    return f"{row['backend']:34}{row['successful_requests']:9}{row['total_latency']:9.2f}{figures}"


if __name__ == "__main__":
    sys.exit(main())
