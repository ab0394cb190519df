"""What a run took: tokens, seconds and memory."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils


@dataclass
class Stats:
    """One call of `Engine.generate`. Seconds of prefill and decode are those of running, not of compiling: together they are the
    time from the first call's dispatch to the last one's result.

    Attributes:
      requests: how many.
      prompt_tokens: in all prompts.
      cached_tokens: those of them that were copied from another prompt's cache, not computed.
      output_tokens: in all completions; prefill makes the first of each, decode the others.
      compile_seconds: making the programs that this call needed and no earlier one had.
      prefill_seconds: from the result of the call before to that of a prefill call, summed over prefill calls.
      decode_seconds: the same of decode calls.
      host_seconds: of both, those in which the host was not waiting for a result; devices are at work in them unless the host is
        slower than they are.
      first_token_seconds: from the run's start to a request's first token on the host, averaged over requests.
      memory_bytes: the most that a local device of the mesh held: its peak where the backend keeps one (GPUs), and
        what live arrays take otherwise.
      slots: sequences that could run together.
      prefill_calls: how many.
      decode_steps: how many; each makes a token for every sequence that runs.
      slot_steps: tokens that those steps made.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    host_seconds: float = 0.0
    first_token_seconds: float = 0.0
    memory_bytes: int = 0
    slots: int = 0
    prefill_calls: int = 0
    decode_steps: int = 0
    slot_steps: int = 0

    def add_call(self, is_prefill: bool, seconds: float, waited: float) -> None:
        """A call's result came so many seconds after the one before; the host waited so many for it."""
        if is_prefill:
            self.prefill_seconds += seconds
        else:
            self.decode_seconds += seconds
        self.host_seconds += seconds - waited

    @property
    def occupancy(self) -> float:
        """Of the tokens that decode steps could have made in all slots, the part that they made."""
        return self.slot_steps / (self.decode_steps * self.slots) if self.decode_steps else 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        return _rate(self.prompt_tokens, self.prefill_seconds)

    @property
    def output_tokens_per_second(self) -> float:
        """Tokens that decode made, per second of decode."""
        return _rate(self.output_tokens - self.requests, self.decode_seconds)

    @property
    def tokens_per_second(self) -> float:
        """All output tokens, per second of prefill and decode together."""
        return _rate(self.output_tokens, self.prefill_seconds + self.decode_seconds)

    def summary(self) -> str:
        """Five lines for a person to read."""
        return "\n".join(
            (
                f"prompts      {self.requests} of {self.prompt_tokens} tokens: {self.prefill_seconds:.2f} s, "
                f"{self.prompt_tokens_per_second:.1f} tokens/s; first token after {self.first_token_seconds * 1e3:.1f} ms",
                f"output       {self.output_tokens} tokens: {self.decode_seconds:.2f} s, "
                f"{self.output_tokens_per_second:.1f} tokens/s; with the prompts' time {self.tokens_per_second:.1f} tokens/s",
                f"slots        {self.slots}, {100 * self.occupancy:.0f}% of them at work in {self.decode_steps} decode steps; "
                f"{self.cached_tokens} prompt tokens copied; host {self.host_seconds:.2f} s",
                f"compilation  {self.compile_seconds:.2f} s",
                f"memory       {_bytes(self.memory_bytes)} at most on a device",
            )
        )


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0


def device_memory(devices: Sequence[jax.Device]) -> int:
    """The bytes of the fullest of these devices: the peak so far if it is known, else what live arrays take now."""
    stats = [device.memory_stats() for device in devices]
    if all(s is not None and "peak_bytes_in_use" in s for s in stats):
        return max((s["peak_bytes_in_use"] for s in stats), default=0)
    held = dict.fromkeys(devices, 0)
    for array in jax.live_arrays():
        shard = int(np.prod(array.sharding.shard_shape(array.shape), dtype=np.int64)) * array.dtype.itemsize
        for device in array.sharding.device_set & held.keys():
            held[device] += shard
    return max(held.values(), default=0)


def free_memory(devices: Iterable[jax.Device], fraction: float) -> int | None:
    """The bytes that every one of these devices has left of `fraction` of its memory; None where a backend does not tell (CPUs).

    With several processes, what all of them have.
    """
    local = [device for device in devices if device.process_index == jax.process_index()]
    stats = [device.memory_stats() for device in local]
    free = min(
        (int(s["bytes_limit"] * fraction) - s["bytes_in_use"] for s in stats if s and "bytes_limit" in s), default=None
    )
    if jax.process_count() > 1:
        told = multihost_utils.process_allgather(np.asarray(-1 if free is None else max(free, 0) >> 20, np.int32))
        free = None if (told < 0).any() else int(told.min()) << 20
    return None if free is None else max(free, 0)
