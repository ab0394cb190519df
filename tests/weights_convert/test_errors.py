"""Every bad input: one line that says what is wrong, exit status 2, nothing half written."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import namedtuple

import ml_dtypes
import numpy as np
import pytest
from hf_checkpoint import DEEPSEEK_V2, DEEPSEEK_V3, MIXTRAL, OLMOE, read_index, tensors_and_expected, write, write_index
from safetensors.numpy import load_file, save_file

from weights_convert.cli import main

convert_module = importlib.import_module("weights_convert.convert")
SHARD = "model-00002-of-00003.safetensors"


def edit_config(**changes):
    def edit(src):
        config = json.loads((src / "config.json").read_text()) | changes
        (src / "config.json").write_text(json.dumps(config))

    return edit


def edit_shard(change):
    def edit(src):
        tensors = load_file(src / SHARD)
        change(tensors)
        save_file(tensors, src / SHARD)

    return edit


def edit_index(change):
    def edit(src):
        weight_map = read_index(src)
        change(weight_map)
        write_index(src, weight_map)

    return edit


def add_tensor(name, array):
    def edit(src):
        edit_shard(lambda tensors: tensors.update({name: array}))(src)
        edit_index(lambda weight_map: weight_map.update({name: SHARD}))(src)

    return edit


def edit_tensor(name, change):
    def edit(src):
        file = src / read_index(src)[name]
        tensors = load_file(file)
        tensors[name] = change(tensors[name])
        save_file(tensors, file)

    return edit


def remove_tensor(name):
    def edit(src):
        file = src / read_index(src)[name]
        tensors = load_file(file)
        del tensors[name]
        save_file(tensors, file)
        edit_index(lambda weight_map: weight_map.pop(name))(src)

    return edit


def in_two_shards(src):
    for shard in set(read_index(src).values()):
        save_file(load_file(src / shard) | {NORM: np.zeros(16, ml_dtypes.bfloat16)}, src / shard)


def only_pickle(src):
    for file in src.glob("*.safetensors*"):
        file.unlink()
    (src / "pytorch_model.bin").write_bytes(b"\x80\x02")


def no_weights(src):
    only_pickle(src)
    (src / "pytorch_model.bin").unlink()


def no_index(src):
    (src / "model.safetensors.index.json").unlink()


def truncated(src):
    os.truncate(src / SHARD, (src / SHARD).stat().st_size - 1)


def longer(src):
    with open(src / SHARD, "ab") as stream:
        stream.write(b"\0")


def huge_header(src):
    """A file of 200 MB without the disk's, whose header would be 150."""
    (src / SHARD).write_bytes((150_000_000).to_bytes(8, "little"))
    os.truncate(src / SHARD, 200_000_000)


def overlapping(src):
    """The second tensor begins where the first does."""
    content = (src / SHARD).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    del header["__metadata__"]
    (_, first), (_, second), *_ = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    size = second["data_offsets"][1] - second["data_offsets"][0]
    second["data_offsets"] = [first["data_offsets"][0], first["data_offsets"][0] + size]
    raw = json.dumps(header).encode()
    (src / SHARD).write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])


def edit_header(old, new):
    def edit(src):
        content = (src / SHARD).read_bytes()
        assert content.count(old) >= 1
        assert len(old) == len(new)
        (src / SHARD).write_bytes(content.replace(old, new, 1))

    return edit


GATE = "model.layers.0.block_sparse_moe.gate.weight"
W3 = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
NORM = "model.norm.weight"

