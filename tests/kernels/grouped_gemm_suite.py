"""What every backend of `grouped_gemm` promises; a backend's test class inherits it and names the backend.

The definition here is a loop over groups in NumPy float64, and for gradients a dense product in float32 that gives each
row its own copy of its expert's matrix. Rows past `sum(group_sizes)` are filled with NaN everywhere.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_epmoe import grouped_gemm
from jax_epmoe.config import Activation, ClampedSwiGLU


class Shape(NamedTuple):
    rows: int
    experts: int
    n: int
    k: int
    tokens: int  # rows of x when there is a row_index


CLAMPED_SWIGLU = ClampedSwiGLU(limit=0.8)  # as low as that, it clamps about half


class Variant(NamedTuple):
    activation: Activation | None = None
    bias: bool = False
    row_index: bool = False

    def __str__(self) -> str:
        names = [
            "clamped_swiglu" if self.activation == CLAMPED_SWIGLU else self.activation or "plain",
            "bias" * self.bias,
            "row_index" * self.row_index,
        ]
        return "-".join(name for name in names if name)


class Inputs(NamedTuple):
    x: jax.Array
    w: jax.Array
    group_sizes: jax.Array
    row_index: jax.Array | None
    bias: jax.Array | None


VARIANTS = (
    Variant(),
    Variant(bias=True, row_index=True),
    Variant("silu", row_index=True),
    Variant("silu", bias=True, row_index=True),
    Variant("gelu", bias=True),
    Variant("gelu_pytorch_tanh", row_index=True),
    Variant(CLAMPED_SWIGLU, bias=True),
)
# By norm(out - ref) / norm(ref).
FORWARD_TOLERANCE = {"float32": 1e-6, "bfloat16": 5e-3, "float16": 5e-3}
GRADIENT_TOLERANCE = {"float32": 2e-6, "bfloat16": 5e-3, "float16": 5e-3}


@partial(jax.jit, static_argnames=("activation", "backend", "out_dtype"))
def run(inputs: Inputs, activation: Activation | None, backend: str, out_dtype: str | None = None) -> jax.Array:
    x, w, group_sizes, row_index, bias = inputs
    return grouped_gemm(
        x, w, group_sizes, row_index=row_index, bias=bias, activation=activation, out_dtype=out_dtype, backend=backend
    )


@partial(jax.jit, static_argnames=("activation", "backend"))
def run_gradients(
    inputs: Inputs, d_out: jax.Array, activation: Activation | None, backend: str
) -> dict[str, jax.Array]:
    return gradients(partial(grouped_gemm, activation=activation, backend=backend), inputs, d_out)


@partial(jax.jit, static_argnames=("activation",))
def dense_gradients(inputs: Inputs, d_out: jax.Array, activation: Activation | None) -> dict[str, jax.Array]:
    return gradients(partial(dense, activation=activation), inputs, d_out)


def gradients(function: Callable[..., jax.Array], inputs: Inputs, d_out: jax.Array) -> dict[str, jax.Array]:
    differentiated = {name: getattr(inputs, name) for name in ("x", "w", "bias") if getattr(inputs, name) is not None}

    def of(arrays: dict[str, jax.Array]) -> jax.Array:
        return function(
            arrays["x"], arrays["w"], inputs.group_sizes, row_index=inputs.row_index, bias=arrays.get("bias")
        )

    return jax.vjp(of, differentiated)[1](d_out)[0]


def dense(x, w, group_sizes, *, row_index, bias, activation) -> jax.Array:
    """Float32, every row with its own copy of its expert's matrix; zeros past the sum."""
    rows = x if row_index is None else x[row_index]
    expert = jnp.repeat(jnp.arange(len(group_sizes)), group_sizes, total_repeat_length=len(rows))
    inside = (jnp.arange(len(rows)) < group_sizes.sum())[:, None]
    rows = jnp.where(inside, rows, 0)
    product = jnp.einsum("rk,r...k->r...", rows, w[expert], precision="highest")
    if bias is not None:
        product += bias[expert]
    if activation is not None:
        if isinstance(activation, ClampedSwiGLU):
            return jnp.where(inside, clamped_swiglu(activation, product[:, 0], product[:, 1], jnp.clip, jnp.exp), 0)
        act = {"silu": jax.nn.silu, "gelu": partial(jax.nn.gelu, approximate=False)}.get(activation, jax.nn.gelu)
        product = act(product[:, 0]) * product[:, 1]
    return jnp.where(inside, product, 0)


