"""The grouped GEMM's benchmark as a program, on the CPU: the definition stands in for the Hopper kernel."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import grouped_gemm, peers, roofline, timing
from bench.roofline import (
    DENSE,
    GATED,
    GATHER,
    IMPLEMENTATIONS,
    OURS,
    QUANTIZED_IMPLEMENTATIONS,
    RAGGED_DOT,
    SCALED,
    SCALED_FAST,
    TORCH,
    Shape,
)

ROOT = Path(__file__).parents[2]


def run_program(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench.grouped_gemm", *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def arguments_of(monkeypatch, *arguments: str):
    monkeypatch.setattr(sys, "argv", ["bench.grouped_gemm", *arguments])
    return grouped_gemm._arguments()


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(roofline.MODELS, "tiny", roofline.Model(64, 32, 4, 2))
    monkeypatch.setattr(grouped_gemm, "BACKEND", "xla")
    ceilings = {"dense_tflops": 1e-2, "copy_gbs": 1.0}
    monkeypatch.setattr(grouped_gemm.Bench, "ceilings", lambda self: ceilings)


def test_without_a_hopper_gpu_it_says_so_in_one_line():
    done = run_program()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.strip().splitlines() == ["bench.grouped_gemm needs an NVIDIA Hopper GPU; this is cpu"]


def test_arguments_choose_shapes_loads_and_implementations(monkeypatch):
    quick = arguments_of(monkeypatch, "--quick")
    assert (quick.shapes, quick.loads) == (list(roofline.TABLE_SHAPES), ("dirichlet",))
    assert RAGGED_DOT not in quick.wanted
    whole = arguments_of(monkeypatch)
    assert (len(whole.shapes), whole.loads) == (28, roofline.LOADS)
    assert whole.output.name == "grouped_gemm_cpu.json"
    some = arguments_of(
        monkeypatch, "--shapes", "olmoe-*-up", "--loads", "one-hot", "--implementations", "ours", "torch"
    )
    assert [shape.name for shape in some.shapes] == ["olmoe-16-up", "olmoe-64-up", "olmoe-256-up"]
    assert (some.loads, some.wanted) == (["one-hot"], [OURS, GATED, GATHER, TORCH])
    with pytest.raises(SystemExit):
        arguments_of(monkeypatch, "--shapes", "gpt*")


def test_quantised_runs_have_shapes_peers_and_a_file_of_their_own(monkeypatch, capsys):
    args = arguments_of(monkeypatch, "--quantize", "fp8-block", "--shapes", "v3*", "--implementations", "ours", "torch")
    assert [(shape.name, shape.quantize) for shape in args.shapes] == [
        ("v3-4-32768-up", "fp8-block"), ("v3-4-32768-down", "fp8-block"),
    ]  # fmt: skip
    assert args.wanted == [OURS, GATED, GATHER, SCALED, SCALED_FAST]
    assert args.output.name == "grouped_gemm-fp8-block_cpu.json"
    with pytest.raises(SystemExit):
        arguments_of(monkeypatch, "--quantize", "fp8-block", "--implementations", "ours", "tokamax", "mgpu")
    assert "--implementations: tokamax, mgpu cannot be had with --quantize" in capsys.readouterr().err


def test_a_run_writes_right_numbers_and_says_what_failed(tiny, monkeypatch, tmp_path, capsys):
    output = tmp_path / "result.json"
    args = arguments_of(monkeypatch, "--output", str(output))
    args.shapes = [Shape("tiny", 16, "up"), Shape("tiny", 16, "down")]
    bench = grouped_gemm.Bench(args)
    try:
        bench.run()
    finally:
        bench.close()
    result = json.loads(output.read_text())
    assert [(case["shape"], case["load"]) for case in result["cases"]] == [
        (shape.name, load) for load in roofline.LOADS for shape in args.shapes
    ]
    for case in result["cases"]:
        up = case["shape"].endswith("up")
        assert set(case["results"]) == {name for key in IMPLEMENTATIONS for name in IMPLEMENTATIONS[key]} - (
            set() if up else {GATED, GATHER}
        )
        for name in (OURS, DENSE, RAGGED_DOT, *((GATED, GATHER) if up else ())):
            assert case["results"][name]["error"] < roofline.TOLERANCE, (case["shape"], case["load"], name)
            assert case["results"][name]["device_us"] > 0
        assert case["results"]["jax ragged_dot_mgpu"]["failed"]
    printed = capsys.readouterr().out
    assert "tiny-16-down" in printed.splitlines()[-2]
    assert f"wrote {output}" in printed.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["fp8-block", "fp8-channel", "fp8-tensor"])
def test_a_quantised_run_writes_right_numbers_and_its_format(tiny, monkeypatch, tmp_path, capsys, quantize):
    monkeypatch.setitem(roofline.MODELS, "tiny", roofline.Model(384, 128, 4, 2))
    output = tmp_path / "result.json"
    args = arguments_of(monkeypatch, "--quantize", quantize, "--loads", "dirichlet", "--output", str(output))
    args.shapes = [Shape("tiny", 16, projection, quantize) for projection in ("up", "down")]
    bench = grouped_gemm.Bench(args)
    try:
        bench.run()
    finally:
        bench.close()
    result = json.loads(output.read_text())
    assert result["quantize"] == quantize
    wanted = {name for names in QUANTIZED_IMPLEMENTATIONS.values() for name in names}
    for case, names in zip(result["cases"], ((OURS, GATED, GATHER), (OURS,)), strict=True):
        assert set(case["results"]) == wanted - {GATED, GATHER} | set(names)
        for name in names:
            # float8 activations that were not those of the product checked against would be 2.6e-2 off
            assert case["results"][name]["error"] < roofline.TOLERANCE, (case["shape"], name)
            assert case["results"][name]["device_us"] > 0
        assert case["results"][SCALED]["failed"]
    up = result["cases"][0]
    sizes = np.array(up["group_sizes"])
    scales = {"fp8-block": (32 * 3, 2 * 3), "fp8-channel": (32, 256), "fp8-tensor": (1, 1)}[quantize]
    weights = np.count_nonzero(sizes) * (256 * 384 + 4 * scales[1])
    assert up["results"][OURS]["bytes"] == 32 * 384 + 4 * scales[0] + weights + 2 * 32 * 256
    assert f"{quantize}; ceilings" in capsys.readouterr().out


def test_blocks_that_gate_and_up_would_share_leave_the_pair_out():
    for quantize, names in (("fp8-block", [GATHER]), ("fp8-channel", [GATED, GATHER])):
        candidates = grouped_gemm.ours(Shape("coder-tp8", 8192, "up", quantize))
        assert [candidate.name for candidate in candidates][2:] == names


def test_past_the_time_limit_it_starts_nothing(tiny, monkeypatch, tmp_path, capsys):
    args = arguments_of(
        monkeypatch, "--implementations", "ours", "--time-limit", "-1", "--output", str(tmp_path / "r.json")
    )
    bench = grouped_gemm.Bench(args)
    bench.run()
    bench.close()
    assert "84 of 84 cases left out" in capsys.readouterr().out


def test_a_wrong_scale_is_seen(tiny):
    inputs = grouped_gemm.Inputs(Shape("tiny", 16, "up", "fp8-channel"), "dirichlet", set())

    def shifted(x, w, sizes):
        return grouped_gemm.multiply(dataclasses.replace(x, scales=jnp.roll(x.scales, 1)), w, sizes, backend="xla")

    candidate = peers.Candidate(OURS, shifted, ("x", "w", "sizes"))
    assert inputs.error(candidate, shifted(*inputs.of(candidate)[0])) > 0.1


def test_a_wrong_output_is_seen(tiny, monkeypatch):
    inputs = grouped_gemm.Inputs(Shape("tiny", 16, "up"), "dirichlet", set())
    candidate = peers.Candidate(OURS, lambda x, w, sizes: x, ("x", "w", "sizes"))
    assert inputs.error(candidate, inputs.arrays["x"][0]) > 0.5  # n is k
    with pytest.raises(RuntimeError, match="NaN"):
        inputs.error(candidate, inputs.arrays["x"][0].at[3, 5].set(jnp.nan))


def test_consecutive_runs_take_their_arguments_in_turn():
    call = timing.Rotation(lambda a: a, [(0,), (1,), (2,)])
    assert isinstance(call, jax.stages.Wrapped)  # or the profiler would jit it, once for all
    assert [call() for _ in range(5)] == [1, 2, 0, 1, 2]


def test_tiles_of_jaxs_example_divide_n():
    for shape in roofline.SHAPES:
        for config in (*peers.PREFILL_CONFIGS, *peers.DECODE_CONFIGS):
            narrowed = peers._narrowed(config, shape.n)
            assert narrowed is None or shape.n % (narrowed.block_n * narrowed.grid_block_n) == 0
    assert peers._narrowed(peers.TileConfig(128, 128, 64, 5, 4), 384) == (128, 128, 64, 5, 3)
    assert peers._narrowed(peers.TileConfig(64, 256, 64, 4, 2), 384) is None


def test_a_process_that_dies_leaves_a_line(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    process = peers.TorchProcess()
    process.connect()
    assert process.ask({"ceilings": {"quantized": False}}) == {"failed": "torch's process ended with status 1"}
    process.close()


def test_samples_hold_in_the_process_of_torch_too():
    sizes = np.array(roofline.group_sizes("dirichlet", 192, 20).tolist())  # as they come out of JSON
    for mine, theirs in zip(roofline.samples(sizes), roofline.samples(sizes.astype(np.int32)), strict=True):
        np.testing.assert_array_equal(mine, theirs)
