"""How fast a whole model generates: prefill and decode, by batch size, with random weights of a real model's size.

    python -m bench.generate                        # OLMoE-1B-7B on a GPU; the demo's small model on a CPU
    python -m bench.generate --model FOLDER --tp-size 8 --ep-size 8 --batch-size 1 8 64

Each line is one batch of random prompts of one length, run twice: the first run compiles and warms up, the second is timed.
The peak of a device's memory is the process's so far, so batches run in rising order.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

import jax_epmoe as ep
from bench.environment import environment, result_path
from jax_epmoe.generate.engine import Engine
from jax_epmoe.generate.sampling import SamplingParams

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    on_gpu = jax.default_backend() == "gpu"
    model = ROOT / ("bench/configs/olmoe-1b-7b" if on_gpu else "examples/demo/checkpoint")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=model, help="a folder with a config.json")
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--ep-size", type=int, default=1)
    parser.add_argument("--dp-size", type=int, default=1)
    parser.add_argument("--enable-dp-attention", action="store_true", help="as epmoe-generate's; leave --dp-size out")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 32] if on_gpu else [1, 8])
    parser.add_argument("--prompt-length", type=int, default=512 if on_gpu else 64)
    parser.add_argument("--output-length", type=int, default=64 if on_gpu else 16)
    parser.add_argument("--output", type=Path, help="default: a file in bench/results/ named after model and device")
    args = parser.parse_args()
    args.output = args.output or result_path(f"generate_{args.model.resolve().name}")

    mesh = ep.make_mesh(args.tp_size, args.ep_size, args.dp_size)
    decoder = ep.dummy_model(args.model, mesh=mesh, dtype=args.dtype, dp_attention=args.enable_dp_attention)
    rows = []
    for batch_size in tqdm(sorted(args.batch_size), desc="batches"):
        engine = Engine(decoder, max_batch_size=batch_size)
        rows.append(measure(engine, batch_size, args.prompt_length, args.output_length))
    result = {
        **environment(),
        "model": args.model.name,
        "dtype": args.dtype,
        "mesh": {"tp_size": args.tp_size, "ep_size": args.ep_size, "dp_size": args.dp_size},
        "dp_attention": args.enable_dp_attention,
        "prompt_length": args.prompt_length,
        "output_length": args.output_length,
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    show(result)


def measure(engine: Engine, batch_size: int, prompt_length: int, output_length: int) -> dict[str, float]:
    """One line: `batch_size` random prompts, the second run's rates."""
    random = np.random.default_rng(0)
    prompts = random.integers(0, engine.config.vocab_size, (batch_size, prompt_length)).tolist()
    sampling = SamplingParams(max_new_tokens=output_length, ignore_eos=True)
    engine.generate(prompts, sampling)
    compile_seconds = engine.stats.compile_seconds
    engine.generate(prompts, sampling)
    stats = engine.stats
    return {
        "batch_size": batch_size,
        "prefill_tokens_per_second": round(stats.prompt_tokens_per_second, 1),
        "decode_tokens_per_second": round(stats.output_tokens_per_second, 1),
        "decode_step_ms": round(1e3 * stats.decode_seconds / stats.decode_steps, 3),
        "first_token_ms": round(1e3 * stats.first_token_seconds, 2),
        "compile_seconds": round(compile_seconds, 2),
        "peak_device_gib_so_far": round(stats.memory_bytes / 2**30, 3),
    }


def show(result: dict) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    print(f"{result['model']}, {result['dtype']}, {result['devices']} x {result['device']}; {versions}")
    columns = list(result["rows"][0])
    widths = [max(len(name), 10) for name in columns]
    print("  ".join(name.rjust(width) for name, width in zip(columns, widths, strict=True)))
    for row in result["rows"]:
        print("  ".join(str(row[name]).rjust(width) for name, width in zip(columns, widths, strict=True)))


if __name__ == "__main__":
    main()
