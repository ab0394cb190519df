"""The grouped GEMM of quantised operands: what its arguments may be, who serves it, and that it has no gradient."""

from functools import partial
from typing import NoReturn, cast

import jax
import jax.numpy as jnp

from jax_epmoe.config import Activation, require
from jax_epmoe.kernels.grouped_gemm import hopper_fp8, reference, triton
from jax_epmoe.quant import FP8, Granularity, QuantizedArray, quantize, scale_shape

# In order of preference; a backend is a module with `quantized_matmul`.
BACKENDS = {"hopper": hopper_fp8, "triton": triton, "xla": reference}
OUTPUTS = ("tensor", "token", "group")


def quantized_gemm(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    x_scale: jax.Array | None,
    w_scale: jax.Array | None,
    out_scale: jax.Array | None,
    *,
    row_index: jax.Array | None,
    bias: jax.Array | None,
    activation: Activation | None,
    quantize_out: str | None,
    out_dtype: jnp.dtype,
    backend: str | None,
    expected_rows: int,
) -> jax.Array | QuantizedArray:
    """`grouped_gemm` with scales; its other arguments have been checked."""
    for name, scale, operand in (("x", x_scale, x), ("w", w_scale, w)):
        require(scale is not None, f"{name}_scale", scale, "given: quantised operands come in pairs")
        assert scale is not None
        require(operand.dtype == FP8, f"{name}.dtype", str(operand.dtype), f"{FP8}, as it has a scale")
        kinds = reference.X_KINDS if name == "x" else reference.W_KINDS
        shapes = [scale_shape(operand.shape, kind) for kind in kinds]
        require(scale.shape in shapes, f"{name}_scale.shape", scale.shape, f"one of {', '.join(map(str, shapes))}")
        require(scale.dtype == jnp.float32, f"{name}_scale.dtype", str(scale.dtype), "float32")
    require(
        quantize_out is None or quantize_out in OUTPUTS, "quantize_out", quantize_out, f"None, {', '.join(OUTPUTS)}"
    )
    if out_scale is not None:
        require(quantize_out == "tensor", "quantize_out", quantize_out, "tensor, as out_scale is given")
        require(out_scale.shape == w.shape[:1], "out_scale.shape", out_scale.shape, f"{w.shape[:1]}, the experts of w")
    if (x if row_index is None else row_index).shape[0] == 0:
        nothing = jnp.zeros((0, w.shape[-2]), out_dtype)
        return nothing if quantize_out is None else quantize(nothing, cast(Granularity, quantize_out))
    scales = (x_scale, w_scale, out_scale)
    return _multiply(
        x, w, group_sizes, scales, row_index, bias, activation, quantize_out, out_dtype, backend, expected_rows
    )


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9, 10))
def _multiply(x, w, group_sizes, scales, row_index, bias, activation, quantize_out, out_dtype, backend, expected_rows):
    x_scale, w_scale, out_scale = scales
    for module in (BACKENDS[backend],) if backend else BACKENDS.values():
        try:
            return module.quantized_matmul(
                x,
                w,
                group_sizes,
                row_index=row_index,
                bias=bias,
                activation=activation,
                x_scale=x_scale,
                w_scale=w_scale,
                quantize_out=quantize_out,
                out_scale=out_scale,
                out_dtype=out_dtype,
                expected_rows=expected_rows,
            )
        except NotImplementedError as error:
            refusal = error
    raise refusal


def refuse_gradient(*args) -> NoReturn:
    """The forward and the backward rule of what has no gradient."""
    raise ValueError("quantised weights have no gradient; train the weights that they were quantised from")


_multiply.defvjp(refuse_gradient, refuse_gradient)
