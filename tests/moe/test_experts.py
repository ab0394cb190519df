"""`run_experts`: the same result whatever the size of the chunks, in memory that follows it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_epmoe.moe.experts import default_chunk_rows, run_experts
from jax_epmoe.moe.plan import make_plan

T, K, E, H, I = 21, 3, 6, 16, 12  # noqa: E741  64 rows: 63 pairs, rounded up to a multiple of 8
LOADS = {
    "spread over all devices": lambda rng: np.argsort(rng.random((T, 4 * E)))[:, :K],
    "all here": lambda rng: np.argsort(rng.random((T, E)))[:, :K] + E,
    "one expert here has every row": lambda rng: np.full((T, K), E + 2),
    "none here": lambda rng: np.full((T, K), 0),
}


def make_inputs(load: str, seed: int = 0):
    """Tokens, weights of experts and pairs, what to add to, and ids; the device holds experts E to 2E - 1 of 4E."""
    rng = np.random.default_rng(seed)
    shapes = ((T, H), (E, 2, I, H), (E, H, I), (T, K), (T, H))
    floats = [jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-1]), jnp.float32) for shape in shapes]
    return floats, jnp.asarray(LOADS[load](rng), jnp.int32)


def dense(tokens, w_gate_up, w_down, weights, base, ids):
    """All experts for all tokens, those that were not chosen weighing 0."""
    gate, up = (jnp.einsum("th,eih->tei", tokens, w_gate_up[:, part], precision="highest") for part in (0, 1))
    y = jnp.einsum("tei,ehi->teh", jax.nn.silu(gate) * up, w_down, precision="highest")
    chosen = (ids[:, :, None] == jnp.arange(E, 2 * E)) * weights[:, :, None]
    return base + jnp.einsum("tke,teh->th", chosen, y, precision="highest")


@partial(jax.jit, static_argnums=(0, 3, 4))
def out_and_gradients(function, floats, ids, chunk_rows=None, expected_rows=None):
    if chunk_rows is None:
        run = partial(function, ids=ids)
    else:
        plan = make_plan(ids, E, E)
        run = lambda *floats: function(*floats[:4], plan, floats[4], "silu", None, chunk_rows, expected_rows)  # noqa: E731
    out, pull = jax.vjp(run, *floats)
    return out, pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))


@pytest.mark.parametrize(
    ("chunk_rows", "expected_rows"),
    [(64, None), (24, None), (16, None), (24, 16), (8, 8)],
    ids=["one chunk", "three of tokens", "five of tokens, the last two overlap", "three of rows", "eight of rows"],
)
@pytest.mark.parametrize("load", LOADS)
def test_outputs_and_gradients_equal_the_dense_definition(load, chunk_rows, expected_rows):
    floats, ids = make_inputs(load)
    out, gradients = out_and_gradients(run_experts, floats, ids, chunk_rows, expected_rows)
    expected_out, expected_gradients = out_and_gradients(dense, floats, ids)
    np.testing.assert_allclose(out, expected_out, rtol=1e-5, atol=2e-6)
    for name, got, expected in zip(
        ("tokens", "w_gate_up", "w_down", "weights", "base"), gradients, expected_gradients, strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=5e-6, err_msg=name)


def test_no_tokens_give_no_output():
    floats, _ = make_inputs("all here")
    tokens, w_gate_up, w_down, weights, base = floats
    plan = make_plan(jnp.zeros((0, K), jnp.int32), E, E)
    assert run_experts(tokens[:0], w_gate_up, w_down, weights[:0], plan, base[:0], "silu", None, 8).shape == (0, H)


@pytest.mark.parametrize(("chunk_rows", "expected_rows"), [(64, None), (24, None), (24, 16)])
def test_without_a_base_the_sum_begins_with_zeros_and_is_rounded_once(chunk_rows, expected_rows):
    floats, ids = make_inputs("spread over all devices")
    plan = make_plan(ids, E, E)
    out = run_experts(*floats[:4], plan, None, "silu", None, chunk_rows, expected_rows)
    np.testing.assert_allclose(out, dense(*floats[:4], 0, ids), rtol=1e-5, atol=2e-6)
    halved = [value.astype(jnp.bfloat16) for value in floats[:3]]
    rounded = run_experts(*halved, floats[3], plan, floats[4], "silu", None, chunk_rows, expected_rows)
    assert rounded.dtype == jnp.bfloat16


def temporaries(
    tokens: int,
    top_k: int,
    chunk_rows: int,
    expected_rows: int | None,
    *,
    gradient: bool,
    hidden: int = 256,
    inner: int = 128,
) -> int:
    """Bytes, by the compiled program's own account, in float32."""
    shapes = ((tokens, hidden), (E, 2, inner, hidden), (E, hidden, inner), (tokens, top_k))
    floats = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def run(ids, *floats):
        plan = make_plan(ids, 0, E)
        return run_experts(*floats, plan, None, "silu", "xla", chunk_rows, expected_rows)

    def pull(ids, d_out, *floats):
        return jax.vjp(partial(run, ids), *floats)[1](d_out)

    ids = jax.ShapeDtypeStruct((tokens, top_k), jnp.int32)
    compiled = (
        jax.jit(pull).lower(ids, floats[0], *floats) if gradient else jax.jit(run).lower(ids, *floats)
    ).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("chunk_rows", "expected_rows"), [(16384, None), (8192, None), (4096, None), (4096, 1024), (1024, 1024)]
)  # chunks of tokens, chunks of rows
def test_memory_stays_within_the_formulas_of_the_docs(chunk_rows, expected_rows):
    tokens, top_k, hidden, inner = 2048, 8, 256, 128
    pairs = 4 * 4 * tokens * top_k + 2**16
    forward = 4 * chunk_rows * (2 * hidden + inner) + 4 * tokens * hidden + pairs
    assert temporaries(tokens, top_k, chunk_rows, expected_rows, gradient=False) <= forward
    weights = 4 * 3 * E * inner * hidden
    backward = 4 * chunk_rows * (4 * hidden + 6 * inner) + 4 * 2 * tokens * hidden + weights + pairs
    assert temporaries(tokens, top_k, chunk_rows, expected_rows, gradient=True) <= backward


def test_the_default_holds_any_load_where_that_is_small_and_is_bounded_where_it_is_not():
    of = partial(default_chunk_rows, hidden_size=5120, intermediate_size=1536, itemsize=2)
    assert of(4099) == 4104
    assert of(8192 * 6) == 8192 * 6  # no loop
    assert of(32768 * 6) == 2**31 // (2 * (2 * 5120 + 1536)) // 8 * 8 + 8
