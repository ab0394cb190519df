"""`python -m weights_convert SRC DST`, installed as `epmoe-convert`."""

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from weights_convert.convert import convert, make_work, share
from weights_convert.describe import describe, describe_hf
from weights_convert.plan import DTYPES, find, make_plan
from weights_convert.quantization import FROM_WEIGHTS
from weights_convert.to_hf import make_hf_plan, make_hf_work, to_hf
from weights_convert.verify import verify

EPILOG = """\
A run that was killed or interrupted, or that found the disk full, goes on where it was when it is started again with the same
arguments; until then .DST.partial, beside DST, holds what it wrote.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 2 after a line that says what is wrong, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # Orbax starts a backend; this must not be the GPU, which others may use
    logging.getLogger("absl").setLevel(
        logging.CRITICAL
    )  # Orbax logs an error's traceback in each thread that it passes
    try:
        said = _run(args)
    except (ValueError, OSError) as error:
        left = _left(args) if isinstance(error, OSError) else ""
        print(f"epmoe-convert: {' '.join(str(error).split())}{left}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"epmoe-convert: interrupted; {args.dst} was not written{_left(args)}", file=sys.stderr)
        return 130
    print(said)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="epmoe-convert",
        description="Convert a Hugging Face MoE checkpoint to jax_epmoe's, a few MB at a time; or back, with --to-hf.",
        epilog=EPILOG,
    )
    parser.add_argument("src", metavar="SRC", help="folder with config.json and safetensors, or a name on the hub")
    parser.add_argument("dst", metavar="DST", help="folder to write; it must not exist, or be empty")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="store weights so (default: what config.json says, else bfloat16)"
    )
    parser.add_argument(
        "--quantize", choices=FROM_WEIGHTS, help="quantise the weights of experts, attention and dense MLPs"
    )
    parser.add_argument(
        "--revision",
        metavar="REV",
        help="branch, tag or commit on the hub (`hf auth login` gives access to private ones)",
    )
    parser.add_argument(
        "--process",
        metavar="I/N",
        default="0/1",
        help="be process I (from 0) of N that share the work on one file system",
    )
    parser.add_argument("--to-hf", action="store_true", help="SRC is jax_epmoe's checkpoint, DST Hugging Face's")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="check all, print what would be written and how it shards")
    what.add_argument(
        "--verify", action="store_true", help="write nothing: read SRC and DST again and compare every tensor"
    )
    return parser


def _run(args: argparse.Namespace) -> str:
    """Does what the arguments ask; returns what to say."""
    process = _process(args.process)
    _refuse(args, "to_hf", "dtype", "quantize", "revision")
    _refuse(args, "verify", "dtype", "quantize")
    if process[1] > 1 and (args.to_hf or args.verify):
        raise ValueError(f"--process is {args.process}; it should be left out with --to-hf and --verify")
    if args.verify:
        src, dst = (args.dst, args.src) if args.to_hf else (args.src, args.dst)
        return f"{args.dst}: {verify(src, dst, revision=args.revision)}"
    if args.dry_run and args.to_hf:
        hf_plan = make_hf_plan(Path(args.src))
        work = make_hf_work(args.dst, hf_plan)
        work.is_finished()
        print(describe_hf(hf_plan, work))
        work.check_space(sum(map(hf_plan.nbytes, hf_plan.pieces)))
        return "nothing was written"
    if args.dry_run:
        plan = make_plan(find(args.src, args.revision), args.dtype, args.quantize)
        work = make_work(args.dst, plan)
        work.is_finished()
        print(describe(plan, work, process[1]))
        work.check_space(plan.files_bytes)
        return "nothing was written"
    if args.to_hf:
        return f"{args.dst}: {to_hf(args.src, args.dst)}"
    summary = convert(
        args.src, args.dst, dtype=args.dtype, quantize=args.quantize, revision=args.revision, process=process
    )
    if summary.not_finite:
        more = f" (and {len(summary.not_finite) - 1} more like it)" if len(summary.not_finite) > 1 else ""
        print(
            f"epmoe-convert: warning: tensor {summary.not_finite[0]} has values that are NaN or infinite{more};"
            f" {Path(args.dst) / 'manifest.json'} names all",
            file=sys.stderr,
        )
    return f"{args.dst}: {summary}"


def _refuse(args: argparse.Namespace, option: str, *others: str) -> None:
    """Refuses options that mean nothing together."""
    for other in others if getattr(args, option) else ():
        if getattr(args, other) is not None:
            name = option.replace("_", "-")
            raise ValueError(f"--{other} is {getattr(args, other)!r}; it should be left out with --{name}")


def _process(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match:
        raise ValueError(f"--process is {text!r}; it should be I/N, such as 0/4")
    process = int(match[1]), int(match[2])
    share({}, process)
    return process


def _left(args: argparse.Namespace) -> str:
    """Where a run's work is, if it left some."""
    target = Path(args.dst).resolve()
    folder = target.parent / f".{target.name}.partial"
    if args.dry_run or args.verify or not (folder / "checkpoint").is_dir():
        return ""
    return f"; the same command goes on from {folder}"
