"""`epmoe-generate`: continues prompts with a converted checkpoint on this machine's devices, or on several machines'."""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jax_epmoe.command_line import refuse
from jax_epmoe.generate.arguments import PROGRAM, make_parser

# Of the engine's arguments, those that the command line calls by the same names.
_SIZES = ("max_batch_size", "prefill_chunk", "max_prefill_tokens", "num_continuous_decode_steps", "context_length")


# And of `load_on_mesh`'s.
_LOADING = ("tp_size", "ep_size", "dp_size", "enable_dp_attention", "load_format", "dtype", "backend")


class _Interrupted(KeyboardInterrupt):
    """Ctrl-C, and how to go on."""


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
    except KeyboardInterrupt as interrupt:
        print(f"\n{PROGRAM}: interrupted{interrupt}", file=sys.stderr)
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


@dataclass(frozen=True)
class _Task:
    """A line of the input, checked: `place` is its number among all lines, from 0, and `limit` the most tokens it may get."""

    place: int
    entry: Any
    params: Any
    prompt: list[int]
    key: str
    limit: int


def _generate(args: argparse.Namespace) -> None:
    """From arguments to output. What can be refused is refused before devices are touched or weights read."""
    from jax_epmoe.config import require
    from jax_epmoe.generate import text
    from jax_epmoe.generate.batching import check_sizes
    from jax_epmoe.generate.entries import SAMPLING_KEYS
    from jax_epmoe.generate.llm import read_generation_config
    from jax_epmoe.generate.outputs import Result
    from jax_epmoe.generate.sampling import SamplingParams
    from jax_epmoe.generate.watching import profile, progress_bar, run_kernels_one_by_one, saved
    from jax_epmoe.mesh import dp_size_of_mesh, initialize_distributed, split_cpu

    default = SamplingParams(**{name: value for name, value in vars(args).items() if name in SAMPLING_KEYS})
    lines = _lines(args)
    names = ("--dp-size", "--enable-dp-attention")
    args.dp_size = dp_size_of_mesh(args.tp_size, args.dp_size, args.enable_dp_attention, names)
    is_file = args.output not in (None, "-") and not _is_device(args.output)
    if args.resume and not is_file:
        raise ValueError("--resume needs a file as --output; it should be the one to go on with")
    require(args.profile_seconds > 0, "--profile-seconds", args.profile_seconds, "a positive number")
    folder = Path(args.model)
    config = read_generation_config(folder, "--model")
    context_length = check_sizes(config, **{name: getattr(args, name) for name in _SIZES})
    tokenizer = text.load_tokenizer(folder)
    if args.chat:
        text.check_chat_template(tokenizer)
    tasks = _tasks(args, lines, default, tokenizer, config.vocab_size, context_length)

    if args.profile is not None:
        run_kernels_one_by_one()
    split_cpu(max(1, args.tp_size * args.dp_size // (args.num_processes or 1)))
    initialize_distributed(args.coordinator_address, args.num_processes, args.process_id)
    import jax

    is_first = jax.process_index() == 0
    output = _output(args, tasks, is_first=is_first, is_file=is_file)
    finished = False
    try:
        tasks = _remaining(tasks, output.places)
        if not tasks:
            finished = True
            if is_first:
                print(f"{PROGRAM}: all {output.done} answers are in {args.output} already", file=sys.stderr)
            return
        show_progress = is_first and not args.no_progress and sys.stderr.isatty()
        recorder = _recorder(args, config, folder)
        engine = _make_engine(args, folder, config.eos_token_ids, show_progress, tokenizer, recorder)
        prompts, sampling = [task.prompt for task in tasks], [task.params for task in tasks]
        indices = [task.place for task in tasks]  # a resumed run draws what it would have drawn
        name = folder.resolve().name
        with (
            saved(recorder, args.expert_load if is_first else None),
            profile(args.profile, args.profile_seconds) as in_profile,
            progress_bar([task.limit for task in tasks], shown=show_progress) as (progress, close),
        ):
            for i, completion in engine.stream(prompts, sampling, progress=in_profile(progress), indices=indices):
                task = tasks[i]
                close(task.limit, len(completion.token_ids))
                if is_first:
                    said = text.completion_text(tokenizer, task.prompt, completion)
                    output.add(task.place, Result(task.entry, task.key, completion, said, name, tokenizer))
        finished = True
        if is_first:
            print(engine.stats.summary(), file=sys.stderr)
    except KeyboardInterrupt:
        if is_file and is_first and output.done:
            raise _Interrupted(
                f": {args.output} holds {output.done} of {output.total} answers; the same command with --resume goes on"
            ) from None
        raise
    finally:
        output.close(finished=finished)


def _lines(args: argparse.Namespace) -> list[tuple[Any, str, str]]:
    """What to parse, as (parser, name, text)."""
    from jax_epmoe.generate.inputs import read_lines, text_entry, token_ids_entry

    lines: list[tuple[Any, str, str]] = [
        (text_entry, f"--prompt {i}", prompt) for i, prompt in enumerate(args.prompt, 1)
    ]
    for i, ids in enumerate(args.prompt_token_ids, 1):
        lines.append((token_ids_entry, f"--prompt-token-ids {i}", ids))
    if args.input is not None:
        parse, found = read_lines(args.input)
        lines += [(parse, name, line) for name, line in found]
    if not lines:
        raise ValueError("there is nothing to continue; --prompt, --prompt-token-ids or --input should be given")
    return lines


def _tasks(
    args: argparse.Namespace,
    lines: Sequence[tuple[Any, str, str]],
    default: Any,
    tokenizer: Any | None,
    vocab_size: int,
    context_length: int,
) -> list[_Task]:
    """Every line that is right; a wrong one stops, or with `--on-error skip` is told and left out."""
    from jax_epmoe.generate import text
    from jax_epmoe.generate.batching import check_prompts
    from jax_epmoe.generate.entries import resume_key

    def check(place: int, parse: Any, name: str, line: Any) -> _Task:
        entry = parse(name, line)
        if entry.custom_id is not None and custom_ids.setdefault(entry.custom_id, name) != name:
            earlier = custom_ids[entry.custom_id]
            raise ValueError(f"{name}: custom_id is {entry.custom_id!r}, as of {earlier}; it should be the line's own")
        params = entry.params(default)
        prompt = text.encode(tokenizer, entry, chat=args.chat)
        if params.stop and tokenizer is None:
            raise ValueError(
                f"{name}: stop is {params.stop!r}; it should be empty where the model's folder has no tokenizer"
            )
        check_prompts([prompt], vocab_size=vocab_size, context_length=context_length, names=[name])
        limit = min(params.max_new_tokens, context_length - len(prompt))
        return _Task(place, entry, params, prompt, resume_key(entry, place, params, chat=args.chat), limit)

    tasks: list[_Task] = []
    custom_ids: dict[str, str] = {}
    for place, line in enumerate(lines):
        try:
            tasks.append(check(place, *line))
        except ValueError as error:
            if args.on_error == "stop" or not _is_ours(error):
                raise
            print(f"{PROGRAM}: skipped: {' '.join(str(error).split())}", file=sys.stderr)
    skipped = len(lines) - len(tasks)
    if skipped:
        print(f"{PROGRAM}: skipped {skipped} of {len(lines)} lines", file=sys.stderr)
    if not tasks:
        raise ValueError("no line is left to continue; --on-error skip left all of them out")
    return tasks


def _is_device(path: str) -> bool:
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def _output(args: argparse.Namespace, tasks: Sequence[_Task], *, is_first: bool, is_file: bool) -> Any:
    """Where results go: nowhere, but in the first process."""
    from jax_epmoe.generate.outputs import Result, ResumableFile, Stream

    places = [task.place for task in tasks]
    in_order = args.output_order == "input"
    if is_first and is_file:
        keys = {task.key: task.place for task in tasks}
        return ResumableFile(args.output, keys, resume=args.resume, in_order=in_order)
    order = places if in_order else None
    if not is_first:
        return Stream(open(os.devnull, "w"), Result.json, order)
    if args.output is not None:
        file = sys.stdout if args.output == "-" else open(args.output, "w", encoding="utf-8")  # noqa: SIM115
        return Stream(file, Result.json, order)
    return Stream(sys.stdout, *((Result.readable, order) if len(tasks) == 1 else (Result.block, order, "\n")))


def _remaining(tasks: list[_Task], done: frozenset[int]) -> list[_Task]:
    """The tasks without a line in the output, which the first process alone has read."""
    import jax
    import numpy as np

    is_done = np.array([task.place in done for task in tasks])
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        is_done = np.asarray(multihost_utils.broadcast_one_to_all(is_done))
    return [task for task, there in zip(tasks, is_done, strict=True) if not there]


def _recorder(args: argparse.Namespace, config: Any, folder: Path) -> Any:
    """What `--expert-load` asks for, or None."""
    from jax_epmoe.generate.expert_load import ExpertLoad

    if args.expert_load is None:
        return None
    with open(args.expert_load, "ab"):  # told before anything runs, if it cannot be written
        pass
    return ExpertLoad.of(config, folder.resolve().name)


def _make_engine(
    args: argparse.Namespace,
    folder: Path,
    eos_token_ids: Sequence[int],
    show_progress: bool,
    tokenizer: Any | None,
    recorder: Any | None,
) -> Any:
    from jax_epmoe.checkpoint import load_on_mesh
    from jax_epmoe.generate.engine import Engine
    from jax_epmoe.generate.text import decode

    return Engine(
        load_on_mesh(folder, progress=show_progress, **{name: getattr(args, name) for name in _LOADING}),
        **{name: getattr(args, name) for name in _SIZES},
        eos_token_ids=eos_token_ids,
        kv_cache_dtype=args.kv_cache_dtype,
        prefix_cache=not args.disable_radix_cache,
        mem_fraction_static=args.mem_fraction_static,
        detokenize=None if tokenizer is None else partial(decode, tokenizer),
        expert_load=recorder,
    )


if __name__ == "__main__":
    sys.exit(main())
