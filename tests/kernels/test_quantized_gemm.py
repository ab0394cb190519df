"""The grouped GEMM of quantised operands: each format is its definition, in NumPy and float64, and has no gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_epmoe import grouped_gemm
from jax_epmoe.kernels.grouped_gemm.reference import quantize_rows
from jax_epmoe.quant import QuantizedArray, dequantize, quantize, scale_shape

TOKENS, EXPERTS, N, K = 21, 4, 200, 300  # neither is a multiple of 128
SIZES = np.array([13, 0, 9, 5], np.int32)
ROWS = 32  # five past the last
FORMATS = {  # of weights, and of activations
    "block": ("block", "group"),
    "channel": ("channel", "token"),
    "tensor": ("tensor", "tensor"),
}
each_format = pytest.mark.parametrize("name", FORMATS)
fast_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def operands(name: str, gated: bool, seed: int = 0) -> tuple[QuantizedArray, QuantizedArray, jax.Array]:
    """x, w and row_index; rows, experts and halves have sizes of their own, so that a scale used elsewhere shows."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(TOKENS, K)) * np.exp(rng.normal(size=(TOKENS, 1)))
    w = rng.normal(size=(EXPERTS, 2, N, K)) * np.exp(2 * rng.normal(size=(EXPERTS, 2, 1, 1))) / np.sqrt(K)
    w = w if gated else w[:, 0]
    w_kind, x_kind = FORMATS[name]
    x, w = (jnp.asarray(array, jnp.float32) for array in (x, w))
    return quantize(x, x_kind), quantize(w, w_kind), jnp.asarray(rng.integers(0, TOKENS, ROWS), jnp.int32)


@partial(fast_jit, static_argnames=("activation", "quantize_out", "out_dtype", "backend"))
def run(x: QuantizedArray, w: QuantizedArray, row_index=None, **kwargs):
    return grouped_gemm(
        x.values, w.values, jnp.asarray(SIZES), row_index=row_index, x_scale=x.scales, w_scale=w.scales, **kwargs
    )


def by_hand(x: QuantizedArray, w: QuantizedArray, row_index: np.ndarray, activation: str | None) -> np.ndarray:
    expert = np.repeat(np.arange(EXPERTS), SIZES)
    rows = np.asarray(dequantize(x), np.float64)[np.asarray(row_index)[: len(expert)]]
    products = np.einsum("rk,r...nk->r...n", rows, np.asarray(dequantize(w), np.float64)[expert])
    if activation is None:
        return products
    gate, up = products[:, 0], products[:, 1]
    return gate / (1 + np.exp(-gate)) * up


def relative_error(out, ref) -> float:
    out, ref = np.asarray(out, np.float64)[: SIZES.sum()], np.asarray(ref, np.float64)
    return float(np.linalg.norm(out - ref) / np.linalg.norm(ref))


@each_format
@pytest.mark.parametrize("activation", [None, "silu"])
def test_each_format_is_its_definition(name, activation):
    x, w, row_index = operands(name, activation is not None)
    out = run(x, w, row_index, activation=activation, out_dtype=jnp.float32)
    assert out.shape == (ROWS, N)
    error = relative_error(out, by_hand(x, w, row_index, activation))
    assert error < 2e-6, error


@each_format
def test_rows_in_expert_order_need_no_index(name):
    x, w, _ = operands(name, False)
    out = run(x, w, out_dtype=jnp.float32)
    size = np.array([13, 0, 8, 0])  # as many rows as there are tokens
    expert = np.repeat(np.arange(EXPERTS), size)
    ref = np.einsum("rk,rnk->rn", np.asarray(dequantize(x)), np.asarray(dequantize(w))[expert])
    np.testing.assert_allclose(out[:TOKENS], ref, rtol=1e-4, atol=1e-4 * np.abs(ref).max())


def test_the_output_is_bfloat16_unless_asked_and_has_a_bias():
    x, w, row_index = operands("tensor", False)
    bias = jnp.asarray(np.random.default_rng(1).normal(size=(EXPERTS, N)), jnp.float32)
    out = run(x, w, row_index, bias=bias)
    assert out.dtype == jnp.bfloat16
    ref = by_hand(x, w, row_index, None) + np.repeat(np.asarray(bias), SIZES, axis=0)
    assert relative_error(out, ref) < 4e-3


