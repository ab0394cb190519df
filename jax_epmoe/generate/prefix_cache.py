"""Which slots hold the beginning of a prompt, so that it need not be computed again: on the host, by blocks of tokens.

A block's key is a digest of the prompt up to its end, so two prompts that share a key share all tokens up to there. Only blocks
that at least two of a run's prompts begin with are kept: where prompts share nothing, nothing is done.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

BLOCK = 16  # tokens
# What is shared is copied where it is at least this part of the prompt: the rest is computed beside a cache, which costs more.
LEAST_PART = 0.25


def shared_blocks(prompts: Sequence[Sequence[int]]) -> list[list[bytes]]:
    """For each prompt the keys of its blocks that another prompt begins with too, if that is enough of it to copy.

    A prompt's last token is never in a block: something must be computed to go on from.
    """
    keys = [_keys(prompt) for prompt in prompts]
    count = Counter(key for own in keys for key in own)
    shared = [[key for key in own if count[key] > 1] for own in keys]
    return [
        own if len(own) * BLOCK >= LEAST_PART * len(prompt) else [] for own, prompt in zip(shared, prompts, strict=True)
    ]


def _keys(prompt: Sequence[int]) -> list[bytes]:
    tokens = np.asarray(prompt, np.int32)
    digest = hashlib.blake2b(digest_size=16)
    keys = []
    for end in range(BLOCK, len(prompt), BLOCK):
        digest.update(tokens[end - BLOCK : end].tobytes())
        keys.append(digest.digest())
    return keys


class PrefixCache:
    """The blocks that each slot holds, or is going to hold."""

    def __init__(self) -> None:
        self._holders: dict[bytes, dict[int, None]] = {}  # in the order in which they came
        self._blocks: dict[int, list[bytes]] = {}
        self._filled: dict[int, int] = {}

    def assign(self, slot: int, blocks: list[bytes], kept: int) -> None:
        """The slot is going to hold these blocks, of which the first `kept` tokens are there."""
        self._forget(slot, 0)
        self._blocks[slot], self._filled[slot] = blocks, kept
        for key in blocks:
            self._holders.setdefault(key, {})[slot] = None

    def fill(self, slot: int, tokens: int) -> None:
        """So many tokens of the prompt are in the slot's cache, once what has been dispatched has run."""
        self._filled[slot] = tokens

    def release(self, slot: int) -> None:
        """Nothing more comes into this slot; what is there stays until it is assigned again."""
        self._forget(slot, self._filled.get(slot, 0) // BLOCK)

    def _forget(self, slot: int, kept_blocks: int) -> None:
        blocks = self._blocks.pop(slot, [])
        for key in blocks[kept_blocks:]:
            self._holders[key].pop(slot)
            if not self._holders[key]:
                del self._holders[key]
        if kept_blocks:
            self._blocks[slot] = blocks[:kept_blocks]

    def find(self, blocks: list[bytes], slots: Iterable[int]) -> tuple[int, int]:
        """The slot among `slots` that holds most of these blocks, and how many tokens; (-1, 0) if none does."""
        return self._longest(blocks, frozenset(slots), filled=True)

    def find_coming(self, blocks: list[bytes], slots: Iterable[int]) -> tuple[int, int]:
        """The same, of what the slots hold or are going to hold."""
        return self._longest(blocks, frozenset(slots), filled=False)

    def _longest(self, blocks: list[bytes], slots: frozenset[int], *, filled: bool) -> tuple[int, int]:
        for count in range(len(blocks), 0, -1):
            for slot in self._holders.get(blocks[count - 1], ()):
                if slot in slots and (not filled or self._filled[slot] >= count * BLOCK):
                    return slot, count * BLOCK
        return -1, 0
