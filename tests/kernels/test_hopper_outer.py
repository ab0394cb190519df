"""The gradient of the weights on Hopper, without a GPU: interpreted on the CPU with race detection, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.kernels.grouped_gemm import grouped_gemm, hopper, hopper_outer, reference


@pytest.fixture
def pretend_hopper(monkeypatch):
    monkeypatch.setattr(hopper, "on_hopper", lambda: True)
    monkeypatch.setattr(hopper, "num_sms", lambda: 3)  # the interpreter runs one after another
    yield
    reset_gpu_interpret_mode_state()


def make_operands(sizes, rows, n, k, dtype):
    """Random arrays; NaN in the rows past the groups."""
    total = sum(sizes)
    left = jax.random.normal(jax.random.key(0), (rows, n), dtype).at[total:].set(jnp.nan)
    right = jax.random.normal(jax.random.key(1), (rows, k), dtype).at[total:].set(jnp.nan)
    return left, right, jnp.array(sizes, jnp.int32)


def interpret(left, right, sizes) -> np.ndarray:
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        return np.asarray(hopper_outer.outer(left, right, sizes, out_dtype=left.dtype), np.float32)


def define(left, right, sizes) -> jax.Array:
    return reference.outer(left.astype(jnp.float32), right.astype(jnp.float32), sizes, out_dtype=jnp.float32)


@pytest.mark.usefixtures("pretend_hopper")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("sizes", "rows", "n", "k"),
    [
        ((37, 0, 70, 5), 112, 128, 256),
        ((100, 3, 0, 1), 131, 192, 320),  # rows that 8 does not divide, n and k off the tile
        ((0, 0), 16, 64, 64),
        ((1, 0, 1), 16, 128, 64),
        ((64, 64), 128, 64, 256),
        ((65, 63, 8), 136, 128, 128),
    ],
    ids=str,
)
def test_it_computes_the_definition_without_races(sizes, rows, n, k, dtype):
    left, right, sizes = make_operands(sizes, rows, n, k, dtype)
    out, expected = interpret(left, right, sizes), define(left, right, sizes)
    assert np.linalg.norm(out - expected) <= 5e-3 * np.linalg.norm(expected)


@pytest.mark.usefixtures("pretend_hopper")
def test_what_is_not_finite_in_left_stays_in_its_own_group():
    left, right, sizes = make_operands((20, 9, 20), 56, 64, 64, "bfloat16")
    expected = define(left, right, sizes)[np.array([0, 2])]
    out = interpret(left.at[20:29].set(jnp.inf), right, sizes)[[0, 2]]
    assert np.linalg.norm(out - expected) <= 5e-3 * np.linalg.norm(expected)


@pytest.mark.usefixtures("pretend_hopper")
@pytest.mark.parametrize(
    ("rows", "experts", "n", "k"),
    [(6144, 20, 3072, 5120), (6152, 20, 5120, 1536), (65536, 128, 1536, 2048), (192, 8, 64, 64)],
)
def test_it_lowers_for_cuda(rows, experts, n, k):
    left, right = (jax.ShapeDtypeStruct((rows, width), jnp.bfloat16) for width in (n, k))
    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
    run = jax.jit(lambda left, right, sizes: hopper_outer.outer(left, right, sizes, out_dtype=left.dtype))
    run.trace(left, right, sizes).lower(lowering_platforms=("cuda",))


@pytest.mark.usefixtures("pretend_hopper")
@pytest.mark.parametrize(
    "change",
    [
        {"dtype": jnp.float32, "out_dtype": jnp.float32},
        {"out_dtype": jnp.float32},
        {"rows": 0},
        {"n": 96},
        {"k": 96},
        {"k": 0},
    ],
    ids=str,
)
def test_what_it_cannot_serve_it_refuses(change):
    arguments = {"dtype": jnp.bfloat16, "out_dtype": jnp.bfloat16, "rows": 16, "n": 128, "k": 128} | change
    left, right = (jnp.zeros((arguments["rows"], arguments[width]), arguments["dtype"]) for width in ("n", "k"))
    with pytest.raises(NotImplementedError, match="hopper backend"):
        hopper_outer.outer(left, right, jnp.array([4, 4]), out_dtype=arguments["out_dtype"])


def test_it_serves_only_hopper():
    operand = jnp.zeros((16, 128), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="not a Hopper"):
        hopper_outer.outer(operand, operand, jnp.array([16]), out_dtype=operand.dtype)


@pytest.mark.parametrize(("backend", "asked"), [(None, 1), ("xla", 0)])
@pytest.mark.parametrize("serves", [True, False])
def test_the_backward_pass_asks_it_first_and_the_definition_next(backend, asked, serves, monkeypatch):
    calls = []

    def outer(*args, **kwargs):
        calls.append(args)
        if not serves:
            raise NotImplementedError
        return reference.outer(*args, **kwargs)

    monkeypatch.setattr(hopper_outer, "outer", outer)
    x, w, sizes = jnp.ones((6, 4)), jnp.ones((3, 5, 4)), jnp.array([1, 2, 3])
    gradient = jax.grad(lambda w: jnp.sum(grouped_gemm(x, w, sizes, backend=backend)))(w)
    np.testing.assert_array_equal(gradient, np.broadcast_to(np.array([1.0, 2.0, 3.0])[:, None, None], w.shape))
    assert len(calls) == asked
