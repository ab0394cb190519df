"""Grouped GEMM: rows in groups, each group times its own expert's matrix.

    start = 0
    for e, size in enumerate(group_sizes):
        rows = start + arange(size)
        out[rows] = act(x[rows] @ w[e, 0].T) * (x[rows] @ w[e, 1].T)     # or x[rows] @ w[e].T without a gate
        start += size

`grouped_gemm` is the only public name. A backend is a module with `matmul`; one that cannot serve a call raises
NotImplementedError, and the next is asked. The gradient of the weights is an `outer`: Hopper's has a file of its own.
"""

from contextlib import suppress
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_epmoe.config import ACTIVATIONS, Activation, is_activation, require
from jax_epmoe.kernels.activations import gate
from jax_epmoe.kernels.grouped_gemm import hopper, hopper_outer, reference, triton
from jax_epmoe.kernels.grouped_gemm.quantized import quantized_gemm

# In order of preference.
BACKENDS = {"hopper": hopper, "triton": triton, "xla": reference}
OUTERS = {"hopper": hopper_outer, "triton": triton, "xla": reference}


def grouped_gemm(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    row_index: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
    x_scale: jax.Array | None = None,
    w_scale: jax.Array | None = None,
    quantize_out: str | None = None,
    out_scale: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    backend: str | None = None,
    expected_rows: int | None = None,
) -> Any:  # a jax.Array, or with quantize_out a QuantizedArray
    """Multiplies each group of rows by its own expert's weights, accumulating in float32; differentiable.

    Args:
      x: `[rows, k]`; or `[tokens, k]` with `row_index`, whose row r is then `x[row_index[r]]`.
      w: `[experts, n, k]`; or, with `activation`, `[experts, 2, n, k]`, gate first.
      group_sizes: `[experts]` int32: how many consecutive rows belong to each expert; their sum is at most `rows`.
        Rows past the sum are not read and cost no work; their output is unspecified.
      row_index: `[rows]` int32 or None.
      bias: `[experts, n]` (`[experts, 2, n]` with `activation`) added before the activation, or None.
      activation: None, "silu", "gelu" (exact), "gelu_pytorch_tanh", or a `ClampedSwiGLU` in the place of `act(gate) * up`.
      x_scale: of a float8_e4m3fn x, float32: `[]`, `[rows]` or `[ceil(k / 128), rows]`, with the rows of x (tokens, with `row_index`).
      w_scale: of a float8_e4m3fn w, float32: `[experts]`, `[experts, n]` or `[experts, ceil(n / 128), ceil(k / 128)]`; with
        `activation` a 2 after the experts. Operands have both scales, or neither (see `jax_epmoe.quant`).
      quantize_out: "tensor", "token" or "group": quantise the output so, from its float32 values.
      out_scale: `[experts]` float32: scales to quantise each expert's rows with, for "tensor"; None: from the values.
      out_dtype: default x's, or bfloat16 where x is quantised. Values are rounded once, at the end.
      backend: "hopper", "triton" or "xla"; None picks the fastest that supports the call on this device.
      expected_rows: about what `group_sizes` will add up to, where that is less than `rows`; it picks tile sizes, no more.

    Returns:
      `[rows, n]`: `act(x @ gate.T) * (x @ up.T)`, or `x @ w.T` without an activation; with `quantize_out` a `QuantizedArray`
      (with `out_scale`: one scale a row).

    Raises:
      ValueError: shapes or names that do not fit, with the argument's name.
      NotImplementedError: the backend that was asked for by name cannot serve the call.
    """
    require(backend is None or backend in BACKENDS, "backend", backend, f"None or one of {', '.join(BACKENDS)}")
    require(
        activation is None or is_activation(activation), "activation", activation, f"None, {', '.join(ACTIVATIONS)}"
    )
    gated = activation is not None
    expected = "[experts, 2, n, k]" if gated else "[experts, n, k]"
    require(w.ndim == 3 + gated and (not gated or w.shape[1] == 2), "w.shape", w.shape, expected)
    require(x.ndim == 2 and x.shape[1] == w.shape[-1], "x.shape", x.shape, f"[rows, {w.shape[-1]}], with the k of w")
    if out_dtype is None:
        out_dtype = x.dtype if x_scale is None else jnp.bfloat16
    out_dtype = jnp.dtype(out_dtype)
    for name, dtype in (("x.dtype", x.dtype), ("w.dtype", w.dtype), ("out_dtype", out_dtype)):
        require(jnp.issubdtype(dtype, jnp.floating), name, str(dtype), "a floating type")
    require(
        group_sizes.shape == w.shape[:1], "group_sizes.shape", group_sizes.shape, f"[{w.shape[0]}], the experts of w"
    )
    require(
        jnp.issubdtype(group_sizes.dtype, jnp.integer), "group_sizes.dtype", str(group_sizes.dtype), "an integer type"
    )
    if row_index is not None:
        require(row_index.ndim == 1, "row_index.shape", row_index.shape, "[rows]")
        require(
            jnp.issubdtype(row_index.dtype, jnp.integer), "row_index.dtype", str(row_index.dtype), "an integer type"
        )
    if bias is not None:
        require(bias.shape == w.shape[:-1], "bias.shape", bias.shape, f"{w.shape[:-1]}, as w's")
    rows = (x if row_index is None else row_index).shape[0]
    require(
        expected_rows is None or expected_rows >= 0,
        "expected_rows",
        expected_rows,
        "None or how many rows there will be",
    )
    expected_rows = rows if expected_rows is None else min(expected_rows, rows)
    if not (x_scale is w_scale is quantize_out is out_scale is None):
        return quantized_gemm(
            x, w, group_sizes, x_scale, w_scale, out_scale, row_index=row_index, bias=bias, activation=activation,
            quantize_out=quantize_out, out_dtype=out_dtype, backend=backend, expected_rows=expected_rows,
        )  # fmt: skip
    if rows == 0:
        return jnp.zeros((0, w.shape[-2]), out_dtype)
    return _grouped_gemm(x, w, group_sizes, row_index, bias, activation, out_dtype, backend, expected_rows)


