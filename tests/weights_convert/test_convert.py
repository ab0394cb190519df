import hashlib
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hf_checkpoint import BF16, CONFIGS, DEEPSEEK_V3, MIXTRAL, OLMOE, tensors_and_expected, write
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1
from safetensors.numpy import load_file

import weights_convert
from jax_epmoe import make_mesh
from jax_epmoe.checkpoint import load_model, parameter_shapes
from jax_epmoe.models.families import read_config
from weights_convert import arrays
from weights_convert.cli import main
from weights_convert.work import advance, progress_bar

PARITY = sorted((Path(__file__).parent.parent / "parity" / "checkpoints").glob("*/config.json"))


def convert(src, dst, **options) -> dict[str, np.ndarray]:
    """What is in the checkpoint that `convert` wrote."""
    weights_convert.convert(src, dst, progress=False, **options)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(dst / "params" / "state")


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert sorted(actual) == sorted(expected)
    for name, array in expected.items():
        assert (name, actual[name].dtype, actual[name].shape) == (name, array.dtype, array.shape)
        assert actual[name].tobytes() == array.tobytes(), f"{name} differs"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", CONFIGS)
def test_every_parameter_comes_back_bit_for_bit(tmp_path, family, shards):
    tensors, expected = tensors_and_expected(CONFIGS[family])
    src = write(tmp_path / "src", CONFIGS[family], tensors, shards)
    assert_same(convert(src, tmp_path / "dst"), expected)
    assert_same(v1.load(tmp_path / "dst" / "params"), expected)  # the newer API, too


@pytest.mark.parametrize("config", PARITY, ids=lambda config: config.parent.name)
def test_checkpoints_as_on_the_hub_convert_and_load(tmp_path, config):
    arrays = convert(config.parent, tmp_path / "dst")
    shapes = parameter_shapes(read_config(config.parent))
    assert {name: array.shape for name, array in arrays.items()} == {name: s.shape for name, s in shapes.items()}

    hf = json.loads(config.read_text())
    left_out = (f"model.layers.{hf['num_hidden_layers']}.", *(["lm_head.weight"] if hf["tie_word_embeddings"] else []))
    stored = [load_file(file) for file in config.parent.glob("*.safetensors")]
    # A byte of MXFP4's blocks has two, its scales are none.
    elements = sum(
        a.size if a.dtype != np.uint8 else 2 * a.size * name.endswith("_blocks")
        for file in stored
        for name, a in file.items()
        if not name.startswith(left_out)
    )
    assert sum(array.size for array in arrays.values()) == elements

    model = load_model(tmp_path / "dst", mesh=make_mesh())
    np.testing.assert_array_equal(model.embed.table[...], arrays["embed.table"])


