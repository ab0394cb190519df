"""The layer's benchmark as a program, on the CPU, at tiny sizes."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from programs import refuses_other_devices

import jax_epmoe as ep
from bench import layer_tables, layers, moe_layer
from bench.layer_tables import OURS, TORCH_PEERS, WITH_SHARED
from bench.layers import EP, TP, WHOLE, Case
from jax_epmoe.moe import layer as epmoe

CONFIG = ep.MoEConfig(64, 32, 16, 2, norm_topk_prob=True, n_group=4, topk_group=2, shared_intermediate_size=32)
CEILINGS = {"dense_tflops": 1e-2, "copy_gbs": 1.0}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(layers.MODELS, "deepseek-tiny", CONFIG)
    monkeypatch.setattr(moe_layer.Bench, "ceilings", lambda self: CEILINGS)


def arguments_of(monkeypatch, *arguments: str):
    monkeypatch.setattr(sys, "argv", ["bench.moe_layer", *arguments])
    return moe_layer._arguments()


def run(args) -> moe_layer.Bench:
    bench = moe_layer.Bench(args)
    try:
        bench.run()
    finally:
        bench.close()
    return bench


def test_without_a_hopper_gpu_it_says_so_in_one_line():
    refuses_other_devices("bench.moe_layer")


def test_arguments_choose_models_tokens_and_loads(monkeypatch):
    whole = arguments_of(monkeypatch)
    assert (whole.models, whole.tokens, whole.loads) == (list(layers.MODELS), layers.TOKENS, layers.LOADS)
    assert whole.output.name == "moe_layer_cpu.json"
    quick = arguments_of(monkeypatch, "--quick", "--models", "*seek*", "qwen*")
    assert quick.models == ["deepseek-coder-v2", "deepseek-v3", "qwen3-30b-a3b"]
    assert (quick.tokens, quick.loads, quick.time_limit) == ((8192, 64), ("balanced",), 200)
    with pytest.raises(SystemExit):
        arguments_of(monkeypatch, "--models", "gpt*")


@pytest.mark.parametrize("layout", [EP, TP, WHOLE], ids=lambda layout: layout.name)
def test_ranks_add_up_to_the_layer_and_run_as_it_runs(layout, tiny, monkeypatch):
    """Every rank's output, summed, is `EPMoE`'s on a mesh; and both call `run_experts` with the same sizes and settings."""
    monkeypatch.setattr(moe_layer, "DTYPE", jnp.float32)
    monkeypatch.setattr(layers, "_ELEMENT", 4)
    monkeypatch.setattr("jax_epmoe.moe.experts._MAX_BYTES", 4096)  # so that ranks run in chunks
    seen = []
    for module in (epmoe, moe_layer):
        monkeypatch.setattr(module, "run_experts", _recorded(seen, module.run_experts))
    case = Case("deepseek-tiny", layout, 48)
    ranks = layout.ep_size * layout.slices
    layer = ep.EPMoE(
        CONFIG, mesh=ep.make_mesh(ranks, layout.ep_size), dtype=jnp.float32, rngs=nnx.Rngs(3), backend="xla"
    )
    x = jax.random.normal(jax.random.key(0), (case.tokens, CONFIG.hidden_size))
    expected = nnx.jit(lambda layer, x: layer(x))(layer, x)

    weights = moe_layer.Weights(case)
    program = jax.jit(moe_layer.rank_layer(case, weights.shared))
    total = np.zeros(x.shape)
    for rank in range(ranks):
        first = rank * case.experts if layout.ep_size > 1 else 0
        own = slice(first, first + case.experts)
        inner = slice(rank * case.inner, (rank + 1) * case.inner) if layout.slices > 1 else slice(None)
        shared = slice(rank * case.shared_inner, (rank + 1) * case.shared_inner)
        weights.shared_state["w_gate_up"].set_value(layer.shared.w_gate_up[...][:, shared])
        weights.shared_state["w_down"].set_value(layer.shared.w_down[...][:, shared])
        experts = (layer.w_gate_up[...][own, :, inner], layer.w_down[...][own, :, inner])
        router = (layer.router.weight[...], None)
        arguments = (x, router, experts, jnp.int32(first), weights.shared_state)
        total += np.asarray(program(*jax.device_put(arguments, jax.devices()[0])))
    np.testing.assert_allclose(total, expected, rtol=2e-5, atol=2e-5)
    assert len(seen) == 2
    assert seen[0] == seen[1]


def _recorded(seen, run_experts):
    """`run_experts` that notes the sizes and settings of each call that is traced, but for the backend."""

    def recorded(tokens, w_gate_up, w_down, weights, plan, base, activation, backend, *settings):
        seen.append((w_gate_up.shape, w_down.shape, base.shape, base.dtype, activation, *settings[:2]))
        return run_experts(tokens, w_gate_up, w_down, weights, plan, base, activation, backend, *settings)

    return recorded


def test_a_run_writes_right_numbers_and_shows_them(tiny, monkeypatch, tmp_path, capsys):
    output = tmp_path / "result.json"
    args = arguments_of(monkeypatch, "--models", "*tiny", "--tokens", "64", "8", "--output", str(output))
    run(args)
    result = json.loads(output.read_text())
    assert [(case["layout"], case["tokens"], case["load"]) for case in result["cases"]] == [
        (layout.name, tokens, load) for tokens in (64, 8) for load in layers.LOADS for layout in (EP, TP)
    ]
    for case in result["cases"]:
        ours = case["results"][OURS]
        assert ours["error"] < layer_tables.TOLERANCE, (case["layout"], case["load"], ours["error"])
        assert ours["device_us"] == pytest.approx(sum(ours["parts"].values()))
        assert {"router", "plan", "gate_up", "down", "combine"} <= set(ours["parts"])
        assert (WITH_SHARED in case["results"]) == (case["load"] == "balanced")
        assert all("failed" in case["results"][name] for name in TORCH_PEERS)  # not installed, or no GPU
    worst = [case for case in result["cases"] if case["load"] == "worst" and case["tokens"] == 64]
    assert [(case["rank"], case["rows"], case["experts_used"]) for case in worst] == [(0, 128, 2), (0, 128, 2)]
    assert "shared_experts" in result["cases"][0]["results"][WITH_SHARED]["parts"]
    printed = capsys.readouterr().out
    assert "deepseek-tiny     EP8     64 balanced" in printed
    assert f"wrote {output}" in printed.splitlines()[-1]


def test_a_second_run_adds_what_the_first_left_out(tiny, monkeypatch, tmp_path):
    common = ["--models", "*tiny", "--tokens", "8", "--no-peers", "--output", str(tmp_path / "result.json")]
    first = run(arguments_of(monkeypatch, *common, "--loads", "zipf")).result["cases"]
    both = run(arguments_of(monkeypatch, *common, "--loads", "zipf", "worst", "--add")).result["cases"]
    assert both[:2] == first
    assert [(case["layout"], case["load"]) for case in both[2:]] == [("EP8", "worst"), ("TP8", "worst")]


@pytest.mark.parametrize(
    "quantize", ["fp8-block", *(pytest.param(name, marks=pytest.mark.slow) for name in layers.QUANTIZATIONS[1:])]
)
def test_a_quantised_run_writes_right_numbers_and_its_format(tiny, monkeypatch, tmp_path, capsys, quantize):
    monkeypatch.setitem(layers.MODELS, "deepseek-tiny", dataclasses.replace(CONFIG, intermediate_size=128))
    output = tmp_path / "result.json"
    common = ("--models", "*tiny", "--tokens", "64", "--output", str(output), "--quantize")
    run(arguments_of(monkeypatch, *common, quantize, "--loads", "zipf"))
    result = json.loads(output.read_text())
    assert result["quantize"] == quantize
    assert [case["layout"] for case in result["cases"]] == (["EP8"] if quantize == "fp8-block" else ["EP8", "TP8"])
    for case in result["cases"]:
        ours = case["results"][OURS]
        assert ours["error"] < layer_tables.TOLERANCE, (case["layout"], ours["error"])
        assert {"router", "plan", "quantize", "gate_up", "down", "combine"} <= set(ours["parts"])
    printed = capsys.readouterr()
    assert f"{quantize}; ceilings" in printed.out
    with pytest.raises(SystemExit):
        arguments_of(monkeypatch, *common, "fp8-channel" if quantize == "fp8-block" else "fp8-block", "--add")
    assert f"holds results of --quantize {quantize}" in capsys.readouterr().err


def test_past_the_time_limit_it_starts_nothing(tiny, monkeypatch, tmp_path, capsys):
    args = arguments_of(monkeypatch, "--no-peers", "--time-limit", "-1", "--output", str(tmp_path / "r.json"))
    args.models = ["deepseek-tiny"]
    assert run(args).result["cases"] == []
    assert "time limit of -1 s" in capsys.readouterr().out


def test_a_wrong_output_is_seen(tiny):
    case = Case("deepseek-tiny", EP, 32)
    weights = moe_layer.Weights(case)
    tokens = moe_layer.Tokens("deepseek-tiny", 32, "balanced", weights.router)
    arguments = moe_layer.Bench.arguments(tokens.x, weights, 2, False)[0]
    right = jax.jit(moe_layer.rank_layer(case))
    assert moe_layer.Bench.error(right, arguments, case, 1, tokens) < layer_tables.TOLERANCE
    assert moe_layer.Bench.error(lambda *args: 2 * right(*args), arguments, case, 1, tokens) > 0.5
    assert np.isnan(moe_layer.Bench.error(lambda *args: right(*args).at[3, 5].set(jnp.nan), arguments, case, 1, tokens))