def loop_over_groups(inputs: Inputs, activation: Activation | None) -> np.ndarray:
    """The definition in the docstring of `grouped_gemm`, in float64 -> `[sum(group_sizes), n]`."""
    x, w = (np.asarray(array).astype(np.float64) for array in (inputs.x, inputs.w))
    rows = x if inputs.row_index is None else x[np.asarray(inputs.row_index)[: int(inputs.group_sizes.sum())]]
    out, start = [np.zeros((0, w.shape[-2]))], 0
    for expert, size in enumerate(np.asarray(inputs.group_sizes)):
        block = rows[start : start + size]
        bias = 0.0 if inputs.bias is None else np.asarray(inputs.bias)[expert].astype(np.float64)
        if activation is None:
            out.append(block @ w[expert].T + bias)
        else:
            gate, up = (block @ w[expert, i].T + (bias if inputs.bias is None else bias[i]) for i in (0, 1))
            if isinstance(activation, ClampedSwiGLU):
                out.append(clamped_swiglu(activation, gate, up, np.clip, np.exp))
            else:
                out.append(NUMPY_ACTIVATIONS[activation](gate) * up)
        start += size
    return np.concatenate(out)


def clamped_swiglu(activation: ClampedSwiGLU, gate, up, clip, exp):
    gate, up = clip(gate, None, activation.limit), clip(up, -activation.limit, activation.limit)
    return (up + 1) * gate / (1 + exp(-activation.alpha * gate))


NUMPY_ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def make_inputs(shape: Shape, variant: Variant, sizes: np.ndarray, dtype: str, seed: int) -> Inputs:
    """Random arrays; whatever only rows past the sum would read is NaN, and their row_index is out of range."""
    rng = np.random.default_rng(seed)
    total = int(sizes.sum())
    middle = (2,) if variant.activation else ()
    w = rng.normal(size=(shape.experts, *middle, shape.n, shape.k)) / math.sqrt(shape.k)
    bias = rng.normal(size=w.shape[:-1])
    row_index = None
    if variant.row_index:
        x = rng.normal(size=(shape.tokens, shape.k))
        row_index = rng.integers(0, shape.tokens, shape.rows).astype(np.int32)
        x[np.setdiff1d(np.arange(shape.tokens), row_index[:total])] = np.nan
        row_index[total:] = rng.choice([0, shape.tokens - 1, shape.tokens, 2**31 - 1], shape.rows - total)
    else:
        x = rng.normal(size=(shape.rows, shape.k))
        x[total:] = np.nan
    return Inputs(
        jnp.asarray(x, dtype),
        jnp.asarray(w, dtype),
        jnp.asarray(sizes, jnp.int32),
        None if row_index is None else jnp.asarray(row_index),
        jnp.asarray(bias, dtype) if variant.bias else None,
    )


def relative_error(out: jax.Array | np.ndarray, ref: jax.Array | np.ndarray) -> float:
    """`norm(out - ref) / norm(ref)`; the norm of `out` itself where `ref` is all zeros. NaN compares as too large."""
    out, ref = (np.asarray(array).astype(np.float64) for array in (out, ref))
    assert out.shape == ref.shape, f"shape {out.shape}, should be {ref.shape}"
    return float(np.linalg.norm(out - ref) / (np.linalg.norm(ref) or 1.0))


