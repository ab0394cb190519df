"""A run: requests on their way through one cache. It dispatches the steps that the scheduler names, and reads what they made."""

import collections
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jax_epmoe.generate.programs import COPIES, Call, Made, Programs, pack
from jax_epmoe.generate.scheduler import Decode, FinishReason, Prefill, Running, Scheduler
from jax_epmoe.generate.stats import Stats, device_memory
from jax_epmoe.generate.stopping import Detokenize, read_tokens

# How many steps have been dispatched and not read when the host waits for one: while it reads a step's tokens, the next one runs.
_LOOKAHEAD = 1


@dataclass(frozen=True)
class Completion:
    """What one prompt got.

    Attributes:
      token_ids: with the token that stopped it, if one did, or that completed a stop string.
      finish_reason: "stop" after a stop token or string, "length" after `max_new_tokens` or at the context's end, "abort".
      prompt_tokens: of the prompt.
      logprobs: if they were asked for, for every token its own log-probability and those of the likeliest, by token id.
      stop_reason: which of `stop_token_ids` or `stop` ended it; None for an end-of-sequence token.
    """

    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: list[dict[int, float]] | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class Update:
    """News of the prompt at `index`: the token ids since the last update, and its completion if it has ended."""

    index: int
    token_ids: list[int]
    completion: Completion | None = None


