"""Who runs next, and where: pure host logic, the same in every process, that knows devices only as ranges of slots.

A sequence waits until a slot is free, is prefilled there in one call or several, and then gets tokens from decode calls until it
ends. Calls run in the order in which they are made here, so that what one leaves in a slot the next may count on. A sequence
whose last token some call is bound to make gives its slot away with that call; one that ends earlier, by a stop token, when the
host has read so.
"""

import collections
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from jax_epmoe.generate.batching import Request, Shapes
from jax_epmoe.generate.prefix_cache import LEAST_PART, PrefixCache, shared_blocks

FinishReason = Literal["stop", "length", "abort"]
_WAIT = -2


@dataclass(eq=False)
class Running:
    """A request on its way.

    `filled`, `made`: what dispatched calls put into the cache of the prompt, and the most that they make of new tokens.
    `reused`: how much of the prompt was there without being computed; None until its first call.
    `token_ids` and what follows is what the host has read.
    """

    request: Request
    blocks: list[bytes]
    slot: int = -1
    filled: int = 0
    made: int = 0
    reused: int | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class PrefillRow:
    """Tokens `start .. start + length` of a sequence; `ends`: its prompt's last among them."""

    running: Running
    slot: int
    start: int
    length: int

    @property
    def ends(self) -> bool:
        return self.start + self.length == len(self.running.request.prompt)


@dataclass(frozen=True)
class Prefill:
    """A prefill call of `rows` x `chunk` tokens; None is a row of padding. Row i is on the device of its slot.

    `copies`: (from slot, to slot), to be done before. `is_start`: every row begins its sequence.
    """

    rows: tuple[PrefillRow | None, ...]
    chunk: int
    is_start: bool
    copies: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Decode:
    """A decode call: which sequence is in which slot."""

    rows: tuple[tuple[int, Running], ...]


