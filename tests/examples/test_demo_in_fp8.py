"""The demo checkpoint in every format that needs nothing but its weights, and in a static one: measured, and made to write."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from jax_epmoe import load_model, make_mesh
from jax_epmoe.generate import cli
from weights_convert import convert

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
WINDOWS = 8
FORMATS = ["fp8-block", "fp8-channel", "fp8-tensor"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The demo checkpoint's folders by format; None: as it is."""
    folder = tmp_path_factory.mktemp("demo")
    for name in (None, *FORMATS):
        convert(DEMO / "checkpoint", folder / str(name), quantize=name, progress=False)
    return {name: folder / str(name) for name in (None, *FORMATS)}


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    """The demo checkpoint as a file with static scales per tensor."""
    folder = tmp_path_factory.mktemp("static")
    config = json.loads((DEMO / "checkpoint" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static"}
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, tensor in load_file(DEMO / "checkpoint" / "model.safetensors").items():
        tensors[name] = tensor
        if ".experts." in name or "_proj." in name:
            base = name.removesuffix(".weight")
            scale = np.abs(tensor.astype(np.float32)).max() / 448
            tensors[name] = (tensor.astype(np.float32) / scale).clip(-448, 448).astype("float8_e4m3fn")
            tensors[f"{base}.weight_scale"] = np.asarray(scale, np.float32)
            tensors[f"{base}.input_scale"] = np.asarray(20 / 448, np.float32)
    save_file(tensors, folder / "hf" / "model.safetensors")
    convert(folder / "hf", folder / "ours", progress=False)
    return folder / "ours"


@pytest.fixture(scope="module")
def perplexity(converted):
    """`perplexity(folder)`, on the first of the text that the model never saw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DEMO))
        demo, text = importlib.import_module("demo"), importlib.import_module("text")
        tokenizer = AutoTokenizer.from_pretrained(converted[None])
        ids = tokenizer(text.load_text()[1][:60_000], add_special_tokens=False)["input_ids"][: WINDOWS * text.WINDOW]

    def measure(folder: Path) -> float:
        model = load_model(folder, mesh=make_mesh(), dtype="float32")
        return 2 ** (demo.bits_and_load(model, ids, tokenizer.bos_token_id)[0] / len(ids))

    yield measure
    for name in ("demo", "text"):
        sys.modules.pop(name, None)


def test_perplexity_is_within_one_percent(converted, perplexity):
    bf16 = perplexity(converted[None])
    ratios = {name: perplexity(converted[name]) / bf16 for name in FORMATS}
    assert all(0.99 < ratio < 1.01 for ratio in ratios.values()), ratios
    assert all(ratio != 1 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("name", ["static", *(pytest.param(name, marks=pytest.mark.slow) for name in FORMATS)])
def test_epmoe_generate_writes_in_every_format(converted, static, name, capsys):
    folder = static if name == "static" else converted[name]
    arguments = ["--model", str(folder), "--dtype", "float32", "--tp-size", "2", "--ep-size", "2", "--output", "-"]
    assert cli.main([*arguments, "--prompt-token-ids", "0,5,6", "--max-new-tokens", "6", "--ignore-eos"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert len(json.loads(line)["token_ids"]) == 6
