"""`route` against each model's published routing, written out token by token in NumPy float64; and `MoEConfig`."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_epmoe import MoEConfig
from jax_epmoe.moe import router
from jax_epmoe.moe.router import route

H, E = 24, 16
BASE = MoEConfig(hidden_size=H, intermediate_size=1, num_experts=E, top_k=4)
VARIANTS = {
    "mixtral": {"top_k": 2, "norm_topk_prob": True},
    "olmoe": {},
    "top_1": {"top_k": 1},
    "every_expert": {"top_k": E},
    "deepseek_v2": {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
    "deepseek_v2_one_group": {"n_group": 4, "topk_group": 1, "norm_topk_prob": True},
    "deepseek_v3": {
        "scoring": "sigmoid", "correction_bias": True, "n_group": 4, "topk_group": 2, "group_score": "top2_sum",
        "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    },
    "deepseek_v3_pairs": {"scoring": "sigmoid", "correction_bias": True, "n_group": 8, "topk_group": 2, "group_score": "top2_sum"},
    "sigmoid_all_groups": {"scoring": "sigmoid", "n_group": 4, "topk_group": 4, "group_score": "top2_sum"},
    "softmax_with_bias": {"correction_bias": True, "norm_topk_prob": True},
    "sigmoid_with_bias_and_no_groups": {"scoring": "sigmoid", "correction_bias": True},
}  # fmt: skip


def best_first(values: np.ndarray, count: int) -> list[int]:
    """Indices of the largest values; of equal ones, the lower index first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def route_one_token(logits: np.ndarray, bias: np.ndarray, config: MoEConfig) -> tuple[list[float], list[int]]:
    if config.scoring == "softmax":
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
    else:
        scores = 1 / (1 + np.exp(-logits))
    choice = scores + bias
    groups = np.split(np.arange(len(logits)), config.n_group)
    if config.group_score == "max":
        group_scores = np.array([max(choice[group]) for group in groups])
    else:
        group_scores = np.array([sum(sorted(choice[group])[-2:]) for group in groups])
    eligible = sorted(e for g in best_first(group_scores, config.topk_group) for e in groups[g])
    ids = [eligible[i] for i in best_first(choice[eligible], config.top_k)]
    weights = scores[ids]
    if config.norm_topk_prob:
        weights = weights / weights.sum()
    return list(weights * config.routed_scaling_factor), ids


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_published_routing(variant, dtype):
    config = dataclasses.replace(BASE, **VARIANTS[variant])
    rng = np.random.default_rng(len(variant))
    x = jnp.asarray(rng.normal(size=(200, H)), dtype)
    router_weight = rng.normal(size=(E, H)).astype(np.float32) / 4
    bias = rng.normal(size=E).astype(np.float32) / 2 if config.correction_bias else np.zeros(E, np.float32)
    weights, ids = jax.jit(route, static_argnames="config")(
        x, router_weight, bias if config.correction_bias else None, config=config
    )
    assert (weights.dtype, ids.dtype) == (jnp.float32, jnp.int32)
    logits = np.asarray(x).astype(np.float64) @ router_weight.astype(np.float64).T
    expected = [route_one_token(row, bias.astype(np.float64), config) for row in logits]
    np.testing.assert_array_equal(ids, [ids for _, ids in expected])
    np.testing.assert_allclose(weights, [weights for weights, _ in expected], rtol=2e-5)


def route_scores(scores: list[list[float]], bias: list[float] | None = None, **changes):
    """Softmax routing whose scores are the given ones, in proportion: the router is the identity, x their logarithm."""
    experts = len(scores[0])
    config = MoEConfig(hidden_size=experts, intermediate_size=1, num_experts=experts, **changes)
    return route(jnp.log(jnp.array(scores)), jnp.eye(experts), None if bias is None else jnp.array(bias), config)


