"""How much of the time devices are at work, and at what, read from a profile's kernels."""

import collections
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from bench.scopes import events, streams

Interval = tuple[float, float]  # start and end, nanoseconds

# The engine's programs by what XLA calls their modules.
_PHASES = {"jit__prefill": "prefill", "jit__decode": "decode"}
OTHER = "other"


def device_busy(folder: str | Path) -> dict[str, Any]:
    """Of the newest profile in `folder`.

    Returns:
      `seconds` from the first kernel's start to the last one's end, the mean of devices; `busy`, the part of them in which some kernel
      ran, and what is left, `idle`; and `prefill`, `decode` and `other`, the parts of each kind of program. Kernels that do not tell
      their program (of CUDA graphs) are others.

    Raises:
      RuntimeError: there is no profile, or no kernel in it.
    """
    paths = sorted(Path(folder).rglob("*.xplane.pb"))
    if not paths:
        raise RuntimeError(f"{folder} holds no profile")
    profile = jax.profiler.ProfileData.from_file(str(paths[-1]))
    each_device = ([kernel for line in lines for kernel in _kernels(line)] for lines in streams(profile))
    devices = [kernels for kernels in each_device if kernels]
    if not devices:
        raise RuntimeError(f"{paths[-1]} holds no kernel")
    each = [_shares(kernels) for kernels in devices]
    return {key: sum(shares[key] for shares in each) / len(each) for key in each[0]}


def _shares(kernels: list[tuple[str, Interval]]) -> dict[str, float]:
    by_phase: dict[str, list[Interval]] = collections.defaultdict(list)
    for phase, interval in kernels:
        by_phase[phase].append(interval)
    everything = [interval for _, interval in kernels]
    window = max(end for _, end in everything) - min(start for start, _ in everything)
    busy = covered(everything) / window
    parts = {phase: covered(by_phase[phase]) / window for phase in (*_PHASES.values(), OTHER)}
    return {"seconds": window / 1e9, "busy": busy, "idle": 1 - busy, **parts}


def covered(intervals: Iterable[Interval]) -> float:
    """How much of the time at least one of them covers."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _kernels(line: Any) -> Iterable[tuple[str, Interval]]:
    """What ran: the phase that it belongs to, and when. On a CPU, threads do other things too."""
    on_gpu = line.name.startswith("Stream")
    for event, stats in events(line):
        if on_gpu or "hlo_op" in stats:
            module = str(stats.get("hlo_module", "")).split("(")[0]
            yield _PHASES.get(module, OTHER), (event.start_ns, event.start_ns + event.duration_ns)
