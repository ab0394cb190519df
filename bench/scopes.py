"""How a program's time on the device divides over its named scopes (`jax.named_scope`), read from a profile.

XLA names the instruction that each of a profile's events ran (`hlo_op`), and the compiled program's text says in which scope
each instruction was written. XLA leaves CUDA graphs out while it profiles, so kernels keep their instructions.
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
from bench.timing import Rotation, times

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")


class Event(NamedTuple):
    """Something that ran, on one line of a profile; `op` is the instruction that it belongs to."""

    op: str
    start_ns: float
    duration_ns: float


def measure(
    compiled: Any,
    arguments: Sequence[tuple[Any, ...]],
    iterations: int,
    names: Sequence[str],
    run: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """`timing.times` of a compiled program, and its `parts`: empty where a profile does not tell them.

    `run`: what calls the program, if not the program itself.
    """
    run = run or compiled
    result: dict[str, Any] = {**times(run, arguments, iterations), "parts": {}}
    try:
        result["parts"] = parts(compiled, Rotation(run, arguments), iterations, names)
    except Exception as problem:
        tqdm.write(f"  no parts: {failure(problem)['failed']}")
        return result
    if result["method"] == "stream":  # its kernels' times, after all
        result |= {"device_us": sum(result["parts"].values()), "method": "profile"}
    return result


def parts(compiled: Any, call: Callable[[], Any], calls: int, names: Sequence[str]) -> dict[str, float]:
    """Microseconds of one of `calls` calls in each named scope that took any, and in `OTHER`; kernels only, no gaps.

    Args:
      compiled: the program that `call` runs, and nothing else.
      call: without arguments; its result can be waited for.
      calls: how many to profile.
      names: of scopes that do not contain each other.

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
    total = divide((line for profile in profiles for line in lines(profile)), scopes(compiled.as_text(), names))
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


def divide(lines: Iterable[Sequence[Event]], scope_of: dict[str, str]) -> dict[str, float]:
    """Microseconds of each scope; what runs inside an event of the same line (a loop's body) counts once, as itself."""
    total: dict[str, float] = collections.defaultdict(float)
    for events in lines:
        around: list[Event] = []
        for event in sorted(events, key=lambda event: (event.start_ns, -event.duration_ns)):
            while around and around[-1].start_ns + around[-1].duration_ns <= event.start_ns:
                around.pop()
            if around:
                total[scope_of.get(around[-1].op, OTHER)] -= event.duration_ns / 1e3
            total[scope_of.get(event.op, OTHER)] += event.duration_ns / 1e3
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
