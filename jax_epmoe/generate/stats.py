"""What a run took: tokens, seconds and memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np


@dataclass
class Stats:
    """One call of `Engine.generate`. Seconds of prefill and decode are those of running, not of compiling.

    Attributes:
      requests: how many.
      prompt_tokens: in all prompts.
      output_tokens: in all completions; prefill makes the first of each, decode the others.
      compile_seconds: making the programs that this call needed and no earlier one had.
      prefill_seconds: from a batch's start to its first tokens on the host, summed over batches.
      decode_seconds: from there to the batch's last token, summed over batches.
      first_token_seconds: from a batch's start to its first tokens, averaged over requests.
      memory_bytes: the most that a local device of the mesh held: its peak where the backend keeps one (GPUs), and
        what live arrays take otherwise.
    """

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_token_seconds: float = 0.0
    memory_bytes: int = 0

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
        """Four lines for a person to read."""
        return "\n".join(
            (
                f"prompts      {self.requests} of {self.prompt_tokens} tokens: {self.prefill_seconds:.2f} s, "
                f"{self.prompt_tokens_per_second:.1f} tokens/s; first token after {self.first_token_seconds * 1e3:.1f} ms",
                f"output       {self.output_tokens} tokens: {self.decode_seconds:.2f} s, "
                f"{self.output_tokens_per_second:.1f} tokens/s; with the prompts' time {self.tokens_per_second:.1f} tokens/s",
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
