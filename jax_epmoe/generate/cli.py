"""`epmoe-generate`: continues prompts with a converted checkpoint on this machine's devices, or on several machines'."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from jax_epmoe.command_line import Parser, refuse
from jax_epmoe.models.kv_cache import KV_CACHE_DTYPES

PROGRAM = "epmoe-generate"

_DESCRIPTION = """\
Continue prompts with a converted checkpoint (see epmoe-convert), on a mesh of dp_size * tp_size devices.

Input files: JSONL with {"prompt": ...}, {"prompt_token_ids": [...]} or, with --chat, {"messages": [...]} a line, or text
with a prompt a line. A JSON line may set max_new_tokens, temperature, top_k, top_p, seed, ignore_eos and stop_token_ids
for itself; its other keys are copied to the output. Output: {"text": ..., "token_ids": [...], "finish_reason": "stop" |
"length"} a line, in the order of the input; text is null without a tokenizer.
"""

_EPILOG = "JAX_COMPILATION_CACHE_DIR=FOLDER keeps compiled programs for the next run."


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
        "--output", metavar="FILE.jsonl", help="default: readable text on standard output; -: JSONL on standard output"
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
    group.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    group.add_argument("--ignore-eos", action="store_true", help="do not stop at the model's end-of-sequence tokens")
    group.add_argument(
        "--stop-token-ids", type=_token_ids, default=[], metavar="1,2,3", help="stop at these too, --ignore-eos or not"
    )

    group = parser.add_argument_group("batches")
    group.add_argument(
        "--max-batch-size", type=int, default=32, metavar="N", help="sequences run together (default 32)"
    )
    group.add_argument(
        "--prefill-chunk", type=int, default=512, metavar="N", help="tokens of each prompt a prefill call (default 512)"
    )
    group.add_argument(
        "--context-length",
        type=int,
        metavar="N",
        help="most positions of a prompt and its continuation; default, and most: the model's",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status: 2 after one line on standard error when something given was wrong."""
    try:
        args = make_parser().parse_args(argv)
        _generate(args)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        # The reader has gone; what Python flushes at exit must go somewhere.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        told = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        return refuse(PROGRAM, told)
    except (ValueError, NotImplementedError) as error:
        if not _is_ours(error):
            raise
        return refuse(PROGRAM, str(error))


