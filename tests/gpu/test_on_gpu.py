"""What must hold on a real GPU. Run with `EPMOE_TEST_GPU=1 python -m pytest tests/gpu`; skipped where there is none."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_epmoe as ep
from jax_epmoe.generate.engine import Engine
from jax_epmoe.generate.sampling import SamplingParams
from weights_convert import convert

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")

CHECKPOINTS = Path(__file__).parents[1] / "parity" / "checkpoints"


def relative_error(got, expected) -> float:
    got, expected = (np.asarray(a, np.float64) for a in (got, expected))
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "deepseek_v2_lite", "deepseek_v2"])
def test_float32_logits_and_greedy_text_are_transformers(name, tmp_path):
    convert(CHECKPOINTS / name, tmp_path / name, progress=False)
    model = ep.load_model(tmp_path / name, mesh=ep.make_mesh(), dtype=jnp.float32)
    expected = np.load(CHECKPOINTS / name / "expected.npz")
    graphdef, state = nnx.split(model)
    logits = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))(state, expected["tokens"])
    assert relative_error(logits, expected["logits"]) < 1e-4
    prompts = [
        row[:length].tolist() for row, length in zip(expected["prompts"], expected["prompt_lengths"], strict=True)
    ]
    sampling = SamplingParams(max_new_tokens=expected["greedy"].shape[1], ignore_eos=True)
    completions = Engine(model, prefill_chunk=16).generate(prompts, sampling)
    assert [c.token_ids for c in completions] == expected["greedy"].tolist()


def test_layer_and_its_gradients_in_bfloat16_follow_float32():
    config = ep.MoEConfig(hidden_size=256, intermediate_size=384, num_experts=16, top_k=4, shared_intermediate_size=128)
    mesh = ep.make_mesh()
    x = jax.random.normal(jax.random.key(1), (512, 256), jnp.float32)
    precise = ep.EPMoE(config, mesh=mesh, dtype=jnp.float32, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(precise)

    def loss(state, x):
        y = nnx.merge(graphdef, state)(x)
        return jnp.sum(jnp.square(y.astype(jnp.float32))), y

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    # The same (rounded) numbers in both, so that both choose the same experts.
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), (state, x))
    (_, expected), expected_grads = run(*rounded)
    keep = ("router",)
    halved = nnx.map_state(lambda path, v: v if path[0] in keep else v.replace(v[...].astype(jnp.bfloat16)), rounded[0])
    (_, got), got_grads = run(halved, rounded[1].astype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    assert relative_error(got, expected) < 1e-2
    for g, e in zip(jax.tree.leaves(got_grads), jax.tree.leaves(expected_grads), strict=True):
        assert relative_error(g, e) < 3e-2


def test_rows_past_two_to_the_31_elements_are_read():
    rows, k, n = 2**20 + 4096, 2048, 64
    x = jax.random.normal(jax.random.key(0), (rows, k), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (2, n, k), jnp.bfloat16)
    sizes = jnp.array([rows - 128, 128], jnp.int32)
    out = jax.jit(ep.grouped_gemm)(x, w, sizes)
    tail = np.asarray(x[-256:], np.float32)
    expected = np.concatenate(
        [tail[:128] @ np.asarray(w[0], np.float32).T, tail[128:] @ np.asarray(w[1], np.float32).T]
    )
    assert relative_error(out[-256:], expected) < 5e-3