@pytest.mark.parametrize("quantize_out", ["tensor", "token", "group"])
def test_the_output_is_quantised_from_its_float32_values(quantize_out):
    x, w, row_index = operands("block", True)
    exact = run(x, w, row_index, activation="silu", out_dtype=jnp.float32)
    out = run(x, w, row_index, activation="silu", quantize_out=quantize_out, out_dtype=jnp.bfloat16)
    want = quantize(exact, quantize_out)
    assert out.granularity == quantize_out
    assert out.scales.shape == scale_shape((ROWS, N), quantize_out)
    np.testing.assert_array_equal(out.scales, want.scales)
    np.testing.assert_array_equal(out.values.view(jnp.uint8), want.values.view(jnp.uint8))


def test_static_output_scales_are_each_expert_s_own():
    x, w, row_index = operands("tensor", True)
    exact = run(x, w, row_index, activation="silu", out_dtype=jnp.float32)
    out_scale = jnp.asarray([0.5, 7.0, 0.03, 0.25], jnp.float32)
    out = run(x, w, row_index, activation="silu", quantize_out="tensor", out_scale=out_scale)
    of_row = np.repeat(np.asarray(out_scale), SIZES)
    np.testing.assert_array_equal(out.scales[: SIZES.sum()], of_row)
    want = quantize(exact[: SIZES.sum()], "token", jnp.asarray(of_row))
    np.testing.assert_array_equal(out.values[: SIZES.sum()].view(jnp.uint8), want.values.view(jnp.uint8))


def test_no_scale_depends_on_rows_past_the_groups():
    out = jax.random.normal(jax.random.key(0), (32, 200))
    dirty = out.at[27:].set(jnp.array([jnp.nan, jnp.inf, 1e30, -1e30, 1])[:, None])
    for granularity in ("tensor", "token", "group"):
        expected, got = (
            quantize_rows(each, jnp.asarray(SIZES), granularity, None) for each in (out.at[27:].set(0), dirty)
        )
        np.testing.assert_array_equal(dequantize(got)[:27], dequantize(expected)[:27])


def test_no_rows_give_no_output():
    x, w, row_index = operands("block", False)
    assert run(x, w, row_index[:0]).shape == (0, N)
    assert run(x, w, row_index[:0], quantize_out="group").shape == (0, N)


@pytest.mark.parametrize("wrt", ["x", "scale"])
def test_a_gradient_is_refused_in_one_line(wrt):
    x, w, row_index = operands("channel", False)

    def loss(x_values, w_scale):
        out = grouped_gemm(x_values, w.values, SIZES, row_index=row_index, x_scale=x.scales, w_scale=w_scale)
        return jnp.sum(out.astype(jnp.float32))

    with pytest.raises(ValueError, match=r"^quantised weights have no gradient; ") as error:
        jax.grad(loss, argnums=0 if wrt == "x" else 1)(x.values, w.scales)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"x_scale": None}, "x_scale is None; it should be given: quantised operands come in pairs"),
        ({"w_scale": None}, "w_scale is None; it should be given: quantised operands come in pairs"),
        ({"x": jnp.zeros((TOKENS, K), jnp.bfloat16)}, "x.dtype is 'bfloat16'; it should be float8_e4m3fn, as it has a scale"),
        ({"w_scale": jnp.zeros((EXPERTS, 2, 2))}, "w_scale.shape is (4, 2, 2); it should be one of (4, 2, 3), (4, 200), (4,)"),
        ({"x_scale": jnp.zeros((TOKENS, 3))}, "x_scale.shape is (21, 3); it should be one of (), (21,), (3, 21)"),
        ({"x_scale": jnp.zeros((), jnp.bfloat16)}, "x_scale.dtype is 'bfloat16'; it should be float32"),
        ({"quantize_out": "block"}, "quantize_out is 'block'; it should be None, tensor, token, group"),
        ({"out_scale": jnp.ones(EXPERTS)}, "quantize_out is None; it should be tensor, as out_scale is given"),
        (
            {"quantize_out": "tensor", "out_scale": jnp.ones(3)},
            "out_scale.shape is (3,); it should be (4,), the experts of w",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_scales_are_refused_in_one_line(change, line):
    x, w, row_index = operands("block", False)
    arguments = {"x": x.values, "w": w.values, "x_scale": x.scales, "w_scale": w.scales} | change
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the line itself is checked)
        grouped_gemm(group_sizes=jnp.asarray(SIZES), row_index=row_index, **arguments)
    assert str(error.value) == line
