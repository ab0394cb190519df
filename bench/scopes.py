"""How a program's time on the device divides over its named scopes (`jax.named_scope`), read from a profile.

XLA names the instruction that each of a profile's events ran (`hlo_op`), and the compiled program's text says in which scope
each instruction was written. A kernel in a CUDA graph does not tell its instruction: what is profiled is the same program
compiled `ONE_BY_ONE`. Kernel times come from XLA's profile alone: another CUPTI client in the process (`timing.times`) ends
it once XLA's has run.
"""

import collections
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from bench.layer_tables import OTHER
from bench.roofline import failure
from bench.timing import stream_us

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")


class Event(NamedTuple):
    """Something that ran, on one line of a profile; `op` is the instruction that it belongs to."""

    op: str
    start_ns: float
    duration_ns: float


# For `compile`: no CUDA graphs.
ONE_BY_ONE = {"xla_gpu_enable_command_buffer": ""}


def measure(
    call: Callable[[], Any], profiled: Callable[[], Any], hlo: str, calls: int, names: Sequence[str]
) -> dict[str, Any]:
    """Microseconds of a call: on the stream, all its kernels, and those of each scope (`parts`).

    Args:
      call: the program, without arguments; its result can be waited for.
      profiled: the same, compiled `ONE_BY_ONE`; hlo: that program's text.
      calls: how many to time, of each.
      names: of scopes that do not contain each other.
    """
    result: dict[str, Any] = stream_us(call, calls)
    try:
        kernels = kernel_us(profiled, calls)
    except Exception as problem:
        tqdm.write(f"  no kernel times: {failure(problem)['failed']}")
        return {**result, "device_us": result["stream_us"], "parts": {}, "kernels": [], "method": "stream"}
    scope_of, parts = scopes(hlo, names), collections.Counter[str]()
    for name, us in kernels.items():
        parts[scope_of.get(name, OTHER)] += us
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:20]
    return {
        **result,
        "device_us": sum(kernels.values()),
        "parts": dict(parts),
        "kernels": [{"name": name, "scope": scope_of.get(name, OTHER), "us": us} for name, us in longest],
        "method": "profile",
    }


def kernel_us(call: Callable[[], Any], calls: int) -> dict[str, float]:
    """Microseconds of one of `calls` calls that each instruction's kernels take; no gaps.

    Raises:
      RuntimeError: the profile has no event that tells its instruction.
    """
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready([call() for _ in range(calls)])
        profiles = [jax.profiler.ProfileData.from_file(str(path)) for path in Path(folder).rglob("*.xplane.pb")]
    total = divide(line for profile in profiles for line in lines(profile))
    if not total:
        raise RuntimeError("the profile has no event that tells its instruction")
    return {name: us / calls for name, us in total.items()}


def lines(profile: Any) -> Iterable[list[Event]]:
    """The lines of a profile whose events tell their instructions: a GPU's streams, or, without a GPU, the CPU's threads."""
    gpus = [plane for plane in profile.planes if plane.name.startswith("/device:GPU")]
    for plane in gpus or profile.planes:
        for line in plane.lines:
            if gpus and not line.name.startswith("Stream"):
                continue  # the same again, summed up
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of the iterator's type, by Python
                told = [(event, dict(event.stats).get("hlo_op")) for event in line.events]
            yield [Event(str(op), event.start_ns, event.duration_ns) for event, op in told if op]


def divide(lines: Iterable[Sequence[Event]]) -> dict[str, float]:
    """Microseconds of each instruction. A moment counts once, for the event that began last: what runs inside another (a loop's
    body), or begins while a kernel ends."""
    total: dict[str, float] = collections.defaultdict(float)
    for events in lines:
        around: list[Event] = []
        for event in sorted(events, key=lambda event: (event.start_ns, -event.duration_ns)):
            while around and around[-1].start_ns + around[-1].duration_ns <= event.start_ns:
                around.pop()
            if around:
                shared = min(around[-1].start_ns + around[-1].duration_ns - event.start_ns, event.duration_ns)
                total[around[-1].op] -= shared / 1e3
            total[event.op] += event.duration_ns / 1e3
            around.append(event)
    return dict(total)


def scopes(hlo: str, names: Sequence[str]) -> dict[str, str]:
    """The scope of each instruction of a compiled program's text that lies in one of `names`.

    A fusion whose own name tells none (it ends in a cast outside, say) has the scope of most of what it fuses.
    """
    computation, own, called = "", {}, {}
    inside: dict[str, list[str]] = collections.defaultdict(list)
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header[1]
        elif instruction := _INSTRUCTION.match(line):
            name, op_name, callee = instruction[1], _OP_NAME.search(line), _CALLED.search(line)
            inside[computation].append(name)
            found = [part for part in op_name[1].split("/") if part in names] if op_name else []
            if found:
                own[name] = found[0]
            elif callee:
                called[name] = callee[1]
    for name in called:  # a computation stands before what calls it
        votes = collections.Counter(own[other] for other in inside[called[name]] if other in own)
        if votes:
            own[name] = votes.most_common(1)[0][0]
    return own
