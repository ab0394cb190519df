"""What the compiled programs send between devices: two all-reduces a layer, and one exchange each to begin and to end."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import (
    DEEPSEEK_LIKE,
    FAST_COMPILE,
    GPT_OSS_LIKE,
    KINDS,
    MIXTRAL_LIKE,
    OLMOE_LIKE,
    QWEN2_LIKE,
    decoder,
    tokens,
)

from jax_epmoe.models.blocks import rope_table

COLLECTIVE = re.compile(
    r"= \S.*? (all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter|collective-permute|collective-broadcast)"
    r"(?:-start)?\("
)
MESHES = [(8, 8, 1), (8, 2, 1), (4, 2, 2)]


def collectives(call, *args) -> Counter:
    """How many of each kind the compiled `call(*args)` has."""
    text = jax.jit(call).lower(*args).compile(compiler_options=FAST_COMPILE).as_text()
    return Counter(match[1] for match in COLLECTIVE.finditer(text))


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "x".join(map(str, sizes)))
@pytest.mark.parametrize("cached", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize(
    ("config", "layer", "count"),
    [
        (MIXTRAL_LIKE, 0, 2),
        (DEEPSEEK_LIKE, 1, 2),
        (DEEPSEEK_LIKE, 0, 2),
        (QWEN2_LIKE, 0, 2),
        pytest.param(GPT_OSS_LIKE, 0, 2, marks=pytest.mark.slow),
        (OLMOE_LIKE, 0, 3),  # the mean square of its QK norm runs over all heads
    ],
    ids=["mixtral_like", "deepseek_like", "deepseek_like_dense", "qwen2_like", "gpt_oss_like", "olmoe_like"],
)
def test_a_layer_has_two_all_reduces_and_no_other_collective(config, layer, count, cached, sizes):
    model = decoder(config, *sizes)
    length, cache = (1, model.init_cache(4, 8)[layer]) if cached else (6, None)
    graphdef, state = nnx.split(model.layers[layer])

    def call(state, x, start, cache):
        positions = start[:, None] + jnp.arange(length)
        rope, mask = rope_table(config.rope, config.attention.rope_dim, positions), jnp.ones((4, length), bool)
        return nnx.merge(graphdef, state)(x, rope, positions, mask, cache)[:2]

    x = jnp.zeros((4, length, config.hidden_size))
    if sizes[2] > 1:  # as the embedding leaves them
        x = jax.device_put(x, jax.NamedSharding(model.mesh, jax.P("data")))
    assert collectives(call, state, x, np.zeros(4, np.int32), cache) == {"all-reduce": count}


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_a_decode_step_adds_one_all_reduce_to_embed_and_one_all_gather_of_logits(config):
    model = decoder(config, 4, 2, 2)
    graphdef, state = nnx.split(model)

    def step(state, tokens, start, cache, num_tokens):
        model = nnx.merge(graphdef, state)
        hidden, cache = model.hidden(tokens, start, cache, num_tokens)
        return model.logits(hidden), cache

    a_layer = 3 if config is OLMOE_LIKE else 2
    found = collectives(step, state, tokens(4, 1), np.zeros(4, np.int32), model.init_cache(4, 8), np.ones(4, np.int32))
    assert found == {"all-reduce": 1 + a_layer * config.num_layers, "all-gather": 1}
