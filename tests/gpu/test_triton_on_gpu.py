"""The Triton backend on any NVIDIA GPU since Ampere: the suite that every backend passes, the tiles that are chosen at real sizes,
more than 2**31 elements, gradients; the same bits on every run."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu.test_fp8_on_gpu import make_case as make_float8_case
from gpu.test_grouped_gemm_on_gpu import make_case, poison_past_the_sum, sampled_error
from kernels.float8_cases import KINDS
from kernels.grouped_gemm_suite import GroupedGemmSuite

from jax_epmoe import grouped_gemm
from jax_epmoe.kernels.grouped_gemm import reference, triton
from jax_epmoe.quant import dequantize, quantize

installed = all(map(importlib.util.find_spec, ("triton", "jax_triton")))
pytestmark = pytest.mark.skipif(
    triton.compute_capability() < 80 or not installed,
    reason="needs an NVIDIA GPU of compute capability 8.0 or newer, triton and jax-triton",
)


class TestTriton(GroupedGemmSuite):
    backend = "triton"


@partial(jax.jit, static_argnames="activation", donate_argnames="memory", keep_unused=True)
def multiply(x, w, sizes, index, memory, activation):
    """Into the donated `memory`."""
    return grouped_gemm(x, w, sizes, row_index=index, activation=activation, backend="triton")


@pytest.mark.parametrize("gather", [False, True], ids=["rows", "gather"])
@pytest.mark.parametrize("load", ["uneven", "one", "half"])
@pytest.mark.parametrize(
    ("rows", "experts", "k", "n", "gated"),
    [
        (6144, 20, 5120, 1536, True),
        (6152, 20, 1536, 5120, False),
        (8192, 16, 192, 5120, False),
        (49152, 160, 192, 384, False),
        (512, 64, 2048, 1024, True),
        (192, 20, 5120, 1536, True),
        (768, 20, 1536, 5120, False),
        (8, 64, 1024, 2048, False),
    ],
)
def test_chosen_tiles_are_right_at_real_sizes_under_skewed_loads(rows, experts, k, n, gated, load, gather):
    x, w, sizes = make_case(rows, experts, k, n, gated, load)
    index = jax.random.permutation(jax.random.key(3), rows).astype(jnp.int32) if gather else None
    activation = "silu" if gated else None
    out, again = (
        multiply(x, w, sizes, index, jnp.full((rows, n), jnp.nan, x.dtype), activation=activation) for _ in range(2)
    )
    assert sampled_error(out, x[index] if gather else x, w, sizes, gated) < 5e-3
    valid = int(sizes.sum())
    assert bool(jnp.all(out[:valid] == again[:valid])), "the same input gave other bits"
    assert bool(jnp.all(jnp.isnan(out[valid:]))), "rows of no group were written"


@pytest.mark.parametrize(
    ("rows", "experts", "k", "n"),
    [(2**20 + 4096, 8, 2048, 64), (2**20 + 4096, 8, 64, 2112), (1024, 130, 4096, 4096)],
    ids=["x", "out", "w"],
)
def test_more_than_two_to_the_31_elements(rows, experts, k, n):
    x, w, sizes = make_case(rows, experts, k, n, gated=False, load="even")
    assert max(rows * k, rows * n, w.size) > 2**31
    out = jax.jit(lambda x, w, s: grouped_gemm(x, w, s, backend="triton"))(x, w, sizes)
    assert sampled_error(out, x, w, sizes, gated=False) < 5e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_both_gradients_of_a_gate_at_a_real_size(dtype):
    x, w, sizes = make_case(1536, 20, 1280, 640, gated=True, load="half")
    d_out = jax.random.normal(jax.random.key(2), (1536, 640), x.dtype)
    x, d_out, w = (
        poison_past_the_sum(x, sizes).astype(dtype),
        poison_past_the_sum(d_out, sizes).astype(dtype),
        w.astype(dtype),
    )

    @partial(jax.jit, static_argnames="backend")
    def gradients(x, w, sizes, d_out, backend):
        return jax.vjp(lambda x, w: grouped_gemm(x, w, sizes, activation="silu", backend=backend), x, w)[1](d_out)

    program = gradients.lower(x, w, sizes, d_out, "triton").as_text()
    assert "stablehlo.while" not in program, "some product was left to the definition in XLA"
    limit = {"bfloat16": 5e-3, "float32": 5e-6}[dtype]
    for got, expected in zip(
        gradients(x, w, sizes, d_out, "triton"), gradients(x, w, sizes, d_out, "xla"), strict=True
    ):
        got, expected = (np.asarray(gradient, np.float64) for gradient in (got, expected))
        assert np.linalg.norm(got - expected) < limit * np.linalg.norm(expected)


@pytest.mark.skipif(
    triton.compute_capability() < 89, reason="needs float8 tensor cores: compute capability 8.9 or newer"
)
@pytest.mark.parametrize("load", ["uneven", "one", "half"])
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize(
    ("rows", "experts", "k", "n", "gated"),
    [
        (6144, 20, 5120, 1536, True),
        (2048, 16, 1536, 1280, False),
        (192, 20, 5120, 512, True),
        (96, 32, 400, 136, False),
    ],
)
def test_float8_is_the_definition_in_every_format(kinds, rows, experts, k, n, gated, load):
    x, w, sizes = make_float8_case(kinds, rows, experts, k, n, gated, load)
    index = jax.random.permutation(jax.random.key(3), rows).astype(jnp.int32)
    options = {"row_index": index, "activation": "silu" if gated else None}
    options |= {"x_scale": x.scales, "w_scale": w.scales}
    jnp.full((rows, n), jnp.nan, jnp.bfloat16).block_until_ready().delete()  # memory that the output may get
    valid = int(sizes.sum())
    expected = reference.quantized_matmul(x.values, w.values, sizes, out_dtype=jnp.float32, **options)[:valid]
    for out_dtype, tolerance in ((jnp.bfloat16, 5e-3), (jnp.float32, 1e-3)):  # tensor cores add with fewer than 24 bits
        multiply = jax.jit(lambda x, w, s, d=out_dtype: grouped_gemm(x, w, s, out_dtype=d, backend="triton", **options))
        out, again = (multiply(x.values, w.values, sizes)[:valid] for _ in range(2))
        assert jnp.linalg.norm(out.astype(jnp.float32) - expected) < tolerance * jnp.linalg.norm(expected)
        assert bool(jnp.all(out == again)), "the same input gave other bits"


@pytest.mark.skipif(
    triton.compute_capability() < 89, reason="needs float8 tensor cores: compute capability 8.9 or newer"
)
def test_a_long_sum_of_float8_is_not_truncated():
    """All products positive: what tensor cores lose, they lose downwards."""
    x, w, sizes = make_float8_case(KINDS["tensor"], 256, 2, 4096, 256, False, "uneven")
    x, w = (quantize(jnp.abs(dequantize(a)), "tensor") for a in (x, w))
    options = {"x_scale": x.scales, "w_scale": w.scales, "out_dtype": jnp.float32}
    out = grouped_gemm(x.values, w.values, sizes, backend="triton", **options)
    expected = reference.quantized_matmul(x.values, w.values, sizes, **options)
    valid = int(sizes.sum())
    assert abs(float(jnp.sum(out[:valid]) / jnp.sum(expected[:valid])) - 1) < 2e-3
