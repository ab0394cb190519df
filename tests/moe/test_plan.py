"""`make_plan`: each rank's rows, in expert order."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.moe import plan as plan_module
from jax_epmoe.moe.plan import ROW_ALIGNMENT, make_plan

T, K, E = 11, 3, 8
R = 40  # T * K, rounded up to a multiple of ROW_ALIGNMENT

run = jax.jit(make_plan, static_argnames="num_local_experts")


def test_the_example_of_the_docstring():
    plan = make_plan(jnp.array([[3, 0], [2, 3], [1, 2]]), first_expert=2, num_local_experts=2)
    np.testing.assert_array_equal(plan.row_pair[:4], [2, 5, 0, 3])
    np.testing.assert_array_equal(plan.group_sizes, [2, 2])
    np.testing.assert_array_equal(plan.pair_row, [[2, 8], [0, 3], [8, 1]])  # 8 rows: 6, rounded up


def test_rows_are_padded_for_the_kernels_and_integers_are_int32():
    plan = make_plan(jnp.zeros((T, K), jnp.int32), 0, E)
    assert {name: array.dtype for name, array in plan._asdict().items()} == dict.fromkeys(plan._fields, jnp.int32)
    assert (plan.row_pair.shape, plan.group_sizes.shape, plan.pair_row.shape) == ((R,), (E,), (T, K))
    assert R % ROW_ALIGNMENT == 0


def test_no_tokens_make_no_rows():
    plan = make_plan(jnp.zeros((0, K), jnp.int32), 0, E)
    np.testing.assert_array_equal(plan.group_sizes, np.zeros(E))


# The number of experts, E, is the id of a pair without work.
ids_of_pairs = st.lists(st.integers(0, E), min_size=T * K, max_size=T * K)
some_ids = st.one_of(ids_of_pairs, st.integers(0, E).map(lambda one: [one] * (T * K)))


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(ids=some_ids, num_local=st.sampled_from([1, 2, 4, 8]), data=st.data())
def test_every_local_pair_has_one_row_in_stable_expert_order(ids, num_local, data):
    first = data.draw(st.sampled_from(range(0, E, num_local)), label="first_expert")
    plan = jax.tree.map(np.asarray, run(jnp.array(ids, jnp.int32).reshape(T, K), first, num_local_experts=num_local))

    # Sorting (expert, pair) tuples is what "stable, in expert order" means.
    pairs = sorted((expert, pair) for pair, expert in enumerate(ids) if first <= expert < first + num_local)
    total = len(pairs)
    np.testing.assert_array_equal(plan.row_pair[:total], [pair for _, pair in pairs])
    expected_sizes = [sum(expert == e for expert in ids) for e in range(first, first + num_local)]
    np.testing.assert_array_equal(plan.group_sizes, expected_sizes)

    expected_rows = np.full(T * K, R)
    expected_rows[[pair for _, pair in pairs]] = np.arange(total)
    np.testing.assert_array_equal(plan.pair_row.ravel(), expected_rows)
    assert ((plan.row_pair >= 0) & (plan.row_pair < T * K)).all(), plan.row_pair


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(ids=some_ids, num_local=st.sampled_from([1, 2, 4, 8]))
def test_the_ranks_together_hold_every_pair_once(ids, num_local):
    array = jnp.array(ids, jnp.int32).reshape(T, K)
    plans = [run(array, first, num_local_experts=num_local) for first in range(0, E, num_local)]
    holders = sum((np.asarray(plan.pair_row) < R).astype(int) for plan in plans)
    np.testing.assert_array_equal(holders, (np.asarray(array) < E).astype(int))
    sizes = np.concatenate([plan.group_sizes for plan in plans])
    np.testing.assert_array_equal(sizes, np.bincount(ids, minlength=E + 1)[:E])


@pytest.mark.parametrize("num_keys", [1, 7, 2**20], ids=["one key", "a few", "too many to pack"])
@pytest.mark.parametrize("pairs", [1, 8, 100, 3000])
def test_comparing_and_sorting_give_the_same_stable_order(pairs, num_keys):
    key = jnp.asarray(np.random.default_rng(pairs).integers(0, num_keys + 1, pairs), jnp.int32)
    expected = np.argsort(np.asarray(key), kind="stable")
    sort = jax.jit(plan_module._sort, static_argnums=1)
    for pair, row in (jax.jit(plan_module._compare)(key), sort(key, num_keys)):
        np.testing.assert_array_equal(pair, expected)
        np.testing.assert_array_equal(np.asarray(row)[expected], np.arange(pairs))
        assert pair.dtype == row.dtype == jnp.int32


def test_many_pairs_are_planned_as_few_are(monkeypatch):
    ids = jnp.asarray(np.random.default_rng(0).integers(0, E + 1, (T, K)), jnp.int32)
    few = make_plan(ids, 2, 4)
    monkeypatch.setattr(plan_module, "_FEW_PAIRS", 0)
    jax.tree.map(np.testing.assert_array_equal, make_plan(ids, 2, 4), few)


def test_a_kernel_plans_few_pairs_on_hopper(monkeypatch):
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 17, (64, 2)), jnp.int32)
    expected = make_plan(ids, 4, 8)
    monkeypatch.setattr(plan_module, "on_hopper", lambda: True)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = jax.tree.map(np.asarray, make_plan(ids, 4, 8))
    reset_gpu_interpret_mode_state()
    jax.tree.map(np.testing.assert_array_equal, got, expected)