def _matmul(backend: str | None, *args, **kwargs) -> jax.Array:
    """`matmul` of the named backend, or of the first that serves the call."""
    for module in (BACKENDS[backend],) if backend else BACKENDS.values():
        try:
            return module.matmul(*args, **kwargs)
        except NotImplementedError as error:
            refusal = error
    raise refusal


def _outer(backend: str | None, *args, **kwargs) -> jax.Array:
    """`outer` of the named backend, or of the first that serves the call; `reference.outer` where the named one cannot."""
    for module in (OUTERS[backend],) if backend else OUTERS.values():
        with suppress(NotImplementedError):
            return module.outer(*args, **kwargs)
    return reference.outer(*args, **kwargs)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _grouped_gemm(x, w, group_sizes, row_index, bias, activation, out_dtype, backend, expected_rows):
    return _matmul(
        backend,
        x,
        w,
        group_sizes,
        row_index=row_index,
        bias=bias,
        activation=activation,
        out_dtype=out_dtype,
        expected_rows=expected_rows,
    )


def _forward(x, w, group_sizes, row_index, bias, activation, out_dtype, backend, expected_rows):
    out = _grouped_gemm(x, w, group_sizes, row_index, bias, activation, out_dtype, backend, expected_rows)
    return out, (x, w, group_sizes, row_index, bias)


def _backward(activation, out_dtype, backend, expected_rows, saved, d_out):
    x, w, group_sizes, row_index, bias = saved
    experts, n, k = w.shape[0], w.shape[-2], w.shape[-1]
    in_a_group = (jnp.arange(d_out.shape[0]) < jnp.sum(group_sizes))[:, None]
    rows = x if row_index is None else x[row_index]
    d_product = d_out
    if activation is not None:
        # The product before the gate is computed again rather than kept: two wide rows a row of output.
        flat_w = w.reshape(experts, 2 * n, k)
        flat_bias = None if bias is None else bias.reshape(experts, 2 * n)
        product = _matmul(
            backend, rows, flat_w, group_sizes, bias=flat_bias, out_dtype=x.dtype, expected_rows=expected_rows
        )
        product = jnp.where(in_a_group, product, 0).reshape(-1, 2, n).astype(jnp.float32)
        (d_product,) = jax.vjp(partial(gate, activation), product)[1](d_out.astype(jnp.float32))
        d_product = d_product.reshape(-1, 2 * n)
        w_2d = flat_w
    else:
        w_2d = w
    d_product = jnp.where(in_a_group, d_product, 0).astype(x.dtype)
    d_rows = _matmul(
        backend, d_product, w_2d, group_sizes, transpose_w=True, out_dtype=x.dtype, expected_rows=expected_rows
    )
    d_rows = jnp.where(in_a_group, d_rows, 0)
    d_x = d_rows if row_index is None else jnp.zeros(x.shape, jnp.float32).at[row_index].add(d_rows)
    d_w = _outer(backend, d_product, rows, group_sizes, out_dtype=w.dtype)
    d_bias = None
    if bias is not None:
        ones = jnp.ones((rows.shape[0], 1), d_product.dtype)
        d_bias = reference.outer(d_product, ones, group_sizes, out_dtype=bias.dtype)
        d_bias = d_bias.reshape(bias.shape)
    return d_x.astype(x.dtype), d_w.reshape(w.shape), None, None, d_bias


_grouped_gemm.defvjp(_forward, _backward)
