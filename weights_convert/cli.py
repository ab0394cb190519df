"""`python -m weights_convert SRC DST`, installed as `epmoe-convert`."""

import argparse
import logging
import sys
from collections.abc import Sequence

import jax

from weights_convert.convert import DTYPES, convert
from weights_convert.quantization import FROM_WEIGHTS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 2 after a line that says what is wrong, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="epmoe-convert", description="Convert a Hugging Face MoE checkpoint to jax_epmoe's, one layer at a time."
    )
    parser.add_argument("src", metavar="SRC", help="folder with config.json and safetensors, or a name on the hub")
    parser.add_argument("dst", metavar="DST", help="folder to write; it must not exist, or be empty")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="store weights so (default: what config.json says, else bfloat16)"
    )
    parser.add_argument(
        "--quantize", choices=FROM_WEIGHTS, help="quantise the weights of experts, attention and dense MLPs"
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub")
    args = parser.parse_args(argv)

    jax.config.update("jax_platforms", "cpu")  # Orbax starts a backend; this must not be the GPU, which others may use
    logging.getLogger("absl").setLevel(
        logging.CRITICAL
    )  # Orbax logs an error's traceback in each thread that it passes
    try:
        summary = convert(args.src, args.dst, dtype=args.dtype, quantize=args.quantize, revision=args.revision)
    except (ValueError, OSError) as error:
        print(f"epmoe-convert: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"epmoe-convert: interrupted; {args.dst} was not written", file=sys.stderr)
        return 130
    print(f"{args.dst}: {summary}")
    return 0
