import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_epmoe.generate.sampling import (
    SamplingMode,
    SamplingParams,
    cheapest_mode,
    log_probabilities,
    penalize,
    request_keys,
    sample,
)

B, V = 4, 23
draw = jax.jit(sample, static_argnames="method")
keys_of = jax.jit(request_keys)

# Few distinct values, so that rows hold ties.
logits_strategy = st.lists(st.integers(-6, 6), min_size=B * V, max_size=B * V).map(
    lambda values: np.array(values, np.float32).reshape(B, V)
)


def rows(value, dtype):
    return np.broadcast_to(np.array(value, dtype), (B,)).copy()


def call(logits, temperature=1.0, top_k=0, top_p=1.0, seed=0, index=range(B), step=0, method="filtered", min_p=0.0):
    keys = keys_of(rows(seed, np.uint32), rows(index, np.uint32))
    columns = rows(temperature, np.float32), rows(top_k, np.int32), rows(top_p, np.float32), rows(min_p, np.float32)
    return np.asarray(draw(logits, *columns, keys, rows(step, np.int32), method=method))


def ranked(row):
    """Ids, likeliest first; of equals, the lowest first."""
    return np.argsort(-row, kind="stable")


@settings(max_examples=25, deadline=None)
@given(logits_strategy, st.integers(0, 2**32 - 1), st.sampled_from(["greedy", "filtered"]))
def test_temperature_0_is_the_lowest_of_the_likeliest_ids(logits, seed, method):
    np.testing.assert_array_equal(call(logits, 0.0, 3, 0.5, seed, method=method), logits.argmax(-1))


@settings(max_examples=40, deadline=None)
@given(logits_strategy, st.lists(st.integers(1, V + 5), min_size=B, max_size=B), st.integers(0, 2**32 - 1))
def test_top_k_chooses_among_the_k_likeliest(logits, top_k, seed):
    chosen = call(logits, 5.0, top_k, 1.0, seed)
    for row, k, token in zip(logits, top_k, chosen, strict=True):
        assert token in ranked(row)[:k]


@settings(max_examples=40, deadline=None)
@given(logits_strategy, st.floats(0.01, 0.999), st.floats(0.2, 5.0), st.integers(0, V), st.integers(0, 2**32 - 1))
def test_top_p_chooses_among_the_fewest_likeliest_that_reach_p_of_what_top_k_left(
    logits, top_p, temperature, top_k, seed
):
    chosen = call(logits, temperature, top_k, top_p, seed)
    for row, token in zip(logits.astype(np.float64) / np.float32(temperature), chosen, strict=True):
        order = ranked(row)[: top_k or V]
        probability = np.exp(row[order] - row.max())
        before = np.cumsum(probability) / probability.sum() - probability / probability.sum()
        assert token in order[before < top_p + 1e-5]


def test_top_k_1_and_a_tiny_top_p_and_a_tiny_temperature_are_greedy():
    logits = np.random.default_rng(0).normal(size=(B, V)).astype(np.float32)
    for kwargs in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-30}, {"temperature": 1e-30, "top_p": 0.5}):
        np.testing.assert_array_equal(call(logits, **kwargs), logits.argmax(-1), err_msg=str(kwargs))


def test_draws_have_the_softmax_of_the_logits_as_their_frequencies():
    logits = np.tile(np.array([2.0, 1.0, 0.0, -1.0], np.float32), (B, 1))
    keys = keys_of(rows(7, np.uint32), np.arange(B, dtype=np.uint32))
    one = functools.partial(sample, method="filtered")
    columns = (
        rows(0.8, np.float32),
        rows([0, 3, 0, 2], np.int32),
        rows([1, 1, 0.95, 1], np.float32),
        rows(0, np.float32),
    )
    drawn = jax.jit(jax.vmap(lambda step: one(logits, *columns, keys, jnp.full(B, step))))(np.arange(5000))
    weights = np.exp(np.array([2.0, 1.0, 0.0, -1.0]) / 0.8)
    for row, kept in enumerate([4, 3, 3, 2]):  # sums: 0.72, 0.92, 0.98, 1
        frequency = np.bincount(np.asarray(drawn)[:, row], minlength=4) / 5000
        np.testing.assert_allclose(frequency, [*(weights[:kept] / weights[:kept].sum()), *[0] * (4 - kept)], atol=0.03)


