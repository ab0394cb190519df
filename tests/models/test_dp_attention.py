"""Data-parallel attention: sequences dealt over the tensor-parallel group; the same numbers, other collectives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from small_models import DEEPSEEK_LIKE, KINDS, MIXTRAL_LIKE, OLMOE_LIKE, compiled, decoder, relative_error, tokens
from test_collectives import collectives

from jax_epmoe.generate import Engine, SamplingParams
from jax_epmoe.models.blocks import rope_table

TOLERANCE = 1e-5
MESHES = [(2, 1, 1), (4, 2, 1), (8, 8, 1), (2, 2, 2)]
each_mesh = pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "tp{}-ep{}-dp{}".format(*sizes))
each_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


@each_mesh
@each_kind
def test_logits_and_load_are_those_of_one_device(config, sizes):
    text = tokens(8, 5)
    logits, load = compiled(decoder(config, *sizes, dp_attention=True), type(decoder(config)).with_load)(text)
    expected, expected_load = compiled(decoder(config), type(decoder(config)).with_load)(text)
    assert relative_error(logits, expected) < TOLERANCE
    np.testing.assert_array_equal(load, expected_load)


@each_kind
def test_a_ragged_batch_with_a_cache_gives_the_logits_of_the_whole_sequences(config):
    """Pieces of 4 tokens, then single ones; padding rows and tokens take no experts."""
    model = decoder(config, 4, 2, dp_attention=True)
    text, lengths = tokens(8, 7), np.array([7, 6, 5, 7, 1, 2, 7, 3])

    def step(model, tokens, start, cache, num_tokens):
        hidden, cache = model.hidden(tokens, start, cache, num_tokens)
        return model.logits(hidden), cache

    run, cache, pieces = compiled(model, step), model.init_cache(8, 8), []
    assert all(len(array.sharding.device_set) == 4 and array.sharding.spec[0] for layer in cache for array in layer)
    for start, length in ((0, 4), (4, 1), (5, 1), (6, 1)):
        real = np.clip(lengths - start, 0, length).astype(np.int32)
        logits, cache = run(text[:, start : start + length], np.full(8, start, np.int32), cache, real)
        pieces.append(logits)
    expected = compiled(decoder(config), type(model).__call__)(text)
    inside = np.arange(7) < lengths[:, None]
    assert relative_error(np.concatenate(pieces, axis=1)[inside], np.asarray(expected)[inside]) < TOLERANCE


@pytest.mark.parametrize(
    "config", [pytest.param(MIXTRAL_LIKE, marks=pytest.mark.slow), DEEPSEEK_LIKE], ids=["mixtral_like", "deepseek_like"]
)
def test_gradients_are_those_of_one_device(config):
    text = tokens(4, 3)

    def gradients(model):
        graphdef, state = nnx.split(model)

        def loss(state):
            logits = nnx.merge(graphdef, state)(text)
            return jnp.sum(jnp.sin(logits) * jnp.cos(jnp.arange(logits.size, dtype=jnp.float32)).reshape(logits.shape))

        return nnx.to_flat_state(jax.jit(jax.grad(loss))(state))

    plain = dict(gradients(decoder(config)))
    for name, gradient in gradients(decoder(config, 4, 2, dp_attention=True)):
        want = np.asarray(plain[name].get_value())
        got = np.asarray(gradient.get_value())[tuple(slice(n) for n in want.shape)]
        assert relative_error(got, want) < 1e-4, name


@pytest.mark.parametrize("cached", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize(
    ("config", "layer"),
    [(MIXTRAL_LIKE, 0), (OLMOE_LIKE, 0), (DEEPSEEK_LIKE, 0), (DEEPSEEK_LIKE, 1)],
    ids=["mixtral_like", "olmoe_like", "deepseek_like_dense", "deepseek_like"],
)
def test_a_layer_gathers_once_and_scatters_once(config, layer, cached):
    model = decoder(config, 4, 2, 2, dp_attention=True)
    length, cache = (1, model.init_cache(8, 8)[layer]) if cached else (6, None)
    graphdef, state = nnx.split(model.layers[layer])
    dim = getattr(config.attention, "head_dim", None) or config.attention.qk_rope_head_dim

    def call(state, x, start, cache):
        positions = start[:, None] + jnp.arange(length)
        return nnx.merge(graphdef, state)(x, rope_table(config.rope, dim, positions), positions, None, cache)[:2]

    spec = P(("data", "expert", "tensor"))
    x, start = (
        jax.device_put(value, jax.NamedSharding(model.mesh, spec))
        for value in (jnp.zeros((8, length, config.hidden_size)), np.zeros(8, np.int32))
    )
    found = collectives(call, state, x, start, cache)
    # The CPU's compiler writes a reduce-scatter as an all-reduce and a slice where it likes; nothing else is allowed.
    assert found.pop("all-gather") in (1, 2)  # x, and the mask if it is not folded
    assert sum(found.values()) == 1, found
    assert set(found) <= {"reduce-scatter", "all-reduce"}


@pytest.mark.parametrize(
    "config", [pytest.param(MIXTRAL_LIKE, marks=pytest.mark.slow), DEEPSEEK_LIKE], ids=["mixtral_like", "deepseek_like"]
)
def test_the_engine_says_the_same(config):
    prompts = [[7, 3, 9], [n % 29 for n in range(20)], [20, 21, 22, 23], [11] * 12, [5]]
    params = SamplingParams(max_new_tokens=6)
    config = config.replace(max_position_embeddings=256)
    alone = Engine(decoder(config), max_batch_size=8, prefill_chunk=16).generate(prompts, params)
    split = decoder(config, 4, 4, dp_attention=True)
    assert Engine(split, max_batch_size=3, prefill_chunk=16).generate(prompts, params) == alone


def test_a_batch_that_does_not_divide_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^batch_size is 6; it should be a multiple of dp_size \* tp_size \(4\)$"):
        decoder(MIXTRAL_LIKE, 4, 2, dp_attention=True).init_cache(6, 8)
