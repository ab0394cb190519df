"""What the layer's benchmark asks of a rank: loads, and floors checked by hand and against those that the project aims at."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import layers
from bench.layers import EP, LOADS, MODELS, TP, WHOLE, Case
from jax_epmoe.config import MoEConfig
from jax_epmoe.moe.router import route

RATES = {"dense_tflops": 800, "copy_gbs": 2940}


@pytest.fixture
def tiny(monkeypatch):
    """16 experts, 2 a token; H 8, I 16."""
    monkeypatch.setitem(MODELS, "tiny", MoEConfig(8, 16, 16, 2))
    return Case("tiny", EP, 4)


def routed(model: str, tokens: int, load: str) -> np.ndarray:
    """The ids that the model's own routing gives."""
    config = MODELS[model]
    x = jnp.asarray(layers.logits(config, tokens, load), jnp.bfloat16)
    router = jnp.eye(config.num_experts), jnp.zeros(config.num_experts) if config.correction_bias else None
    return np.asarray(jax.jit(route, static_argnums=3)(x, *router, config)[1])


def test_a_floor_by_hand(tiny):
    # Rank 1 holds experts 2 and 3: 3 rows, of tokens 0 (twice) and 2; both experts are used.
    ids = np.array([[2, 3], [0, 15], [4, 2], [7, 8]])
    np.testing.assert_array_equal(tiny.group_sizes(ids, 1), [2, 1])
    up = 2 * (2 * 8 + 2 * 32 * 8 + 3 * 16) + 4 * 3  # tokens, weights, hidden; the index
    down = 2 * (3 * 16 + 2 * 8 * 16 + 3 * 8)
    combine = 2 * (3 * 8 + 4 * 8)  # rows in, tokens out
    assert tiny.floor_us(ids, 1, dense_tflops=1e9, copy_gbs=1) == pytest.approx((up + down + combine) / 1e3)
    flops = 2 * 3 * 8 * 32 + 2 * 3 * 16 * 8
    assert tiny.floor_us(ids, 1, dense_tflops=1e-3, copy_gbs=1e9) == pytest.approx(flops / 1e3)
    assert Case("tiny", EP, 4).busiest_rank(ids) == 1


def test_a_quantised_floor_by_hand(tiny):
    case = dataclasses.replace(tiny, quantize="fp8-channel")
    ids = np.array([[2, 3], [0, 15], [4, 2], [7, 8]])
    assert case.weight_bytes == 2 * (3 * 16 * 8 + 4 * (16 + 16 + 8))
    up = (
        2 * (8 + 4) + 2 * (32 * 8 + 4 * 32) + 3 * (16 + 4) + 4 * 3
    )  # tokens, weights, hidden, each with scales; the index
    down = 3 * (16 + 4) + 2 * (8 * 16 + 4 * 8) + 2 * 3 * 8
    combine = 2 * (3 * 8 + 4 * 8)
    assert case.floor_us(ids, 1, dense_tflops=1e9, copy_gbs=1) == pytest.approx((up + down + combine) / 1e3)


def test_layouts_that_cut_blocks_are_left_out():
    assert layers.layouts("qwen3-30b-a3b", "fp8-channel") == (EP, TP, WHOLE)
    assert layers.layouts("qwen3-30b-a3b", "fp8-block") == (EP, WHOLE)  # 768 / 8 = 96
    assert layers.layouts("deepseek-v3", "fp8-block") == (EP, TP)  # 2048 / 8 = 256


@pytest.mark.parametrize(
    ("model", "layout", "tokens", "goal_us"),
    [
        ("deepseek-coder-v2", EP, 8192, 424),
        ("qwen3-30b-a3b", WHOLE, 8192, 876),
        ("olmoe-1b-7b", WHOLE, 8192, 1134),
        ("deepseek-coder-v2", EP, 64, 315),
        ("qwen3-30b-a3b", WHOLE, 64, 405),
        ("olmoe-1b-7b", WHOLE, 64, 271),
    ],
)
def test_floors_are_those_of_the_goals(model, layout, tokens, goal_us):
    ids = routed(model, tokens, "balanced")
    assert Case(model, layout, tokens).floor_us(ids, 0, **RATES) == pytest.approx(goal_us, rel=0.03)


def test_a_rank_of_either_kind_holds_as_much(tiny):
    assert (tiny.experts, tiny.inner, tiny.weight_bytes) == (2, 16, 2 * 3 * 2 * 16 * 8)
    other = Case("tiny", TP, 4)
    assert (other.experts, other.inner, other.weight_bytes) == (16, 2, tiny.weight_bytes)
    whole = Case("tiny", WHOLE, 4)
    assert (whole.experts, whole.inner, whole.weight_bytes) == (16, 16, 8 * tiny.weight_bytes)
    assert Case("deepseek-coder-v2", EP, 64).shared_inner == Case("deepseek-coder-v2", TP, 64).shared_inner == 384


@pytest.mark.parametrize("model", list(MODELS))
def test_loads_are_what_their_names_say(model):
    tokens, config = 320, MODELS[model]
    counts = {load: np.bincount(routed(model, tokens, load).ravel(), minlength=config.num_experts) for load in LOADS}
    assert np.ptp(counts["balanced"]) <= 1, counts["balanced"]
    assert counts["zipf"].max() > 3 * counts["zipf"].mean() or model == "mixtral-8x7b", counts["zipf"]
    assert counts["zipf"].max() > 1.5 * counts["zipf"].mean()
    local = config.num_experts // layers.RANKS
    assert counts["worst"][:local].sum() == tokens * min(config.top_k, local)
    np.testing.assert_array_equal(routed(model, tokens, "zipf"), routed(model, tokens, "zipf"))
