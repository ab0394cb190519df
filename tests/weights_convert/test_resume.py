"""A conversion that is killed goes on where it was; several processes share one; either way the bytes are the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hf_checkpoint import DEEPSEEK_V3, tensors_and_expected, write

import weights_convert
from weights_convert import arrays, work
from weights_convert.cli import main
from weights_convert.convert import share

to_hf_module = sys.modules["weights_convert.to_hf"]  # the package has the function by this name
CHUNK_BYTES, SHARD_BYTES = 1000, 4_000

# Imports once, and forks. Children run the program and are killed: some after a pause, others when a number of files more are whole; the
# last is not. Prints how each ended; fails if a file that was whole when a child was dead is not the same one, untouched, ever after.
KILLED = f"""
import json, os, random, signal, sys, time
from pathlib import Path
from weights_convert import arrays, cli
sys.modules["weights_convert.to_hf"].SHARD_BYTES = {SHARD_BYTES}
arrays.CHUNK_BYTES = {CHUNK_BYTES}
rng = random.Random(0)
step, *argv = sys.argv[1:]
dst = Path(argv[1])
partial = dst.parent / f".{{dst.name}}.partial"

def whole():
    folder = dst if dst.exists() else partial / "checkpoint"
    files = [f for f in folder.rglob("*") if f.suffix == ".safetensors" or "c" in f.parts and f.suffix != ".__lock"]
    return {{str(f.relative_to(folder)): [f.stat().st_ino, f.stat().st_mtime_ns] for f in files if f.is_file()}}

ended, seen = [], {{}}
for trial in range(13):
    if (child := os.fork()) == 0:
        os._exit(cli.main(argv))
    if trial < 3:
        time.sleep(rng.uniform(0, 0.1))
    elif trial < 12:
        wanted = len(seen) + rng.randint(1, int(step))
        while not dst.exists() and sum(1 for f in partial.glob("checkpoint/**/*") if f.is_file()) < wanted:
            time.sleep(0.0005)
    if trial < 12:
        os.kill(child, signal.SIGKILL)
    ended.append(os.waitpid(child, 0)[1])
    there = whole()
    assert {{name: there.get(name) for name in seen}} == seen
    seen |= there
    if ended[-1] != 9:
        break
print()  # whoever was killed may have left half a line
print(json.dumps([ended, len(seen)]))
"""

# Imports once, and forks the processes that share a conversion, all at once.
SHARED = f"""
import os, sys
from weights_convert import arrays, cli
arrays.CHUNK_BYTES = {CHUNK_BYTES}
children = []
for i in range(3):
    if (child := os.fork()) == 0:
        os._exit(cli.main([*sys.argv[1:], "--process", f"{{i}}/3"]))
    children.append(child)
print([os.waitpid(child, 0)[1] for child in children])
"""


def program(code: str, *argv) -> str:
    """What it prints."""
    result = subprocess.run([sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def content(folder: Path) -> dict[str, bytes]:
    """Every file by its name, but for Orbax's two that say when and where it was written."""
    orbax_s = ("_CHECKPOINT_METADATA", "commit_success.txt")
    files = (f for f in folder.rglob("*") if f.is_file() and f.name not in orbax_s)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture
def src(tmp_path):
    config = DEEPSEEK_V3 | {"hidden_size": 64, "num_hidden_layers": 4, "moe_intermediate_size": 32, "vocab_size": 300}
    return write(tmp_path / "src", config, tensors_and_expected(config)[0], shards=3)