BAD = {
    "no config": (lambda src: (src / "config.json").unlink(), r"no config\.json"),
    "config is not JSON": (lambda src: (src / "config.json").write_text("{"), r"config\.json is not JSON"),
    "config is a list": (lambda src: (src / "config.json").write_text("[]"), r"config\.json holds a list"),
    "unknown family": (edit_config(model_type="llama"), r"model_type is 'llama'; it should be one of mixtral"),
    "quantised": (edit_config(quantization_config={"quant_method": "gptq"}), "quant_method is 'gptq'; it should be one of"),
    "config's dtype": (edit_config(torch_dtype="float8"), r"dtype is 'float8'; it should be one of bfloat16"),
    "pickle": (only_pickle, r"has pytorch_model\.bin \(a pickle.*should have model\.safetensors"),
    "no weights": (no_weights, r"has no weights; it should have model\.safetensors"),
    "no index": (no_index, r"has model-00001-of-00003\.safetensors and 2 more; it should have"),
    "index is not JSON": (
        lambda src: (src / "model.safetensors.index.json").write_bytes(b"\xff"),
        r"index\.json is not JSON",
    ),
    "index without map": (lambda src: write_index(src, {}), "no weight_map"),
    "shard is missing": (lambda src: (src / SHARD).unlink(), rf"has no {SHARD}; .*index\.json says"),
    "shard cut short": (truncated, rf"{SHARD} has \d+ bytes; it should have \d+"),
    "shard too long": (longer, rf"{SHARD} has \d+ bytes; it should have \d+"),
    "shard is empty": (lambda src: os.truncate(src / SHARD, 0), rf"{SHARD} \(0 bytes\) says its header"),
    "header is cut": (lambda src: os.truncate(src / SHARD, 99), rf"{SHARD} \(99 bytes\) says its header"),
    "header is too long": (huge_header, rf"{SHARD} \(200000000 bytes\) says its header has 150000000 bytes; it should be 2 to 100000000"),
    "overlapping": (overlapping, rf"{SHARD}: tensor .* begins at byte 0; it should be \d+, where the last ends"),
    "header is not JSON": (edit_header(b'{"', b"{,"), rf"{SHARD} has a header that is not JSON"),
    "offsets lie": (edit_header(b'"data_offsets":[0,', b'"data_offsets":[1,'), rf"{SHARD}: tensor .* data_offsets"),
    "shape lies": (edit_header(b'"shape":[1', b'"shape":[2'), rf"{SHARD}: tensor .* bytes apart"),
    "dtype is unknown": (edit_header(b'"BF16"', b'"BF17"'), rf"{SHARD}: tensor .* has dtype 'BF17'"),
    "in two shards": (in_two_shards, r"tensor model\.norm\.weight is in .* and in .*; it should be in"),
    "absolute": (edit_index(lambda m: m.update({NORM: "/etc/x.safetensors"})), rf"{NORM} in '/etc/x\.safetensors'; it"),
    "outside": (edit_index(lambda m: m.update({NORM: "a/../../x.safetensors"})), rf"{NORM} in 'a/\.\./\.\./x"),
    "not a name": (edit_index(lambda m: m.update({NORM: 3})), rf"{NORM} in 3; it should be"),
    "not safetensors": (edit_index(lambda m: m.update({NORM: "x.bin"})), rf"{NORM} in 'x\.bin'; it should be"),
    "index lies": (edit_index(lambda m: m.update({"no.such": SHARD})), rf"{SHARD} has no tensor no\.such"),
    "index misplaces": (
        edit_index(lambda m: m.update({name: next(s for s in set(m.values()) if s != m[name]) for name in [NORM]})),
        rf"tensor {NORM} is in .*; model\.safetensors\.index\.json says",
    ),
    "index lacks": (edit_index(lambda m: m.pop(NORM)), rf"tensor {NORM} \[16\] is in .* should be in model"),
    "missing": (remove_tensor(W3), rf"tensor {W3} is missing; it should be there, \[7, 16\]"),
    "extra": (
        add_tensor("model.layers.0.self_attn.q_proj.bias", np.zeros(24, np.float32)),
        rf"tensor model\.layers\.0\.self_attn\.q_proj\.bias in {SHARD} is \[24\] of F32; it should not be there",
    ),
    "an expert too many": (edit_config(num_local_experts=2), r"experts\.2\.w\d\.weight in .* should not be there"),
    "misshapen": (edit_tensor(W3, lambda a: a.T.copy()), rf"{W3} in .* is \[16, 7\] of BF16; it should be \[7, 16\]"),
    "heads": (edit_config(num_key_value_heads=1), r"k_proj\.weight in .* is \[12, 16\] of BF16; it should be \[6, 16\]"),
    "integers": (edit_tensor(GATE, lambda a: a.astype(np.int8)), rf"{GATE} in .* is \[3, 16\] of I8; it should be \[3, 16\]"),
    "float8": (
        edit_tensor(GATE, lambda a: a.astype(ml_dtypes.float8_e4m3fn)),
        rf"{GATE} in .* is \[3, 16\] of F8_E4M3; it should be \[3, 16\] of a dtype among BF16",
    ),
}  # fmt: skip


