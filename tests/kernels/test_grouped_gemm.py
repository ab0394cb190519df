"""`grouped_gemm`: its backends against the definition (grouped_gemm_suite.py), and what it refuses."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from kernels.grouped_gemm_suite import GroupedGemmSuite

from jax_epmoe.kernels import grouped_gemm as package
from jax_epmoe.kernels.grouped_gemm import grouped_gemm


class TestXla(GroupedGemmSuite):
    backend = "xla"


def test_the_docstring_s_example_by_hand():
    # Expert 0 doubles row 0; expert 1 has no row; expert 2 swaps the columns of rows 1 and 2; row 3 belongs to nobody.
    x = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    w = jnp.array([[[2.0, 0.0], [0.0, 2.0]], [[9.0, 9.0], [9.0, 9.0]], [[0.0, 1.0], [1.0, 0.0]]])
    out = grouped_gemm(x, w, jnp.array([1, 0, 2]))
    np.testing.assert_array_equal(out[:3], [[2, 4], [4, 3], [6, 5]])
    out = grouped_gemm(x, w, jnp.array([1, 0, 2]), row_index=jnp.array([3, 0, 0, 1]))
    np.testing.assert_array_equal(out[:3], [[14, 16], [2, 1], [2, 1]])


def test_a_gate_multiplies_the_activated_half_by_the_other():
    # gate = 0 -> silu(0) = 0; gate = 1 -> silu(1) = 0.7310586; up = 3 in both rows.
    x = jnp.array([[0.0, 3.0], [1.0, 3.0]])
    w = jnp.array([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    out = grouped_gemm(x, w, jnp.array([2]), activation="silu")
    np.testing.assert_allclose(out, [[0.0], [2.1931758]], rtol=1e-6)


def test_no_rows_make_no_rows():
    for row_index in (None, jnp.zeros(0, jnp.int32)):
        out = grouped_gemm(jnp.ones((0, 4)), jnp.ones((3, 5, 4)), jnp.zeros(3, jnp.int32), row_index=row_index)
        assert out.shape == (0, 5)


X, W, GATED, SIZES = jnp.zeros((6, 4)), jnp.zeros((3, 5, 4)), jnp.zeros((3, 2, 5, 4)), jnp.array([1, 2, 3])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("backend", {"backend": "cublas"}),
        ("activation", {"activation": "relu"}),
        ("w.shape", {"w": GATED}),
        ("w.shape", {"activation": "silu"}),
        ("w.shape", {"w": jnp.zeros((3, 3, 5, 4)), "activation": "silu"}),
        ("x.shape", {"x": jnp.zeros((6, 5))}),
        ("x.shape", {"x": jnp.zeros((1, 6, 4))}),
        ("group_sizes.shape", {"group_sizes": jnp.array([1, 2])}),
        ("group_sizes.shape", {"group_sizes": jnp.array([[1, 2, 3]])}),
        ("group_sizes.dtype", {"group_sizes": jnp.array([1.0, 2.0, 3.0])}),
        ("row_index.shape", {"row_index": jnp.zeros((6, 1), jnp.int32)}),
        ("row_index.dtype", {"row_index": jnp.zeros(6)}),
        ("bias.shape", {"bias": jnp.zeros((3, 4))}),
        ("bias.shape", {"w": GATED, "activation": "silu", "bias": jnp.zeros((3, 5))}),
        ("out_dtype", {"out_dtype": "int32"}),
        ("x.dtype", {"x": jnp.zeros((6, 4), jnp.int32)}),
        ("expected_rows", {"expected_rows": -1}),
    ],
)
def test_a_bad_argument_is_refused_by_name_in_one_line(name, arguments):
    with pytest.raises(ValueError, match=f"^{name} is .*; it should be ") as error:
        grouped_gemm(**{"x": X, "w": W, "group_sizes": SIZES} | arguments)
    assert "\n" not in str(error.value)


def test_a_backend_that_cannot_serve_is_passed_over_unless_it_was_named(monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("no such card")

    picky = types.SimpleNamespace(matmul=refuse)
    monkeypatch.setattr(package, "BACKENDS", {"picky": picky, **package.BACKENDS})
    x = jnp.ones((6, 4))
    np.testing.assert_array_equal(grouped_gemm(x, W + 1, SIZES), np.full((6, 5), 4.0))
    with pytest.raises(NotImplementedError, match="no such card"):
        grouped_gemm(x, W, SIZES, backend="picky")
