"""`epmoe-tune` on the CPU: a made-up clock stands in for the GPU's, the definition for its kernel."""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_epmoe import tune
from jax_epmoe.kernels.grouped_gemm import hopper, reference, tuning
from jax_epmoe.tune import MODELS, Case, candidates, make_cases, make_loads

ROOT = Path(__file__).parents[1]
CODER = ["--model", "deepseek-coder-v2", "--tp-size", "8", "--ep-size", "8"]


class Clock:
    """A `Measure` whose microseconds come from `time(case, tiling)`; keeps what it was asked for."""

    def __init__(self, time=lambda case, tiling: 100.0 if tiling == case.heuristic else 200.0):
        self.time, self.calls, self.loads = time, [], []

    def __call__(self, case, tilings, loads):
        self.calls.append((case.product, case.rows))
        self.loads.append(loads)
        for tiling in tilings:
            yield self.time(case, tiling)


def second_candidate_wins(case, tiling):
    return 80.0 if tiling == candidates(case)[1] else 100.0


@pytest.fixture(autouse=True)
def pretend_hopper(monkeypatch, tmp_path):
    """Also gives each test a folder of its own for tables."""
    monkeypatch.setattr(hopper, "on_hopper", lambda: True)
    monkeypatch.setattr(tuning, "_PACKAGED", tmp_path / "packaged")
    monkeypatch.setenv("JAX_EPMOE_TUNED", str(tmp_path / "user"))
    tuning._measured.cache_clear()
    yield
    tuning._measured.cache_clear()


@pytest.fixture
def table(tmp_path):
    return tmp_path / "user" / "cpu.json"


def entries(table):
    return tuning.read_table(table, "cpu")