@pytest.fixture
def whole(src, tmp_path, monkeypatch):
    """What a conversion that nothing disturbs writes."""
    monkeypatch.setattr(arrays, "CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(to_hf_module, "SHARD_BYTES", SHARD_BYTES)
    weights_convert.convert(src, tmp_path / "whole", progress=False)
    return tmp_path / "whole"


to_hf_module = sys.modules["weights_convert.to_hf"]


def test_a_conversion_killed_again_and_again_does_nothing_twice_and_ends_with_the_same_bytes(src, whole, tmp_path):
    said = program(KILLED, 100, src, tmp_path / "dst").splitlines()
    ended, chunks = json.loads(said[-1])
    assert ended.count(9) >= 5, ended
    assert chunks > 200
    assert content(tmp_path / "dst") == content(whole)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dst", "src", "whole"]


def test_going_back_to_hugging_face_killed_again_and_again_does_nothing_twice(whole, tmp_path):
    weights_convert.to_hf(whole, tmp_path / "hf", progress=False)
    ended, shards = json.loads(program(KILLED, 20, whole, tmp_path / "dst", "--to-hf").splitlines()[-1])
    assert ended.count(9) >= 5, ended
    assert shards > 50
    assert content(tmp_path / "dst") == content(tmp_path / "hf")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dst", "hf", "src", "whole"]


def test_what_was_converted_is_neither_read_nor_written_again(src, whole, tmp_path, monkeypatch):
    convert_module = sys.modules["weights_convert.convert"]
    read, calls, stopped = convert_module.Reader.read, [], []

    def stops(*args):
        calls.append(args)
        if len(calls) == 100 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(convert_module.Reader, "read", stops)
    with pytest.raises(KeyboardInterrupt):
        weights_convert.convert(src, tmp_path / "dst", progress=False)
    there = [f for f in (tmp_path / ".dst.partial" / "checkpoint").rglob("*") if f.is_file() and "c" in f.parts]
    total = sum(1 for f in whole.rglob("*") if f.is_file() and "c" in f.parts)
    calls.clear()
    summary = weights_convert.convert(src, tmp_path / "dst", progress=False)
    assert 90 < len(there) < 110 < total
    assert len(calls) == total - len(there)
    assert 0 < summary.resumed < summary.nbytes
    assert content(tmp_path / "dst") == content(whole)


def test_killed_before_the_empty_folder_went_the_next_run_removes_it_and_finds_dst_there(src, tmp_path):
    weights_convert.convert(src, tmp_path / "dst", progress=False)
    (tmp_path / ".dst.partial").mkdir()
    with pytest.raises(ValueError, match="exists; it should be a new or an empty folder"):
        weights_convert.convert(src, tmp_path / "dst", progress=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dst", "src"]


@pytest.mark.parametrize("is_back", [False, True])
def test_killed_after_the_folder_got_its_name_the_next_run_only_tidies_up(src, whole, tmp_path, monkeypatch, is_back):
    run, source = (weights_convert.to_hf, whole) if is_back else (weights_convert.convert, src)
    remove = work.Work.remove
    monkeypatch.setattr(work.Work, "remove", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "dst", progress=False)
    monkeypatch.setattr(work.Work, "remove", remove)
    before = content(tmp_path / "dst")
    summary = run(source, tmp_path / "dst", progress=False)
    assert summary.resumed == summary.nbytes
    assert content(tmp_path / "dst") == before
    assert not (tmp_path / ".dst.partial").exists()
    with pytest.raises(ValueError, match="exists; it should be a new or an empty folder"):
        run(source, tmp_path / "dst", progress=False)


def test_processes_share_a_conversion_at_the_same_time(src, whole, tmp_path):
    assert program(SHARED, src, tmp_path / "dst").splitlines()[-1] == "[0, 0, 0]"
    assert content(tmp_path / "dst") == content(whole)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dst", "src", "whole"]


def test_processes_share_a_conversion_in_any_order_and_the_last_gives_it_its_name(src, whole, tmp_path, capsys):
    for i, is_last in ((2, False), (0, False), (2, False), (1, True), (0, True)):
        assert main([str(src), str(tmp_path / "dst"), "--process", f"{i}/3"]) == 0
        assert (tmp_path / "dst").exists() == is_last
        assert ("still to be written by other processes" in capsys.readouterr().out) == (not is_last)
    assert content(tmp_path / "dst") == content(whole)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 30])
def test_each_array_is_one_process_s_and_their_parts_are_nearly_equal(n):
    sizes = {
        f"layers.{i}.moe.{name}": nbytes for i in range(10) for name, nbytes in (("w_down", 50), ("w_gate_up", 100))
    }
    sizes |= {"embed.table": 70, "norm.scale": 1}
    parts = [share(sizes, (i, n)) for i in range(n)]
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    assert all(abs(sum(sizes[name] for name in part) - sum(sizes.values()) / n) <= 100 for part in parts)
