"""How operands lie in Hopper's shared memory, and what that asks of their sizes."""

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

ROW_ALIGNMENT = 8  # a swizzle pattern's rows
_NARROWEST_SWIZZLE = 32  # bytes that wgmma reads; transposed, 128
# What divides the contiguous dimension of a 16-bit operand, and of a float8 one.
K_ALIGNMENT = _NARROWEST_SWIZZLE // 2
FP8_K_ALIGNMENT = _NARROWEST_SWIZZLE
TRANSPOSED_ALIGNMENT = 64

# Blocks of 64 columns on their way out.
OUTPUT_TRANSFORMS = (plgpu.SwizzleTransform(128),)  # type: ignore[abstract]


def operand_transforms(minor: int, itemsize: int = 2) -> tuple[Any, ...]:
    """For an operand of `wgmma` whose last dimension in device memory is `minor`: the widest swizzle that divides it."""
    swizzle = next(swizzle for swizzle in (128, 64, _NARROWEST_SWIZZLE) if minor * itemsize % swizzle == 0)
    tiling = plgpu.TilingTransform((ROW_ALIGNMENT, swizzle // itemsize))  # type: ignore[abstract]
    return tiling, plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]
