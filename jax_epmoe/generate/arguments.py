"""The arguments of `epmoe-generate`."""

import argparse

from jax_epmoe.command_line import Parser
from jax_epmoe.models.kv_cache import KV_CACHE_DTYPES

PROGRAM = "epmoe-generate"

_DESCRIPTION = """\
Continue prompts with a converted checkpoint (see epmoe-convert), on a mesh of dp_size * tp_size devices.

Input files: JSONL with {"prompt": ...}, {"prompt_token_ids": [...]} or, with --chat, {"messages": [...]} a line, or lines of
OpenAI's batch format, or text with a prompt a line. A JSON line may set the parameters of sampling for itself; its other
keys are copied to the output. Output: {"text": ..., "token_ids": [...], "finish_reason": "stop" | "length"} a line, or
OpenAI's response; text is null without a tokenizer. A file gets each line as soon as it is there.
"""

_EPILOG = """\
After an interruption the same command with --resume goes on. JAX_COMPILATION_CACHE_DIR=FOLDER keeps compiled programs for
the next run.
"""


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} should be token ids with commas between: 1,2,3") from None


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(PROGRAM, _DESCRIPTION, _EPILOG)
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, metavar="FOLDER", help="a converted checkpoint")
    group.add_argument(
        "--load-format",
        choices=("auto", "dummy"),
        default="auto",
        help="dummy: random weights, for a folder with only config.json",
    )
    group.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: the checkpoint's")
    group.add_argument(
        "--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
        default="auto",
        help="auto, the default: as --dtype; fp8 (or fp8_e4m3): float8 with scales, about half of bfloat16's memory",
    )
    group.add_argument("--backend", choices=("hopper", "triton", "xla"), help="grouped GEMM; default: the fastest")

    group = parser.add_argument_group("devices")
    group.add_argument(
        "--tp-size", type=int, default=1, metavar="N", help="devices a replica is split over (default 1)"
    )
    group.add_argument(
        "--ep-size", type=int, default=1, metavar="N", help="parts the experts are dealt into (default 1)"
    )
    group.add_argument("--dp-size", type=int, default=1, metavar="N", help="replicas (default 1)")
    group.add_argument(
        "--enable-dp-attention",
        action="store_true",
        help="deal sequences, not heads, over the tp-size devices in attention; --dp-size is then tp-size or left out",
    )
    group.add_argument("--coordinator-address", metavar="HOST:PORT", help="of process 0, to run over several processes")
    group.add_argument("--num-processes", type=int, metavar="N")
    group.add_argument("--process-id", type=int, metavar="I")

    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    group.add_argument(
        "--prompt-token-ids",
        type=_token_ids,
        action="append",
        default=[],
        metavar="1,2,3",
        help="may be repeated; needs no tokenizer",
    )
    group.add_argument("--input", metavar="FILE", help=".jsonl or .txt; - is standard input")
    group.add_argument("--chat", action="store_true", help="apply the tokenizer's chat template")
    group.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="a bad line of the input ends the run before it begins (stop, the default), or is told and left out (skip)",
    )
    group.add_argument(
        "--output", metavar="FILE.jsonl", help="default: readable text on standard output; -: JSONL on standard output"
    )
    group.add_argument(
        "--output-order",
        choices=("input", "finished"),
        default="input",
        help="of the lines: as the input's (default; a file is sorted in the end, a pipe waits), or as they finish",
    )
    group.add_argument(
        "--resume", action="store_true", help="keep what the output file holds already, and generate only the rest"
    )
    group.add_argument(
        "--no-progress",
        action="store_true",
        help="no progress bars on standard error; there are none where that is no terminal",
    )

    group = parser.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="per prompt (default 128)")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="0, the default, is all tokens")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1, the default, is all tokens")
    group.add_argument("--min-p", type=float, default=0.0, metavar="P", help="0, the default, is all tokens")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="1, the default, is none")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    group.add_argument("--ignore-eos", action="store_true", help="do not stop at the model's end-of-sequence tokens")
    group.add_argument(
        "--stop-token-ids", type=_token_ids, default=[], metavar="1,2,3", help="stop at these too, --ignore-eos or not"
    )

    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="a string that ends a text; may be repeated"
    )
    group.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="tell each token's log-probability, and those of the N likeliest (0 to 20)",
    )

    group = parser.add_argument_group("seeing it")
    group.add_argument("--profile", metavar="FOLDER", help="write a trace for XProf or Perfetto")
    group.add_argument(
        "--profile-seconds", type=float, default=10.0, metavar="S", help="of the run, at the most (default 10)"
    )
    group.add_argument(
        "--expert-load",
        metavar="FILE.npz",
        help="record the rows of each expert; python -m bench.report FILE.npz draws them",
    )

    group = parser.add_argument_group("batches")
    group.add_argument(
        "--max-batch-size",
        "--max-running-requests",
        type=int,
        default=256,
        metavar="N",
        help="sequences run together, or as many as the memory holds (default 256)",
    )
    group.add_argument(
        "--prefill-chunk",
        "--chunked-prefill-size",
        type=int,
        default=512,
        metavar="N",
        help="tokens of each prompt a prefill call (default 512)",
    )
    group.add_argument(
        "--max-prefill-tokens", type=int, default=8192, metavar="N", help="of all prompts a prefill call (default 8192)"
    )
    group.add_argument(
        "--num-continuous-decode-steps",
        type=int,
        default=4,
        metavar="N",
        help="tokens of each sequence a decode call (default 4)",
    )
    group.add_argument(
        "--mem-fraction-static",
        type=float,
        default=0.85,
        metavar="F",
        help="of a device's memory, for weights and cache (default 0.85)",
    )
    group.add_argument(
        "--disable-radix-cache",
        action="store_true",
        help="compute what prompts share at their beginning for each of them",
    )
    group.add_argument(
        "--context-length",
        type=int,
        metavar="N",
        help="most positions of a prompt and its continuation; default, and most: the model's",
    )
    return parser