def test_an_example_by_hand():
    # Scores 1/15, 2/15, 4/15, 8/15: the best two are experts 3 and 2.
    scores = [[1.0, 2.0, 4.0, 8.0], [8.0, 1.0, 2.0, 4.0]]
    weights, ids = route_scores(scores, top_k=2)
    np.testing.assert_array_equal(ids, [[3, 2], [0, 3]])
    np.testing.assert_allclose(weights, [[8 / 15, 4 / 15]] * 2, rtol=1e-6)
    weights, ids = route_scores(scores, top_k=2, norm_topk_prob=True, routed_scaling_factor=3.0)
    np.testing.assert_array_equal(ids, [[3, 2], [0, 3]])
    np.testing.assert_allclose(weights, [[2.0, 1.0]] * 2, rtol=1e-6)


def test_an_example_with_groups_by_hand():
    # Groups (6, 1), (5, 4), (3, 1) of 20: the best expert lies in the first, the best two together in the second.
    scores = [[6.0, 1.0, 5.0, 4.0, 3.0, 1.0]]
    groups = {"top_k": 2, "n_group": 3, "topk_group": 1}
    weights, ids = route_scores(scores, **groups, group_score="max")
    np.testing.assert_array_equal(ids, [[0, 1]])
    np.testing.assert_allclose(weights, [[0.3, 0.05]], rtol=1e-6)
    weights, ids = route_scores(scores, **groups, group_score="top2_sum")
    np.testing.assert_array_equal(ids, [[2, 3]])
    np.testing.assert_allclose(weights, [[0.25, 0.2]], rtol=1e-6)


def test_the_correction_bias_chooses_but_does_not_weigh():
    # Scores 0.1, 0.2, 0.3, 0.4; with the bias 1.1, 0.2, 0.3, -0.6.
    weights, ids = route_scores([[1.0, 2.0, 3.0, 4.0]], bias=[1.0, 0.0, 0.0, -1.0], top_k=2, correction_bias=True)
    np.testing.assert_array_equal(ids, [[0, 2]])
    np.testing.assert_allclose(weights, [[0.1, 0.3]], rtol=1e-6)


def test_ties_go_to_the_lower_id():
    _, ids = route_scores([[1.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]], top_k=2)
    np.testing.assert_array_equal(ids, [[1, 2], [0, 1]])
    _, ids = route_scores([[1.0, 3.0, 3.0, 1.0, 3.0, 1.0]], top_k=2, n_group=3, topk_group=1)
    np.testing.assert_array_equal(ids, [[1, 0]])


@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
def test_a_negative_correction_bias_never_lets_an_ineligible_expert_in(group_score):
    """Where ineligible experts are masked with 0, as some published code does, they beat experts of negative choice score."""
    changes = {"scoring": "sigmoid", "correction_bias": True, "n_group": 4, "topk_group": 1, "group_score": group_score}
    config = dataclasses.replace(BASE, **changes)
    x = np.random.default_rng(0).normal(size=(50, H)).astype(np.float32)
    router_weight = np.random.default_rng(1).normal(size=(E, H)).astype(np.float32)
    bias = np.linspace(-12, -10, E)
    _, ids = route(x, router_weight, jnp.asarray(bias, jnp.float32), config)
    logits = x.astype(np.float64) @ router_weight.astype(np.float64).T
    expected = [route_one_token(row, bias, config)[1] for row in logits]
    assert len({row[0] for row in expected}) > 1, "too easy: one choice for all"
    np.testing.assert_array_equal(ids, expected)


def test_sigmoids_that_all_underflow_make_no_nan():
    config = dataclasses.replace(BASE, scoring="sigmoid", norm_topk_prob=True)
    weights, _ = route(jnp.ones((1, H)), jnp.full((E, H), -100.0), None, config)
    assert np.isfinite(weights).all(), weights


@pytest.mark.parametrize("variant", ["olmoe", "deepseek_v3"])
def test_no_tokens_are_no_trouble(variant):
    config = dataclasses.replace(BASE, **VARIANTS[variant])
    weights, ids = route(jnp.ones((0, H)), jnp.ones((E, H)), None, config)
    assert weights.shape == ids.shape == (0, config.top_k)