def test_restores_padded_to_shards(tmp_path):
    tensors, expected = tensors_and_expected(MIXTRAL)
    weights_convert.convert(write(tmp_path / "src", MIXTRAL, tensors), tmp_path / "dst", progress=False)
    name, padded = "layers.1.moe.w_gate_up", (3, 2, 8, 16)  # intermediate size 7, over 8 devices
    sharding = NamedSharding(jax.make_mesh((8,), ("tensor",)), PartitionSpec(None, None, "tensor"))
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            tmp_path / "dst" / "params" / "state",
            args=ocp.args.PyTreeRestore(
                item={name: 0},
                restore_args={name: ocp.ArrayRestoreArgs(sharding=sharding, global_shape=padded, strict=False)},
                partial_restore=True,
            ),
        )[name]
    assert restored.sharding == sharding
    np.testing.assert_array_equal(restored, np.pad(expected[name], [(0, 0), (0, 0), (0, 1), (0, 0)]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("stored", [BF16, np.float16, np.float32, np.float64])
def test_dtype_converts(tmp_path, stored, dtype):
    tensors, expected = tensors_and_expected(MIXTRAL, np.dtype(stored))
    arrays = convert(write(tmp_path / "src", MIXTRAL, tensors), tmp_path / "dst", dtype=dtype)
    assert_same(arrays, {name: array.astype(jnp.dtype(dtype)) for name, array in expected.items()})
    assert json.loads((tmp_path / "dst" / "epmoe.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize(
    ("keys", "expected"),
    [({}, "bfloat16"), ({"torch_dtype": "float16"}, "float16"), ({"dtype": "float32", "torch_dtype": None}, "float32")],
)
def test_dtype_defaults_to_the_config_s(tmp_path, keys, expected):
    config = {key: value for key, value in MIXTRAL.items() if key != "torch_dtype"} | keys
    tensors, _ = tensors_and_expected(config)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)  # mixed, as some are on the hub
    arrays = convert(write(tmp_path / "src", config, tensors), tmp_path / "dst")
    assert {array.dtype.name for array in arrays.values()} == {expected}


def test_header_and_files_beside_the_weights(tmp_path):
    tensors, _ = tensors_and_expected(MIXTRAL)
    src = write(tmp_path / "src", MIXTRAL, tensors)
    summary = weights_convert.convert(src, tmp_path / "deep" / "dst", progress=False)
    dst = tmp_path / "deep" / "dst"
    assert sorted(path.name for path in dst.iterdir()) == [
        "config.json", "epmoe.json", "generation_config.json", "manifest.json", "params", "tokenizer.json",
    ]  # fmt: skip
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (dst / name).read_bytes() == (src / name).read_bytes()

    lines = sorted(json.dumps([name, "BF16", array.shape]) for name, array in tensors.items())
    lines += [json.dumps(["model.safetensors", (src / "model.safetensors").stat().st_size])]
    fingerprint = hashlib.sha256((src / "config.json").read_bytes() + "\n".join(lines).encode()).hexdigest()
    assert json.loads((dst / "epmoe.json").read_text()) == {
        "format_version": 1,
        "dtype": "bfloat16",
        "quantization": None,
        "source": {"fingerprint": fingerprint},
    }
    assert summary.parameters == sum(array.size for array in tensors.values())
    assert summary.nbytes == 2 * summary.parameters


def test_tied_head_that_repeats_the_embedding_is_dropped(tmp_path):
    tensors, expected = tensors_and_expected(OLMOE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    assert_same(convert(write(tmp_path / "src", OLMOE, tensors, shards=2), tmp_path / "dst"), expected)


def test_known_tensors_that_are_no_parameters_are_ignored(tmp_path):
    tensors, expected = tensors_and_expected(MIXTRAL)
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    assert_same(convert(write(tmp_path / "src", MIXTRAL, tensors), tmp_path / "dst"), expected)


def test_layers_for_multi_token_prediction_are_skipped_and_that_is_said(tmp_path, capsys):
    tensors, expected = tensors_and_expected(DEEPSEEK_V3)
    tensors["model.layers.2.eh_proj.weight"] = np.zeros((16, 32), BF16)
    tensors["model.layers.2.self_attn.o_proj.weight"] = np.zeros((16, 12), BF16)
    src = write(tmp_path / "src", DEEPSEEK_V3, tensors)
    assert_same(convert(src, tmp_path / "dst"), expected)
    assert main([str(src), str(tmp_path / "again")]) == 0
    said = "skipped 2 tensors of multi-token prediction, such as model.layers.2.eh_proj.weight\n"
    assert capsys.readouterr().out.endswith(said)


def test_hub_name_is_downloaded_and_its_links_are_followed(tmp_path, monkeypatch):
    tensors, expected = tensors_and_expected(MIXTRAL)
    blobs, snapshot = write(tmp_path / "blobs", MIXTRAL, tensors, shards=2), tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    calls = []

    def snapshot_download(repo, **options):
        calls.append((repo, options))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert_same(convert("someone/mixtral", tmp_path / "dst", revision="v1"), expected)
    [(repo, options)] = calls
    assert (repo, options["revision"]) == ("someone/mixtral", "v1")
    assert not any("*.bin" in p or "*.py" in p or p == "*" for p in options["allow_patterns"])


def test_an_empty_folder_is_taken_as_destination(tmp_path, capsys):
    tensors, _ = tensors_and_expected(MIXTRAL)
    src = write(tmp_path / "src", MIXTRAL, tensors)
    (tmp_path / "dst").mkdir()
    assert main([str(src), str(tmp_path / "dst")]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{tmp_path / 'dst'}: ")
    assert captured.out.count("\n") == 1
    assert captured.err == ""


MEMORY = """
import re, sys
import jax
jax.config.update("jax_platforms", "cpu")
import weights_convert
from weights_convert import arrays
arrays.CHUNK_BYTES = 2**20
# Not getrusage's ru_maxrss: a process inherits that from the one that started it.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
weights_convert.convert(sys.argv[1], sys.argv[2] + "/small", progress=False)
before = peak()
print(weights_convert.convert(sys.argv[3], sys.argv[2] + "/large", progress=False).nbytes, peak() - before)
"""


def test_memory_is_that_of_a_few_chunks_whatever_the_size(tmp_path):
    """Chunks of 1 MiB for a model of 200 MB; they are of 16 MiB otherwise."""
    config = MIXTRAL | {"hidden_size": 256, "num_local_experts": 8, "num_hidden_layers": 4}
    for size in (16, 4096):
        sized = config | {"intermediate_size": size}
        tensors, _ = tensors_and_expected(sized)
        write(tmp_path / str(size), sized, tensors, shards=2)
    largest = max(array.nbytes for array in tensors.values())
    del tensors
    output = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "16", tmp_path, tmp_path / "4096"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    written, grown = map(int, output.split())
    bound = 40 * 2**20 + largest
    assert written > 4 * bound
    assert grown < bound, f"{grown / 2**20:.0f} MiB more for {written / 2**20:.0f} MiB of arrays"


def test_the_manifest_has_the_digest_of_each_array(tmp_path):
    tensors, expected = tensors_and_expected(DEEPSEEK_V3)
    weights_convert.convert(write(tmp_path / "src", DEEPSEEK_V3, tensors), tmp_path / "dst", progress=False)
    manifest = json.loads((tmp_path / "dst" / "manifest.json").read_text())
    assert manifest == {
        "not_finite": [],
        "arrays": {
            name: {
                "shape": list(array.shape),
                "dtype": array.dtype.name,
                "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
            }
            for name, array in expected.items()
        },
    }


@pytest.mark.parametrize("limit", [1, 64, 1000, 2**24])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (13, 5), (3, 2, 7, 5), (4, 1, 8), (2, 3, 1)], ids=str)
def test_chunks_are_runs_of_the_array_under_the_limit_that_cover_it(monkeypatch, shape, limit):
    monkeypatch.setattr(arrays, "CHUNK_BYTES", limit)
    array = np.arange(math.prod(shape)).reshape(shape)
    end = 0
    for chunk in arrays.chunks(shape, 2):
        assert chunk.start == end
        end = chunk.stop
        np.testing.assert_array_equal(array[chunk.place].reshape(-1), np.arange(chunk.start, chunk.stop))
        assert array[chunk.place].shape == chunk.shape
        assert 2 * math.prod(chunk.shape) <= max(limit, 2 * array.shape[-1] if shape else 2)
    assert end == array.size


@pytest.mark.parametrize("limit", [100, 1000])
def test_arrays_of_many_chunks_come_back_bit_for_bit(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(arrays, "CHUNK_BYTES", limit)
    tensors, expected = tensors_and_expected(DEEPSEEK_V3)
    assert_same(convert(write(tmp_path / "src", DEEPSEEK_V3, tensors, 3), tmp_path / "dst"), expected)
    model = load_model(tmp_path / "dst", mesh=make_mesh(4, 2))
    np.testing.assert_array_equal(model.layers[1].moe.w_down[...][:, :, :7], expected["layers.1.moe.w_down"])


def test_values_that_are_not_finite_are_kept_and_named(tmp_path, capsys):
    tensors, expected = tensors_and_expected(MIXTRAL)
    names = ["model.layers.1.block_sparse_moe.experts.2.w3.weight", "model.norm.weight"]
    tensors[names[0]][1, 2] = expected["layers.1.moe.w_gate_up"][2, 1, 1, 2] = np.nan
    tensors[names[1]][3] = expected["norm.scale"][3] = -np.inf
    src = write(tmp_path / "src", MIXTRAL, tensors)
    assert main([str(src), str(tmp_path / "dst")]) == 0
    where = tmp_path / "dst" / "manifest.json"
    assert capsys.readouterr().err == (
        f"epmoe-convert: warning: tensor {names[0]} has values that are NaN or infinite (and 1 more like it); {where} names all\n"
    )
    assert json.loads(where.read_text())["not_finite"] == names
    for dtype in (None, "float32", "float16"):
        assert weights_convert.convert(src, tmp_path / str(dtype), dtype=dtype, progress=False).not_finite == tuple(
            names
        )
    assert_same(v1.load(tmp_path / "None" / "params"), expected)


def test_a_dry_run_prints_arrays_files_sharding_and_parts_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 400)
    tensors, _ = tensors_and_expected(MIXTRAL)
    src = write(tmp_path / "src", MIXTRAL, tensors)
    before = sorted(tmp_path.rglob("*"))
    assert main([str(src), str(tmp_path / "dst"), "--dry-run", "--process", "1/2"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "layers.*.moe.w_gate_up 2 3 x 2 x 7 x 16 bfloat16 2.69kB 12 1 x 1 x 7 x 16 expert, -, tensor, -" in said
    assert "layers.*.attention.q 2 4 x 6 x 16 bfloat16 1.54kB 4 2 x 6 x 16 expert+tensor, -, -" in said
    assert "norm.scale 1 16 bfloat16 32.0B 1 16 nothing" in said
    parts = [line.split() for line in said if line.startswith("process ")]
    assert [part[1] for part in parts] == ["0/2:", "1/2:"]
    assert sum(int(part[2]) for part in parts) == sum(int(line.split()[1]) for line in said[1 : said.index("")])
    assert re.fullmatch(rf"{tmp_path} has [\d.]+[kMGT]B free", said[-2])
    assert said[-1] == "nothing was written"


def test_progress_is_in_bytes_with_the_time_left_from_where_an_earlier_run_was(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar("converting", 8_000_000, 2_000_000, shown=True) as bar:
        bar.start_t -= 10
        advance(bar, 2_000_000)
        bar.refresh()
    assert re.search(r"converting:  50%\|.*\| 4.00M/8.00M \[00:10<00:\d\d, +\d+kB/s\]", terminal.getvalue())
    assert progress_bar("converting", 1, 0, shown=False).disable
