"""How a program's time on the device divides over its named scopes (`jax.named_scope`), read from a profile.

XLA names the instruction that each of a profile's events ran (`hlo_op`), and the compiled program's text says in which scope
each instruction was written. A kernel in a CUDA graph does not tell its instruction: what is profiled is the same program
compiled `ONE_BY_ONE`. Kernel times come from XLA's profile alone: another CUPTI client in the process (`timing.times`) ends
it once XLA's has run.

With several devices, times are each device's own. Some collectives have names that the text does not have: see `name_collectives`.
A collective's kernel also waits for the last device to come: see `collective_us`.
"""

import collections
import math
import re
import tempfile
import warnings
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from bench.layer_tables import OTHER
from bench.roofline import failure
from bench.timing import stream_us

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) (async|fusion|{'|'.join(_KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


class Event(NamedTuple):
    """Something that ran, on one line of a profile; `op` is the instruction that it belongs to, or a kernel of NCCL's that tells none."""

    op: str
    start_ns: float
    duration_ns: float
    is_nccl: bool = False


# The lines of one device: a GPU's streams.
Lines = list[list[Event]]


class Collective(NamedTuple):
    """What an instruction exchanges: `bytes` of the whole array, which all devices together hold or get."""

    kind: str
    bytes: int

    def sent(self, devices: int) -> float:
        """Bytes that each device sends, in a ring."""
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.bytes * (devices - 1) / devices


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
    """Microseconds of one of `calls` calls that each instruction's kernels take, the mean over devices; no gaps.

    Raises:
      RuntimeError: the profile has no event that tells its instruction.
    """
    devices = record(call, calls)
    total = divide(line for device in devices for line in device)
    return {name: us / calls / len(devices) for name, us in total.items()}


def record(call: Callable[[], Any], calls: int) -> list[Lines]:
    """Each device's profile of `calls` calls.

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
    found = [device for profile in profiles for device in device_lines(profile) if any(device)]
    if not found:
        raise RuntimeError("the profile has no event that tells its instruction")
    return found


def device_lines(profile: Any) -> list[Lines]:
    """Of each GPU in a profile, the streams' events that tell their instructions; without a GPU, the CPU's threads as one device."""
    return [[_told(line) for line in lines] for lines in streams(profile)]


def streams(profile: Any) -> list[list[Any]]:
    """The lines of each GPU's plane that are its streams; without a GPU, all lines as one device's."""
    gpus = [plane for plane in profile.planes if plane.name.startswith("/device:GPU")]
    if gpus:  # a plane's other lines hold the same again, summed up
        return [[line for line in plane.lines if line.name.startswith("Stream")] for plane in gpus]
    return [[line for plane in profile.planes for line in plane.lines]]


def events(line: Any) -> list[tuple[Any, dict[str, Any]]]:
    """A line's events, each with what is told of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the iterator's type, by Python
        return [(event, dict(event.stats)) for event in line.events]


def _told(line: Any) -> list[Event]:
    told = []
    for event, stats in events(line):
        is_nccl = event.name.startswith("nccl")
        if op := stats.get("hlo_op") or (event.name if is_nccl else None):
            told.append(Event(str(op), event.start_ns, event.duration_ns, is_nccl))
    return told


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
            computation = header[2]
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


def collectives(hlo: str, devices: int) -> dict[str, Collective]:
    """The collectives that a compiled program runs or starts, in its order; all are over `devices`, and none in a loop."""
    is_entry, computation, found = False, "", {}
    inside: dict[str, str] = {}  # of a computation that is started by itself, or is a kernel of XLA's own
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            is_entry, computation = bool(header[1]), header[2]
        if not (match := _COLLECTIVE.match(line)):
            continue
        name, arrays, opcode, starts = match.groups()
        callee = _CALLED.search(line)
        kind = opcode if opcode in _KINDS else inside.get(callee[1] if callee else "")
        if kind is None:
            continue
        if not is_entry:
            inside[computation] = kind
            continue
        # Of a start: what goes in, then what comes out. An all-reduce's own may have but what comes out.
        both = bool(starts) and (opcode != "all-reduce" or arrays.startswith("(("))
        size = sum(_bytes(*array) for array in _ARRAY.findall(arrays) if array[2] or not starts)
        if kind in ("all-gather", "reduce-scatter") and both:
            size = size * devices // (devices + 1)
        elif kind == "reduce-scatter":
            size *= devices
        elif both:
            size //= 2
        found[name] = Collective(kind, size)
    return found


def name_collectives(lines: Lines, hlo: str, names: Sequence[str], calls: int) -> Lines:
    """One device's lines with collectives under the names of a program's instructions: `names`, in its order.

    A collective that XLA split into a start and an end has, in a profile, the name from before, which the text has no longer. But
    every call begins its collectives one after another: they are NCCL's kernels, or those (XLA has some of its own) that have
    a collective's name or one that the text does not have. If neither are as many as the calls have, lines stay as they are.
    """
    instructions = {match[1] for line in hlo.splitlines() if (match := _INSTRUCTION.match(line))}
    events = sorted((event for line in lines for event in line), key=lambda event: event.start_ns)
    of_nccl = [event for event in events if event.is_nccl]
    unnamed = [event for event in events if event.op in names or event.op not in instructions]
    for kernels in (of_nccl, unnamed):
        if names and len(kernels) == calls * len(names):
            name_of = {event: names[i % len(names)] for i, event in enumerate(kernels)}
            return [[event._replace(op=name_of.get(event, event.op)) for event in line] for line in lines]
    if of_nccl:
        tqdm.write(f"  {len(of_nccl)} kernels of NCCL's in {calls} calls of {len(names)} collectives")
    return lines


def _bytes(dtype: str, bits: str, shape: str) -> int:
    size = 1 if dtype == "pred" else max(int(bits) // 8, 1)
    return size * math.prod(int(n) for n in shape.split(",") if n)


def collective_us(devices: Sequence[Lines], ops: Container[str]) -> dict[str, tuple[float, float]]:
    """Of each of `ops` that ran: microseconds, and of waiting, summed over its runs.

    A run's time is that on the device where it took the shortest, the last to come; what it took longer on the others, on the
    mean over devices, they waited.
    """
    runs: list[dict[str, list[float]]] = []
    for lines in devices:
        own: dict[str, list[float]] = collections.defaultdict(list)
        for event in sorted((event for line in lines for event in line if event.op in ops), key=lambda e: e.start_ns):
            own[event.op].append(event.duration_ns / 1e3)
        runs.append(own)
    result = {}
    for op in {op: None for own in runs for op in own}:
        same = list(zip(*(own.get(op, []) for own in runs), strict=False))
        result[op] = (sum(map(min, same)), sum(sum(run) / len(run) - min(run) for run in same))
    return result
