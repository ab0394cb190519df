"""Tensors that hold a parameter of all experts with its axes in another order, or in MXFP4, as gpt-oss has them.

MXFP4 (Open Compute Project, Microscaling Formats v1.0): 32 numbers e2m1, two in a byte, the first in its lower half, share
a power of two, e8m0: `2 ** (scale - 127)`, or NaN where scale is 255.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from weights_convert.safetensors_file import Tensor

GROUP = 32  # numbers that share a scale
BLOCK_BYTES = GROUP // 2
_GROUPS_AT_ONCE = 2**15


def _all_pairs() -> np.ndarray:
    """`[2 ** 16]` uint32: two bfloat16 side by side, those of scale s and byte b at `256 * s + b`."""
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])  # e2m1
    powers = np.append(2.0 ** (np.arange(255) - 127), np.nan)
    byte = np.arange(256)
    pairs = powers[:, None, None] * numbers[np.stack([byte & 15, byte >> 4], axis=-1)]
    with np.errstate(over="ignore"):  # what is infinite is looked for, and named, in what is written
        return pairs.astype(ml_dtypes.bfloat16).view(np.uint32).reshape(-1)


_PAIRS = _all_pairs()


def decode_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Groups' blocks and scales, uint8 of any shape, 16 bytes to a scale -> `[groups, 32]` bfloat16: exact, but for what overflows."""
    out = np.empty((scales.size, BLOCK_BYTES), np.uint32)
    blocks, scales = blocks.reshape(out.shape), scales.reshape(-1, 1)
    for start in range(0, len(out), _GROUPS_AT_ONCE):
        here = slice(start, start + _GROUPS_AT_ONCE)
        out[here] = _PAIRS[scales[here].astype(np.uint16) << 8 | blocks[here]]
    return out.view(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Expert:
    """One expert's part of a parameter: to read, as a `Tensor` is.

    Attributes:
      values: a number for each element; or, with `scales`, MXFP4's blocks.
      scales: MXFP4's, or None.
      number: which expert's.
      sizes: of the expert's axes, as they lie in the tensor: none merged.
      order: of our axes, which of those they are.
    """

    values: Tensor
    scales: Tensor | None
    number: int
    sizes: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def file(self) -> Path:
        return self.values.file

    def read(self) -> np.ndarray:
        """The expert's part, in our order."""
        values = self._own(self.values)
        if self.scales is not None:
            values = decode_mxfp4(values, self._own(self.scales))
        return np.ascontiguousarray(values.reshape(self.sizes).transpose(self.order))

    def _own(self, tensor: Tensor) -> np.ndarray:
        size = math.prod(tensor.shape[1:])
        return tensor.elements(self.number * size, (self.number + 1) * size)
