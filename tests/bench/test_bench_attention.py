"""The attention kernels' benchmark: bytes counted by hand, its programs lowered for CUDA, and a run on the CPU with stand-ins."""

import json
import sys
from functools import partial

import jax
import jax._src.cudnn.fused_attention_stablehlo as cudnn
import jax.numpy as jnp
import pytest
from kernels import test_rope_hopper
from programs import refuses_other_devices

from bench import attention, roofline
from bench.attention import CASES, RANK, Case
from jax_epmoe.kernels import decode_hopper, mla_hopper, rope_hopper
from jax_epmoe.models import kv_cache
from jax_epmoe.models.attention import attend

NAMES = [case.name for case in CASES]
CEILINGS = {"dense_tflops": 1.0, "copy_gbs": 2.0}
TINY = (  # with shapes in common, which are compiled once
    Case("gqa", 5, 64, 8, 4, 64),
    Case("gqa", 5, 64, 8, 4, 64, window=9),
    Case("mla", 5, 64, 8),
    Case("rope", 5, 64, 8, 4, 64),
)


def arguments_of(monkeypatch, *arguments: str):
    monkeypatch.setattr(sys, "argv", ["bench.attention", *arguments])
    return attention._arguments()


def attend_to(q, k, v, lengths, scale, window=None):
    """Of keys and values `[B, L, kv_heads, D]`, in float32."""
    wide = (a.astype(jnp.float32) for a in (q[:, None], k, v))
    places = jnp.broadcast_to(jnp.arange(k.shape[1]), k.shape[:2])
    return attend(*wide, lengths[:, None] - 1, places, scale, window)[:, 0].astype(q.dtype)


@pytest.fixture
def stand_ins(monkeypatch):
    """What the kernels compute, in XLA; cuDNN has none."""

    def decode(q, k, v, lengths, sinks, scales, *, scale, sliding_window):
        if scales is not None:
            k, v = (kv_cache.read(kv_cache.Float8Vectors(*a), jnp.float32) for a in zip((k, v), scales, strict=True))
        return attend_to(q, k, v, lengths, scale, sliding_window)

    def decode_latents(q, latent, lengths, *, rank, scale):
        return attend_to(q, latent[:, :, None], latent[:, :, None, :rank], lengths, scale)

    def decode_float8(q, latent, rotated, scales, lengths, *, scale):
        parts = map(kv_cache.Float8Vectors, (latent, rotated), scales)
        whole = kv_cache.read_latents(tuple(parts), jnp.float32)
        return decode_latents(q, whole, lengths, rank=latent.shape[-1], scale=scale)

    def rotate_into_cache(*arrays, eps, dtype):
        assert eps == test_rope_hopper.EPS
        q, *caches = test_rope_hopper.expected(*arrays, dtype)
        return q, tuple(caches)

    monkeypatch.setattr(decode_hopper, "decode", decode)
    monkeypatch.setattr(mla_hopper, "decode", decode_latents)
    monkeypatch.setattr(mla_hopper, "decode_float8", decode_float8)
    monkeypatch.setattr(rope_hopper, "rotate_into_cache", rotate_into_cache)
    monkeypatch.setattr(attention, "ceilings", lambda torch: CEILINGS)


def test_without_a_hopper_gpu_it_says_so_in_one_line():
    refuses_other_devices("bench.attention")


def test_arguments_choose_cases_by_name(monkeypatch, capsys):
    whole = arguments_of(monkeypatch)
    assert whole.cases == list(CASES)
    assert whole.output.name == "attention_cpu.json"
    some = arguments_of(monkeypatch, "--cases", "*-window-*", "mla-1x*", "gqa-8x1024-32/4x128").cases
    assert [case.name for case in some] == ["gqa-8x1024-32/4x128", "gqa-64x8192-64/8x64-window-128", "mla-1x1024-16"]
    quick = arguments_of(monkeypatch, "--quick").cases
    assert [case.name for case in quick] == ["gqa-64x1024-32/4x128", "mla-64x1024-16", "rope-64x1024-32/4x128"]
    assert len(set(NAMES)) == len(NAMES)
    with pytest.raises(SystemExit):
        arguments_of(monkeypatch, "--cases", "gqa*", "mha*")
    assert "--cases: none matches mha*; there are gqa-64x1024-32/4x128, " in capsys.readouterr().err


def test_bytes_by_hand():
    gqa, window, mla, rope = (
        CASES[NAMES.index(name)]
        for name in (
            "gqa-64x1024-32/4x128",
            "gqa-64x8192-64/8x64-window-128",
            "mla-64x1024-16",
            "rope-64x1024-32/4x128",
        )
    )
    of_lengths = 4 * 64
    q_and_out, vectors = 2 * 64 * 32 * 128 * 2, 2 * 64 * 1024 * 4
    assert attention.bytes_moved(gqa, False) == q_and_out + of_lengths + vectors * 2 * 128
    assert attention.bytes_moved(gqa, True) == q_and_out + of_lengths + vectors * (128 + 4)
    assert attention.bytes_moved(window, False) == 2 * 64 * 64 * 64 * 2 + of_lengths + 2 * 64 * 128 * 8 * 2 * 64
    of_heads, positions = 64 * 16 * (576 + 512) * 2 + of_lengths, 64 * 1024
    assert attention.bytes_moved(mla, False) == of_heads + positions * 576 * 2
    assert attention.bytes_moved(mla, True) == of_heads + positions * (576 + 2 * 4)
    q, qkv, table, norms = 64 * 32 * 128 * 2, 64 * 40 * 128 * 4, 64 * 128 * 4, 2 * 128 * 2
    assert attention.bytes_moved(rope, False) == qkv + table + of_lengths + norms + q + 2 * 64 * 4 * 128 * 2
    assert attention.bytes_moved(rope, True) == qkv + table + of_lengths + norms + q + 2 * 64 * 4 * (128 + 4)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_model_would_use_the_kernels_that_are_timed(case):
    for name in attention.implementations(case):
        inputs, cache = jax.eval_shape(partial(attention.draw, case, "float8" in name, 0))
        values = [kv_cache.stored(each)[0] for each in cache]
        if case.kind == "gqa":
            assert decode_hopper.serves(inputs[0], *values)
        elif case.kind == "mla":
            if name == "float8":
                assert mla_hopper.serves_float8(inputs[0], *values)
            else:
                assert mla_hopper.serves(
                    inputs[0], jax.eval_shape(partial(kv_cache.read_latents, dtype=attention.DTYPE), tuple(cache)), RANK
                )
        else:
            qkv, table, *_ = inputs
            q, k, _ = jax.eval_shape(partial(attention._split, case), qkv)
            assert rope_hopper.serves(q, k, table, values[0], attention.DTYPE)


