"""What the grouped GEMM's benchmark counts, draws and shows, with results made up."""

import dataclasses
import json

import numpy as np
import pytest

from bench import roofline
from bench.roofline import (
    GATED,
    GATHER,
    LOADS,
    MGPU,
    OURS,
    RAGGED_DOT,
    SCALED,
    SCALED_FAST,
    SHAPES,
    TABLE_SHAPES,
    TORCH,
    Shape,
    Work,
)

CEILINGS = {"dense_tflops": 800.0, "copy_gbs": 3000.0}


@pytest.fixture
def tiny(monkeypatch):
    """4 tokens of 2 rows; up: 16 -> 8; down: 4 -> 16."""
    monkeypatch.setitem(roofline.MODELS, "tiny", roofline.Model(16, 4, 3, 2))
    return Shape("tiny", 4, "up")


def made_up(us: float, error: float = 1.7e-3, **more) -> dict:
    return {"device_us": us, "main_us": 0.9 * us, "stream_us": us + 5, "error": error, "config": "", **more}


def make_case(shape: Shape, load: str, results: dict) -> dict:
    sizes = roofline.group_sizes(load, shape.rows, shape.experts)
    todo = roofline.work(shape, sizes)
    numbers = {name: getattr(shape, name) for name in ("tokens", "rows", "experts", "k", "n")}
    rated = {name: roofline.rate(result, todo, CEILINGS) for name, result in results.items()}
    return {"shape": shape.name, "load": load, **numbers, "group_sizes": sizes.tolist(), "results": rated}


def make_result(cases: list[dict]) -> dict:
    versions = {"versions": {"jax": "0.11.2"}, "peer_versions": {"torch": "2.11.0"}}
    return {"format": 1, "device": "NVIDIA H100 80GB HBM3", **versions, "ceilings": CEILINGS, "cases": cases}


def some_result() -> dict:
    cases = [
        make_case(
            shape, "dirichlet", {OURS: made_up(300 + i), TORCH: made_up(400), MGPU: {"failed": "RuntimeError: no"}}
        )
        for i, shape in enumerate(SHAPES)
    ]
    return make_result(cases)


def test_work_counts_used_experts_once(tiny):
    sizes = np.array([3, 0, 1], np.int32)
    assert roofline.work(tiny, sizes) == Work(flops=2 * 4 * 16 * 8, bytes=2 * (4 * 16 + 2 * 8 * 16 + 4 * 8))
    assert roofline.work(tiny, sizes, gated=True).bytes == 2 * (4 * 16 + 2 * 8 * 16 + 4 * 4)
    gathered = roofline.work(tiny, sizes, index=np.array([2, 2, 0, 2], np.int32))
    assert gathered.bytes == 2 * (2 * 16 + 2 * 8 * 16 + 4 * 8) + 4 * 4


@pytest.mark.parametrize(
    ("quantize", "x_scales", "w_scales"),
    [("fp8-block", 2 * 2, 2 * 2), ("fp8-channel", 2, 200), ("fp8-tensor", 1, 1)],
    ids=["block", "channel", "tensor"],
)
def test_quantised_work_counts_scales(quantize, x_scales, w_scales):
    sizes = np.array([2, 0], np.int32)
    todo = roofline.product_work(sizes, 192, 200, quantize=quantize)
    w_bytes = 192 * 200 + 4 * w_scales
    assert todo == Work(flops=2 * 2 * 192 * 200, bytes=2 * 192 + 4 * x_scales + w_bytes + 2 * 2 * 200)
    quantized_out = roofline.product_work(sizes, 192, 200, gated=True, quantize=quantize, quantize_out=True)
    out_scales = 1 if quantize == "fp8-tensor" else 2  # 100 columns: one scale a row, in blocks too
    assert quantized_out.bytes == 2 * 192 + 4 * x_scales + w_bytes + 2 * 100 + 4 * out_scales
    assert roofline.product_work(sizes, 192, 200, quantize_out=True) == roofline.product_work(sizes, 192, 200)


def test_floor_is_the_larger_of_the_two_times():
    assert Work(flops=8 * 10**8, bytes=3 * 10**6).floor_us(800, 3000) == pytest.approx(1.0)
    assert Work(flops=16 * 10**8, bytes=3 * 10**6).floor_us(800, 3000) == pytest.approx(2.0)
    assert Work(flops=8 * 10**8, bytes=9 * 10**6).floor_us(800, 3000) == pytest.approx(3.0)


def test_rates_of_a_result():
    rated = roofline.rate(made_up(4.0), Work(flops=16 * 10**8, bytes=3 * 10**6), CEILINGS)
    assert rated["tflops"] == pytest.approx(400)
    assert rated["gbs"] == pytest.approx(750)
    assert rated["share"] == pytest.approx(0.5)
    assert rated["share_main"] == pytest.approx(0.5 / 0.9)


def test_shapes_are_those_of_the_models():
    table = [(shape.rows, shape.experts, shape.k, shape.n) for shape in TABLE_SHAPES]
    assert table == [
        (6144, 20, 5120, 3072), (6144, 20, 1536, 5120), (24576, 20, 5120, 3072),
        (49152, 160, 5120, 384), (49152, 160, 192, 5120), (65536, 128, 2048, 1536), (65536, 128, 768, 2048),
        (16384, 8, 4096, 28672), (192, 20, 5120, 3072), (512, 128, 2048, 1536), (512, 128, 768, 2048),
    ]  # fmt: skip
    assert len({shape.name for shape in SHAPES}) == len(SHAPES) == 28
    assert Shape("coder-ep8", 16, "up").rows == 12
    assert Shape("olmoe", 256, "down").rows == 2048


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(("rows", "experts"), [(12, 20), (6144, 20), (49152, 160)])
def test_group_sizes_sum_to_the_rows_and_are_the_same_every_time(load, rows, experts):
    sizes = roofline.group_sizes(load, rows, experts)
    assert sizes.dtype == np.int32
    assert sizes.shape == (experts,)
    assert sizes.sum() == rows
    assert sizes.min() >= 0
    np.testing.assert_array_equal(sizes, roofline.group_sizes(load, rows, experts))


