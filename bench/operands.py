"""What operands of our products stand for, whether they are bfloat16 or quantised: what results are checked against."""

from typing import Any

import jax
import jax.numpy as jnp

from jax_epmoe.quant import QuantizedArray, dequantize


def rows_of(x: jax.Array | QuantizedArray, index: jax.Array) -> jax.Array:
    """Rows of `x [rows, k]`, in float32."""
    if isinstance(x, QuantizedArray):
        scales = x.scales if x.granularity == "tensor" else x.scales[..., index]
        return dequantize(QuantizedArray(x.values[index], scales, x.granularity))
    return x[index].astype(jnp.float32)


def matrix_of(w: jax.Array | QuantizedArray, index: Any) -> jax.Array:
    """One of the matrices of `w [..., n, k]`, in float32."""
    if isinstance(w, QuantizedArray):
        return dequantize(QuantizedArray(w.values[index], w.scales[index], w.granularity))
    return w[index].astype(jnp.float32)