def assert_refused(capsys, argv, pattern, folder):
    before = sorted(folder.rglob("*"))
    assert main([str(arg) for arg in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert re.search(pattern, captured.err), captured.err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(("spoil", "pattern"), BAD.values(), ids=BAD)
def test_a_bad_checkpoint_is_refused(tmp_path, capsys, spoil, pattern):
    src = write(tmp_path / "src", MIXTRAL, tensors_and_expected(MIXTRAL)[0], shards=3)
    spoil(src)
    assert_refused(capsys, [src, tmp_path / "dst"], pattern, tmp_path)


@pytest.fixture
def src(tmp_path):
    return write(tmp_path / "src", MIXTRAL, tensors_and_expected(MIXTRAL)[0])


def test_a_head_that_differs_from_its_tied_embedding_is_refused(tmp_path, capsys):
    tensors, _ = tensors_and_expected(OLMOE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    src = write(tmp_path / "src", OLMOE, tensors)
    assert_refused(
        capsys, [src, tmp_path / "dst"], "lm_head.weight .* differs from model.embed_tokens.weight", tmp_path
    )


def test_all_of_a_kind_are_counted(tmp_path, capsys):
    tensors, _ = tensors_and_expected(DEEPSEEK_V2)
    tensors = {name: array for name, array in tensors.items() if "shared_experts" not in name}
    src = write(tmp_path / "src", DEEPSEEK_V2, tensors)
    assert_refused(capsys, [src, tmp_path / "dst"], r"shared_experts.* is missing.*\(and 2 more like it\)", tmp_path)


def test_fp8_that_only_config_json_tells_of_is_refused(tmp_path, capsys):
    quantization = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    tensors, _ = tensors_and_expected(DEEPSEEK_V3)
    src = write(tmp_path / "src", DEEPSEEK_V3 | {"quantization_config": quantization}, tensors)
    line = r"config.json has a quantization_config \(fp8-block\), but no tensor is F8_E4M3"
    assert_refused(capsys, [src, tmp_path / "dst"], line, tmp_path)


@pytest.mark.parametrize(("declared", "layer"), [(1, 3), (0, 2)])
def test_layers_past_those_that_config_json_tells_are_not_skipped(tmp_path, capsys, declared, layer):
    tensors, _ = tensors_and_expected(DEEPSEEK_V3)
    name = f"model.layers.{layer}.enorm.weight"
    tensors[name] = np.zeros(16, np.float32)
    src = write(tmp_path / "src", DEEPSEEK_V3 | {"num_nextn_predict_layers": declared}, tensors)
    assert_refused(capsys, [src, tmp_path / "dst"], f"tensor {name} .* it should not be there", tmp_path)


def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path, capsys):
    tensors, _ = tensors_and_expected(MIXTRAL)
    tensors[W3][0, 0] = 1e6
    src = write(tmp_path / "src", MIXTRAL, tensors)
    argv = [src, tmp_path / "dst", "--dtype", "float16"]
    assert_refused(capsys, argv, f"{W3} has values that float16 cannot hold", tmp_path)


def test_a_destination_in_use_is_refused(tmp_path, capsys, src):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "notes.txt").write_text("mine")
    assert_refused(capsys, [src, tmp_path / "dst"], "dst' exists; it should be a new or an empty folder", tmp_path)
    assert_refused(capsys, [src, tmp_path / "dst" / "notes.txt"], "notes.txt' exists", tmp_path)


@pytest.mark.parametrize("dst", ["src", "src/out", "src/../src/a/b"])
def test_a_destination_inside_the_source_is_refused(tmp_path, capsys, src, dst):
    assert_refused(capsys, [src, tmp_path / dst], "it should not be inside SRC", tmp_path)


def test_too_small_a_disk_is_refused(tmp_path, capsys, src, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1000))
    assert_refused(capsys, [src, tmp_path / "dst"], "has 0.0 GB free; it should have", tmp_path)