def refused(capsys, *arguments):
    """The one line that a refused call says."""
    assert tune.main([*map(str, arguments)], measure=Clock()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("epmoe-tune: error: ")
    return err.removeprefix("epmoe-tune: error: ").rstrip()


def test_a_model_and_a_mesh_give_the_products_of_one_device():
    coder = MODELS["deepseek-coder-v2"]
    assert make_cases(coder, 8, 8, [8192, 1]) == [
        Case("up", 8, 20, 5120, 1536, True),
        Case("down", 8, 20, 1536, 5120, False),
        Case("up", 6144, 20, 5120, 1536, True),
        Case("down", 6144, 20, 1536, 5120, False),
    ]
    assert make_cases(coder, 8, 2, [8192])[0] == Case("up", 24576, 80, 5120, 384, True)
    assert make_cases(MODELS["gpt-oss-20b"], 7, 1, [8192])[1].k == 412  # padded, as the layer does


def test_a_folder_with_a_config_is_read():
    assert make_cases(tune.model_config(str(ROOT / "bench/configs/olmoe-1b-7b")), 1, 1, [64]) == make_cases(
        MODELS["olmoe-1b-7b"], 1, 1, [64]
    )


@pytest.mark.parametrize("mesh", [(1, 1), (8, 8), (8, 1)], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_candidates_are_few_valid_and_begin_with_the_heuristic(model, mesh):
    for case in make_cases(MODELS[model], *mesh, tune.TOKENS):
        tilings = candidates(case)
        assert tilings[0] == case.heuristic
        assert 10 <= len(set(tilings)) == len(tilings) <= 24, (case, len(tilings))
        for tiling in tilings:
            used = tuning.shared_memory_bytes(tiling, case.gated)
            assert tiling.columns % 128 == 0 or tiling.columns % 192 == 0
            assert used <= 227 * 1024, (case, tiling, used)
            assert tuning.is_valid(tiling, case.gated), (case, tiling)


def test_loads_hold_all_rows_two_of_them_skewed():
    case = Case("up", 1000, 16, 64, 64, True)
    one, two, even = make_loads(case, quick=False)
    assert [sizes.sum() for sizes in (one, two, even)] == [1000] * 3
    assert max(one) > 2 * 1000 / 16
    assert (one != two).any()
    assert max(even) - min(even) == 1
    np.testing.assert_array_equal(make_loads(case, quick=True), [one])


def test_the_fastest_is_kept_and_later_calls_get_it(table, capsys):
    assert tune.main([*CODER, "--tokens", "8192"], measure=Clock(second_candidate_wins)) == 0
    case, _ = make_cases(MODELS["deepseek-coder-v2"], 8, 8, [8192])
    sizes = {"experts": 20, "n": 1536, "k": 5120, "gated": True}
    assert tuning.choose_tiling(rows=6144, **sizes) == candidates(case)[1]
    assert tuning.choose_tiling(rows=2048, **sizes) == tuning.heuristic(rows=2048, **sizes)
    up = next(entry for entry in entries(table) if entry.gated)
    assert (up.us, up.heuristic_us, up.device, up.versions) == (80.0, 100.0, "cpu", tuning.versions())
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["product", "rows", "heuristic"]
    assert lines[2].split()[:5] == ["up", "6144", "100.0", "80.0", "20.0%"]


def test_a_gain_within_the_noise_changes_nothing(table, capsys):
    time = lambda case, tiling: 100.0 if tiling == case.heuristic else 99.5  # noqa: E731
    assert tune.main([*CODER, "--tokens", "64"], measure=Clock(time)) == 0
    for case in make_cases(MODELS["deepseek-coder-v2"], 8, 8, [64]):
        assert tuning.choose_tiling(rows=64, experts=20, n=case.n, k=case.k, gated=case.gated) == case.heuristic
    assert [entry.us for entry in entries(table)] == [100.0, 100.0]
    assert capsys.readouterr().out.count("0.0%  the heuristic's") == 2


def test_what_does_not_run_is_left_out_with_a_note(table, capsys):
    def time(case, tiling):
        if not case.gated:
            return "NotImplementedError: no such product"
        return "ValueError: too high" if tiling in (case.heuristic, candidates(case)[2]) else 50.0

    assert tune.main([*CODER, "--tokens", "8192"], measure=Clock(time)) == 0
    (entry,) = entries(table)
    assert (entry.gated, entry.us, entry.heuristic_us) == (True, 50.0, None)
    out, err = capsys.readouterr()
    assert err.count("left out Tiling") == 2
    assert err.count("ValueError: too high") == 2
    assert "down, 6144 rows: nothing ran: NotImplementedError: no such product" in err
    assert "not measured" in out.splitlines()[-1]


def test_what_was_measured_before_an_interrupt_is_not_measured_again(table, capsys):
    def until_the_second(case, tiling):
        if len(first.calls) == 2:
            raise KeyboardInterrupt
        return 100.0

    call = [*CODER, "--tokens", "64", "8192"]
    first, second, third, forced = Clock(until_the_second), Clock(), Clock(), Clock()
    assert tune.main(call, measure=first) == 130
    assert [(entry.gated, entry.rows) for entry in entries(table)] == [(True, 48)]
    assert "epmoe-tune: interrupted" in capsys.readouterr().err
    assert tune.main(call, measure=second) == 0
    assert second.calls == [("down", 48), ("up", 6144), ("down", 6144)]
    assert tune.main(call, measure=third) == 0
    assert third.calls == []
    assert tune.main([*call, "--force"], measure=forced) == 0
    assert forced.calls == [("up", 48), *second.calls]
    assert len(entries(table)) == 4


@pytest.mark.parametrize("change", [{"jax": "0.0.1"}, {"kernel": -1}], ids=str)
def test_other_versions_are_measured_again(table, monkeypatch, change):
    call = [*CODER, "--tokens", "64"]
    now = tuning.versions()
    monkeypatch.setattr(tuning, "versions", lambda: {**now, **change})
    assert tune.main(call, measure=Clock()) == 0
    monkeypatch.setattr(tuning, "versions", lambda: now)
    again = Clock()
    assert tune.main(call, measure=again) == 0
    assert len(again.calls) == len(entries(table)) == 2
    assert {entry.versions["kernel"] for entry in entries(table)} == {tuning.KERNEL_VERSION}


def test_a_quick_run_tries_less_and_a_whole_one_does_it_again(table):
    call, quick, whole, after = [*CODER, "--tokens", "8192"], Clock(), Clock(), Clock()
    assert tune.main([*call, "--quick"], measure=quick) == 0
    assert [len(loads) for loads in quick.loads] == [1, 1]
    assert tune.main(call, measure=whole) == 0
    assert [len(loads) for loads in whole.loads] == [3, 3]
    assert tune.main([*call, "--quick"], measure=after) == 0
    assert after.calls == []


def test_past_the_time_limit_nothing_is_begun(table, capsys):
    clock = Clock()
    assert tune.main([*CODER, "--tokens", "64", "--time-limit", "-1"], measure=clock) == 0
    assert clock.calls == entries(table) == []
    out, err = capsys.readouterr()
    assert "time limit: 2 of 2 left out" in err
    assert out.count("not measured") == 2


def test_two_models_share_a_table(table, tmp_path):
    other = tmp_path / "other.json"
    for model in ("olmoe-1b-7b", "qwen3-30b-a3b"):
        assert tune.main(["--model", model, "--tokens", "64", "--output", str(other)], measure=Clock()) == 0
    assert sorted({entry.experts for entry in entries(other)}) == [64, 128]
    assert not table.exists()


def test_runs_side_by_side_measure_in_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    inside, most = [], []

    def measure():
        with tune.in_turn():
            inside.append(None)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: measure(), range(16)))
    assert most == [1] * 16


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--model", "gpt-2"],
            "--model is 'gpt-2'; it should be a folder with a config.json, or one of mixtral-8x7b, ",
        ),
        ([*CODER[:-1], "3"], "--ep-size is 3; it should be a divisor of --tp-size (8)"),
        (
            ["--model", "deepseek-v2", "--tp-size", "96", "--ep-size", "96"],
            "--ep-size is 96; it should be a divisor of the 160 experts",
        ),
        ([*CODER[:2], "--tp-size", "0"], "--tp-size is 0; it should be positive"),
        ([*CODER, "--tokens", "64", "-1"], "--tokens is -1; it should be positive"),
        ([*CODER, "--tokens", "few"], "argument --tokens: invalid int value: 'few'"),
        ([*CODER, "--tp", "8"], "unrecognized arguments: --tp 8"),
        ([], "the following arguments are required: --model"),
        ([*CODER, "--output", "/dev/null/table.json"], "/dev/null/table.json cannot be read: Not a directory"),
        ([*CODER, "--output", "/proc/none/table.json"], "/proc/none: No such file or directory"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_told_in_one_line(capsys, arguments, told):
    assert refused(capsys, *arguments).startswith(told)


def test_an_unsupported_config_is_told_in_one_line(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert refused(capsys, "--model", tmp_path).startswith("config.json: model_type is 'gpt2'")


def test_a_damaged_table_is_told_and_left_as_it_is(capsys, table):
    table.parent.mkdir()
    table.write_text("{")
    assert refused(capsys, *CODER).startswith(f"{table} is damaged: ")
    assert table.read_text() == "{"


def test_without_a_hopper_gpu_it_says_so_in_one_line():
    command = [sys.executable, "-m", "jax_epmoe.tune", *CODER]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip().splitlines() == [
        "epmoe-tune: error: tilings are measured on an NVIDIA Hopper GPU; this is cpu"
    ]


@pytest.mark.parametrize("case", [Case("up", 64, 4, 64, 128, True), Case("down", 64, 4, 128, 64, False)], ids=str)
def test_only_tilings_that_compile_and_compute_the_product_are_timed(case, monkeypatch):
    good, unlucky, wrong, untouched = candidates(case)[:4]

    def matmul(x, w, group_sizes, *, tiling, **options):
        if tiling == unlucky:
            raise ValueError("no room\nfor more")
        out = reference.matmul(x, w, group_sizes, **options)
        return {wrong: 1.1 * out, untouched: out.at[-1, -1].set(math.nan)}.get(tiling, out).astype(x.dtype)

    def kernel_us(call, iterations):
        assert iterations >= 21
        assert isinstance(call, jax.stages.Wrapped)  # or the profiler would jit it, once for all
        assert call().shape == (case.rows, case.n)
        return [1.0, 7.0, 900.0]

    monkeypatch.setattr(hopper, "matmul", matmul)
    monkeypatch.setattr(tune, "kernel_us", kernel_us)
    monkeypatch.setattr(tune, "_UNCACHED_BYTES", 2e5)
    results = list(tune.measure_on_gpu(case, [unlucky, good, wrong, untouched], make_loads(case, quick=False)))
    assert results[:2] == ["ValueError: no room", 7.0]
    assert results[2].startswith("RuntimeError: its result is wrong: error ")
    assert results[3] == "RuntimeError: its result is wrong: error nan"


def test_the_profiler_is_called_as_it_wants_to_be():
    with pytest.raises(RuntimeError, match="CUPTI profiling is not supported"):
        tune.kernel_us(tune.Rotation(lambda: None, [()]), 21)


def test_consecutive_calls_read_other_weights(monkeypatch):
    monkeypatch.setattr(tune, "_UNCACHED_BYTES", 2e5)
    case = Case("down", 8, 4, 128, 64, False)  # 16 KiB of weights an expert
    sizes = np.array([8, 0, 0, 0], np.int32)
    calls = tune._Inputs(case, [sizes]).calls(sizes)
    read = [(id(w), int(np.argmax(sizes))) for _, w, sizes in calls]
    assert len(set(read)) == len(read) == math.ceil(2e5 / 2**14)
