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
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_PAIRS = np.stack([np.tile(_E2M1, 16), np.repeat(_E2M1, 16)], axis=1)  # [256, 2], by a byte's value
_POWERS = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))
_GROUPS_AT_ONCE = 2**15


def decode_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """`blocks [..., groups, 16]` and `scales [..., groups]`, both uint8 -> `[..., 32 * groups]` bfloat16: exact, but for what overflows."""
    out = np.empty((scales.size, GROUP), ml_dtypes.bfloat16)
    blocks, powers = blocks.reshape(-1, BLOCK_BYTES), scales.reshape(-1)
    for start in range(0, len(out), _GROUPS_AT_ONCE):
        here = slice(start, start + _GROUPS_AT_ONCE)
        numbers = _PAIRS[blocks[here]].reshape(-1, GROUP)
        with np.errstate(over="ignore"):  # infinite values are looked for, and named, in what is written
            out[here] = numbers * _POWERS[powers[here], None]
    return out.reshape(*scales.shape[:-1], -1)


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
            values = decode_mxfp4(values.reshape(-1, BLOCK_BYTES), self._own(self.scales))
        return np.ascontiguousarray(values.reshape(self.sizes).transpose(self.order))

    def _own(self, tensor: Tensor) -> np.ndarray:
        size = math.prod(tensor.shape[1:])
        return tensor.elements(self.number * size, (self.number + 1) * size)