def _is_ours(error: BaseException) -> bool:
    """Whether this project raised it. What a library raises is a defect, and keeps its traceback."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and traceback.tb_frame.f_globals.get("__name__", "").startswith(
        ("jax_epmoe", "__main__")
    )


def _generate(args: argparse.Namespace) -> None:
    """From arguments to output. What can be refused is refused before devices are touched or weights read."""
    from jax_epmoe.config import require
    from jax_epmoe.generate import text
    from jax_epmoe.generate.batching import check_prompts, check_sizes
    from jax_epmoe.generate.inputs import SAMPLING_KEYS
    from jax_epmoe.generate.llm import read_generation_config
    from jax_epmoe.generate.sampling import SamplingParams
    from jax_epmoe.mesh import initialize_distributed, split_cpu

    default = SamplingParams(**{name: value for name, value in vars(args).items() if name in SAMPLING_KEYS})
    entries = _entries(args)
    sampling = [entry.params(default) for entry in entries]
    if args.enable_dp_attention:
        wanted = f"{args.tp_size}, as tp_size, or left out with --enable-dp-attention"
        require(args.dp_size in (1, args.tp_size), "--dp-size", args.dp_size, wanted)
        args.dp_size = 1  # the replicas of attention are the devices of the tensor-parallel group
    folder = Path(args.model)
    config = read_generation_config(folder, "--model")
    sizes = {name: getattr(args, name) for name in ("max_batch_size", "prefill_chunk", "context_length")}
    context_length = check_sizes(config, **sizes)
    tokenizer = text.load_tokenizer(folder)
    if args.chat:
        text.check_chat_template(tokenizer)
    prompts = [text.encode(tokenizer, entry, chat=args.chat) for entry in entries]
    check_prompts(
        prompts, vocab_size=config.vocab_size, context_length=context_length, names=[entry.name for entry in entries]
    )

    split_cpu(max(1, args.tp_size * args.dp_size // (args.num_processes or 1)))
    initialize_distributed(args.coordinator_address, args.num_processes, args.process_id)
    import jax

    is_first = jax.process_index() == 0
    with _output(args.output if is_first else os.devnull) as file:
        show_progress = is_first and not args.no_progress and sys.stderr.isatty()
        engine = _make_engine(args, folder, config.eos_token_ids, show_progress, tokenizer)
        with _progress_bar(len(prompts), shown=show_progress) as progress:
            completions = engine.generate(prompts, sampling, progress=progress)
        if is_first:
            _write(file, entries, prompts, completions, tokenizer, as_json=args.output is not None)
            print(engine.stats.summary(), file=sys.stderr)


def _entries(args: argparse.Namespace) -> list[Any]:
    from jax_epmoe.generate.inputs import Entry, read_entries, text_entry

    entries = [text_entry(f"--prompt {i}", prompt) for i, prompt in enumerate(args.prompt, 1)]
    for i, ids in enumerate(args.prompt_token_ids, 1):
        entries.append(Entry(f"--prompt-token-ids {i}", ids, "prompt_token_ids"))
    if args.input is not None:
        entries += read_entries(args.input)
    if not entries:
        raise ValueError("there is nothing to continue; --prompt, --prompt-token-ids or --input should be given")
    return entries


def _make_engine(
    args: argparse.Namespace, folder: Path, eos_token_ids: Sequence[int], show_progress: bool, tokenizer: Any | None
) -> Any:
    from jax_epmoe.checkpoint import dummy_model, load_model
    from jax_epmoe.generate.engine import Engine
    from jax_epmoe.generate.text import decode
    from jax_epmoe.mesh import make_mesh

    how = {
        "mesh": make_mesh(args.tp_size, args.ep_size, args.dp_size),
        "dtype": args.dtype,
        "backend": args.backend,
        "dp_attention": args.enable_dp_attention,
    }
    if args.load_format == "dummy":
        model = dummy_model(folder, **how)
    else:
        model = load_model(folder, progress=show_progress, **how)
    return Engine(
        model,
        max_batch_size=args.max_batch_size,
        prefill_chunk=args.prefill_chunk,
        context_length=args.context_length,
        eos_token_ids=eos_token_ids,
        kv_cache_dtype=args.kv_cache_dtype,
        detokenize=None if tokenizer is None else partial(decode, tokenizer),
    )


def _output(path: str | None) -> contextlib.AbstractContextManager[IO[str]]:
    from jax_epmoe.generate.outputs import whole_file

    return contextlib.nullcontext(sys.stdout) if path in (None, "-") else whole_file(str(path))


@contextlib.contextmanager
def _progress_bar(num_prompts: int, *, shown: bool) -> Iterator[Any]:
    """A bar of output tokens on standard error; yields what `Engine.generate` reports to."""
    from tqdm import tqdm

    with tqdm(unit=" tokens", file=sys.stderr, disable=not shown) as bar:
        finished = 0

        def progress(tokens: int, requests: int) -> None:
            nonlocal finished
            finished += requests
            bar.set_postfix_str(f"{finished}/{num_prompts} prompts", refresh=False)
            bar.update(tokens)

        yield progress


def _write(
    file: IO[str],
    entries: Sequence[Any],
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Any],
    tokenizer: Any | None,
    *,
    as_json: bool,
) -> None:
    from jax_epmoe.generate.outputs import Result, readable
    from jax_epmoe.generate.text import completion_text

    results = [
        Result(entry, completion, completion_text(tokenizer, prompt, completion))
        for entry, prompt, completion in zip(entries, prompts, completions, strict=True)
    ]
    if as_json:
        file.writelines(f"{result.json()}\n" for result in results)
    else:
        print(readable(results), file=file)


if __name__ == "__main__":
    sys.exit(main())
