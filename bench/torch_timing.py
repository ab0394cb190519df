"""How long functions of torch take on the GPU; only the process of `bench.peers` runs this."""

import contextlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

RUNS = 9


def torch_times(calls: Sequence[Callable[[], Any]], iterations: int) -> dict[str, Any]:
    """Microseconds a call: of kernels alone, and of a CUDA graph's replays, gaps included."""
    stream = graph_us(calls, max(1, iterations // len(calls)))
    kernels: list[tuple[float, float]] = []
    with contextlib.suppress(Exception):  # no profiler: replays will do
        kernels = _kernel_us(calls, iterations)
    totals = sorted(total for total, _ in kernels) or stream
    return {
        "device_us": statistics.median(totals),
        "device_us_min": totals[0],
        "device_us_max": totals[-1],
        "main_us": statistics.median(main for _, main in kernels) if kernels else None,
        "stream_us": statistics.median(stream),
        "method": "kernel times" if kernels else "CUDA graph replays",
    }


def graph_us(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Sorted times a call of replays of one CUDA graph that makes each of `calls` `repeats` times."""
    import torch

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in [*calls] * repeats:
            call()
    times = []
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(RUNS + 2):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (repeats * len(calls)))
    return sorted(times[2:])


def _kernel_us(calls: Sequence[Callable[[], Any]], iterations: int) -> list[tuple[float, float]]:
    """For each of `iterations` calls, the sum of its kernels' times and the longest; empty if calls look different."""
    import torch
    from torch.autograd import DeviceType

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(iterations):
            calls[i % len(calls)]()
        torch.cuda.synchronize()
    ranges = [event.time_range for event in profile.events() if event.device_type == DeviceType.CUDA]
    durations = [each.elapsed_us() for each in sorted(ranges, key=lambda each: each.start)]
    each, rest = divmod(len(durations), iterations)
    if not each or rest:
        return []
    groups = [durations[i : i + each] for i in range(0, len(durations), each)]
    return [(sum(group), max(group)) for group in groups]
