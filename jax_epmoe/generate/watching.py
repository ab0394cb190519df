"""What shows a run while it runs: the progress bar, a profile, the rows of each expert."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator

import jax
from tqdm import tqdm

from jax_epmoe.generate.engine import Progress
from jax_epmoe.generate.expert_load import ExpertLoad


@contextlib.contextmanager
def progress_bar(limits: list[int], *, shown: bool) -> Iterator[tuple[Progress, Callable[[int, int], None]]]:
    """A bar of output tokens on standard error, with their rate and the time left if every text goes on to its limit.

    Args:
      limits: the most tokens of each prompt.
      shown: on a terminal.

    Yields:
      What the engine reports to, and what is told of each completion: its limit and its tokens. What a text leaves of its limit
      counts no longer.
    """
    total, finished = sum(limits), 0
    with tqdm(total=total, unit=" tokens", unit_scale=True, smoothing=0.1, file=sys.stderr, disable=not shown) as bar:

        def progress(tokens: int, requests: int) -> None:
            bar.update(tokens)

        def close(limit: int, tokens: int) -> None:
            nonlocal total, finished
            finished += 1
            total -= limit - tokens
            bar.total = total
            bar.set_postfix_str(f"{finished}/{len(limits)} prompts")

        yield progress, close


def run_kernels_one_by_one() -> None:
    """No CUDA graphs, unless XLA_FLAGS says which: a kernel in one does not tell the scope that it belongs to."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_enable_command_buffer" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer=".strip()


@contextlib.contextmanager
def profile(folder: str | None, seconds: float) -> Iterator[Callable[[Progress], Progress]]:
    """Traces into `folder` until so many seconds after the first tokens; None: not at all.

    Yields what a progress report must be wrapped in: by it the time is seen to be over.
    """
    if folder is None:
        yield lambda progress: progress
        return
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow the host down
    jax.profiler.start_trace(folder, profiler_options=options)
    end, running = float("inf"), True

    def stop() -> None:
        nonlocal running
        if running:
            running = False
            jax.profiler.stop_trace()

    def wrap(progress: Progress) -> Progress:
        def report(tokens: int, requests: int) -> None:
            nonlocal end
            now = time.monotonic()
            end = min(end, now + seconds)  # from the first tokens on: before, programs are compiled
            if now > end:
                stop()
            progress(tokens, requests)

        return report

    try:
        yield wrap
    finally:
        stop()


@contextlib.contextmanager
def saved(recorder: ExpertLoad | None, path: str | None) -> Iterator[None]:
    """Saves what was recorded, after an interruption too."""
    try:
        yield
    finally:
        if recorder is not None and path is not None:
            recorder.save(path)