class Run:
    """One scheduler's requests, and the cache and slots that they share; gone with it."""

    def __init__(
        self,
        programs: Programs,
        scheduler: Scheduler,
        stats: Stats,
        detokenize: Detokenize | None,
        expert_load: Any | None,
        aborted: set[int],
    ):
        self.paused = 0.0  # seconds that whoever reads the stream took for itself
        self._programs, self._scheduler, self._shapes = programs, scheduler, scheduler.shapes
        self._stats, self._detokenize, self._aborted = stats, detokenize, aborted
        self._expert_load = expert_load
        self._began = self._last = time.perf_counter()
        self._cache = programs.init_cache(self._shapes.slots, self._shapes.cache_length)
        self._slots = programs.new_slots(self._shapes)
        self._everyone = programs.put(np.ones(self._shapes.slots, bool))
        self._some_were_stopped = False
        stats.slots = max(stats.slots, self._shapes.slots)

    def steps(self) -> Iterator[list[Update]]:
        """Dispatches and reads until all have finished; yields what came with each step that was read."""
        unread: collections.deque[list[tuple[Prefill | Decode, Made]]] = collections.deque()
        while True:
            if aborted := self._abort():
                yield aborted
            step = self._dispatch()
            if step:
                unread.append(step)
            elif not unread:
                break
            if len(unread) > _LOOKAHEAD or not step:
                yield self._read(unread.popleft())
        devices = [d for d in self._programs.mesh.devices.flat if d.process_index == jax.process_index()]
        self._stats.memory_bytes = max(self._stats.memory_bytes, device_memory(devices))
        if self._scheduler.num_free != self._shapes.slots:
            raise RuntimeError(f"{self._shapes.slots - self._scheduler.num_free} slots were never freed")

    def _dispatch(self) -> list[tuple[Prefill | Decode, Made]]:
        prefill, decode = self._scheduler.next_calls()
        step: list[tuple[Prefill | Decode, Made]] = []
        if prefill is not None:
            self._copy(prefill.copies)
            call = Call("start" if prefill.is_start else "continue", len(prefill.rows), prefill.chunk)
            args = [self._programs.put(part) for part in pack(prefill, self._shapes.num_stop_ids)]
            step.append((prefill, self._call(call, *args)))
            self._stats.prefill_calls += 1
        if decode is not None:
            alive = self._everyone
            if self._some_were_stopped:  # by the host: the devices do not know
                running = np.zeros(self._shapes.slots, bool)
                running[[slot for slot, _ in decode.rows]] = True
                alive, self._some_were_stopped = self._programs.put(running), False
            step.append((decode, self._call(Call("decode", length=self._shapes.decode_steps), alive)))
            self._stats.decode_steps += self._shapes.decode_steps
        return step

    def _call(self, call: Call, *args: jax.Array) -> Made:
        program = self._programs(self._shapes, call)
        self._cache, self._slots, made = program(self._programs.weights, self._cache, self._slots, *args)
        for array in jax.tree.leaves(made):
            array.copy_to_host_async()
        return made

    def _copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """From slots to slots of the same replica, up to `COPIES` a replica at a time."""
        per, replicas = self._shapes.slots_per_replica, self._shapes.replicas
        left = [[copy for copy in copies if copy[1] // per == replica] for replica in range(replicas)]
        while any(left):
            numbers = np.full((replicas, COPIES, 2), -1, np.int32)
            for replica, mine in enumerate(left):
                numbers[replica, : len(mine[:COPIES])] = np.array(mine[:COPIES], np.int32).reshape(-1, 2)
                del mine[:COPIES]
            source, target = (self._programs.put(numbers[..., i].reshape(-1)) for i in (0, 1))
            self._cache = self._programs(self._shapes, Call("copy", replicas * COPIES))(self._cache, source, target)

    def _read(self, step: list[tuple[Prefill | Decode, Made]]) -> list[Update]:
        updates = []
        for call, made in step:
            before = time.perf_counter()
            made = jax.tree.map(np.asarray, made)
            now = time.perf_counter()
            if self._expert_load is not None and made.load is not None:
                for rows in np.reshape(made.load, (-1, *np.shape(made.load)[-2:])):
                    self._expert_load.add(rows)
            self._stats.add_call(type(call) is Prefill, now - self._last - self.paused, now - before)
            self._last, self.paused = now, 0.0
            if isinstance(call, Prefill):
                ended = [(i, row.running) for i, row in enumerate(call.rows) if row is not None and row.ends]
                for row in call.rows:
                    if row is not None and row.start == row.running.reused:
                        self._stats.cached_tokens += row.start
                made = jax.tree.map(lambda a: a[None], made)
                updates += self._updates(ended, made)
            else:
                tokens: Any = made.token
                self._stats.slot_steps += int(np.count_nonzero(tokens >= 0))
                updates += self._updates(call.rows, made)
        return updates

    def _updates(self, rows: Sequence[tuple[int, Running]], made: Made) -> list[Update]:
        """What a call made for each sequence: `made`'s arrays are `[steps, B, ...]`."""
        tokens: Any = made.token
        columns = tokens.T.tolist()
        updates = []
        for i, running in rows:
            if running.finish_reason is not None:
                continue
            if not running.token_ids:
                self._stats.first_token_seconds += self._last - self._began
            logprobs = None if made.logprob is None else _logprobs(made, i)
            new = read_tokens(running, columns[i], logprobs, self._detokenize)
            self._stats.output_tokens += new
            if running.finish_reason is not None:
                self._end(running)
            if new or running.finish_reason is not None:
                updates.append(
                    Update(
                        running.request.index, running.token_ids[len(running.token_ids) - new :], _completion(running)
                    )
                )
        return updates

    def _end(self, running: Running) -> None:
        had_slot = self._scheduler.end(running)
        if had_slot and (running.finish_reason == "abort" or isinstance(running.stop_reason, str)):
            self._some_were_stopped = True

    def _abort(self) -> list[Update]:
        updates = []
        for index in sorted(self._aborted):
            running = self._scheduler.requests.get(index)
            if running is None:
                continue
            self._aborted.remove(index)
            if running.finish_reason is None:
                running.finish_reason = "abort"
                self._end(running)
                updates.append(Update(index, [], _completion(running)))
        return updates


def _logprobs(made: Made, i: int) -> list[tuple[float, list[int], list[float]]]:
    columns: list[Any] = [made.logprob, made.top_ids, made.top_logprobs]
    return list(zip(*(column[:, i].tolist() for column in columns), strict=True))


def _completion(running: Running) -> Completion | None:
    if running.finish_reason is None:
        return None
    logprobs = running.logprobs if running.request.sampling.logprobs is not None else None
    return Completion(
        running.token_ids, running.finish_reason, len(running.request.prompt), logprobs, running.stop_reason
    )
