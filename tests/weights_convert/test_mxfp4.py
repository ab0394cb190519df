"""gpt-oss's experts in MXFP4: decoded exactly, wherever they lie, to what the same numbers in bf16 become."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hf_checkpoint import BF16, GPT_OSS, MIXTRAL, tensors_and_expected, write
from safetensors.numpy import load_file
from test_convert import MEMORY, assert_same, convert

import weights_convert
from weights_convert import arrays
from weights_convert.cli import main
from weights_convert.expert_stacks import decode_mxfp4

PARITY = Path(__file__).parent.parent / "parity" / "checkpoints" / "gpt_oss_mxfp4"
QUANTIZATION = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
CONFIG = GPT_OSS | {"hidden_size": 32, "intermediate_size": 64, "quantization_config": QUANTIZATION}


def decoded(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """By the types of ml_dtypes, in float64."""
    halves = np.stack([blocks & 15, blocks >> 4], axis=-1)  # the lower first
    numbers = halves.view(ml_dtypes.float4_e2m1fn).astype(np.float64).reshape(*scales.shape, 32)
    return (numbers * scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)[..., None]).reshape(
        *scales.shape[:-1], -1
    )


def in_mxfp4(config=CONFIG) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Tensors with experts in MXFP4, the same with them in bf16, and the arrays that they should become."""
    tensors, expected = tensors_and_expected(config)
    rng, packed, unpacked = np.random.default_rng(1), {}, {}
    experts, hidden, inner = (config[key] for key in ("num_local_experts", "hidden_size", "intermediate_size"))
    for name, tensor in tensors.items():
        if not name.endswith(("gate_up_proj", "experts.down_proj")):
            packed[name] = unpacked[name] = tensor
            continue
        rows, k = (2 * inner, hidden) if "gate_up" in name else (hidden, inner)
        packed[f"{name}_blocks"] = rng.integers(0, 256, (experts, rows, k // 32, 16), np.uint8)
        packed[f"{name}_scales"] = rng.integers(120, 130, (experts, rows, k // 32), np.uint8)
        w = decoded(packed[f"{name}_blocks"], packed[f"{name}_scales"]).astype(BF16)  # [E, out, in]
        unpacked[name] = np.ascontiguousarray(w.swapaxes(1, 2))
        moe = f"layers.{name.split('.')[2]}.moe"
        if "gate_up" in name:
            expected[f"{moe}.w_gate_up"] = np.stack([w[:, 0::2], w[:, 1::2]], axis=1)
        else:
            expected[f"{moe}.w_down"] = w
    return packed, unpacked, expected


def test_every_byte_is_two_numbers_times_every_power_of_two():
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (255, 1, 1))
    scales = np.repeat(np.arange(255, dtype=np.uint8), 16).reshape(255, 16)
    want = decoded(blocks, scales)
    got = decode_mxfp4(blocks, scales)
    assert (got.dtype, got.shape) == (BF16, (255 * 16, 32))
    got = got.reshape(want.shape)
    fits = np.abs(want) < 2.0**128
    assert fits[:253].all()
    np.testing.assert_array_equal(got.astype(np.float64)[fits], want[fits])
    assert np.isinf(got[~fits]).all()
    assert np.isnan(decode_mxfp4(blocks[0], np.full(16, 255, np.uint8)).astype(np.float32)).all()


def test_numbers_written_out():
    """1 is 0b0010, -6 is 0b1111, 0.5 is 0b0001; a scale of 128 doubles."""
    blocks = np.zeros((1, 16), np.uint8)
    blocks[0, :2] = 0xF2, 0x10
    want = np.zeros((1, 32))
    want[0, :4] = 2, -12, 0, 1
    np.testing.assert_array_equal(decode_mxfp4(blocks, np.array([128], np.uint8)).astype(float), want)


@pytest.mark.parametrize("chunk_bytes", [arrays.CHUNK_BYTES, 300])
def test_it_becomes_what_the_same_numbers_in_bf16_become(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(arrays, "CHUNK_BYTES", chunk_bytes)
    packed, unpacked, expected = in_mxfp4()
    plain = {key: value for key, value in CONFIG.items() if key != "quantization_config"}
    assert_same(convert(write(tmp_path / "packed", CONFIG, packed, shards=3), tmp_path / "ours"), expected)
    assert_same(convert(write(tmp_path / "plain", plain, unpacked), tmp_path / "other"), expected)
    verified = weights_convert.verify(tmp_path / "packed", tmp_path / "ours", progress=False)
    assert verified.tensors == len(unpacked)  # blocks and their scales count once

    weights_convert.to_hf(tmp_path / "ours", tmp_path / "hf", progress=False)
    assert_same(load_file(tmp_path / "hf" / "model.safetensors"), unpacked)
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == plain


def test_the_hubs_checkpoint_has_no_dtype_and_becomes_bf16(tmp_path):
    weights_convert.convert(PARITY, tmp_path / "ours", progress=False)
    assert json.loads((tmp_path / "ours" / "epmoe.json").read_text())["dtype"] == "bfloat16"
    weights_convert.to_hf(tmp_path / "ours", tmp_path / "hf", progress=False)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config.get("quantization_config"), config["intermediate_size"]) == (None, 32)


def test_it_can_be_quantised_to_float8_on_the_way(tmp_path):
    src = write(tmp_path / "src", CONFIG, in_mxfp4()[0])
    weights_convert.convert(src, tmp_path / "fp8", quantize="fp8-block", progress=False)
    stored = json.loads((tmp_path / "fp8" / "manifest.json").read_text())["arrays"]
    assert stored["layers.0.moe.w_gate_up.values"] | {"sha256": ""} == {
        "shape": [3, 2, 64, 32], "dtype": "float8_e4m3fn", "sha256": "",
    }  # fmt: skip
    assert stored["layers.0.moe.gate_up_bias"]["dtype"] == "bfloat16"
    weights_convert.verify(src, tmp_path / "fp8", progress=False)


def test_a_scale_that_is_no_number_is_named(tmp_path):
    packed, _, _ = in_mxfp4()
    name = "model.layers.1.mlp.experts.down_proj"
    packed[f"{name}_scales"][2, 5, 1] = 255
    src = write(tmp_path / "src", CONFIG, packed)
    summary = weights_convert.convert(src, tmp_path / "dst", progress=False)
    assert summary.not_finite == (f"{name}_blocks[2]",)


UP, DOWN = (f"model.layers.0.mlp.experts.{name}_proj" for name in ("gate_up", "down"))
BAD = {
    "no scales": (CONFIG, lambda t: t.pop(f"{UP}_scales"), f"tensor {UP}_scales is missing; it should be there, [3, 128, 1]"),
    "bf16 after all": (
        CONFIG,
        lambda t: t.update({UP: np.zeros((3, 32, 128), BF16)}),
        f"tensor {UP} in model.safetensors is [3, 32, 128] of BF16; it should not be there",
    ),
    "blocks of another size": (
        CONFIG, lambda t: t.update({f"{UP}_blocks": np.zeros((3, 128, 2, 16), np.uint8)}),
        f"tensor {UP}_blocks in model.safetensors is [3, 128, 2, 16] of U8; it should be [3, 128, 1, 16]",
    ),
    "scales in bf16": (
        CONFIG, lambda t: t.update({f"{UP}_scales": np.zeros((3, 128, 1), BF16)}),
        f"tensor {UP}_scales in model.safetensors is [3, 128, 1] of BF16; it should be [3, 128, 1] of a dtype among U8",
    ),
    "sizes without whole groups": (
        CONFIG | {"hidden_size": 48}, lambda t: None,
        "layers.0.moe.w_gate_up has rows of 48; 32 should divide that, as config.json says mxfp4",
    ),
    "float8": (
        CONFIG | {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}},
        lambda t: t.update({n: np.zeros(t[f"{n}_scales"].shape, ml_dtypes.float8_e4m3fn) for n in (UP, DOWN)}),
        f"tensor {DOWN} is float8; a gpt_oss should have it in mxfp4 or wider",
    ),
    "a family that has none": (
        MIXTRAL | {"quantization_config": QUANTIZATION}, lambda t: None,
        "config.json: quantization_config: quant_method is 'mxfp4'; a mixtral should have another",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_refused_in_one_line_that_names_it(tmp_path, capsys, case):
    config, change, line = BAD[case]
    packed, _, _ = in_mxfp4()
    change(packed)
    src = write(tmp_path / "src", config, packed)
    assert main([str(src), str(tmp_path / "dst")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert line in said
    assert not (tmp_path / "dst").exists()


@pytest.mark.slow
def test_memory_is_that_of_a_few_experts_whatever_the_stack(tmp_path):
    """Chunks of 1 MiB; a stack of 32 experts has 16 MiB, one expert half a MiB."""
    for experts in (2, 32):
        sized = CONFIG | {
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_local_experts": experts,
            "num_hidden_layers": 8,
        }
        write(tmp_path / str(experts), sized, in_mxfp4(sized)[0], shards=2)
    output = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "2", tmp_path, tmp_path / "32"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    written, grown = map(int, output.split())
    bound = 40 * 2**20
    assert written > 4 * bound
    assert grown < bound, f"{grown / 2**20:.0f} MiB more for {written / 2**20:.0f} MiB of arrays"
