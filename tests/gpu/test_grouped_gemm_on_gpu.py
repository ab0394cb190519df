"""The Hopper kernels on a Hopper GPU: the suite that every backend passes, the tilings that are chosen at real sizes, any
group sizes, more than 2**31 elements; the same bits on every run."""

from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.grouped_gemm_suite import EDGES, GroupedGemmSuite, Shape, edge_sizes, ragged_sizes

from jax_epmoe import grouped_gemm
from jax_epmoe.config import ClampedSwiGLU
from jax_epmoe.kernels.grouped_gemm import hopper, hopper_outer, reference

pytestmark = pytest.mark.skipif(not hopper.on_hopper(), reason="needs a Hopper GPU")


class TestHopper(GroupedGemmSuite):
    backend = "hopper"
    shape = Shape(rows=80, experts=6, n=64, k=128, tokens=20)  # the gradient of x reads w transposed: 64 divides k


def load_sizes(load, rows, experts):
    random = np.random.default_rng(0)
    sizes = {
        "uneven": random.multinomial(rows, random.dirichlet(np.full(experts, 0.5))),
        "one": rows * np.eye(experts, dtype=np.int32)[experts // 2],
        "even": np.full(experts, rows // experts),
        "half": random.multinomial(rows // 2, np.full(experts, 1 / experts)),  # the other rows belong to nobody
    }[load]
    return jnp.asarray(sizes, jnp.int32)


def make_case(rows, experts, k, n, gated, load):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (rows, k), jnp.bfloat16)
    w = (jax.random.normal(keys[1], (experts, 2, n, k) if gated else (experts, n, k)) * k**-0.5).astype(jnp.bfloat16)
    return x, w, load_sizes(load, rows, experts)


def sampled_error(out, x, w, sizes, gated) -> float:
    """Norm-relative error of at most 80 rows, the first and last of all and those at the ends of groups among them."""
    sizes = np.asarray(sizes)
    expert_of_row = np.repeat(np.arange(len(sizes)), sizes)
    ends = np.cumsum(sizes)
    edges = np.concatenate([(ends - 1)[sizes > 0], (ends - sizes)[sizes > 0]])
    rows = np.unique(np.concatenate([edges, np.random.default_rng(1).integers(0, len(expert_of_row), 16)]))
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), 80)).astype(int)]
    errors, norms = 0.0, 0.0
    for row in rows:
        weights, values = w[int(expert_of_row[row])].astype(jnp.float32), x[int(row)].astype(jnp.float32)
        expected = jnp.matmul(weights, values, precision="highest")
        if gated:
            expected = jax.nn.silu(expected[0]) * expected[1]
        errors += float(jnp.sum(jnp.square(out[int(row)].astype(jnp.float32) - expected)))
        norms += float(jnp.sum(jnp.square(expected)))
    return (errors / norms) ** 0.5


@pytest.mark.parametrize("load", ["uneven", "one", "half"])
@pytest.mark.parametrize(
    ("rows", "experts", "k", "n", "gated"),
    [
        (6144, 20, 5120, 1536, True),
        (6152, 20, 1536, 5120, False),
        (8192, 16, 192, 5120, False),
        (8192, 8, 2048, 1536, False),
        (512, 64, 2048, 1024, True),
        (192, 20, 5120, 1536, True),
        (768, 20, 1536, 5120, False),
        (8, 64, 1024, 2048, False),
    ],
)
def test_chosen_tilings_are_right_at_real_sizes_under_skewed_loads(rows, experts, k, n, gated, load):
    x, w, sizes = make_case(rows, experts, k, n, gated, load)
    run = jax.jit(lambda x, w, s: grouped_gemm(x, w, s, activation="silu" if gated else None, backend="hopper"))
    poison = jnp.full((rows, n), jnp.nan, jnp.bfloat16)  # memory that the output may reuse
    poison.delete()
    out = run(x, w, sizes)
    assert sampled_error(out, x, w, sizes, gated) < 5e-3
    valid = int(sizes.sum())
    assert bool(jnp.all(jnp.isfinite(out[:valid].astype(jnp.float32))))
    again = run(x, w, sizes)
    assert bool(jnp.all(out[:valid] == again[:valid])), "the same input gave other bits"


