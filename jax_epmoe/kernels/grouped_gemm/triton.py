"""The grouped products in Triton, through jax-triton: for NVIDIA GPUs since Ampere, float8 since Ada, among them those without
Hopper's kernel.

One program makes one tile and finds its expert in `group_sizes` by itself, so a call is one kernel, gather, bias and gate
included. The grid is as large as any group sizes may need; surplus programs exit at once. Nothing is added atomically.

Triton and jax-triton are optional (the extra `triton`) and imported when first needed.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_epmoe.config import Activation, ClampedSwiGLU
from jax_epmoe.kernels.device import compute_capability
from jax_epmoe.kernels.grouped_gemm.reference import quantize_rows
from jax_epmoe.quant import BLOCK, FP8, Granularity, QuantizedArray

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_OLDEST = 80
_OLDEST_FLOAT8 = 89
_BAND = 8  # row tiles of an expert that share their weights while these are in the L2
# KiB of shared memory that a CTA may have, by compute capability; a card that is not listed has 99.
_SHARED_MEMORY = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}


class Tile(NamedTuple):
    """How the kernel cuts its work.

    Attributes:
      block_m: rows of a tile, a power of two from 16.
      block_n: columns of w in a tile (with a gate: half of them gate's, half up's), a power of two.
      block_k: how much of k a stage holds, a power of two from 16.
      num_warps: of a program.
      num_stages: how deep Triton pipelines the loads.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    row_index: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
    transpose_w: bool = False,
    out_dtype: jax.typing.DTypeLike,
    expected_rows: int | None = None,
    tile: Tile | None = None,
) -> jax.Array:
    """What `reference.matmul` computes, with the same shapes; rows past the groups are left as they are.

    x and w are both bfloat16, float16 or float32 (multiplied without tensor cores: no tf32), out_dtype is one of these. The
    sizes may be any; those that 8 does not divide are loaded slowly. `tile`: None for what suits `expected_rows` rows.

    Raises:
      NotImplementedError: the device is no NVIDIA GPU since Ampere, another dtype, an empty operand, no jax-triton.
    """
    rows = x.shape[0] if row_index is None else row_index.shape[0]
    n = w.shape[-1] if transpose_w else w.shape[-2]
    parts = 2 if activation else 1
    capability = _refuse_unless_served(x, w, out_dtype)
    if tile is None:
        expected_rows = rows if expected_rows is None else expected_rows
        columns = parts * n
        tile = choose_tile(
            rows=expected_rows, experts=w.shape[0], columns=columns, dtype=x.dtype, capability=capability
        )
    return _matmul(
        x, w, group_sizes, row_index, bias, None, None,
        activation=activation, transpose_w=transpose_w, out_dtype=jnp.dtype(out_dtype), tile=tile, capability=capability,
    )  # fmt: skip


def quantized_matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    row_index: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
    x_scale: jax.Array,
    w_scale: jax.Array,
    quantize_out: Granularity | None = None,
    out_scale: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike,
    expected_rows: int | None = None,
) -> jax.Array | QuantizedArray:
    """What `reference.quantized_matmul` computes; rows past the groups are left as they are. Scales as `grouped_gemm` has them.

    Every 128 of k are summed by themselves, scaled and added in float32.

    Raises:
      NotImplementedError: the device is no NVIDIA GPU since Ada, another out_dtype, an empty operand, no jax-triton.
    """
    out_dtype = jnp.dtype(jnp.float32 if quantize_out else out_dtype)
    capability = _refuse_unless_served(x, w, out_dtype, float8=True)
    rows = x.shape[0] if row_index is None else row_index.shape[0]
    columns = w.shape[-2] * (2 if activation else 1)
    expected_rows = rows if expected_rows is None else expected_rows
    tile = choose_tile(rows=expected_rows, experts=w.shape[0], columns=columns, dtype=x.dtype, capability=capability)
    out = _matmul(
        x, w, group_sizes, row_index, bias, x_scale, w_scale,
        activation=activation, transpose_w=False, out_dtype=out_dtype, tile=tile, capability=capability,
    )  # fmt: skip
    return quantize_rows(out, group_sizes, quantize_out, out_scale) if quantize_out else out