def edge_sizes(case: str, shape: Shape) -> np.ndarray:
    sizes = np.zeros(shape.experts, int)
    match case:
        case "no rows":
            pass
        case "one row":
            sizes[shape.experts // 2] = 1
        case "first expert has everything":
            sizes[0] = shape.rows
        case "last expert has everything":
            sizes[-1] = shape.rows
        case "every other expert is empty":
            sizes[1::2] = shape.rows // len(sizes[1::2])
        case "one row an expert":
            sizes[: shape.rows] = 1
        case "the sum is one short":
            sizes[[0, -1]] = shape.rows // 2, shape.rows - shape.rows // 2 - 1
    return sizes


EDGES = (
    "no rows", "one row", "first expert has everything", "last expert has everything", "every other expert is empty",
    "one row an expert", "the sum is one short",
)  # fmt: skip


@st.composite
def ragged_sizes(draw, shape: Shape) -> np.ndarray:
    """Any split of at most `rows` rows; empty experts are common."""
    total = draw(st.one_of(st.just(shape.rows), st.integers(0, shape.rows)))
    cuts = draw(st.lists(st.integers(0, total), min_size=shape.experts - 1, max_size=shape.experts - 1))
    return np.diff([0, *sorted(cuts), total])


def served(function: Callable[..., jax.Array], *args, **kwargs):
    """The call's result; the test is skipped where the backend says that it cannot serve such a call."""
    try:
        return function(*args, **kwargs)
    except NotImplementedError as error:
        pytest.skip(str(error))


# The same test runs in every backend's class; each example costs no compilation, so there is no deadline to keep.
settings = hypothesis.settings(
    max_examples=10,
    deadline=None,
    derandomize=False,
    suppress_health_check=[hypothesis.HealthCheck.differing_executors, hypothesis.HealthCheck.too_slow],
)
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", FORWARD_TOLERANCE)


class GroupedGemmSuite:
    backend: ClassVar[str]
    shape: ClassVar[Shape] = Shape(rows=80, experts=6, n=24, k=32, tokens=20)
    odd_shape: ClassVar[Shape] = Shape(rows=29, experts=3, n=7, k=13, tokens=5)
    large_shape: ClassVar[Shape] = Shape(rows=512, experts=64, n=128, k=256, tokens=128)

    def check_forward(self, shape: Shape, variant: Variant, sizes: np.ndarray, dtype: str, seed: int) -> None:
        inputs = make_inputs(shape, variant, sizes, dtype, seed)
        out = served(run, inputs, variant.activation, self.backend)
        assert out.shape == (shape.rows, shape.n)
        assert out.dtype == jnp.dtype(dtype)
        error = relative_error(out[: sizes.sum()], loop_over_groups(inputs, variant.activation))
        assert error < FORWARD_TOLERANCE[dtype], f"relative error {error:.2e}, group_sizes {sizes.tolist()}"

    def check_gradients(self, shape: Shape, variant: Variant, sizes: np.ndarray, dtype: str, seed: int) -> None:
        inputs = make_inputs(shape, variant, sizes, dtype, seed)
        d_out = np.random.default_rng(seed + 1).normal(size=(shape.rows, shape.n))
        d_out[sizes.sum() :] = np.nan
        d_out = jnp.asarray(d_out, dtype)
        out = served(run_gradients, inputs, d_out, variant.activation, self.backend)
        float_inputs = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == dtype else a, inputs)
        ref = dense_gradients(float_inputs, d_out.astype(jnp.float32), variant.activation)
        for name, gradient in out.items():
            assert gradient.dtype == jnp.dtype(dtype), f"gradient of {name} is {gradient.dtype}"
            error = relative_error(gradient, ref[name])
            assert error < GRADIENT_TOLERANCE[dtype], f"{name}: {error:.2e}, group_sizes {sizes.tolist()}"

    @each_dtype
    @each_variant
    @settings
    @hypothesis.given(data=st.data(), seed=st.integers(0, 2**32 - 1))
    def test_equals_the_loop_over_groups(self, variant, dtype, data, seed):
        self.check_forward(self.shape, variant, data.draw(ragged_sizes(self.shape)), dtype, seed)

    @each_dtype
    @each_variant
    @pytest.mark.parametrize("edge", EDGES)
    def test_no_group_is_too_small_or_too_large(self, edge, variant, dtype):
        self.check_forward(self.shape, variant, edge_sizes(edge, self.shape), dtype, seed=0)

    @each_dtype
    @pytest.mark.parametrize("variant", [Variant(), Variant("silu", bias=True, row_index=True)], ids=str)
    def test_odd_sizes(self, variant, dtype):
        sizes = np.array([12, 1, 15])
        self.check_forward(self.odd_shape, variant, sizes, dtype, seed=1)
        self.check_gradients(self.odd_shape, variant, sizes, dtype, seed=1)

    @each_dtype
    @each_variant
    @settings
    @hypothesis.given(data=st.data(), seed=st.integers(0, 2**32 - 1))
    def test_gradients_equal_the_dense_definition(self, variant, dtype, data, seed):
        if variant.activation == CLAMPED_SWIGLU and dtype != "float32":
            pytest.skip("the gradient jumps where it clamps, and 16 bits decide otherwise there than 32")
        self.check_gradients(self.shape, variant, data.draw(ragged_sizes(self.shape)), dtype, seed)

    @each_dtype
    @pytest.mark.parametrize("edge", EDGES)
    def test_gradients_where_groups_are_extreme(self, edge, dtype):
        variant = Variant("silu", bias=True, row_index=True)
        self.check_gradients(self.shape, variant, edge_sizes(edge, self.shape), dtype, seed=2)

    @pytest.mark.parametrize(("dtype", "out_dtype"), [("bfloat16", "float32"), ("float16", "bfloat16")])
    @pytest.mark.parametrize("variant", [Variant(), Variant("silu", row_index=True)], ids=str)
    def test_out_dtype_is_the_only_rounding(self, variant, dtype, out_dtype):
        sizes = np.array([20, 0, 31, 1, 0, 9])
        inputs = make_inputs(self.shape, variant, sizes, dtype, seed=3)
        out = served(run, inputs, variant.activation, self.backend, out_dtype)
        assert out.dtype == jnp.dtype(out_dtype)
        error = relative_error(out[: sizes.sum()], loop_over_groups(inputs, variant.activation))
        assert error < FORWARD_TOLERANCE[out_dtype], f"relative error {error:.2e}"

    @pytest.mark.parametrize("variant", [Variant(), Variant("silu", bias=True, row_index=True)], ids=str)
    def test_gradients_where_out_dtype_is_wider(self, variant):
        sizes = np.array([20, 0, 31, 1, 0, 9])
        inputs = make_inputs(self.shape, variant, sizes, "bfloat16", seed=4)
        d_out = jnp.asarray(np.random.default_rng(4).normal(size=(self.shape.rows, self.shape.n)), jnp.float32)
        function = partial(grouped_gemm, activation=variant.activation, out_dtype="float32", backend=self.backend)
        out = served(gradients, function, inputs, d_out)
        float_inputs = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, inputs)
        ref = dense_gradients(float_inputs, d_out, variant.activation)
        errors = {name: relative_error(gradient, ref[name]) for name, gradient in out.items()}
        assert max(errors.values()) < GRADIENT_TOLERANCE["bfloat16"], errors

    @each_dtype
    def test_the_same_bits_on_every_run(self, dtype):
        variant = Variant("silu", bias=True, row_index=True)
        sizes = np.array([20, 0, 31, 1, 0, 9])
        inputs = make_inputs(self.shape, variant, sizes, dtype, seed=5)
        d_out = jnp.ones((self.shape.rows, self.shape.n), dtype)

        def bits() -> list[bytes]:
            out = served(run, inputs, variant.activation, self.backend)[: sizes.sum()]
            grads = served(run_gradients, inputs, d_out, variant.activation, self.backend)
            return [np.asarray(array).tobytes() for array in (out, *grads.values())]

        first = bits()
        for _ in range(5):
            assert bits() == first

    @each_dtype
    @pytest.mark.parametrize("variant", [Variant(), Variant("silu", row_index=True)], ids=str)
    def test_memory_follows_the_rows_not_the_experts(self, variant, dtype):
        """Neither `[experts, rows, k]` nor a copy of the weights: what is kept beside the output is a few rows' worth."""
        shape = self.large_shape
        sizes = np.full(shape.experts, shape.rows // shape.experts)
        inputs = make_inputs(shape, variant, sizes, dtype, seed=6)
        program = served(run.lower, inputs, variant.activation, self.backend).compile()
        temporary = program.memory_analysis().temp_size_in_bytes
        bound = 4 * shape.rows * (shape.k + 2 * shape.n)
        assert bound < min(inputs.w.nbytes, shape.experts * shape.rows * shape.k) // 2
        assert temporary < bound, f"{temporary} temporary bytes, should be under {bound}; w has {inputs.w.nbytes}"

    @each_dtype
    def test_memory_of_gradients_follows_the_rows_and_the_weights(self, dtype):
        """The gradient of w is summed in float32, once; nothing is `[experts, rows, k]`."""
        shape, variant = self.large_shape, Variant("silu", row_index=True)
        sizes = np.full(shape.experts, shape.rows // shape.experts)
        inputs = make_inputs(shape, variant, sizes, dtype, seed=7)
        d_out = jnp.ones((shape.rows, shape.n), dtype)
        program = served(run_gradients.lower, inputs, d_out, variant.activation, self.backend).compile()
        temporary = program.memory_analysis().temp_size_in_bytes
        bound = 4 * inputs.w.size + 8 * shape.rows * (shape.k + 4 * shape.n)
        assert bound < 4 * shape.experts * shape.rows * shape.k
        assert temporary < bound, f"{temporary} temporary bytes, should be under {bound}; w has {inputs.w.nbytes}"