class Scheduler:
    """A run's requests over its slots."""

    def __init__(self, requests: Sequence[Request], shapes: Shapes, *, prefix_cache: bool):
        self.shapes = shapes
        # A repetition penalty needs to see the whole prompt pass by.
        reuse = [prefix_cache and r.sampling.repetition_penalty == 1 for r in requests]
        blocks = shared_blocks([r.prompt if reused else () for r, reused in zip(requests, reuse, strict=True)])
        self._waiting = collections.deque(map(Running, requests, blocks))
        self.requests = {running.request.index: running for running in self._waiting}
        self.decodes = any(r.limit > 1 for r in requests)
        self.shares_prefixes = any(blocks)
        self.continues = self.shares_prefixes or any(len(r.prompt) > shapes.chunk for r in requests)
        self._prefixes = PrefixCache()
        self._prefilling: list[Running] = []
        self._decoding: dict[int, Running] = {}
        # Of each replica, the slot that has been free for longest first.
        per = shapes.slots_per_replica
        self._free = [dict.fromkeys(range(i * per, (i + 1) * per)) for i in range(shapes.replicas)]

    @property
    def num_free(self) -> int:
        return sum(map(len, self._free))

    @property
    def is_empty(self) -> bool:
        """Nothing waits, and every slot is free."""
        return not (self._waiting or self._prefilling or self._decoding)

    def next_calls(self) -> tuple[Prefill | None, Decode | None]:
        """What to dispatch now: prefill alone, unless more than half of what is in slots can decode."""
        self._admit()
        prefill = self._next_prefill() if self._prefilling else None
        occupied = len(self._prefilling) + len(self._decoding)
        return prefill, self._next_decode() if prefill is None or 2 * len(self._decoding) > occupied else None

    def end(self, running: Running) -> bool:
        """The sequence has ended; whether it still had a slot, which is free now."""
        if running in self._waiting:
            self._waiting.remove(running)
        if running in self._prefilling:
            self._prefilling.remove(running)
        elif self._decoding.get(running.slot) is running:
            del self._decoding[running.slot]
        else:
            return False
        self._release(running)
        return True

    def _release(self, running: Running) -> None:
        self._prefixes.release(running.slot)
        self._free[running.slot // self.shapes.slots_per_replica][running.slot] = None

    def _slots_of(self, replica: int) -> range:
        per = self.shapes.slots_per_replica
        return range(replica * per, (replica + 1) * per)

    def _admit(self) -> None:
        """Gives free slots to those who wait, first come, first served."""
        while self._waiting and self.num_free:
            running = self._waiting.popleft()
            running.slot, kept = self._choose_slot(running.blocks, len(running.request.prompt))
            free = self._free[running.slot // self.shapes.slots_per_replica]
            del free[running.slot]
            running.filled = kept
            self._prefixes.assign(running.slot, running.blocks, kept)
            self._prefilling.append(running)

    def _choose_slot(self, blocks: list[bytes], length: int) -> tuple[int, int]:
        """A free slot, if there is one where the prompt's beginning is or will be, and how much of it is there already."""
        with_room = [i for i, free in enumerate(self._free) if free]
        if blocks:
            slots = [slot for i in with_room for slot in self._slots_of(i)]
            there, tokens = self._prefixes.find_coming(blocks, slots)
            if tokens >= LEAST_PART * length:
                free = self._free[there // self.shapes.slots_per_replica]
                return (there, tokens) if there in free else (next(iter(free)), 0)
        emptiest = max(with_room, key=lambda i: (len(self._free[i]), -i))
        return next(iter(self._free[emptiest])), 0

    def _next_prefill(self) -> Prefill | None:
        """The first sequence that can go on decides what kind of call it is; others of that kind come with it."""
        chunk, is_start = 0, False
        sizes: tuple[int, ...] = (0,)
        rows: list[list[PrefillRow]] = [[] for _ in range(self.shapes.replicas)]
        copies = []
        for running in self._prefilling:
            mine = rows[running.slot // self.shapes.slots_per_replica]
            if chunk and len(mine) == sizes[-1] // self.shapes.replicas:
                continue
            donor, there = self._beginning(running)
            if donor == _WAIT:
                continue
            left = len(running.request.prompt) - there
            own_chunk, own_sizes = next((c for c in self.shapes.chunks if left <= c[0]), self.shapes.chunks[-1])
            if not chunk:
                chunk, is_start, sizes = own_chunk, there == 0, own_sizes
            if (own_chunk, there == 0) != (chunk, is_start):
                continue
            if donor >= 0:
                copies.append((donor, running.slot))
            mine.append(PrefillRow(running, running.slot, there, min(left, chunk)))
        if not chunk:
            return None
        for row in (row for mine in rows for row in mine):
            self._took(row)
        each = max(map(len, rows))
        most = next(n // self.shapes.replicas for n in sizes if n >= each * self.shapes.replicas)
        padded = tuple(row for mine in rows for row in (*mine, *[None] * (most - len(mine))))
        return Prefill(padded, chunk, is_start, tuple(copies))

    def _beginning(self, running: Running) -> tuple[int, int]:
        """A slot to copy the prompt's beginning from (or -1), and how many tokens are there then.

        The slot is `_WAIT` where one that came earlier is about to compute more of it than there is.
        """
        if running.reused is not None or not running.blocks:
            return -1, running.filled
        replica = running.slot // self.shapes.slots_per_replica
        donor, there = self._prefixes.find(running.blocks, self._slots_of(replica))
        earlier = self._prefilling[: self._prefilling.index(running)]
        _, coming = self._prefixes.find_coming(running.blocks, [other.slot for other in earlier])
        enough = LEAST_PART * len(running.request.prompt)
        if coming > there and coming >= enough:
            return _WAIT, 0
        if there <= running.filled or there < enough:
            return -1, running.filled
        return donor, there

    def _took(self, row: PrefillRow) -> None:
        running = row.running
        if running.reused is None:
            running.reused = row.start
        running.filled = row.start + row.length
        self._prefixes.fill(row.slot, running.filled)
        if row.ends:
            self._prefilling.remove(running)
            self._decoding[row.slot] = running
            self._makes(running, 1)

    def _next_decode(self) -> Decode | None:
        rows = tuple(self._decoding.items())
        for _, running in rows:
            self._makes(running, self.shapes.decode_steps)
        return Decode(rows) if rows else None

    def _makes(self, running: Running, tokens: int) -> None:
        """A call makes so many of its tokens, or as many as it is still to get: then its slot is free for later calls."""
        running.made += tokens
        if running.made >= running.request.limit:
            del self._decoding[running.slot]
            self._release(running)