def outer(left: jax.Array, right: jax.Array, group_sizes: jax.Array, *, out_dtype: jax.typing.DTypeLike) -> jax.Array:
    """What `reference.outer` computes: `left[rows of e].T @ right[rows of e]` -> `[experts, n, k]`; refuses as `matmul` does."""
    capability = _refuse_unless_served(left, right, out_dtype)
    return _outer(left, right, group_sizes, out_dtype=jnp.dtype(out_dtype), capability=capability)


def choose_tile(*, rows: int, experts: int, columns: int, dtype: jax.typing.DTypeLike, capability: int) -> Tile:
    """A tile for `rows` rows over `experts` groups of unknown sizes and `columns` columns of w (gate and up together)."""
    rows_per_expert = rows / experts
    # Decoding reads weights and little else, and reads them once if an expert's rows fit into one tile.
    block_m = next((height for height in (16, 32, 64) if rows_per_expert <= 0.75 * height), 128)
    if jnp.dtype(dtype) == jnp.float32:
        return Tile(min(block_m, 64), 64, 32, num_warps=4, num_stages=3)
    if jnp.dtype(dtype) == FP8:  # two sums of float32: registers for 128 columns; block_k is what shares a scale
        return Tile(block_m, 128, BLOCK, num_warps=8 if block_m == 128 else 4, num_stages=4)
    if block_m < 128:
        return Tile(block_m, 128, 64, num_warps=4, num_stages=4 if block_m == 64 else 5)
    fits = _SHARED_MEMORY.get(capability, 99) >= 163
    if fits and -(-columns // 256) * 256 <= 1.15 * columns:
        return Tile(128, 256, 64, num_warps=8, num_stages=4)
    # 96 KiB either way: before Hopper Triton keeps one stage less in shared memory.
    return Tile(128, 128, 64, num_warps=8, num_stages=3 if capability // 10 == 9 else 4)


def outer_tile(dtype: jax.typing.DTypeLike) -> Tile:
    """`outer`'s tile: block_m is of n, block_n of k, and block_k of the rows."""
    return Tile(64, 64, 32, 4, 3) if jnp.dtype(dtype) == jnp.float32 else Tile(128, 128, 32, 8, 4)


def _refuse_unless_served(
    left: jax.Array, right: jax.Array, out_dtype: jax.typing.DTypeLike, float8: bool = False
) -> int:
    """Raises NotImplementedError with one line unless the kernels can run; the device's compute capability."""
    capability, dtypes = compute_capability(), (left.dtype, right.dtype, jnp.dtype(out_dtype))
    names, oldest = ", ".join(map(str, dtypes)), _OLDEST_FLOAT8 if float8 else _OLDEST
    accepted = dtypes[2:] if float8 else dtypes  # whoever gives scales has checked that both operands are float8
    for refused, reason in (
        (capability < oldest, f"the device is not an NVIDIA GPU of compute capability {oldest / 10} or newer"),
        (left.dtype != right.dtype, f"dtypes {names}: the operands' differ"),
        (any(dtype not in _DTYPES for dtype in accepted), f"dtypes {names} are not bfloat16, float16 or float32"),
        (left.size == 0 or right.size == 0, "an operand is empty"),
    ):
        if refused:
            raise NotImplementedError(f"grouped_gemm's triton backend: {reason}")
    try:
        _import()
    except ImportError as error:
        reason = f"jax-triton cannot be used: {str(error).splitlines()[0]}"
        raise NotImplementedError(f"grouped_gemm's triton backend: {reason}") from error
    return capability


def _import() -> tuple[Any, Any]:
    """`jax_triton.triton_call` and our kernels."""
    import jax_triton

    from jax_epmoe.kernels.grouped_gemm import triton_kernels

    return jax_triton.triton_call, triton_kernels


# Both under jit of their own, so that a model's layers share one trace and one compilation.
@functools.partial(jax.jit, static_argnames=("activation", "transpose_w", "out_dtype", "tile", "capability"))
def _matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    row_index: jax.Array | None,
    bias: jax.Array | None,
    x_scale: jax.Array | None,
    w_scale: jax.Array | None,
    *,
    activation: Activation | None,
    transpose_w: bool,
    out_dtype: jnp.dtype,
    tile: Tile,
    capability: int,
) -> jax.Array:
    triton_call, kernels = _import()
    rows = x.shape[0] if row_index is None else row_index.shape[0]
    n, k = (w.shape[2], w.shape[1]) if transpose_w else w.shape[-2:]
    columns = tile.block_n // 2 if activation else tile.block_n
    row_tiles = rows // tile.block_m + min(w.shape[0], rows)  # the most that any sizes can give
    group_sizes = group_sizes.astype(jnp.int32)
    return triton_call(
        x,
        w,
        group_sizes,
        group_sizes if row_index is None else row_index.astype(jnp.int32),  # what is absent is not read
        w if bias is None else bias,
        w if x_scale is None else x_scale,
        w if w_scale is None else w_scale,
        kernel=kernels.matmul,
        name="grouped_gemm",
        out_shape=jax.ShapeDtypeStruct((rows, n), out_dtype),
        grid=(row_tiles * -(-n // columns),),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        compute_capability=capability,
        EXPERTS=w.shape[0],
        N=n,
        K=k,
        STRIDE_N=1 if transpose_w else k,
        STRIDE_K=n if transpose_w else 1,
        HAS_INDEX=row_index is not None,
        HAS_BIAS=bias is not None,
        **_activation(activation),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        BAND=_BAND,
        **_scale_strides(x_scale, w_scale, w),
    )


def _activation(activation: Activation | None) -> dict[str, Any]:
    """The activation as the kernel's compile-time constants."""
    if isinstance(activation, ClampedSwiGLU):
        return {"ACTIVATION": "clamped_swiglu", "ALPHA": float(activation.alpha), "LIMIT": float(activation.limit)}
    return {"ACTIVATION": activation or "", "ALPHA": 0.0, "LIMIT": 0.0}


def _scale_strides(x_scale: jax.Array | None, w_scale: jax.Array | None, w: jax.Array) -> dict[str, int]:
    """How scales lie, for the kernel: those of x's rows and groups; of w's matrices, their columns (or blocks) and blocks of k."""
    names = ("X_SCALE_ROW", "X_SCALE_K", "W_SCALE_MATRIX", "W_SCALE_COLUMN", "W_SCALE_K")
    if x_scale is None or w_scale is None:
        return dict.fromkeys(names, 0)
    match x_scale.shape:
        case ():
            of_x = (0, 0)
        case (_,):
            of_x = (1, 0)
        case (_, rows):
            of_x = (1, rows)
    match w_scale.shape[w.ndim - 2 :]:
        case ():
            of_w = (1, 0, 0)
        case (columns,):
            of_w = (columns, 1, 0)
        case (column_blocks, k_blocks):
            of_w = (column_blocks * k_blocks, k_blocks, 1)
    return dict(zip(names, of_x + of_w, strict=True))


@functools.partial(jax.jit, static_argnames=("out_dtype", "capability"))
def _outer(
    left: jax.Array, right: jax.Array, group_sizes: jax.Array, *, out_dtype: jnp.dtype, capability: int
) -> jax.Array:
    triton_call, kernels = _import()
    (experts,), n, k = group_sizes.shape, left.shape[1], right.shape[1]
    tile = outer_tile(left.dtype)
    return triton_call(
        left,
        right,
        group_sizes.astype(jnp.int32),
        kernel=kernels.outer,
        name="grouped_outer",
        out_shape=jax.ShapeDtypeStruct((experts, n, k), out_dtype),
        grid=(-(-n // tile.block_m) * -(-k // tile.block_n), experts),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        compute_capability=capability,
        EXPERTS=experts,
        N=n,
        K=k,
        BLOCK_N=tile.block_m,
        BLOCK_K=tile.block_n,
        BLOCK_ROWS=tile.block_k,
    )
