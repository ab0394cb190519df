"""Back to Hugging Face: the tensors that were read, bit for bit, in files that its libraries load."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from fp8_checkpoint import BF16, FP8, LAYOUTS, SMALL_MIXTRAL, in_fp8, tensors_of
from hf_checkpoint import CONFIGS, DEEPSEEK_V3, MIXTRAL, OLMOE, read_index, tensors_and_expected, write
from safetensors import deserialize
from safetensors.numpy import load_file

import weights_convert
from weights_convert import arrays
from weights_convert.cli import main

to_hf_module = sys.modules["weights_convert.to_hf"]  # the package has the function by this name
PARITY = sorted((Path(__file__).parent.parent / "parity" / "checkpoints").glob("*/config.json"))


def tensors_in(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in load_file(file).items()}


def there_and_back(src: Path, tmp_path: Path, **options) -> Path:
    weights_convert.convert(src, tmp_path / "ours", progress=False, **options)
    weights_convert.to_hf(tmp_path / "ours", tmp_path / "hf", progress=False)
    return tmp_path / "hf"


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert sorted(actual) == sorted(expected)
    for name, array in expected.items():
        assert (name, actual[name].dtype, actual[name].shape) == (name, array.dtype, array.shape)
        assert actual[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize(
    "config",
    [config for config in PARITY if config.parent.name != "gpt_oss_mxfp4"],  # see test_mxfp4.py
    ids=lambda config: config.parent.name,
)
def test_each_family_s_checkpoint_comes_back_bit_for_bit(tmp_path, config):
    src = config.parent
    hf, layers = there_and_back(src, tmp_path), json.loads(config.read_text())["num_hidden_layers"]
    expected = {n: a for n, a in tensors_in(src).items() if not n.startswith(f"model.layers.{layers}.")}
    assert_same(tensors_in(hf), expected)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (hf / name).read_bytes() == (src / name).read_bytes()
    assert not (hf / "epmoe.json").exists()
    assert weights_convert.verify(hf, tmp_path / "ours", progress=False).tensors == len(expected)


@pytest.mark.parametrize("family", CONFIGS)
def test_with_many_chunks_and_shards_too(tmp_path, monkeypatch, family):
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 200)
    monkeypatch.setattr(to_hf_module, "SHARD_BYTES", 3000)
    tensors, _ = tensors_and_expected(CONFIGS[family])
    hf = there_and_back(write(tmp_path / "src", CONFIGS[family], tensors), tmp_path)
    assert_same(tensors_in(hf), tensors)
    weight_map = read_index(hf)
    assert sorted(set(weight_map.values())) == sorted(file.name for file in hf.glob("*.safetensors"))
    for file in hf.glob("*.safetensors"):
        in_file = load_file(file)
        assert sorted(in_file) == sorted(name for name, shard in weight_map.items() if shard == file.name)
        assert sum(array.nbytes for array in in_file.values()) <= 3000
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    again = there_and_back(hf, tmp_path / "again")
    assert_same(tensors_in(again), tensors)


def test_config_json_tells_the_dtype_that_is_stored(tmp_path):
    tensors, _ = tensors_and_expected(MIXTRAL)
    hf = there_and_back(write(tmp_path / "src", MIXTRAL, tensors), tmp_path, dtype="float32")
    assert json.loads((hf / "config.json").read_text()) == MIXTRAL | {"torch_dtype": "float32"}
    assert_same(tensors_in(hf), {name: array.astype(np.float32) for name, array in tensors.items()})


def test_a_tied_head_that_was_repeated_is_not(tmp_path):
    tensors, _ = tensors_and_expected(OLMOE)
    src = write(tmp_path / "src", OLMOE, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert_same(tensors_in(there_and_back(src, tmp_path)), tensors)


@pytest.mark.parametrize("layout", [name for name, entry in LAYOUTS.items() if entry[-1] == "fp8-block"])
def test_blocks_of_float8_come_back_bit_for_bit(tmp_path, layout):
    config, tensors, _ = in_fp8(layout)
    hf = there_and_back(write(tmp_path / "src", config, tensors), tmp_path)
    assert json.loads((hf / "config.json").read_text()) == config
    names = {np.dtype(FP8): "F8_E4M3", np.dtype(BF16): "BF16", np.dtype(np.float32): "F32"}
    there = dict(deserialize((hf / "model.safetensors").read_bytes()))
    assert sorted(there) == sorted(tensors)
    for name, array in tensors.items():
        assert (there[name]["dtype"], tuple(there[name]["shape"])) == (names[array.dtype], array.shape)
        assert bytes(there[name]["data"]) == array.tobytes(), name


def assert_refused(capsys, argv, line, folder):
    before = sorted(folder.rglob("*"))
    assert main([str(arg) for arg in argv]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert line in said.err
    assert sorted(folder.rglob("*")) == before


def test_what_cannot_be_written_is_refused(tmp_path, capsys):
    config, tensors, _ = in_fp8("compressed_channels")
    weights_convert.convert(write(tmp_path / "fp8", config, tensors), tmp_path / "channels", progress=False)
    src = write(tmp_path / "src", SMALL_MIXTRAL, tensors_of(SMALL_MIXTRAL))
    weights_convert.convert(src, tmp_path / "made", quantize="fp8-block", progress=False)
    end = "it should be fp8-block as read from a checkpoint, or not at all"
    for name, kind in (("channels", "fp8-channel"), ("made", "fp8-block, made by --quantize")):
        line = f"SRC '{tmp_path / name}' is quantised ({kind}); {end}"
        assert_refused(capsys, [tmp_path / name, tmp_path / "hf", "--to-hf"], line, tmp_path)
    assert_refused(capsys, [src, tmp_path / "hf", "--to-hf"], "has no readable epmoe.json", tmp_path)


def test_destinations_and_damage_are_refused_as_for_convert(tmp_path, capsys, monkeypatch):
    src = write(tmp_path / "src", MIXTRAL, tensors_and_expected(MIXTRAL)[0])
    ours = tmp_path / "ours"
    weights_convert.convert(src, ours, progress=False)
    assert_refused(capsys, [ours, src, "--to-hf"], "exists; it should be a new or an empty folder", tmp_path)
    assert_refused(capsys, [ours, ours / "hf", "--to-hf"], "it should not be inside SRC", tmp_path)
    (ours / "config.json").write_text(json.dumps(MIXTRAL | {"vocab_size": 12}))
    line = f"{ours}: array embed.table is [11, 16]; it should be [12, 16], by config.json"
    assert_refused(capsys, [ours, tmp_path / "hf", "--to-hf"], line, tmp_path)
    (ours / "config.json").write_text(json.dumps(MIXTRAL))
    (ours / "params" / "state" / "layers.1.moe.w_down" / "c" / "0" / "0" / "0").unlink()
    assert main([str(ours), str(tmp_path / "hf"), "--to-hf"]) == 2
    assert "layers.1.moe.w_down" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ours", "src"]


def test_a_dry_run_prints_the_files_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(to_hf_module, "SHARD_BYTES", 8000)
    tensors, _ = tensors_and_expected(DEEPSEEK_V3)
    weights_convert.convert(write(tmp_path / "src", DEEPSEEK_V3, tensors), tmp_path / "ours", progress=False)
    before = sorted(tmp_path.rglob("*"))
    assert main([str(tmp_path / "ours"), str(tmp_path / "hf"), "--to-hf", "--dry-run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    files = [line for line in said if line and line[0].endswith(".safetensors")]
    assert [line[0] for line in files] == [
        f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert sum(int(line[1]) for line in files) == len(tensors)


# Run by the Python that $EPMOE_HF_PYTHON names, or this one, with torch and transformers: folders, each with the name of a file to compare.
LOAD = """
import json, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM
for folder, expected in zip(sys.argv[1::2], sys.argv[2::2]):
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **eager)
    arrays = np.load(expected)
    with torch.no_grad():
        logits = model(torch.from_numpy(arrays["tokens"]).long()).logits.numpy()
    error = float(np.linalg.norm(logits - arrays["logits"]) / np.linalg.norm(arrays["logits"]))
    print(json.dumps([sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), error]))
"""
HF_PYTHON = os.environ.get("EPMOE_HF_PYTHON") or (sys.executable if find_spec("torch") else None)


@pytest.mark.skipif(
    HF_PYTHON is None, reason="needs torch and transformers, here or in the Python that $EPMOE_HF_PYTHON names"
)
def test_transformers_loads_every_family_and_computes_the_logits_that_it_computed_from_the_original(tmp_path):
    argv = []
    for config in PARITY:
        folder = tmp_path / config.parent.name
        folder.mkdir()
        argv += [str(there_and_back(config.parent, folder)), str(config.parent / "expected.npz")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run([HF_PYTHON, "-c", LOAD, *argv], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    for config, line in zip(PARITY, result.stdout.splitlines(), strict=True):
        missing, unexpected, error = json.loads(line)
        assert (missing, unexpected) == ([], []), config.parent.name
        assert error < 1e-4, (config.parent.name, error)
