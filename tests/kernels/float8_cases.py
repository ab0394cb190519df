"""Float8 operands for the tests of kernels: rows, experts and halves have sizes of their own, so that a scale used elsewhere shows."""

import jax.numpy as jnp
import numpy as np

from jax_epmoe.quant import quantize

# Of x, and of w.
KINDS = {"block": ("group", "block"), "channel": ("token", "channel"), "tensor": ("tensor", "tensor")}


def make_inputs(kinds=KINDS["block"], gated=False, sizes=(37, 0, 70, 5), rows=128, k=288, n=136, gather=None, **_):
    rng = np.random.default_rng(0)
    shape = (len(sizes), 2, n, k) if gated else (len(sizes), n, k)
    x = rng.normal(size=(gather or rows, k)) * np.exp(rng.normal(size=(gather or rows, 1)))
    w = rng.normal(size=shape) * np.exp(rng.normal(size=shape[: len(shape) - 2]))[..., None, None] / np.sqrt(k)
    x, w = (quantize(jnp.asarray(a, jnp.float32), kind) for a, kind in zip((x, w), kinds, strict=True))
    index = jnp.asarray(rng.integers(0, gather, rows), jnp.int32) if gather else None
    return x, w, jnp.array(sizes, jnp.int32), index


def run(matmul, x, w, sizes, **options):
    return matmul(x.values, w.values, sizes, x_scale=x.scales, w_scale=w.scales, **options)
