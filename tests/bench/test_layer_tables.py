"""What the layer's benchmark shows, of results made up."""

import json

import pytest

from bench import layer_tables, roofline
from bench.layer_tables import OURS, SGLANG, TORCH_LAYER, VLLM, WITH_SHARED

PARTS = {"router": 30.0, "plan": 20.0, "gate_up": 300.0, "down": 160.0, "combine": 60.0, "other": 10.0}


def made_up(us: float, error: float | None = 3e-3, **more) -> dict:
    return {"device_us": us, "stream_us": us + 5, "error": error, "method": "kernel times", **more}


def make_case(layout: str = "EP8", load: str = "balanced", us: float = 580.0, tokens: int = 8192, **peers) -> dict:
    sizes = {"rank": 0, "rows": 6144, "experts_used": 20, "most_rows_of_an_expert": 308, "chunk_rows": 9216}
    results = {
        OURS: made_up(us, parts=PARTS),
        WITH_SHARED: made_up(us + 40, None, parts={**PARTS, "shared_experts": 40.0}),
        TORCH_LAYER: made_up(1100),
        VLLM: made_up(400, error=0.3),
        SGLANG: {"failed": "not installed: sglang"},
        **peers,
    }
    case = {"model": "deepseek-coder-v2", "layout": layout, "tokens": tokens, "load": load, **sizes}
    return {**case, "floor_us": 424.0, "results": results}


def make_result(*cases: dict) -> dict:
    versions = {"versions": {"jax": "0.11.2"}, "peer_versions": {"torch": "2.11.0"}}
    ceilings = {"dense_tflops": 800.0, "copy_gbs": 2940.0}
    return {"format": 1, "device": "NVIDIA H100 80GB HBM3", **versions, "ceilings": ceilings, "cases": list(cases)}


def test_the_best_peer_is_right_and_is_compared_with_ours_without_the_router():
    case = make_case()
    assert layer_tables.best_peer(case)[0] == TORCH_LAYER
    assert layer_tables.ratio(case) == pytest.approx(1100 / 550)
    case["results"][OURS]["parts"] = {}
    assert layer_tables.ratio(case) == pytest.approx(1100 / 580)
    assert layer_tables.ratio(make_case(**{OURS: {"failed": "RuntimeError: lost"}})) is None


def test_a_float8_layer_may_be_further_off():
    case = make_case(**{TORCH_LAYER: made_up(1100, error=2e-2), VLLM: made_up(400, error=4e-2)})
    assert layer_tables.best_peer(case) is None
    assert layer_tables.best_peer({**case, "quantize": "fp8-block"})[0] == TORCH_LAYER


def test_what_lies_outside_the_floor_is_told():
    assert layer_tables.outside_us(made_up(580, parts=PARTS)) == pytest.approx(60)
    assert layer_tables.outside_us(made_up(580, parts={})) is None


def test_a_case_says_what_is_wrong_and_missing():
    lines = {line[2:28].strip(): line for line in layer_tables.case_table(make_case()).splitlines()}
    assert lines[OURS].split()[1:5] == ["580.0", "585.0", "1.37", "3.0e-03"]
    assert lines[OURS].endswith("router 30.0, plan 20.0, gate_up 300.0, down 160.0, combine 60.0, other 10.0")
    assert "WRONG" in lines[VLLM]
    assert "WRONG" not in lines[WITH_SHARED]
    assert lines[SGLANG].endswith("not installed: sglang")


def test_the_summary_has_a_line_a_case_and_sets_ep_against_tp():
    cases = [make_case(), make_case("TP8", us=870.0), make_case(load="zipf", us=928.0)]
    failed = make_case("TP8", "zipf", **{OURS: {"failed": "RuntimeError: lost"}})
    lines = layer_tables.summary(make_result(*cases, failed)).splitlines()
    assert lines[1].split() == [
        "deepseek-coder-v2", "EP8", "8192", "balanced", "580.0", "585.0", "424.0", "1.37", "60.0",
        "30.0", "20.0", "-", "300.0", "160.0", "60.0", "40.0", "10.0", "2.00", "torch", "layer",
    ]  # fmt: skip
    assert lines[4].endswith("RuntimeError: lost")
    assert lines[-2].split() == ["deepseek-coder-v2", "8192", "balanced", "580.0", "870.0", "1.50", "1.00"]
    assert lines[-1].split() == ["deepseek-coder-v2", "8192", "zipf", "928.0", "-", "-", "1.60"]


def test_a_saved_result_reads_back_the_same(tmp_path):
    result, path = make_result(make_case(), make_case("TP8")), tmp_path / "moe_layer.json"
    roofline.save(result, path)
    read = json.loads(path.read_text())
    assert read == result
    assert layer_tables.summary(read) == layer_tables.summary(result)


def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    result = make_result(make_case(), make_case("TP8"), make_case(tokens=64), make_case("TP8", tokens=64))
    layer_tables.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
