"""How 16-bit operands lie in Hopper's shared memory, and what that asks of their sizes."""

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

ROW_ALIGNMENT = 8  # a swizzle pattern's rows
# What divides the contiguous dimension of an operand: the narrowest swizzle that wgmma reads is 32 bytes; transposed, 128.
K_ALIGNMENT = 16
TRANSPOSED_ALIGNMENT = 64

# Blocks of 64 columns on their way out.
OUTPUT_TRANSFORMS = (plgpu.SwizzleTransform(128),)  # type: ignore[abstract]


def operand_transforms(minor: int) -> tuple[Any, ...]:
    """For an operand of `wgmma` whose last dimension in device memory is `minor`: the widest swizzle that divides it."""
    width = next(width for width in (64, 32, K_ALIGNMENT) if minor % width == 0)
    return (plgpu.TilingTransform((ROW_ALIGNMENT, width)), plgpu.SwizzleTransform(2 * width))  # type: ignore[abstract]