@pytest.mark.parametrize("load", ["uneven", "one", "half"])
@pytest.mark.parametrize("rows", [16, 512, 8192])
@pytest.mark.parametrize(("n", "k"), [(2880, 2880), (1440, 2880), (2880, 720)], ids=str)
@pytest.mark.parametrize("activation", [None, ClampedSwiGLU()], ids=["", "clamped_swiglu"])
def test_biases_are_added_at_gpt_oss_s_sizes(activation, n, k, rows, load):
    """Whole experts and parts of them; the last tile of columns reads past the biases' end."""
    x, w, sizes = make_case(rows, 32, k, n, activation is not None, load)
    x, bias = 3 * x, jax.random.normal(jax.random.key(2), w.shape[:-1], jnp.bfloat16)  # some are clamped
    run = jax.jit(lambda *args: grouped_gemm(*args[:3], bias=args[3], activation=activation, backend="hopper"))
    valid = int(sizes.sum())
    jnp.full((rows, n), jnp.nan, jnp.bfloat16).block_until_ready().delete()  # memory that the output may get
    out, again = (run(x, w, sizes, bias)[:valid] for _ in range(2))
    f32 = (a.astype(jnp.float32) for a in (x, w))
    expected = reference.matmul(*f32, sizes, bias=bias, activation=activation, out_dtype=jnp.float32)[:valid]
    assert jnp.linalg.norm(out.astype(jnp.float32) - expected) < 5e-3 * jnp.linalg.norm(expected)
    assert bool(jnp.all(out == again)), "the same input gave other bits"


# Sizes at and around those of tiles, more often none or a single row.
tile_sizes = st.sampled_from([0, 0, 0, 0, 1, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257])


@st.composite
def sizes_around_tiles(draw, shape: Shape) -> np.ndarray:
    wanted = draw(st.lists(tile_sizes, min_size=shape.experts, max_size=shape.experts))
    return np.diff(np.minimum(np.cumsum(wanted), shape.rows), prepend=0)


def any_sizes(shape: Shape) -> st.SearchStrategy[np.ndarray]:
    edges = [edge_sizes(edge, shape) for edge in EDGES]
    return st.one_of(st.sampled_from(edges), ragged_sizes(shape), sizes_around_tiles(shape))


# Sizes are traced: each shape is compiled once, and a draw of sizes takes milliseconds.
many_draws = hypothesis.settings(max_examples=60, deadline=None)


@partial(jax.jit, static_argnames="activation", donate_argnames="memory", keep_unused=True)
def multiply(x, w, sizes, memory, activation):
    """Into the donated `memory`."""
    return grouped_gemm(x, w, sizes, activation=activation, backend="hopper")


@partial(jax.jit, static_argnames="activation")
def errors(out, again, x, w, sizes, activation):
    """Norm-relative error of the rows in groups, how many of their elements differ in the second run, NaNs past them."""
    expected = reference.matmul(
        x.astype(jnp.float32), w.astype(jnp.float32), sizes, activation=activation, out_dtype=jnp.float32
    )
    inside = (jnp.arange(x.shape[0]) < jnp.sum(sizes))[:, None]
    difference = jnp.where(inside, out.astype(jnp.float32) - expected, 0)
    error = jnp.linalg.norm(difference) / jnp.maximum(jnp.linalg.norm(expected), 1e-30)
    return error, jnp.sum(inside & (out != again)), jnp.sum(~inside & jnp.isnan(out))


@jax.jit
def poison_past_the_sum(rows, sizes):
    return jnp.where((jnp.arange(rows.shape[0]) < jnp.sum(sizes))[:, None], rows, jnp.nan)


@pytest.mark.parametrize(
    ("shape", "activation"),
    [
        (Shape(rows=256, experts=32, n=384, k=256, tokens=0), "silu"),
        (Shape(rows=1024, experts=32, n=520, k=656, tokens=0), None),
        (Shape(rows=2048, experts=16, n=512, k=1024, tokens=0), None),
        (Shape(rows=2048, experts=16, n=384, k=640, tokens=0), "gelu_pytorch_tanh"),
        (Shape(rows=2048, experts=12, n=640, k=192, tokens=0), None),
        (Shape(rows=16384, experts=32, n=4096, k=1024, tokens=0), None),
    ],
    ids=str,
)
@many_draws
@hypothesis.given(data=st.data())
def test_any_sizes_write_all_rows_of_groups_and_no_others(shape, activation, data):
    sizes = data.draw(any_sizes(shape))
    x, w, _ = make_case(shape.rows, shape.experts, shape.k, shape.n, activation is not None, "even")
    x, sizes = poison_past_the_sum(x, sizes), jnp.asarray(sizes, jnp.int32)
    out, again = (
        multiply(x, w, sizes, jnp.full((shape.rows, shape.n), jnp.nan, x.dtype), activation) for _ in range(2)
    )
    error, different, untouched = errors(out, again, x, w, sizes, activation)
    assert error < 5e-3
    assert different == 0, f"{different} elements have other bits in the second run"
    assert untouched == (shape.rows - int(sizes.sum())) * shape.n