@settings(max_examples=25, deadline=None)
@given(logits_strategy, st.permutations(range(B)), st.integers(0, 2**32 - 1))
def test_a_row_does_not_depend_on_the_others_or_on_its_place(logits, order, seed):
    order = list(order)
    top_k, top_p, temperature = np.array([0, 3, 0, 5]), np.array([1, 1, 0.7, 0.9]), np.array([1.0, 0.5, 2.0, 0.0])
    alone = call(logits, temperature, top_k, top_p, seed, range(B))
    shuffled = call(logits[order], temperature[order], top_k[order], top_p[order], seed, order)
    np.testing.assert_array_equal(shuffled, alone[order])


def test_seed_index_and_step_each_change_the_draw():
    logits = np.zeros((B, V), np.float32)
    first = call(logits)
    assert len(set(first)) > 1, "index"
    assert (call(logits, seed=2**32 - 1) != first).any()
    assert (call(logits, step=1) != first).any()
    np.testing.assert_array_equal(call(logits), first)


def test_every_method_that_may_serve_a_batch_chooses_the_same():
    logits = np.random.default_rng(1).normal(size=(B, V)).astype(np.float32)
    temperature = [0.0, 1.0, 3.0, 0.0]
    np.testing.assert_array_equal(call(logits, temperature, method="random"), call(logits, temperature))
    np.testing.assert_array_equal(
        call(logits, temperature, min_p=0.2, method="random"), call(logits, temperature, min_p=0.2)
    )
    assert SamplingParams(temperature=0, top_k=3).method == "greedy"
    assert SamplingParams(temperature=1).method == "random"
    assert SamplingParams(temperature=1, top_p=0.9).method == "filtered"


@settings(max_examples=40, deadline=None)
@given(
    logits_strategy, st.floats(0.01, 1), st.floats(0.2, 5.0), st.integers(0, V), st.sampled_from(["random", "filtered"])
)
def test_min_p_chooses_among_those_as_likely_as_that_part_of_the_likeliest(logits, min_p, temperature, top_k, method):
    chosen = call(logits, temperature, top_k if method == "filtered" else 0, 1.0, 3, min_p=min_p, method=method)
    for row, token in zip(logits.astype(np.float64) / np.float32(temperature), chosen, strict=True):
        assert row[token] - row.max() >= np.log(np.float32(min_p)) - 1e-5


def test_a_penalty_divides_what_is_positive_and_multiplies_what_is_negative():
    logits = np.array([[2.0, -2.0, 3.0, 0.0], [2.0, -2.0, 3.0, 0.0]], np.float32)
    seen = np.array([[True, True, False, True], [False, False, False, False]])
    penalty = np.array([2.0, 2.0], np.float32)
    np.testing.assert_array_equal(penalize(logits, seen, penalty), [[1.0, -4.0, 3.0, 0.0], [2.0, -2.0, 3.0, 0.0]])


def test_log_probabilities_are_those_of_the_softmax():
    logits = np.random.default_rng(0).normal(size=(B, V)).astype(np.float32)
    chosen, ids, values = log_probabilities(logits, np.arange(B), 3)
    want = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(chosen, want[np.arange(B), np.arange(B)], rtol=1e-5)
    np.testing.assert_array_equal(ids, [ranked(row)[:3] for row in logits])
    np.testing.assert_allclose(values, np.take_along_axis(want, np.asarray(ids), -1), rtol=1e-5)
    assert log_probabilities(logits, np.arange(B), 0)[1].shape == (B, 0)


def test_a_mode_is_the_least_that_serves_all():
    greedy, random = SamplingParams(), SamplingParams(temperature=1)
    assert cheapest_mode([]) == cheapest_mode([greedy]) == SamplingMode("greedy")
    assert cheapest_mode([greedy, random]) == SamplingMode("random")
    assert cheapest_mode([random.replace(top_k=3), greedy.replace(repetition_penalty=1.1)]) == SamplingMode(
        "filtered", penalty=True
    )
    assert [cheapest_mode([greedy, greedy.replace(logprobs=n)]).num_logprobs for n in (0, 1, 3, 20)] == [0, 1, 5, 20]


def test_vllms_and_lists_names_are_taken():
    assert SamplingParams(max_tokens=7) == SamplingParams(max_new_tokens=7)
    assert SamplingParams(max_tokens=7).replace(seed=1).max_new_tokens == 7
    assert SamplingParams(stop="\n").stop == SamplingParams(stop=["\n"]).stop == ("\n",)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("seed", -1),
        ("seed", 2**32),
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", "12"),
        ("ignore_eos", 1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("stop", [""]),
        ("stop", 3),
        ("logprobs", 21),
        ("logprobs", True),
        ("max_tokens", 0),
    ],
)
def test_a_value_out_of_range_is_one_line_that_names_it(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is .*; it should be [^\n]*$"):
        SamplingParams(**{name: value})
