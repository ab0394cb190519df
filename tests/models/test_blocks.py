"""Norm, embedding, head and dense MLP against NumPy, on meshes that do not divide their sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import lively, numpy_norm, relative_error

from jax_epmoe import make_mesh
from jax_epmoe.models.blocks import DenseMLP, Embedding, Head, RMSNorm

VOCAB, HIDDEN, INNER = 13, 10, 19
MESHES = [(1, 1, 1), (4, 2, 1), (8, 8, 1), (2, 1, 4)]
on_meshes = pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "x".join(map(str, sizes)))


def make(cls, sizes, *args, **kwargs):
    return lively(cls, *args, mesh=make_mesh(*sizes), **kwargs)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("size", "eps"), [(10, 1e-6), (7, 0.3)])
def test_rms_norm_is_its_formula(size, eps):
    norm = make(RMSNorm, (2, 1, 1), size, eps)
    x = random(2, 3, size)
    want = numpy_norm(x.astype(np.float64), np.asarray(norm.scale[...]), eps)
    np.testing.assert_allclose(norm(jnp.asarray(x)), want, rtol=1e-5)


def test_rms_norm_computes_in_float32_and_rounds_once():
    norm = make(RMSNorm, (1, 1, 1), 4096, 1e-6, dtype=jnp.bfloat16)
    x = jnp.asarray(100 * random(4, 4096), jnp.bfloat16)
    want = numpy_norm(np.asarray(x, np.float64), np.asarray(norm.scale[...], np.float64), 1e-6)
    got = norm(x)
    assert got.dtype == jnp.bfloat16
    assert np.mean(np.asarray(got) == want.astype(jnp.bfloat16)) > 0.999


@on_meshes
def test_embedding_takes_the_tokens_rows(sizes):
    embed = make(Embedding, sizes, VOCAB, HIDDEN)
    tokens = np.arange(4 * VOCAB, dtype=np.int32).reshape(4, VOCAB) % VOCAB
    got = jax.jit(embed)(tokens)
    np.testing.assert_array_equal(got, np.asarray(embed.table[...])[tokens])


@on_meshes
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_logits_are_the_product_with_every_row_of_the_vocabulary_and_no_padding(sizes, tied):
    head = make(Embedding if tied else Head, sizes, VOCAB, HIDDEN)
    weight = np.asarray((head.table if tied else head.weight)[...], np.float64)
    assert weight.shape[0] % sizes[0] == 0
    assert not weight[VOCAB:].any()
    for shape in [(4, HIDDEN), (4, 3, HIDDEN)]:
        hidden = random(*shape)
        got = jax.jit(head.logits)(hidden)
        assert (got.shape, got.dtype) == ((*shape[:-1], VOCAB), jnp.float32)
        assert relative_error(got, hidden @ weight[:VOCAB].T) < 1e-6


def test_logits_of_bfloat16_states_are_float32_sums():
    head = make(Head, (4, 2, 1), VOCAB, 512, dtype=jnp.bfloat16)
    hidden = jnp.asarray(random(2, 512), jnp.bfloat16)
    want = np.asarray(hidden, np.float64) @ np.asarray(head.weight[...], np.float64)[:VOCAB].T
    assert relative_error(head.logits(hidden), want) < 1e-5


@on_meshes
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_dense_mlp_is_its_formula_on_every_mesh(sizes, activation):
    mlp = make(DenseMLP, sizes, HIDDEN, INNER, activation=activation)
    gate, up = np.asarray(mlp.w_gate_up[...], np.float64)
    x = random(4, 3, HIDDEN)
    g = x @ gate.T
    act = (
        g / (1 + np.exp(-g))
        if activation == "silu"
        else g / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
    )
    want = (act * (x @ up.T)) @ np.asarray(mlp.w_down[...], np.float64).T
    assert relative_error(jax.jit(mlp)(x), want) < 1e-6