def test_loads_differ_as_their_names_say():
    assert np.ptp(roofline.group_sizes("balanced", 6144, 20)) == 1
    assert np.count_nonzero(roofline.group_sizes("one-hot", 6144, 20)) == 1
    skewed = roofline.group_sizes("dirichlet", 6144, 20)
    assert skewed.max() > 1.5 * 6144 / 20
    with pytest.raises(ValueError, match="load is 'zipf'"):
        roofline.group_sizes("zipf", 8, 2)


def test_an_experts_tokens_rise_and_repeat_only_if_they_must():
    sizes = np.array([3, 0, 9], np.int32)
    index = roofline.row_index(8, sizes)
    assert index.shape == (12,)
    assert np.all(np.diff(index[:3]) > 0)
    assert np.all(np.diff(index[3:]) >= 0)
    assert index.min() >= 0
    assert index.max() < 8


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("quantize", [None, "fp8-block"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_runs_in_turn_do_not_fit_the_l2(shape, quantize, load):
    shape = dataclasses.replace(shape, quantize=quantize)
    sizes = roofline.group_sizes(load, shape.rows, shape.experts)
    turns = roofline.rotation(shape, sizes)
    np.testing.assert_array_equal(turns[0], sizes)
    assert sum(roofline.work(shape, each).bytes for each in turns) > 100e6
    assert roofline.iterations(shape, len(turns)) % len(turns) == 0
    assert roofline.iterations(shape, len(turns)) >= 7
    if load == "one-hot":
        assert len({int(np.argmax(each)) for each in turns}) == len(turns)


@pytest.mark.parametrize("load", LOADS)
def test_sampled_rows_belong_to_their_experts(load):
    sizes = roofline.group_sizes(load, 192, 20)
    experts, rows = roofline.samples(sizes)
    owner = np.repeat(np.arange(20), sizes)
    np.testing.assert_array_equal(owner[rows], np.broadcast_to(experts[:, None], rows.shape))
    assert rows.min() == 0
    assert rows.max() == 191


def test_the_best_peer_is_the_fastest_that_is_right():
    results = {
        OURS: made_up(300),
        TORCH: made_up(400),
        MGPU: made_up(100, error=0.2),
        RAGGED_DOT: {"failed": "not installed: x"},
    }
    case = make_case(SHAPES[0], "balanced", results)
    name, _ = roofline.best_peer(case)
    assert name == TORCH
    assert roofline.ratio(case) == pytest.approx(400 / 300)
    assert roofline.best_peer(make_case(SHAPES[0], "balanced", {OURS: made_up(1)})) is None


def test_fast_sums_may_be_off_by_less_than_a_rounding_to_float8():
    results = {OURS: made_up(300), SCALED: made_up(400), SCALED_FAST: made_up(350, error=1e-2)}
    assert roofline.best_peer(make_case(SHAPES[0], "balanced", results))[0] == SCALED_FAST
    results[SCALED_FAST] = made_up(350, error=2.6e-2)
    case = make_case(SHAPES[0], "balanced", results)
    assert roofline.best_peer(case)[0] == SCALED
    assert [line[2:28].strip() for line in roofline.case_table(case).splitlines() if "WRONG" in line] == [SCALED_FAST]


def test_tables_say_what_is_wrong_missing_and_faster():
    results = {
        OURS: made_up(300),
        GATED: made_up(309),
        GATHER: made_up(330),
        TORCH: made_up(450),
        MGPU: made_up(100, error=0.2, config="64x64"),
        RAGGED_DOT: {"failed": "not installed: x"},
    }
    case = make_case(SHAPES[0], "balanced", results)
    lines = {line[2:28].strip(): line for line in roofline.case_table(case).splitlines()}
    assert lines[MGPU].endswith("64x64  WRONG")
    assert lines[RAGGED_DOT].endswith("not installed: x")
    assert "644.2" in lines[OURS]  # 2 * 6144 * 5120 * 3072 / 300 us
    row = roofline.summary_table(make_result([case])).splitlines()[1]
    assert row.split() == [
        "coder-ep8-8192-up", "balanced", "300.0", "644.2", "2433", "81%", "90%", "1.50", "+3%", "+10%", TORCH,
    ]  # fmt: skip


def test_a_failure_of_ours_is_told():
    case = make_case(SHAPES[0], "balanced", {OURS: {"failed": "RuntimeError: lost"}, TORCH: made_up(1)})
    assert "RuntimeError: lost" in roofline.summary_table(make_result([case]))
    assert "RuntimeError: lost" in roofline.case_table(case)


def test_a_saved_result_reads_back_the_same(tmp_path):
    result, path = some_result(), tmp_path / "deep" / "grouped_gemm.json"
    roofline.save(result, path)
    read = json.loads(path.read_text())
    assert read == result
    assert roofline.summary_table(read) == roofline.summary_table(result)
    assert [each.name for each in path.parent.iterdir()] == ["grouped_gemm.json"]


def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    roofline.plot(some_result(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
