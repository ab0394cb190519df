"""The plan's kernel without a GPU: interpreted on the CPU against numpy, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.kernels import plan_hopper


@pytest.fixture(autouse=True)
def clean_interpreter():
    yield
    reset_gpu_interpret_mode_state()


def check_order(ids: np.ndarray, first: int, num_groups: int) -> None:
    """That `order` gives what a stable sort gives."""
    (pairs,) = ids.shape
    key = np.where((ids >= first) & (ids < first + num_groups), ids - first, num_groups)
    expected = np.argsort(key, kind="stable")
    rows = np.empty(pairs, int)
    rows[expected] = np.arange(pairs)
    got = plan_hopper.order(jnp.asarray(ids, jnp.int32), jnp.int32(first), num_groups)
    sizes, row_pair, pair_row = map(np.asarray, got)
    np.testing.assert_array_equal(sizes, np.bincount(key, minlength=num_groups + 1)[:num_groups])
    np.testing.assert_array_equal(row_pair, expected)
    np.testing.assert_array_equal(pair_row, np.where(key < num_groups, rows, pairs))


@pytest.fixture
def interpreted():
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


@pytest.mark.parametrize(
    ("pairs", "ids_below", "first", "num_groups"),
    [
        (384, 16, 4, 4),
        (128, 3, 0, 3),
        (128, 130, 0, 130),
        (256, 160, 20, 100),
        (128, 1, 0, 1),
        (128, 8, 8, 8),
        (128, 256, 64, 128),
        (8, 16, 4, 4),
        (150, 130, 0, 130),
    ],
)
def test_pairs_are_ordered_as_by_a_stable_sort(pairs, ids_below, first, num_groups, interpreted):
    check_order(np.random.default_rng(pairs).integers(0, ids_below, pairs), first, num_groups)


@pytest.mark.parametrize(
    ("pairs", "ids_below", "first", "num_groups", "most_chunks"),
    [
        (1024, 16, 4, 4, 128),
        (1024, 130, 0, 130, 1),  # chunks of 512
        (512, 160, 20, 100, 128),
        (1280, 64, 0, 64, 2),  # five chunks: 512 does not divide the pairs
        (512, 8, 8, 8, 128),  # none is here
        (1001, 40, 10, 20, 128),
    ],
)
def test_many_pairs_are_ordered_as_by_a_stable_sort(
    pairs, ids_below, first, num_groups, most_chunks, interpreted, monkeypatch
):
    monkeypatch.setattr(plan_hopper, "_FEW_PAIRS", 0)
    monkeypatch.setattr(plan_hopper, "_MOST_CHUNKS", most_chunks)
    jax.clear_caches()  # those numbers are no arguments
    check_order(np.random.default_rng(pairs).integers(0, ids_below, pairs), first, num_groups)
    jax.clear_caches()


@pytest.mark.parametrize(
    ("pairs", "num_groups"), [(512, 128), (2048, 20), (49152, 20), (65536, 256), (8, 64), (8008, 128)]
)
def test_it_lowers_for_cuda(pairs, num_groups):
    ids = jax.ShapeDtypeStruct((pairs,), jnp.int32)
    first = jax.ShapeDtypeStruct((), jnp.int32)
    plan_hopper.order.trace(ids, first, num_groups=num_groups).lower(lowering_platforms=("cuda",))


def test_what_is_served():
    assert plan_hopper.serves(512, 128)
    assert plan_hopper.serves(1, 2048)
    assert plan_hopper.serves(65536, 256)
    assert not plan_hopper.serves(0, 8)
    assert not plan_hopper.serves(4096, 257)
    assert not plan_hopper.serves(65537, 8)