@pytest.mark.parametrize(
    ("rows", "experts", "k", "n"),
    [(2**20 + 4096, 8, 2048, 64), (2**20 + 4096, 8, 64, 2112), (1024, 130, 4096, 4096)],
    ids=["x", "out", "w"],
)
def test_more_than_two_to_the_31_elements(rows, experts, k, n):
    x, w, sizes = make_case(rows, experts, k, n, gated=False, load="even")
    assert max(rows * k, rows * n, w.size) > 2**31
    out = jax.jit(lambda x, w, s: grouped_gemm(x, w, s, backend="hopper"))(x, w, sizes)
    assert sampled_error(out, x, w, sizes, gated=False) < 5e-3


def make_outer_case(rows, n, k, dtype):
    left = jax.random.normal(jax.random.key(0), (rows, n), dtype)
    right = jax.random.normal(jax.random.key(1), (rows, k), dtype)
    return left, right


@jax.jit
def outer(left, right, sizes):
    return hopper_outer.outer(left, right, sizes, out_dtype=left.dtype)


@jax.jit
def outer_error(out, left, right, sizes):
    expected = reference.outer(left.astype(jnp.float32), right.astype(jnp.float32), sizes, out_dtype=jnp.float32)
    return jnp.linalg.norm(out.astype(jnp.float32) - expected) / jnp.maximum(jnp.linalg.norm(expected), 1e-30)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(rows=2048, experts=16, n=320, k=576, tokens=0),
        Shape(rows=514, experts=64, n=128, k=64, tokens=0),
        Shape(rows=6144, experts=20, n=3072, k=5120, tokens=0),
    ],
    ids=str,
)
@many_draws
@hypothesis.given(data=st.data())
def test_the_gradient_of_w_for_any_sizes(shape, dtype, data):
    sizes = data.draw(any_sizes(shape))
    left, right = (poison_past_the_sum(rows, sizes) for rows in make_outer_case(shape.rows, shape.n, shape.k, dtype))
    sizes = jnp.asarray(sizes, jnp.int32)
    out = outer(left, right, sizes)
    assert outer_error(out, left, right, sizes) < 5e-3
    assert bool(jnp.all(out == outer(left, right, sizes))), "the same input gave other bits"


@pytest.mark.parametrize(
    ("rows", "experts", "n", "k"), [(2**20 + 4096, 8, 64, 2048), (1024, 130, 4096, 4096)], ids=["x", "w"]
)
def test_the_gradient_of_w_past_two_to_the_31_elements(rows, experts, n, k):
    left, right = make_outer_case(rows, n, k, jnp.bfloat16)
    assert max(right.size, experts * n * k) > 2**31
    size = rows // experts
    out = outer(left, right, jnp.full(experts, size, jnp.int32))
    for expert in (0, experts // 2, experts - 1):
        own = slice(expert * size, (expert + 1) * size)
        error = outer_error(out[expert : expert + 1], left[own], right[own], jnp.array([size], jnp.int32))
        assert error < 5e-3, f"expert {expert}"


def test_both_gradients_of_a_gate_at_a_real_size():
    x, w, sizes = make_case(6144, 20, 5120, 1536, gated=True, load="half")
    x = poison_past_the_sum(x, sizes)
    d_out = poison_past_the_sum(jax.random.normal(jax.random.key(2), (6144, 1536), x.dtype), sizes)

    @partial(jax.jit, static_argnames="backend")
    def gradients(x, w, sizes, d_out, backend):
        return jax.vjp(lambda x, w: grouped_gemm(x, w, sizes, activation="silu", backend=backend), x, w)[1](d_out)

    program = gradients.lower(x, w, sizes, d_out, "hopper").as_text()
    assert "stablehlo.while" not in program, "some product was left to the definition in XLA"
    for got, expected in zip(
        gradients(x, w, sizes, d_out, "hopper"), gradients(x, w, sizes, d_out, "xla"), strict=True
    ):
        got, expected = got.astype(jnp.float32), expected.astype(jnp.float32)
        assert jnp.linalg.norm(got - expected) < 5e-3 * jnp.linalg.norm(expected)
