"""`combine`: weighted rows back to their tokens."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
