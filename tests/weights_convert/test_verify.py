"""`--verify` reads both sides again: it passes what `convert` and `to_hf` write, and names what has been changed since."""

import json
import shutil

import numpy as np
import pytest
from fp8_checkpoint import LAYOUTS, SMALL_MIXTRAL, in_fp8, tensors_of
from hf_checkpoint import CONFIGS, DEEPSEEK_V3, tensors_and_expected, write
from safetensors.numpy import load_file, save_file

import weights_convert
from weights_convert import arrays
from weights_convert.cli import main


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A checkpoint and what it became, in chunks of 200 bytes."""
    folder = tmp_path_factory.mktemp("pair")
    tensors, _ = tensors_and_expected(DEEPSEEK_V3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "CHUNK_BYTES", 200)
        src = write(folder / "src", DEEPSEEK_V3, tensors, shards=2)
        weights_convert.convert(src, folder / "dst", progress=False)
    return src, folder / "dst"


@pytest.fixture
def copies(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 200)
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in pair]


def refusal(capsys, src, dst) -> str:
    assert main([str(src), str(dst), "--verify"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    return said.err.removeprefix("epmoe-convert: ").strip()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_what_was_converted_is_the_same_on_both_sides(tmp_path, capsys, family, dtype):
    tensors, expected = tensors_and_expected(CONFIGS[family])
    src = write(tmp_path / "src", CONFIGS[family], tensors)
    weights_convert.convert(src, tmp_path / "dst", dtype=dtype, progress=False)
    verified = weights_convert.verify(src, tmp_path / "dst", progress=False)
    assert verified.tensors == len(tensors)
    assert verified.nbytes == sum(np.dtype(dtype or a.dtype).itemsize * a.size for a in expected.values())
    assert main([str(src), str(tmp_path / "dst"), "--verify"]) == 0
    assert f"dst: {len(tensors)} tensors, " in capsys.readouterr().out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_so_are_float8_checkpoints(tmp_path, layout):
    config, tensors, _ = in_fp8(layout)
    src = write(tmp_path / "src", config, tensors)
    weights_convert.convert(src, tmp_path / "dst", progress=False)
    assert weights_convert.verify(src, tmp_path / "dst", progress=False).tensors == len(tensors)


def test_so_are_weights_quantised_on_the_way(tmp_path):
    src = write(tmp_path / "src", SMALL_MIXTRAL, tensors_of(SMALL_MIXTRAL))
    weights_convert.convert(src, tmp_path / "dst", quantize="fp8-block", progress=False)
    assert weights_convert.verify(src, tmp_path / "dst", progress=False).nbytes > 0


def test_a_bit_that_differs_in_dst_is_named(copies, capsys):
    src, dst = copies
    chunk = dst / "params" / "state" / "layers.1.moe.w_gate_up" / "c" / "2" / "1" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[2 * 20] ^= 1
    chunk.write_bytes(content)
    where = (2 * 2 + 1) * 7 * 16 + 20
    assert refusal(capsys, src, dst) == (
        f"{dst}: array layers.1.moe.w_gate_up differs from tensor model.layers.1.mlp.experts.2.up_proj.weight,"
        f" first in element {where} of the array flattened"
    )


def test_a_bit_that_differs_in_src_is_named(copies, capsys):
    src, dst = copies
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    for file in src.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name][3, 1] += 1
        save_file(tensors, file)
    assert f"array layers.0.attention.kv_b differs from tensor {name}, first in element {3 * 6 + 1}" in refusal(
        capsys, src, dst
    )


def test_missing_and_damaged_arrays_are_named(copies, capsys):
    src, dst = copies
    array = dst / "params" / "state" / "layers.1.attention.o"
    chunk = next(file for file in (array / "c").rglob("*") if file.is_file())
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-1])
    assert "an array is damaged or cut short: " in (line := refusal(capsys, src, dst))
    assert "layers.1.attention.o" in line
    chunk.unlink()
    assert f"{chunk}" in refusal(capsys, src, dst)
    shutil.rmtree(array)
    assert refusal(capsys, src, dst).startswith(f"{array} cannot be read: ")


def test_a_wrong_manifest_is_named(copies, capsys):
    src, dst = copies
    manifest = json.loads((dst / "manifest.json").read_text())
    right = manifest["arrays"]["norm.scale"]["sha256"]
    manifest["arrays"]["norm.scale"]["sha256"] = "0" * 64
    (dst / "manifest.json").write_text(json.dumps(manifest))
    line = f"{dst / 'manifest.json'}: the sha256 of norm.scale is {'0' * 64}; it should be {right}"
    assert refusal(capsys, src, dst) == line
    manifest["arrays"]["one.more"] = manifest["arrays"].pop("norm.scale")
    (dst / "manifest.json").write_text(json.dumps(manifest))
    assert refusal(capsys, src, dst) == f"{dst}: array norm.scale is not there; it should be, as {src} has it"
    (dst / "manifest.json").write_text("{}")
    assert refusal(capsys, src, dst) == f"{dst / 'manifest.json'} is damaged; convert the checkpoint again"
    (dst / "manifest.json").unlink()
    assert refusal(capsys, src, dst).startswith(f"{dst} has no manifest.json; it should have one")


def test_what_is_no_checkpoint_is_refused(copies, capsys, tmp_path):
    src, dst = copies
    assert "has no readable epmoe.json" in refusal(capsys, src, src)
    assert "it should be a folder, or a name" in refusal(capsys, tmp_path / "nowhere", dst)
