"""The benchmark of several GPUs: its parts by hand, and the whole program on four of the CPU's devices with a tiny model."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from test_bench_decode_step import TINY

from bench import multi_gpu, multi_gpu_check, multi_gpu_mode, multi_gpu_tables, scopes, sharded_decoder
from bench.multi_gpu_mode import Setting
from bench.multi_gpu_workers import Worker
from bench.sharded_decoder import ONE, PREFILL, VARIANTS, Loads, ShardedDecoder, Step, Variant, modes
from jax_epmoe import make_mesh
from jax_epmoe.models.families import read_config

ROOT = Path(__file__).parents[2]
FAST_COMPILE = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("multi_gpu") / "tiny"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(TINY | {"num_key_value_heads": 2, "num_attention_heads": 4}))
    return path


@pytest.fixture(autouse=True)
def compile_fast(monkeypatch):
    for name, variant in VARIANTS.items():
        monkeypatch.setitem(VARIANTS, name, Variant(variant.options | FAST_COMPILE, variant.batches))


def bench_of(monkeypatch, folder: Path, output: Path, *arguments: str) -> multi_gpu.Bench:
    common = ["--model", str(folder), "--layers", "2", "--devices", "4", "--prompt-length", "8", "--context", "16"]
    common += ["--jobs", "2", "--quantize", "bf16", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["bench.multi_gpu", *common, *arguments])
    return multi_gpu.Bench(Setting(multi_gpu._arguments()))


def test_modes_have_the_fields_names():
    assert [mode[:3] for mode in modes(2).values()] == [("TP+DP", 2, 1), ("EP+DP", 2, 2), ("TP", 2, 1), ("EP", 2, 2)]
    assert modes(8)["hybrid"][1:] == (8, 4, False)
    assert modes(4)["hybrid+DP"][1:] == (4, 2, True)


def test_a_run_measures_every_mode_that_is_asked_for(folder, monkeypatch, tmp_path, capsys):
    output = tmp_path / "result.json"
    sizes = ["--prefill", "64", "--decode", "--zipf", "64"]
    bench_of(monkeypatch, folder, output, *sizes, "--modes", "EP+DP", "--one-process", "--no-one-device").run()
    result = json.loads(output.read_text())
    assert (result["devices"], result["layers"], result["moe_layers"], result["model_layers"]) == (4, 2, 1, 2)
    assert [(link["kind"], link["bytes"]) for link in result["links"]] == [
        (kind, 4 * 64 * 32) for kind in ("all-reduce", "all-gather", "reduce-scatter")
    ]
    rows = {(row["mode"], row["load"]): row for row in result["rows"]}
    assert list(rows) == [("EP+DP", "balanced"), ("EP+DP", "zipf")]
    for (_, load), row in rows.items():
        assert row["step_tokens"] == 64
        assert row["tokens_per_s"] == pytest.approx(row["step_tokens"] / row["step_us"] * 1e6)
        assert row["model_us"] == pytest.approx(row["step_us"])  # both layers of the model ran
        assert 0 < row["layer_us"] < row["step_us"]
        assert {"attention", "router", "plan", "gate_up", "down", "combine"} <= row["parts"].keys()
        assert row["rows"]["total"] == 2 * row["step_tokens"]
        assert (row["rows"]["expert_max_over_mean"] == 1) == (load == "balanced")
    exchanged = {each["kind"]: each for each in rows["EP+DP", "balanced"]["collectives"]}
    assert exchanged["all-gather"]["bytes"] == 4 * 64 * 32
    assert rows["EP+DP", "balanced"]["parts"]["collective"] > 0
    printed = capsys.readouterr().out
    assert "4 x CPU" in printed
    assert "bf16, prefill 64, zipf; a layer with experts, us" in printed

    # With --add, what is there is left out; another run's sizes are refused.
    bench_of(monkeypatch, folder, output, *sizes, "--modes", "EP+DP", "--no-one-device", "--add").run()
    assert json.loads(output.read_text())["rows"] == result["rows"]
    with pytest.raises(ValueError, match=r"^--add: context is 32; it should be 16 as in "):
        bench_of(monkeypatch, folder, output, "--context", "32", "--add")


@pytest.mark.slow
def test_all_variants_of_both_phases_run(folder, monkeypatch, tmp_path):
    output = tmp_path / "result.json"
    sizes = ["--prefill", "64", "--decode", "16", "--zipf", "--no-links", "--modes", "hybrid", "--one-process"]
    sizes += ["--variants", *VARIANTS, "--xla", "named:xla_cpu_enable_fast_math=false"]
    bench_of(monkeypatch, folder, output, *sizes).run()
    result = json.loads(output.read_text())
    assert [row for row in result["rows"] if "failed" in row] == []
    rows = {(row["mode"], row["phase"], row["variant"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 2 * (1 + 5)
    assert rows[ONE.name, "prefill", "default"]["step_tokens"] == 16
    assert rows["hybrid", "decode", "two batches"]["rows"] == rows["hybrid", "decode", "default"]["rows"]
    text = multi_gpu_tables.summary(result)
    assert "named" in text.split("step time, default / this")[1].splitlines()[0]


@pytest.mark.slow
def test_processes_compile_side_by_side_and_measure_in_turn(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_backend_optimization_level=0")
    output = tmp_path / "result.json"
    sizes = ["--prefill", "64", "8", "--decode", "--zipf", "64", "--modes", "TP", "EP+DP", "hybrid"]
    bench_of(monkeypatch, folder, output, *sizes).run()
    result = json.loads(output.read_text())
    failed = {(row["mode"], row["tokens"]): row["failed"] for row in result["rows"] if "failed" in row}
    assert list(failed) == [(ONE.name, 8), ("EP+DP", 8)]  # a quarter of a prompt; one for four devices
    assert failed["EP+DP", 8] == "ValueError: prefill 8: sequences is 1; it should be a multiple of 4 on this mesh"
    assert len(result["rows"]) == 3 * 4
    assert [each["mode"] for each in result["compile"]] == [ONE.name, "EP+DP", "TP", "hybrid"]


@pytest.mark.slow
def test_a_process_that_ends_or_is_late_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["bench.multi_gpu", "--model", "nowhere"])
    monkeypatch.chdir(ROOT)
    late, worker = (Worker("EP", "bf16", [], [], 0, tmp_path) for _ in range(2))
    with pytest.raises(TimeoutError, match="the time limit"):
        late.ready(time.monotonic())
    assert late.process.poll() is not None, "it still runs"
    with pytest.raises(RuntimeError, match="the process ended with status 2"):
        worker.ready(time.monotonic() + 60)
    worker.close()


def test_what_cannot_be_is_refused_in_one_line(folder, monkeypatch, tmp_path):
    output = tmp_path / "result.json"
    for arguments, message in (
        (["--modes", "EP2"], r"^--modes is 'EP2'; it should be of TP\+DP, EP\+DP, .* on 4 devices$"),
        (["--devices", "1"], r"^--devices is 1; it should be at least 2"),
        (["--layers", "1"], r"^--layers is 1; it should be at most 2, one with experts among the first$"),
    ):
        with pytest.raises(ValueError, match=message):
            bench_of(monkeypatch, folder, output, *arguments)
    with pytest.raises(SystemExit):
        bench_of(monkeypatch, folder, output, "--xla", "nothing")


def test_a_step_that_a_mesh_does_not_divide_fails_alone(folder, monkeypatch, tmp_path):
    bench = bench_of(monkeypatch, folder, tmp_path / "r.json", "--prefill", "8", "--decode", "--modes", "EP+DP").setting
    model = ShardedDecoder(bench.config, bench.modes[1], None, loads=bench.loads)
    with pytest.raises(ValueError, match=r"^prefill 8: sequences is 1; it should be a multiple of 4 on this mesh$"):
        model.lower_step(bench.steps[0])


def test_weights_are_the_same_on_every_mesh_and_lie_on_their_shards(folder):
    config = read_config(folder)
    drawn = []
    for mode in (ONE, modes(4)["EP"], modes(4)["TP"]):
        model = ShardedDecoder(config, mode, "fp8-channel")
        weights = model.weights(model.lower_weights().compile(FAST_COMPILE))
        assert [w.sharding for w in weights] == [leaf.sharding for leaf in model.leaves]
        assert sum(w.addressable_shards[0].data.nbytes for w in weights) == model.weight_bytes
        drawn.append([np.asarray(w, np.float32) for w in weights])
    for one, *others in zip(*drawn, strict=True):
        for other in others:
            np.testing.assert_array_equal(one, other)


def test_drawn_numbers_are_nearly_normal():
    x = np.asarray(sharded_decoder._normal(1, (1000, 999)))
    assert abs(x.mean()) < 4e-3
    assert x.std() == pytest.approx(1, abs=4e-3)
    assert np.mean(np.abs(x) < 1) == pytest.approx(0.683, abs=0.02)
    assert abs(np.corrcoef(x[:-1].ravel(), x[1:].ravel())[0, 1]) < 4e-3


def test_token_ids_tell_the_load(folder):
    config = read_config(folder)
    loads = Loads(config, 48)
    balanced, zipf = (loads.tokens(Step(PREFILL, 32, 8), load) for load in ("balanced", "zipf"))
    assert balanced.tolist() == np.arange(32).reshape(4, 8).tolist()
    assert zipf.tolist() == (48 + np.arange(32)).reshape(4, 8).tolist()
    chosen = np.argsort(-loads.logits, axis=1)[:, : config.moe.top_k]
    counts = [np.bincount(chosen[ids.ravel()].ravel(), minlength=8) for ids in (balanced, zipf)]
    assert counts[0].tolist() == [8] * 8
    assert counts[1].max() > 12


def test_loads_are_told_by_their_worst_layer():
    load = np.array([[1, 3, 2, 2], [4, 0, 4, 0]])
    assert multi_gpu_mode.spread(load, 2) == {"total": 8, "device_max_over_mean": 1.0, "expert_max_over_mean": 2.0}
    assert multi_gpu_mode.spread(load, 4)["device_max_over_mean"] == 2.0


def test_each_collective_alone_gives_what_it_should():
    mesh = make_mesh(4, 4)
    for kind, (program, x) in sharded_decoder.exchanges(mesh, 8, 16, jnp.float32).items():
        given = np.asarray(x)
        out = np.asarray(program(x))
        want = given if kind == "all-gather" else given.reshape(4, 8, 16).sum(axis=0)
        np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
        ((_, what),) = scopes.collectives(program.lower(x).compile().as_text(), 4).items()
        assert what.bytes == 8 * 16 * 4


def test_errors_that_rounding_does_not_explain_are_wrong():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=100)
    one, same, off = (reference + size * rng.normal(size=100) for size in (1e-2, 1e-2, 3e-2))
    assert multi_gpu_check.judge(same, one, reference, "bfloat16", None)["right"]
    assert not multi_gpu_check.judge(off, one, reference, "bfloat16", None)["right"]
    assert multi_gpu_check.judge(reference + 1e-6, reference, reference, "float32", None)["right"]
    assert not multi_gpu_check.judge(same, reference, reference, "float32", None)["right"]
    assert not multi_gpu_check.judge(reference * np.nan, one, reference, "bfloat16", None)["right"]


def check(folder: Path, output: Path, devices: int, *arguments: str) -> list[dict]:
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "bench.multi_gpu", "--check", "--layers", "2", "--model", str(folder)]
    command += ["--output", str(output), "--quantize", "bf16", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    return json.loads(output.read_text())["check"]


@pytest.mark.slow
def test_two_processes_give_one_devices_logits_as_one_does(folder, tmp_path):
    output = tmp_path / "result.json"
    assert [each["mode"] for each in check(folder, output, 4)] == list(modes(4))
    both = check(folder, output, 2, "--processes", "2", "--modes", "EP", "TP+DP")
    assert {(each["mode"], each["processes"]) for each in both} == {
        *((mode, 1) for mode in modes(4)),
        ("EP", 2),
        ("TP+DP", 2),
    }
    assert all(each["difference"] < 1e-5 for each in both), both


def row(mode: str, us: float, **changes) -> dict:
    parts = {"attention": 0.4 * us / 3, "gate_up": 0.3 * us / 3, "collective": 0.2 * us / 3, "wait": 0.1 * us / 3}
    collectives = [{"kind": "all-reduce", "count": 2.0, "bytes": 4000, "us": 50.0, "gbs": 120.0}]
    return {
        "quantize": "bf16", "mode": mode, "phase": "prefill", "tokens": 8192, "load": "balanced", "variant": "default",
        "tokens_per_s": 8192 / us * 1e6, "step_us": us, "layer_us": us / 3, "model_us": 10 * us,
        "model_tokens_per_s": 819.2 / us * 1e6, "parts": parts, "collectives": collectives,
        "rows": {"total": 1, "device_max_over_mean": 1.25, "expert_max_over_mean": 2.0},
    } | changes  # fmt: skip


@pytest.fixture
def shown() -> dict:
    rows = [row(ONE.name, 800.0, model_tokens_per_s=2e5), row("TP", 1300.0), row("EP", 1000.0)]
    rows += [row("EP", 800.0, variant="two batches"), row("EP+DP", 1.0, failed="ValueError: no room")]
    check = {
        "format": "bfloat16",
        "mode": "EP",
        "processes": 2,
        "error": 2e-3,
        "error_of_one": 1e-3,
        "difference": 2e-3,
    }
    return {
        "device": "H100", "devices": 4, "versions": {"jax": "0.11.2"}, "model": "m", "layers": 3, "moe_layers": 2,
        "model_layers": 60, "prompt_length": 1024, "context": 1024, "dtype": "bfloat16", "rows": rows,
        "links": [{"kind": "all-reduce", "tokens": 8192, "bytes": 4000, "us": 40.0, "gbs": 150.0}],
        "check": [{**check, "right": False}],
    }  # fmt: skip


def test_the_tables_ratios_are_right(shown):
    text = multi_gpu_tables.summary(shown)
    ratios = next(line for line in text.splitlines() if line.startswith("bf16, prefill 8192, balanced  "))
    assert ratios.split()[4:] == ["1.30", "-", "-", "-", "-", "-", "102%", "-", "79%", "-"]
    variants = next(line for line in text.splitlines() if line.startswith("bf16 EP, prefill"))
    assert variants.split()[-1] == "1.250"
    assert "ValueError: no room" in text
    assert "bfloat16 EP, 2 processes" in text
    assert text.rstrip().endswith("WRONG")
    assert multi_gpu_tables.of_alone(shown["rows"][1], shown) == pytest.approx(0.8)
    assert multi_gpu_tables.of_alone(shown["rows"][0], shown) is None
    assert multi_gpu_tables.communication(shown["rows"][1]) == pytest.approx(0.3)


def test_the_plot_is_drawn(shown, tmp_path):
    pytest.importorskip("matplotlib")
    multi_gpu_tables.plot(shown, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
