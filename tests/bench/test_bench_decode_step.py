"""The decode step's benchmark: bytes counted by hand, and the program on the CPU with a tiny model."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import refuses_other_devices

import jax_epmoe as ep
from bench import decode_step
from jax_epmoe.checkpoint import parameter_shapes
from jax_epmoe.models import kv_cache
from jax_epmoe.models.families import read_config
from jax_epmoe.models.kv_cache import Float8Vectors

TINY = {
    "model_type": "qwen3_moe", "hidden_size": 32, "moe_intermediate_size": 16, "intermediate_size": 64, "num_experts": 8,
    "num_experts_per_tok": 2, "num_hidden_layers": 2, "mlp_only_layers": [0], "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(TINY))
    return path


def arguments_of(monkeypatch, *arguments: str):
    monkeypatch.setattr(sys, "argv", ["bench.decode_step", *arguments])
    return decode_step._arguments()


def test_without_a_hopper_gpu_it_says_so_in_one_line():
    refuses_other_devices("bench.decode_step")


@pytest.mark.parametrize(
    ("name", "billions"),
    [("olmoe-1b-7b", 6.92), ("qwen3-30b-a3b", 30.53), ("deepseek-v2-lite", 15.71), ("deepseek-coder-v2", 235.74)],
)
def test_configs_have_as_many_parameters_as_published(name, billions):
    shapes = parameter_shapes(read_config(decode_step.CONFIGS / name)).values()
    assert sum(shape.size for shape in shapes) / 1e9 == pytest.approx(billions, abs=0.01)


def test_bytes_by_hand(folder):
    model = ep.dummy_model(folder, mesh=ep.make_mesh(), dtype="bfloat16")
    hidden, heads = 32, 16
    attention = 2 * hidden * (2 + 1 + 1 + 2) * heads + 2 * 2 * heads + 2 * 2 * hidden  # projections, QK norms, norms
    dense, router, expert = 2 * 3 * 64 * hidden, 2 * 8 * hidden, 2 * 3 * 16 * hidden
    head_and_norm, embedded = 2 * 128 * hidden + 2 * hidden, 2 * 4 * hidden
    expected = 2 * attention + dense + router + 5 * expert + head_and_norm + embedded
    assert decode_step.weight_bytes_read(model, np.array([5]), batch_size=4) == expected
    assert decode_step.cache_bytes_read(model.init_cache(4, 64), 60) == 2 * 2 * 2 * 4 * 60 * heads


def test_a_quantised_experts_bytes_are_those_of_its_values_and_scales(folder):
    model = ep.dummy_model(folder, mesh=ep.make_mesh(), dtype="bfloat16", quantization="fp8-channel")
    some, more = (decode_step.weight_bytes_read(model, np.array([used]), batch_size=4) for used in (5, 8))
    assert more - some == 3 * (3 * 16 * 32 + 4 * (2 * 16 + 32))


def test_a_run_measures_the_engines_own_step(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(decode_step, "ceilings_here", lambda: {"dense_tflops": 1.0, "copy_gbs": 1.0})
    output = tmp_path / "result.json"
    run_of = [
        "--models",
        str(folder),
        str(tmp_path / "none"),
        "--batch-size",
        "4",
        "--context",
        "64",
        "--output",
        str(output),
    ]
    decode_step.run(arguments_of(monkeypatch, *run_of))
    result = json.loads(output.read_text())
    row, missing = result["models"]
    assert row["floor_us"] == pytest.approx((row["weight_bytes"] + row["cache_bytes"]) * 1e-3)
    assert row["kernels_us"] == pytest.approx(sum(row["parts"].values()))
    assert 0 < row["moe_us"] < row["kernels_us"]
    assert {"router", "plan", "gate_up", "down", "combine", "attention", "sample", "other"} == set(row["parts"])
    assert 2 <= row["experts_used"] <= 8
    assert "cannot read config.json" in missing["failed"]
    printed = capsys.readouterr().out
    assert "batch 4, context 64; ms" in printed
    assert printed.splitlines()[-1] == f"wrote {output}"


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_every_call_is_the_same_and_ends_with_the_context(folder, steps):
    model = ep.dummy_model(folder, mesh=ep.make_mesh(), dtype="float32")
    step = decode_step.Step(model, 4, 128, steps)
    assert step.cache[0][0].shape[:2] == (4, 128)
    before = np.asarray(step.cache[0][0])
    tokens = [np.asarray(step.run(step.program).token) for _ in range(decode_step.CALLS - 1)]
    assert tokens[0].shape == (steps, 4)
    assert (tokens[0] >= 0).all()
    assert (np.array(tokens) == tokens[0]).all()
    written = np.any(before != np.asarray(step.cache[0][0]), axis=(0, 2, 3))
    assert np.flatnonzero(written).tolist() == list(range(127 - steps, 127))
    assert step.experts_used().shape == (1,)
    assert step.positions_read == {1: 127, 3: 126}[steps]


def test_a_random_float8_cache_is_finite_and_its_scales_count(folder):
    model = ep.dummy_model(folder, mesh=ep.make_mesh(), dtype="bfloat16")
    cache = model.init_cache(4, 64, "fp8")
    assert decode_step.cache_bytes_read(cache, 60) == 2 * 2 * 4 * 60 * (16 + 4)  # layers, keys and values, sequences
    drawn = jax.tree.map(decode_step._random_like, cache)
    for vectors in jax.tree.leaves(drawn, is_leaf=lambda leaf: isinstance(leaf, Float8Vectors)):
        values = np.asarray(kv_cache.read(vectors, jnp.float32))
        assert np.isfinite(values).all()
        assert len(np.unique(values)) > 100
        assert (np.asarray(vectors.scales) > 0).all()


def test_a_context_that_the_steps_do_not_fit_is_refused(monkeypatch):
    with pytest.raises(SystemExit):
        arguments_of(monkeypatch, "--context", "5", "--num-continuous-decode-steps", "4")
