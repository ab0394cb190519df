"""`combine`: weighted rows back to their tokens; its definition, and the Hopper kernels, interpreted and lowered."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.kernels import rows, rows_hopper
from jax_epmoe.kernels.rows import combine

T, K, R, H = 13, 3, 20, 17


def loop(y: np.ndarray, pair_row: np.ndarray, weights: np.ndarray) -> np.ndarray:
    out = np.zeros((len(pair_row), y.shape[1]))
    for token, pairs in enumerate(pair_row):
        for choice, row in enumerate(pairs):
            if row < len(y):
                out[token] += float(weights[token, choice]) * y[row].astype(np.float64)
    return out


def make_inputs(seed: int, dtype: str = "float32") -> tuple[jax.Array, jax.Array, jax.Array]:
    """A random part of the pairs has no row; rows that no pair names are NaN."""
    rng = np.random.default_rng(seed)
    pair_row = np.full(T * K, R)
    named = rng.permutation(R)[: rng.integers(0, R + 1)]
    pair_row[rng.permutation(T * K)[: len(named)]] = named
    y = rng.normal(size=(R, H))
    y[np.setdiff1d(np.arange(R), named)] = np.nan
    return (
        jnp.asarray(y, dtype),
        jnp.asarray(pair_row.reshape(T, K), jnp.int32),
        jnp.asarray(rng.random((T, K)), "float32"),
    )


run = jax.jit(combine)


@jax.jit
def run_gradients(y, pair_row, weights, d_out):
    return jax.vjp(lambda y, weights: combine(y, pair_row, weights), y, weights)[1](d_out)


def test_an_example_by_hand():
    y = jnp.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    pair_row = jnp.array([[2, 3], [0, 2], [3, 3]])  # 3 is one past the last row: no row
    weights = jnp.array([[0.5, 9.0], [2.0, 1.0], [9.0, 9.0]])
    np.testing.assert_array_equal(combine(y, pair_row, weights), [[1.5, 15.0], [5.0, 50.0], [0.0, 0.0]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**32 - 1))
def test_sums_in_float32_and_never_sees_a_row_that_no_pair_names(dtype, seed):
    y, pair_row, weights = make_inputs(seed, dtype)
    out = run(y, pair_row, weights)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, loop(*map(np.asarray, (y, pair_row, weights))), rtol=1e-5, atol=1e-6)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**32 - 1))
def test_gradients_reach_the_rows_and_weights_that_took_part_and_no_others(seed):
    y, pair_row, weights = make_inputs(seed)
    d_out = jnp.asarray(np.random.default_rng(seed).normal(size=(T, H)), jnp.float32)
    d_y, d_weights = run_gradients(y, pair_row, weights, d_out)
    expected_y, expected_weights = np.zeros((R, H)), np.zeros((T, K))
    for token, choice in np.argwhere(np.asarray(pair_row) < R):
        row = int(pair_row[token, choice])
        expected_y[row] += float(weights[token, choice]) * np.asarray(d_out[token])
        expected_weights[token, choice] = np.asarray(d_out[token], np.float64) @ np.asarray(y[row], np.float64)
    np.testing.assert_allclose(d_y, expected_y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_weights, expected_weights, rtol=1e-5, atol=1e-5)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**32 - 1))
def test_where_a_row_lies_changes_no_bit(seed):
    y, pair_row, weights = make_inputs(seed)
    order = np.random.default_rng(seed).permutation(R)
    place = np.append(np.argsort(order), R)  # row -> where `order` puts it; R stays "no row"
    moved = run(y[order], jnp.asarray(place[np.asarray(pair_row)], jnp.int32), weights)
    np.testing.assert_array_equal(run(y, pair_row, weights), moved)


def test_the_same_bits_on_every_run():
    arrays = make_inputs(0)
    first = np.asarray(run(*arrays)).tobytes()
    assert all(np.asarray(run(*arrays)).tobytes() == first for _ in range(10))


def test_the_sum_begins_with_the_base_and_is_rounded_once():
    y, pair_row, weights = make_inputs(1)
    base = jnp.asarray(np.random.default_rng(1).normal(size=(T, H)), jnp.float32)
    out = combine(y, pair_row, weights, base)
    np.testing.assert_allclose(out, base + combine(y, pair_row, weights), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(combine(y, pair_row, weights, base, jnp.bfloat16), out.astype(jnp.bfloat16))
    (d_base,) = jax.vjp(lambda base: combine(y, pair_row, weights, base, jnp.bfloat16), base)[1](
        jnp.ones_like(out, jnp.bfloat16)
    )
    np.testing.assert_array_equal(d_base, jnp.ones_like(base))
    half = base.astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        combine(y, pair_row, weights, half), combine(y, pair_row, weights, half.astype(base.dtype))
    )


@pytest.fixture
def on_hopper(monkeypatch):
    """The Hopper kernels, interpreted."""
    monkeypatch.setattr(rows, "on_hopper", lambda: True)
    monkeypatch.setattr(rows_hopper, "num_sms", lambda: 1)
    reset_gpu_interpret_mode_state()
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
    reset_gpu_interpret_mode_state()


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 256), ("float16", 520), ("bfloat16", 1536)])
@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16", None])
def test_the_hopper_kernel_sums_as_the_definition(dtype, width, base_dtype, on_hopper):
    _, pair_row, weights = make_inputs(2)
    rng = np.random.default_rng(2)
    y = jnp.asarray(rng.normal(size=(R, width)), dtype)
    y = y.at[np.setdiff1d(np.arange(R), pair_row)].set(jnp.nan)
    base = jnp.asarray(rng.normal(size=(T, width)), base_dtype) if base_dtype else None
    for out_dtype in (jnp.float32, jnp.dtype(dtype)):
        expected = rows._reference(out_dtype, y, pair_row, weights, base)
        got = combine(y, pair_row, weights, base, out_dtype)
        assert got.dtype == out_dtype
        np.testing.assert_allclose(got.astype(jnp.float32), expected.astype(jnp.float32), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("num_rows", [0, 1, 18, 22])
def test_the_hopper_kernel_gathers_the_rows_that_there_are(num_rows, on_hopper):
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(7, 776)), jnp.bfloat16)
    row_index = jnp.asarray(rng.integers(0, 7, 22), jnp.int32)
    out = rows_hopper.gather(x, row_index, jnp.int32(num_rows))
    assert out.shape == (22, 776)
    np.testing.assert_array_equal(out[:num_rows], x[row_index[:num_rows]])


def test_the_hopper_kernel_deals_tokens_to_their_rows(on_hopper):
    _, pair_row, _ = make_inputs(5)
    x = jnp.asarray(np.random.default_rng(5).normal(size=(T, 1320)), jnp.bfloat16)
    out = rows.dispatch(x, pair_row, R)
    assert out.shape == (R, 1320)
    for token, choice in np.argwhere(np.asarray(pair_row) < R):
        np.testing.assert_array_equal(out[int(pair_row[token, choice])], x[int(token)])


@pytest.mark.parametrize("width", [5120, 2880])
def test_the_hopper_kernels_lower_for_cuda(width):
    y = jax.ShapeDtypeStruct((4096, width), jnp.bfloat16)
    pair_row, weights = (jax.ShapeDtypeStruct((512, 6), dtype) for dtype in (jnp.int32, jnp.float32))
    base = jax.ShapeDtypeStruct((512, width), jnp.float32)
    index, count = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4096,), ()))
    for traced in (
        rows_hopper.combine.trace(y, pair_row, weights, base, out_dtype=jnp.bfloat16),
        rows_hopper.gather.trace(y, index, count),
        rows_hopper.dispatch.trace(y, pair_row, 3072),
    ):
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_rows_that_the_kernels_do_not_serve_go_to_the_definition(on_hopper):
    y, pair_row, weights = make_inputs(4)  # 17 columns of float32
    assert rows.dispatch(y, pair_row, R) is None
    np.testing.assert_array_equal(
        combine(y, pair_row, weights), rows._reference(jnp.float32, y, pair_row, weights, None)
    )