def test_no_gradient_reaches_the_correction_bias():
    config = dataclasses.replace(BASE, **VARIANTS["deepseek_v3"])
    x = np.random.default_rng(0).normal(size=(5, H)).astype(np.float32)
    router_weight = np.random.default_rng(1).normal(size=(E, H)).astype(np.float32)
    gradient = jax.grad(lambda bias: route(x, router_weight, bias, config)[0].sum())(jnp.zeros(E))
    np.testing.assert_array_equal(gradient, np.zeros(E))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {name: bad}) for name in ("hidden_size", "intermediate_size", "num_experts", "top_k") for bad in (0, -1, 2.0)),
        ("activation", {"activation": "relu"}),
        ("scoring", {"scoring": "tanh"}),
        ("group_score", {"group_score": "mean"}),
        ("n_group", {"n_group": 3}),
        ("n_group", {"n_group": 0}),
        ("n_group", {"n_group": 16, "topk_group": 16, "group_score": "top2_sum"}),
        ("topk_group", {"n_group": 4, "topk_group": 5}),
        ("topk_group", {"topk_group": 0}),
        ("top_k", {"top_k": 17}),
        ("top_k", {"top_k": 5, "n_group": 4, "topk_group": 1}),
        ("shared_intermediate_size", {"shared_intermediate_size": -1}),
    ],
)  # fmt: skip
def test_a_bad_config_is_refused_by_name_in_one_line(name, changes):
    with pytest.raises(ValueError, match=f"^{name} is .*; it should be ") as error:
        dataclasses.replace(BASE, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bits", [7, 23], ids=["weights from bfloat16", "weights in float32"])
def test_logits_of_many_tokens_in_bfloat16_are_those_of_float32(bits):
    x = jax.random.normal(jax.random.key(0), (router._MANY_TOKENS, 96), jnp.bfloat16)
    w = jax.lax.reduce_precision(jax.random.normal(jax.random.key(1), (24, 96)), exponent_bits=8, mantissa_bits=bits)
    got = np.asarray(jax.jit(router._logits)(x, w), np.float64)
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    few = np.asarray(router._logits(x[:8], w), np.float64)
    assert np.linalg.norm(few - expected[:8]) < 1e-6 * np.linalg.norm(expected[:8])
    assert np.linalg.norm(got - expected) < (1e-6 if bits == 7 else 6e-6) * np.linalg.norm(expected)
    if bits == 7:
        kept = np.asarray(router._logits(x, w.astype(jnp.bfloat16)), np.float64)
        assert np.linalg.norm(kept - expected) < 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("biased", [False, True])
def test_on_hopper_the_kernel_chooses(biased, monkeypatch):
    scoring = {"scoring": "sigmoid", "correction_bias": True} if biased else {}
    config = dataclasses.replace(BASE, num_experts=64, **scoring)
    x, w, more_w = (jax.random.normal(jax.random.key(i), (n, H)) for i, n in enumerate((7, 64, 1032)))
    bias = jax.random.normal(jax.random.key(2), (64,)) if biased else None
    more = dataclasses.replace(config, num_experts=1032)
    more_bias = None if bias is None else jnp.zeros(1032)
    expected = [
        jax.value_and_grad(total_weight, (0, 1), has_aux=True)(x, w, bias, config),
        route(x, more_w, more_bias, more),
    ]
    calls = []

    def recorded(logits, bias, mask, config):
        assert mask is None
        calls.append(config.num_experts)
        choice = router._scores(logits, config) + (0 if bias is None else bias)
        ids = jax.lax.top_k(choice, config.top_k)[1]
        return router._weights_of(logits, ids, config), ids

    monkeypatch.setattr(router, "on_hopper", lambda: True)
    monkeypatch.setattr(router.route_hopper, "choose", recorded)
    got = [
        jax.value_and_grad(total_weight, (0, 1), has_aux=True)(x, w, bias, config),
        route(x, more_w, more_bias, more),
    ]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), got, expected)
    assert calls == [64]


def total_weight(x, w, bias, config):
    weights, ids = route(x, w, bias, config)
    return jnp.sum(weights * jnp.arange(config.top_k)), ids
