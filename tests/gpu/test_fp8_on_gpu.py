"""The float8 grouped GEMM on a Hopper GPU, against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu.test_grouped_gemm_on_gpu import load_sizes
from kernels.float8_cases import KINDS

from jax_epmoe.config import ClampedSwiGLU
from jax_epmoe.kernels import device, quantize_hopper
from jax_epmoe.kernels.grouped_gemm import hopper_fp8, hopper_fp8_large, reference
from jax_epmoe.quant import FP8, dequantize, quantize

pytestmark = pytest.mark.skipif(not device.on_hopper(), reason="needs a Hopper GPU")


def make_case(kinds, rows, experts, k, n, gated, load):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (rows, k)) * jnp.exp(jax.random.normal(keys[1], (rows, 1)))
    w = jax.random.normal(keys[2], (experts, 2, n, k) if gated else (experts, n, k)) * k**-0.5
    x, w = (jax.jit(quantize, static_argnums=1)(a, kind) for a, kind in zip((x, w), kinds, strict=True))
    return x, w, load_sizes(load, rows, experts)


@pytest.mark.parametrize("load", ["uneven", "one", "half"])
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize(
    ("rows", "experts", "k", "n", "gated"),
    [
        (2048, 16, 1024, 768, True),
        (2048, 16, 1536, 1280, False),
        (64, 16, 1024, 512, True),
        (96, 32, 416, 136, False),
        (64, 1, 7168, 576, False),
        (48, 1, 2048, 512, True),
        (256, 1, 4096, 1536, False),
    ],
)
def test_it_is_the_definition_in_every_format(kinds, rows, experts, k, n, gated, load):
    x, w, sizes = make_case(kinds, rows, experts, k, n, gated, load)
    scales = {"x_scale": x.scales, "w_scale": w.scales, "activation": "silu" if gated else None}
    jnp.full((rows, n), jnp.nan, jnp.bfloat16).block_until_ready().delete()  # memory that the output may get
    valid = int(sizes.sum())
    for out_dtype, tolerance in ((jnp.bfloat16, 5e-3), (jnp.float32, 1e-3)):  # tensor cores add with fewer than 24 bits
        run = jax.jit(lambda x, w, s, d=out_dtype: hopper_fp8.quantized_matmul(x, w, s, out_dtype=d, **scales))
        out, again = (run(x.values, w.values, sizes)[:valid] for _ in range(2))
        expected = reference.quantized_matmul(x.values, w.values, sizes, out_dtype=jnp.float32, **scales)[:valid]
        assert jnp.linalg.norm(out.astype(jnp.float32) - expected) < tolerance * jnp.linalg.norm(expected)
        assert bool(jnp.all(out == again)), "the same input gave other bits"


@pytest.mark.parametrize("load", ["uneven", "one", "half"])
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize(("k", "n", "gated"), [(1056, 904, False), (1024, 712, True)])
@pytest.mark.parametrize("rows_per_expert", [512, 8192])
def test_large_groups_are_the_definition_in_every_format(rows_per_expert, kinds, k, n, gated, load):
    rows, experts = 4096, 8
    x, w, sizes = make_case(kinds, rows, experts, k, n, gated, load)
    bias = jax.random.normal(jax.random.key(3), w.shape[:-1], jnp.bfloat16)
    options = {"x_scale": x.scales, "w_scale": w.scales, "activation": "silu" if gated else None, "bias": bias}
    tiling = hopper_fp8_large.large_tiling(rows_per_expert=rows_per_expert, gated=gated)
    jnp.full((rows, n), jnp.nan, jnp.bfloat16).block_until_ready().delete()  # memory that the output may get
    valid = int(sizes.sum())
    for out_dtype, tolerance in ((jnp.bfloat16, 5e-3), (jnp.float32, 1e-3)):
        out = hopper_fp8.quantized_matmul(x.values, w.values, sizes, out_dtype=out_dtype, tiling=tiling, **options)[
            :valid
        ]
        expected = reference.quantized_matmul(x.values, w.values, sizes, out_dtype=jnp.float32, **options)[:valid]
        assert jnp.linalg.norm(out.astype(jnp.float32) - expected) < tolerance * jnp.linalg.norm(expected)


@pytest.mark.parametrize("activation", [None, ClampedSwiGLU()], ids=["", "clamped_swiglu"])
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS.keys())
def test_biases_are_added_at_gpt_oss_s_sizes(kinds, activation):
    x, w, sizes = make_case(kinds, 512, 8, 2880, 2880, activation is not None, "uneven")
    bias = jax.random.normal(jax.random.key(3), w.shape[:-1], jnp.bfloat16)
    options = {"x_scale": x.scales, "w_scale": w.scales, "activation": activation, "bias": bias}
    out = hopper_fp8.quantized_matmul(x.values, w.values, sizes, out_dtype=jnp.bfloat16, **options)
    expected = reference.quantized_matmul(x.values, w.values, sizes, out_dtype=jnp.float32, **options)
    valid = int(sizes.sum())
    error = jnp.linalg.norm(out[:valid].astype(jnp.float32) - expected[:valid])
    assert error < 5e-3 * jnp.linalg.norm(expected[:valid])


def test_a_long_sum_is_not_truncated():
    """All products positive: what tensor cores lose, they lose downwards."""
    x, w, sizes = make_case(KINDS["tensor"], 256, 2, 4096, 256, False, "uneven")
    x, w = (quantize(jnp.abs(dequantize(a)), "tensor") for a in (x, w))
    scales = {"x_scale": x.scales, "w_scale": w.scales, "out_dtype": jnp.float32}
    out = hopper_fp8.quantized_matmul(x.values, w.values, sizes, **scales)
    expected = reference.quantized_matmul(x.values, w.values, sizes, **scales)
    assert abs(float(jnp.sum(out) / jnp.sum(expected)) - 1) < 3e-3


@pytest.mark.parametrize("rows_per_expert", [8, 32, 300, 512])
@pytest.mark.parametrize("load", ["uneven", "one", "half"])
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS.keys())
def test_what_is_gated_is_quantised_where_it_was_summed(kinds, load, rows_per_expert):
    x, w, sizes = make_case(kinds, 4096, 8, 1056, 896, True, load)
    bias = jax.random.normal(jax.random.key(3), w.shape[:-1], jnp.bfloat16)
    options = {"x_scale": x.scales, "w_scale": w.scales, "activation": "silu", "quantize_out": "group", "bias": bias}
    options["out_dtype"] = jnp.bfloat16
    tiling = hopper_fp8.choose_tiling(rows=8 * rows_per_expert, experts=8, n=896, gated=True, out_dtype=jnp.dtype(FP8))
    jnp.full((4096, 896), jnp.nan, FP8).block_until_ready().delete()  # memory that the output may get
    got, again = (hopper_fp8.quantized_matmul(x.values, w.values, sizes, tiling=tiling, **options) for _ in range(2))
    expected = reference.quantized_matmul(x.values, w.values, sizes, **options)
    valid = int(sizes.sum())
    np.testing.assert_allclose(got.scales[:, :valid], expected.scales[:, :valid], rtol=5e-3)
    assert np.mean(np.asarray(got.values[:valid]) != np.asarray(expected.values[:valid])) < 2e-2
    assert bool(jnp.all(got.values[:valid] == again.values[:valid])), "the same input gave other bits"
    assert bool(jnp.all(got.scales[:, :valid] == again.scales[:, :valid])), "the same input gave other bits"


@pytest.mark.parametrize("load", ["uneven", "half"])
@pytest.mark.parametrize(
    ("granularity", "static"), [("group", False), ("token", False), ("tensor", False), ("tensor", True)]
)
@pytest.mark.parametrize(("rows", "n"), [(1024, 768), (8192, 768), (1024, 200)])  # 200: by XLA
def test_the_second_products_input_is_quantised_from_float32(rows, n, granularity, static, load):
    x, w, sizes = make_case(KINDS["channel"], rows, 8, 1024, n, True, load)
    out_scale = jnp.linspace(0.002, 0.02, 8) if static else None  # with the first, some values are out of range
    options = {"x_scale": x.scales, "w_scale": w.scales, "activation": "silu", "quantize_out": granularity}
    options |= {"out_scale": out_scale, "out_dtype": jnp.bfloat16}
    jnp.full((rows, n), jnp.nan, jnp.float32).block_until_ready().delete()  # memory that the output may get
    got, again = (hopper_fp8.quantized_matmul(x.values, w.values, sizes, **options) for _ in range(2))
    expected = reference.quantized_matmul(x.values, w.values, sizes, **options)
    valid = int(sizes.sum())
    assert got.granularity == expected.granularity
    of_rows = (...,) if got.scales.ndim == 0 else (..., slice(valid))
    np.testing.assert_allclose(got.scales[of_rows], expected.scales[of_rows], rtol=5e-3)
    assert np.mean(np.asarray(got.values[:valid]) != np.asarray(expected.values[:valid])) < 2e-2
    assert bool(jnp.all(got.values[:valid] == again.values[:valid])), "the same input gave other bits"


def made_up_rows(total, n, dtype):
    keys = jax.random.split(jax.random.key(0), 2)
    rows = jax.random.normal(keys[0], (total, n)) * jnp.exp(4 * jax.random.normal(keys[1], (total, 1)))
    return rows.astype(dtype).at[1].set(0)


def differing(got, expected):
    """How many numbers have other bits."""
    as_integers = (
        jax.lax.bitcast_convert_type(a, jnp.uint8 if a.dtype == FP8 else jnp.uint32) for a in (got, expected)
    )
    return int(jnp.sum(jnp.not_equal(*as_integers)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    ("total", "num_rows", "n"),
    [(8192, 8192, 5120), (2048, 2045, 7168), (1024, 1000, 16384), (49152, 6144, 1536), (67, 64, 1408), (4, 3, 128)],
)
def test_rows_are_quantised_bit_for_bit(total, num_rows, n, dtype):
    rows = made_up_rows(total, n, dtype).at[num_rows:].set(jnp.nan)
    by_xla = jax.jit(quantize, static_argnums=1)
    runs = {"group": quantize_hopper.quantize_groups, "token": quantize_hopper.quantize_tokens}
    for granularity, run in runs.items():
        got, expected = run(rows, jnp.int32(num_rows)), by_xla(rows, granularity)
        assert differing(got.scales[..., :num_rows], expected.scales[..., :num_rows]) == 0
        assert differing(got.values[:num_rows], expected.values[:num_rows]) == 0
    given = expected.scales * jnp.exp(jax.random.normal(jax.random.key(1), (total,)))  # half put values out of range
    by_given = quantize_hopper.quantize_by(rows, jnp.int32(num_rows), given)
    assert differing(by_given[:num_rows], by_xla(rows, "token", given).values[:num_rows]) == 0
    largest = quantize_hopper.largest_of_rows(rows, jnp.int32(num_rows))[:num_rows]
    assert bool(jnp.all(largest == jnp.max(jnp.abs(rows.astype(jnp.float32)), axis=1)[:num_rows]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("granularity", ["group", "token", "tensor"])
@pytest.mark.parametrize(
    ("tokens", "rows", "num_rows", "n"),
    [(8192, 49152, 6144, 5120), (300, 2048, 2045, 7168), (64, 512, 512, 2048), (9, 100, 37, 16384), (5, 8, 0, 512)],
)
def test_gathered_rows_are_quantised_bit_for_bit(tokens, rows, num_rows, n, granularity, dtype):
    x, index = made_up_rows(tokens, n, dtype), jax.random.randint(jax.random.key(2), (rows,), 0, tokens)
    scale = jnp.float32(0.01) if granularity == "tensor" else None  # which puts some out of range
    got = quantize_hopper.gather(x, index, jnp.int32(num_rows), scale, granularity=granularity)
    expected = jax.jit(quantize, static_argnums=1)(x[index], granularity, scale)
    if scale is None:
        assert differing(got.scales[..., :num_rows], expected.scales[..., :num_rows]) == 0
    assert differing(got.values[:num_rows], expected.values[:num_rows]) == 0
