"""The Hopper kernel's tile list, interpreted on the CPU, against a plain loop."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.kernels.grouped_gemm import schedule


@pytest.fixture(autouse=True)
def clean_interpreter():
    yield
    reset_gpu_interpret_mode_state()


def made(sizes, **sizes_of_work) -> np.ndarray:
    """`[tiles, 6]`, after a look at what lies behind."""
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        listed = np.asarray(schedule.make_schedule(jnp.asarray(sizes, jnp.int32), **sizes_of_work))
    total = listed[schedule.TOTAL, 0]
    assert (listed[schedule.TOTAL] == total).all()
    assert listed.shape[1] >= schedule.max_tiles(sizes_of_work["rows"], len(sizes), sizes_of_work["largest_heights"])
    assert not listed[: schedule.TOTAL, total:].any()
    return listed[: schedule.TOTAL, :total].T


def expected(sizes, *, rows, heights, largest_heights, column_tiles, num_ctas) -> list[list[int]]:
    del rows
    best = None
    for largest in largest_heights:
        groups, start = [], 0
        for expert, size in enumerate(sizes):
            end = start + size
            if size:
                span = end - start // 8 * 8
                tiles = -(-span // largest)
                height = math.ceil(math.ceil(span / tiles) / 8) * 8
                run_as = next((h for h in heights if h >= height), heights[-1])
                groups.append((expert, tiles, start, end, height, run_as))
            start = end
        groups.sort(key=lambda group: -group[-1])  # stable
        listed, costs = [], []
        for expert, tiles, begin, end, height, run_as in groups:
            first = len(listed)
            listed += [[expert, first, tiles, begin, end, height]] * tiles
            costs += [run_as + schedule.FIXED_COST] * (tiles * column_tiles)
        time = sum(costs[::num_ctas])
        if best is None or time < best[0]:
            best = (time, listed)
    return best[1]


def test_the_docstrings_example():
    # 130 rows in two tiles of 72 (the second has 58 rows), an empty group, and 6 rows that begin at row 130: from row 128.
    listed = made([130, 0, 6], rows=136, heights=(8, 72, 128), largest_heights=(128,), column_tiles=1, num_ctas=132)
    assert listed.tolist() == [[0, 0, 2, 0, 130, 72], [0, 0, 2, 0, 130, 72], [2, 2, 1, 130, 136, 8]]


@pytest.mark.parametrize("skew", [0.2, *(pytest.param(skew, marks=pytest.mark.slow) for skew in (1.0, 5.0))])
def test_rests_come_after_all_high_tiles_the_lower_the_later(skew):
    random = np.random.default_rng(1)
    sizes = random.multinomial(5000, random.dirichlet(np.full(20, skew))).tolist()
    work = {"rows": 5000, "heights": (64, 128, 192), "largest_heights": (192,), "column_tiles": 4, "num_ctas": 66}
    groups, rests, start = [], [], 0
    for expert, size in enumerate(sizes):
        end = start + size
        first_row = start // 8 * 8
        slabs = math.ceil(end / 8) - start // 8 if size else 0
        whole, rest = divmod(slabs, 24)
        if whole:
            groups.append((expert, whole, start, end, 192))
        if rest:
            rests.append((expert, 1, first_row + 192 * whole if whole else start, end, rest * 8))
        start = end
    rests.sort(key=lambda rest: -math.ceil(rest[-1] / 64))
    listed = []
    for expert, tiles, *ends_and_height in groups + rests:
        listed += [[expert, len(listed), tiles, *ends_and_height]] * tiles
    assert made(sizes, **work, rest_apart=True).tolist() == listed


def test_a_single_group_s_rest_is_its_last_tile():
    work = {"rows": 504, "heights": (64, 128, 192), "largest_heights": (192,), "column_tiles": 4, "num_ctas": 66}
    assert made([500], **work, rest_apart=True).tolist() == [[0, 0, 3, 0, 500, 192]] * 3


DECODE = {"rows": 512, "heights": (16, 32), "largest_heights": (32,), "column_tiles": 12, "num_ctas": 132}
PREFILL = {
    "rows": 6144, "heights": (32, 64, 80, 96, 112, 128), "largest_heights": (128, 112, 96, 80, 64), "column_tiles": 12,
    "num_ctas": 132,
}  # fmt: skip


# More candidates than the kernel has warps.
CROWDED = {
    "rows": 4096, "heights": tuple(range(48, 129, 8)), "largest_heights": tuple(range(128, 47, -8)), "column_tiles": 6,
    "num_ctas": 132,
}  # fmt: skip
WORKS = pytest.mark.parametrize("work", [DECODE, PREFILL, CROWDED], ids=["decode", "prefill", "crowded"])


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("experts", [8, 65, *slow(1, 64, 128, 160, 256)])
@WORKS
@pytest.mark.parametrize("skew", [0.2, *slow(5.0)])
def test_groups_are_cut_sorted_and_picked_as_by_hand(experts, work, skew):
    random = np.random.default_rng(experts)
    sizes = random.multinomial(work["rows"] - 5, random.dirichlet(np.full(experts, skew))).tolist()
    assert made(sizes, **work).tolist() == expected(sizes, **work)


@pytest.mark.slow
@WORKS
def test_more_experts_than_any_model_has(work):
    sizes = np.random.default_rng(0).multinomial(work["rows"], np.full(512, 1 / 512)).tolist()
    assert made(sizes, **work).tolist() == expected(sizes, **work)


@WORKS
@pytest.mark.parametrize("expert", [0, 63, 64, 159])
def test_all_rows_at_one_expert(work, expert):
    sizes = [work["rows"] if i == expert else 0 for i in range(160)]
    assert made(sizes, **work).tolist() == expected(sizes, **work)


@WORKS
def test_rows_past_the_groups_have_no_tile(work):
    sizes = [3, 0, 8, 130, 0, 1, work["rows"] // 3]
    assert made(sizes, **work).tolist() == expected(sizes, **work)


@pytest.mark.parametrize("size", [0, 1, 64, 137, 512])
@pytest.mark.parametrize("largest", [16, 112])
def test_a_single_group_s_tiles_need_no_kernel(size, largest):
    work = {"rows": 512, "heights": (16, 64, 112), "largest_heights": (largest,), "column_tiles": 12, "num_ctas": 132}
    assert made([size], **work).tolist() == expected([size], **work)
    program = jax.jit(partial(schedule.make_schedule, **work)).lower(jax.ShapeDtypeStruct((1,), jnp.int32)).as_text()
    assert "custom_call" not in program


@WORKS
def test_no_rows_make_no_tiles(work):
    assert made([0, 0, 0, 0], **work).tolist() == []


@pytest.mark.parametrize("cost", [0, 12, 500])
def test_the_candidate_that_finishes_first_depends_on_a_tiles_fixed_cost(cost, monkeypatch):
    monkeypatch.setattr(schedule, "FIXED_COST", cost)
    schedule._make_schedule.clear_cache()  # the cost is read when the kernel is traced
    sizes = np.random.default_rng(1).multinomial(PREFILL["rows"], np.full(20, 1 / 20)).tolist()
    try:
        assert made(sizes, **PREFILL).tolist() == expected(sizes, **PREFILL)
    finally:
        schedule._make_schedule.clear_cache()


def test_more_rows_than_float32_counts_exactly_are_refused():
    with pytest.raises(NotImplementedError, match="4194304 rows"):
        schedule.make_schedule(jnp.zeros(8, jnp.int32), **{**DECODE, "rows": 2**22})


@pytest.mark.parametrize("experts", [160, *slow(1, 20, 64, 65, 256, 512)])
@WORKS
def test_it_lowers_for_cuda(experts, work):
    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
    jax.jit(partial(schedule.make_schedule, **work)).trace(sizes).lower(lowering_platforms=("cuda",))


def test_products_of_different_widths_ask_for_the_same_list_where_there_is_nothing_to_pick():
    def both(sizes):
        return [schedule.make_schedule(sizes, **{**DECODE, "column_tiles": columns}) for columns in (12, 16)]

    program = jax.jit(both).trace(jax.ShapeDtypeStruct((128,), jnp.int32)).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("call @_make_schedule(%arg0)") == 2