def test_quick_programs_lower_for_cuda(monkeypatch):
    for module in (decode_hopper, mla_hopper):
        monkeypatch.setattr(module, "num_sms", lambda: 132)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    for case in arguments_of(monkeypatch, "--quick").cases:
        for name in attention.implementations(case):
            program = attention.traced(case, name).lower(lowering_platforms=("cuda",)).as_text()
            is_ours = not name.startswith(("xla", "cudnn"))
            assert ("custom_call @mosaic_gpu" in program) == is_ours, (case.name, name)
            assert ("cudnn$fmha" in program) == (name == "cudnn")
            given = program.count("tf.aliasing_output") + program.count("jax.buffer_donor")
            assert given == (0 if case.kind != "rope" else 4 if "float8" in name else 2)


def test_a_run_writes_right_numbers_and_what_failed(stand_ins, monkeypatch, tmp_path, capsys):
    output = tmp_path / "result.json"
    args = arguments_of(monkeypatch, "--jobs", "2", "--output", str(output))
    args.cases = list(TINY)
    times = attention.times
    # Of kernels the CPU tells nothing.
    monkeypatch.setattr(attention, "times", lambda *of: {**times(*of), "kernels": 2 * [{"name": "one", "us": 1.0}]})
    attention.run(args)
    result = json.loads(output.read_text())
    assert [(case["case"], case["kind"], case["window"], list(case["results"])) for case in result["cases"]] == [
        ("gqa-5x64-8/4x64", "gqa", None, ["ours", "float8", "float8 dequantised", "cudnn"]),
        ("gqa-5x64-8/4x64-window-9", "gqa", 9, ["ours", "float8"]),
        ("mla-5x64-8", "mla", None, ["ours", "float8", "float8 dequantised", "xla"]),
        ("rope-5x64-8/4x64", "rope", None, ["ours", "xla", "ours float8", "xla float8"]),
    ]
    for case in result["cases"]:
        for name, row in case["results"].items():
            if name == "cudnn":
                assert row["failed"]
                continue
            assert row["error"] < (1e-6 if name == "xla" and case["kind"] == "rope" else roofline.TOLERANCE), (
                case,
                name,
            )
            assert row["gbs"] == pytest.approx(row["bytes"] / row["device_us"] * 1e-3)
            assert row["share"] == pytest.approx(row["gbs"] / 2)
            assert row["copies"] == 4
            assert row["num_kernels"] == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"wrote {output}"
    assert sum("WRONG" in line for line in lines) == 0
    assert sum(line.startswith(tuple(case.name + " " for case in TINY)) for line in lines) == 14
    assert "copy_gbs" in result["ceilings"]


def test_wrong_outputs_are_seen(stand_ins):
    case = TINY[0]
    arguments = attention.draw(case, False, 0)
    right = jax.jit(partial(attention.decode, case))
    assert attention.error_of(case, right, *arguments) < roofline.TOLERANCE
    assert attention.error_of(case, lambda *args: 2 * right(*args), *arguments) > 0.9
    with pytest.raises(RuntimeError, match="not finite"):
        attention.error_of(case, lambda *args: right(*args).at[3, 5].set(jnp.nan), *arguments)
    row = {"device_us": 1.0, "num_kernels": 1, "bytes": 1, "gbs": 1.0, "share": 0.5, "error": 0.9}
    shown = {"cases": [{"case": case.name, "kind": "gqa", "results": {"ours": row}}]}
    assert attention.table(shown).endswith("9.0e-01  WRONG")


@pytest.mark.parametrize("float8", [False, True], ids=["bfloat16", "float8"])
def test_rope_that_writes_wrong_keys_is_seen(float8, stand_ins):
    case = TINY[-1]
    inputs, cache = attention.draw(case, float8, 0)

    def right(inputs, cache):
        out, cache[:] = attention.rotate_into_cache(case, inputs, cache)
        return out

    assert attention.error_of(case, right, inputs, list(cache)) < attention.ROPE_TOLERANCE

    def swapped(inputs, cache):
        out = right(inputs, cache)
        cache.reverse()
        return out

    assert attention.error_of(case, swapped, inputs, cache) > 0.1


def test_past_the_time_limit_it_measures_nothing(stand_ins, monkeypatch, tmp_path, capsys):
    output = tmp_path / "result.json"
    args = arguments_of(monkeypatch, "--time-limit", "-1", "--output", str(output))
    args.cases = list(TINY[2:3])
    attention.run(args)
    assert not output.exists()
    assert "time limit of -1 s: mla-5x64-8 and what follows left out" in capsys.readouterr().out
