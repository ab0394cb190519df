"""The definition of the grouped products, in plain XLA: runs anywhere, and every other backend is tested against it.

It walks over blocks of rows that share an expert, as many as `group_sizes` makes, so its work and
its memory follow the rows that there are: no `[experts, rows, k]` array, no copy of the weights.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_epmoe.config import Activation
from jax_epmoe.kernels.activations import gate
from jax_epmoe.quant import Granularity, QuantizedArray, dequantize, quantize

# What scales are of, by their number of dimensions: of x's, and how many fewer than w's.
X_KINDS: tuple[Granularity, ...] = ("tensor", "token", "group")
W_KINDS: tuple[Granularity, ...] = ("block", "channel", "tensor")


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
    x_scale: jax.Array | None = None,
    w_scale: jax.Array | None = None,
) -> jax.Array:
    """`out[r] = act(x[r] @ w[e, 0].T) * (x[r] @ w[e, 1].T)` or `x[r] @ w[e].T`, e the expert of row r -> `[rows, n]`.

    Shapes are those of `grouped_gemm`. With `transpose_w`, `w [experts, k, n]` and no activation: `x[r] @ w[e]`.
    Rows past `sum(group_sizes)` come out as zeros. Quantised operands, those with scales, are dequantised to float32 first.
    """
    rows = x.shape[0] if row_index is None else row_index.shape[0]
    n = w.shape[-1] if transpose_w else w.shape[-2]
    block_rows = _block_rows(rows if expected_rows is None else expected_rows, w.shape[0])

    def step(expert: jax.Array, row: jax.Array, out: jax.Array) -> jax.Array:
        source = row if row_index is None else row_index.at[row].get(mode="fill", fill_value=x.shape[0])
        block = x.at[source].get(mode="fill", fill_value=0)  # [block_rows, k]
        weights = w[expert]
        if x_scale is not None and w_scale is not None:
            block = dequantize(QuantizedArray(block, _scales_of_rows(x_scale, source), X_KINDS[x_scale.ndim]))
            weights = dequantize(QuantizedArray(weights, w_scale[expert], W_KINDS[w.ndim - w_scale.ndim]))
        product = _dot(block, weights, contract=(1, weights.ndim - 1 if not transpose_w else 0))  # [block_rows, (2,) n]
        if bias is not None:
            product += bias[expert].astype(jnp.float32)
        if activation is not None:
            product = gate(activation, product)
        return out.at[row].set(product.astype(out_dtype), mode="drop")

    return _for_each_block(step, jnp.zeros((rows, n), out_dtype), group_sizes, rows, block_rows)


def quantized_matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    quantize_out: Granularity | None = None,
    out_scale: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike,
    **kwargs: Any,
) -> jax.Array | QuantizedArray:
    """`matmul` of operands with scales; with `quantize_out`, its float32 output is quantised and never rounded otherwise."""
    if quantize_out is None:
        return matmul(x, w, group_sizes, out_dtype=out_dtype, **kwargs)
    out = matmul(x, w, group_sizes, out_dtype=jnp.float32, **kwargs)
    return quantize_rows(out, group_sizes, quantize_out, out_scale)


def quantize_rows(
    out: jax.Array, group_sizes: jax.Array, granularity: Granularity, out_scale: jax.Array | None
) -> QuantizedArray:
    """`out [rows, n]` float32 quantised; by `out_scale [experts]`, each expert's rows by its own, or else by its values.

    Rows past the groups may hold anything: no row's scale depends on them.
    """
    if granularity == "tensor" and out_scale is None:
        out = jnp.where(jnp.arange(out.shape[0])[:, None] < jnp.sum(group_sizes), out, 0)
    if out_scale is None:
        return quantize(out, granularity)
    return quantize(out, "token", jnp.repeat(out_scale, group_sizes, total_repeat_length=out.shape[0]))


def _scales_of_rows(x_scale: jax.Array, row: jax.Array) -> jax.Array:
    """The scales of `x[row]`: rows are the last dimension, if there is one."""
    return x_scale if x_scale.ndim == 0 else x_scale.at[..., row].get(mode="fill", fill_value=0)


def outer(left: jax.Array, right: jax.Array, group_sizes: jax.Array, *, out_dtype: jax.typing.DTypeLike) -> jax.Array:
    """`out[e] = left[rows of e].T @ right[rows of e]`, for `left [rows, n]`, `right [rows, k]` -> `[experts, n, k]`."""
    rows, experts = left.shape[0], group_sizes.shape[0]

    def step(expert: jax.Array, row: jax.Array, out: jax.Array) -> jax.Array:
        block_left = left.at[row].get(mode="fill", fill_value=0)
        block_right = right.at[row].get(mode="fill", fill_value=0)
        return out.at[expert].add(_dot(block_left, block_right, contract=(0, 0)))

    out = jnp.zeros((experts, left.shape[1], right.shape[1]), jnp.float32)
    return _for_each_block(step, out, group_sizes, rows, _block_rows(rows, experts)).astype(out_dtype)


def _block_rows(rows: int, experts: int) -> int:
    """Blocks about half as tall as an expert has rows on average: a power of two from 8 to 512."""
    return min(512, max(8, 1 << (rows // experts // 2).bit_length()))


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """A product in float32 arithmetic (no tf32), whatever the operands' dtype."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _for_each_block(
    step: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    out: jax.Array,
    group_sizes: jax.Array,
    rows: int,
    block_rows: int,
) -> jax.Array:
    """Runs `out = step(expert, row_ids, out)` over all blocks; a block's ids past its group are `rows`: out of range.

    Example: group_sizes (3, 0, 10) in blocks of 8 give expert 0 with rows 0-2, expert 2 with rows 3-10 and 11-12.
    """
    group_ends = jnp.cumsum(group_sizes)
    blocks_per_group = (group_sizes + block_rows - 1) // block_rows
    block_ends = jnp.cumsum(blocks_per_group)

    def body(block: jax.Array, out: jax.Array) -> jax.Array:
        expert = jnp.sum(block_ends <= block)  # not searchsorted: its own loop costs more than the product on a GPU
        block_in_group = block - (block_ends[expert] - blocks_per_group[expert])
        first = group_ends[expert] - group_sizes[expert] + block_in_group * block_rows
        row = first + jnp.arange(block_rows)
        return step(expert, jnp.where(row < group_ends[expert], row, rows), out)

    return jax.lax.fori_loop(0, block_ends[-1], body, out)