def test_a_source_that_is_nowhere_is_refused(tmp_path, capsys, src, monkeypatch):
    def offline(*args, **options):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert_refused(capsys, ["someone/some-model", tmp_path / "dst"], "from the hub: no network at all", tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    line = r"'someone/some-model' is not a folder, and huggingface_hub.* is not installed; .* install jax_epmoe\[hub\]"
    assert_refused(capsys, ["someone/some-model", tmp_path / "dst"], line, tmp_path)
    assert_refused(capsys, [tmp_path / "nowhere", tmp_path / "dst"], "it should be a folder, or a name", tmp_path)
    assert_refused(capsys, [src / "config.json", tmp_path / "dst"], "it should be a folder, or a name", tmp_path)
    assert_refused(
        capsys, [src, tmp_path / "dst", "--revision", "main"], "revision is 'main'; .* local folder", tmp_path
    )


@pytest.fixture
def fail_at_second_chunk(monkeypatch):
    """Makes the reading of a second chunk raise the given exception."""

    def install(error):
        original, calls = convert_module.Reader.read, []

        def read(*args):
            calls.append(args)
            if len(calls) == 2:
                raise error
            return original(*args)

        monkeypatch.setattr(convert_module.Reader, "read", read)

    return install


def test_an_interrupted_run_says_how_to_go_on(tmp_path, capsys, src, fail_at_second_chunk):
    fail_at_second_chunk(KeyboardInterrupt())
    assert main([str(src), str(tmp_path / "dst")]) == 130
    left = tmp_path / ".dst.partial"
    assert capsys.readouterr().err == (
        f"epmoe-convert: interrupted; {tmp_path / 'dst'} was not written; the same command goes on from {left}\n"
    )
    assert left.is_dir()
    assert main([str(src), str(tmp_path / "dst")]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dst", "src"]


def test_an_unexpected_error_keeps_its_traceback_and_what_was_written(tmp_path, src, fail_at_second_chunk):
    fail_at_second_chunk(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        main([str(src), str(tmp_path / "dst")])
    assert sorted(file.name for file in tmp_path.iterdir()) == [".dst.partial", "src"]


def test_an_unfinished_conversion_with_other_options_is_refused(tmp_path, capsys, src, fail_at_second_chunk):
    fail_at_second_chunk(KeyboardInterrupt())
    assert main([str(src), str(tmp_path / "dst")]) == 130
    capsys.readouterr()
    line = r"\.dst\.partial holds an unfinished conversion of another checkpoint or with other options; it should be"
    for more in (["--dtype", "float32"], ["--dtype", "float32", "--dry-run"], ["--quantize", "fp8-tensor"]):
        assert_refused(capsys, [src, tmp_path / "dst", *more], line, tmp_path)
    os.utime(src / "model.safetensors")  # a file that was written since
    assert_refused(capsys, [src, tmp_path / "dst"], line, tmp_path)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--process", "2/2"], "process is 2/2; it should be I/N with I from 0 to N - 1"),
        (["--process", "1"], "--process is '1'; it should be I/N, such as 0/4"),
        (["--process", "0/0"], "process is 0/0; it should be I/N"),
        (["--verify", "--process", "0/2"], "--process is 0/2; it should be left out with --to-hf and --verify"),
        (["--to-hf", "--dtype", "float32"], "--dtype is 'float32'; it should be left out with --to-hf"),
        (["--verify", "--quantize", "fp8-block"], "--quantize is 'fp8-block'; it should be left out with --verify"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, capsys, src, argv, line):
    assert_refused(capsys, [src, tmp_path / "dst", *argv], re.escape(line), tmp_path)


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(tmp_path, capsys):
    """A limit on the size of a file, which the system reports as it does a full disk."""
    config = MIXTRAL | {"vocab_size": 2000}
    src = write(tmp_path / "src", config, tensors_and_expected(config)[0])
    limited = f"ulimit -f 32; {sys.executable} -m weights_convert {src} {tmp_path / 'dst'}"  # in KiB
    result = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert "File too large" in result.stderr
    assert result.stderr.endswith(f"; the same command goes on from {tmp_path / '.dst.partial'}\n")
    assert not (tmp_path / "dst").exists()
    written = sorted((tmp_path / ".dst.partial" / "checkpoint" / "params" / "state" / "embed.table").rglob("*"))
    assert [file.name for file in written if file.is_file()] == ["zarr.json"]  # nothing half written
    assert main([str(src), str(tmp_path / "dst")]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dst", "src"]


# The program on a disk that has room when it starts; others have taken it since.
ROOM_AT_FIRST = """
import collections, shutil, sys
from weights_convert.cli import main
shutil.disk_usage = lambda path: collections.namedtuple("usage", "free")(10**12)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_is_one_line_and_the_run_goes_on_when_there_is_room(tmp_path):
    """A disk of 1200 KiB, in memory, for a checkpoint of 1263; Linux lets whoever asks mount one in a namespace of his own."""
    config = MIXTRAL | {"vocab_size": 20_000}
    src = write(tmp_path / "src", config, tensors_and_expected(config)[0])
    (disk := tmp_path / "disk").mkdir()
    mount = f"mount -t tmpfs -o size=1200k tmpfs {disk}"
    if subprocess.run(f"unshare -rm {mount}", shell=True, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    script = f"""
        {mount}
        {sys.executable} -c "$0" {src} {disk}/dst; echo $?; ls -A {disk}
        mount -o remount,size=10m {disk}
        {sys.executable} -m weights_convert {src} {disk}/dst; echo $?; ls -A {disk}
    """
    result = subprocess.run(["unshare", "-rm", "bash", "-c", script, ROOM_AT_FIRST], capture_output=True, text=True)
    assert result.stderr.count("\n") == 1
    assert "No space left on device" in result.stderr
    assert result.stderr.endswith(f"; the same command goes on from {disk / '.dst.partial'}\n")
    assert re.fullmatch(r"2\n\.dst\.partial\n.* had been written before\n0\ndst\n", result.stdout), result.stdout


def test_a_disk_that_is_full_at_once_leaves_nothing(tmp_path, src):
    limited = f"ulimit -f 0; {sys.executable} -B -m weights_convert {src} {tmp_path / 'dst'}"
    before = sorted(tmp_path.rglob("*"))
    result = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert "File too large" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


# The program with a pause after each array, so that the signal comes in time on a busy machine too. Where tests are started in the
# background, they inherit that Ctrl-C is ignored, and so would it.
SLOWLY = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from weights_convert import cli, work
set_done = work.Work.set_done
work.Work.set_done = lambda *args: (set_done(*args), time.sleep(0.5))
sys.exit(cli.main(sys.argv[1:]))
"""


def test_ctrl_c_stops_at_once_and_the_next_run_goes_on(tmp_path, capsys):
    src = write(tmp_path / "src", MIXTRAL, tensors_and_expected(MIXTRAL)[0])
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, src, tmp_path / "dst"], stderr=subprocess.PIPE, text=True)
    while not (done := list(tmp_path.glob(".dst.partial/done/*.json"))):
        assert process.poll() is None, "ended before it could be interrupted"
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    left = tmp_path / ".dst.partial"
    line = f"epmoe-convert: interrupted; {tmp_path / 'dst'} was not written; the same command goes on from {left}\n"
    assert (process.returncode, error) == (130, line)
    assert not (tmp_path / "dst").exists()
    assert done
    assert main([str(src), str(tmp_path / "dst")]) == 0
    assert "B had been written before" in capsys.readouterr().out
