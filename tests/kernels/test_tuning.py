"""Which tiling a call gets: from tables of measured ones, and where there is none from the heuristic."""

import dataclasses
import itertools
import json
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.mosaic.gpu import core as mosaic_core

from jax_epmoe.kernels.grouped_gemm import hopper, tuning
from jax_epmoe.kernels.grouped_gemm.tuning import Entry, Tiling, choose_tiling, heuristic

SIZES = {"experts": 20, "n": 1536, "k": 5120, "gated": True}
DEVICE = "cpu"  # the default device of the tests
PACKAGED = sorted(tuning._PACKAGED.glob("*.json"))
OURS, OTHER = Tiling(columns=128, heights=(48, 96), stages=3), Tiling(columns=128, heights=(24,), stages=2)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """The folders of the packaged and the user's tables, both without any."""
    packaged, user = tmp_path / "packaged", tmp_path / "user"
    monkeypatch.setattr(tuning, "_PACKAGED", packaged)
    monkeypatch.setenv("JAX_EPMOE_TUNED", str(user))
    tuning._measured.cache_clear()
    yield packaged, user
    tuning._measured.cache_clear()


def entry(rows=1024, tiling=OURS, **changes):
    values = {
        **SIZES,
        "rows": rows,
        "tiling": dataclasses.asdict(tiling),
        "us": 1.0,
        "heuristic_us": 2.0,
        "quick": False,
        "device": DEVICE,
        "versions": tuning.versions(),
        "date": "2025-01-01",
    }
    return Entry(**{**values, **changes})


def write(folder, *entries):
    tuning.write_table(folder / "cpu.json", DEVICE, entries)


def test_tables_are_named_as_bench_names_results():
    assert tuning.table_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"


def test_the_users_folder_is_in_the_home_unless_told(monkeypatch):
    monkeypatch.delenv("JAX_EPMOE_TUNED")
    monkeypatch.setenv("HOME", "/home/ada")
    assert str(tuning.user_folder()) == "/home/ada/.cache/jax_epmoe/tuned"
    monkeypatch.setenv("JAX_EPMOE_TUNED", "~/tables")
    assert str(tuning.user_folder()) == "/home/ada/tables"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (799, None),
        (800, OURS),
        (1000, OURS),
        (1250, OURS),
        (1251, None),
        (6399, None),
        (6400, OTHER),
        (10000, OTHER),
        (10001, None),
    ],
)
def test_the_nearest_measured_rows_serve_within_a_quarter_more(folders, rows, expected):
    write(folders[0], entry(1000), entry(8000, OTHER))
    expected = expected or heuristic(rows=rows, **SIZES)
    assert choose_tiling(rows=rows, **SIZES) == expected


def test_nearest_is_by_ratio(folders):
    write(folders[0], entry(1024), entry(1440, OTHER))
    assert choose_tiling(rows=1208, **SIZES) == OURS  # 1.18 times 1024; 1440 is 1.19 times 1208
    assert choose_tiling(rows=1216, **SIZES) == OTHER


def test_a_single_row_is_served_as_the_eight_that_the_kernel_makes_of_it(folders):
    write(folders[0], entry(8))
    assert choose_tiling(rows=1, **SIZES) == OURS


@pytest.mark.parametrize("change", [{"experts": 21}, {"n": 1544}, {"k": 5136}, {"gated": False}], ids=str)
def test_other_sizes_are_left_to_the_heuristic(folders, change):
    write(folders[0], entry())
    sizes = {**SIZES, **change}
    assert choose_tiling(rows=1024, **sizes) == heuristic(rows=1024, **sizes)


def test_the_users_entries_win_and_the_others_stay(folders):
    packaged, user = folders
    write(packaged, entry(1024), entry(8192))
    write(user, entry(1024, OTHER))
    assert choose_tiling(rows=1024, **SIZES) == OTHER
    assert choose_tiling(rows=8192, **SIZES) == OURS


def test_a_table_is_read_once(folders):
    write(folders[0], entry())
    assert choose_tiling(rows=1024, **SIZES) == OURS
    (folders[0] / "cpu.json").unlink()
    assert choose_tiling(rows=1024, **SIZES) == OURS


def with_tiling(**fields):
    return {"format": 1, "device": DEVICE, "entries": [{**vars(entry()), "tiling": {"columns": 128, **fields}}]}


DAMAGED = {
    "cut short": b'{"format": 1, "dev',
    "no text": b"\xff\xfe\xff",
    "a list": [],
    "another program's": {"knobs": 3},
    "another format": {"format": 2, "device": DEVICE, "entries": []},
    "another device's": {"format": 1, "device": "NVIDIA H200", "entries": []},
    "entries that are none": {"format": 1, "device": DEVICE, "entries": 7},
    "an entry that is none": {"format": 1, "device": DEVICE, "entries": ["x"]},
    "an entry with a part missing": {"format": 1, "device": DEVICE, "entries": [{**SIZES, "rows": 8}]},
    "sizes that are none": {"format": 1, "device": DEVICE, "entries": [{**vars(entry()), "rows": "many"}]},
    "versions that are none": {"format": 1, "device": DEVICE, "entries": [{**vars(entry()), "versions": None}]},
    "an unknown field": with_tiling(warps=4),
    "a field of another type": with_tiling(heights=128),
    "heights that are none": with_tiling(heights=["high"]),
    "more than the shared memory": with_tiling(stages=40),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_or_foreign_table_gives_one_warning_and_is_ignored(folders, content):
    packaged, user = folders
    write(packaged, entry())
    user.mkdir()
    (user / "cpu.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.warns(UserWarning, match=r"^a table of tuned tilings is ignored: .*cpu\.json") as seen:
        assert choose_tiling(rows=1024, **SIZES) == OURS
    assert len(seen) == 1
    assert "\n" not in str(seen[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_tiling(rows=1024, **SIZES) == OURS


def test_a_folder_that_is_a_file_or_a_table_that_is_a_folder_is_no_crash(folders):
    packaged, user = folders
    user.write_text("")
    (packaged / "cpu.json").mkdir(parents=True)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert choose_tiling(rows=1024, **SIZES) == heuristic(rows=1024, **SIZES)


def test_what_another_kernel_version_was_measured_with_is_told_and_ignored(folders):
    old_kernel, old_jax = {**tuning.versions(), "kernel": -1}, {**tuning.versions(), "jax": "0"}
    write(folders[0], entry(1024, versions=old_kernel), entry(8192, versions=old_jax))
    with pytest.warns(UserWarning, match="1 of 2 tunings are of another kernel version"):
        assert choose_tiling(rows=1024, **SIZES) == heuristic(rows=1024, **SIZES)
    assert choose_tiling(rows=8192, **SIZES) == OURS  # measured with another jax: still the best that is known


def test_a_table_comes_back_as_it_was_written_and_leaves_no_other_file(folders):
    tiling = Tiling(columns=128, lag=True, largest_heights=(128, 64))
    write(folders[1], entry(1024, tiling), entry(8, tiling))
    read = tuning.read_table(folders[1] / "cpu.json", DEVICE)
    assert [there.rows for there in read] == [8, 1024]
    assert [tuning.parse_tiling(there.tiling, there.gated) for there in read] == [tiling, tiling]
    assert [path.name for path in folders[1].iterdir()] == ["cpu.json"]
    assert tuning.read_table(folders[1] / "none.json", DEVICE) == []


def test_a_field_that_a_table_lacks_has_its_default():
    assert tuning.parse_tiling({"columns": 128, "heights": [16]}, True) == Tiling(columns=128, heights=(16,))


@pytest.mark.parametrize(
    "change",
    [
        {"columns": 64},
        {"columns": 320},
        {"columns": 0},
        {"heights": ()},
        {"heights": (12,)},
        {"heights": (64, 32)},
        {"heights": (32, 32)},
        {"heights": (0, 32)},
        {"heights": (264,), "stages": 2},
        {"largest_heights": (136,)},
        {"largest_heights": (60,)},
        {"block_k": 32},
        {"stages": 0},
        {"stages": 1, "lag": True},
        {"slots": 0},
        {"stages": 5},
    ],
    ids=str,
)
def test_what_the_kernel_cannot_run_is_not_valid(change):
    assert tuning.is_valid(Tiling(), False)
    assert not tuning.is_valid(dataclasses.replace(Tiling(), **change), False)


@pytest.mark.parametrize(
    ("tiling", "gated"),
    [
        (Tiling(), False),
        (Tiling(columns=256, heights=(16, 40), stages=2, slots=2), False),
        (Tiling(columns=128, heights=(16, 32), block_k=128, stages=3, slots=2), True),
    ],
    ids=str,
)
def test_shared_memory_is_what_the_kernel_asks_for(tiling, gated, monkeypatch):
    monkeypatch.setattr(hopper, "on_hopper", lambda: True)
    w = (4, 2, 512, 1024) if gated else (4, 512, 1024)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1024, 1024), w)]
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)

    def lower():
        def run(x, w, sizes):
            activation = "silu" if gated else None
            return hopper.matmul(x, w, sizes, activation=activation, out_dtype=x.dtype, tiling=tiling)

        jax.jit(run).trace(*shapes, sizes).lower(lowering_platforms=("cuda",))

    asked = tuning.shared_memory_bytes(tiling, gated)
    with mosaic_core.artificial_shared_memory_limit(asked):
        lower()
    with mosaic_core.artificial_shared_memory_limit(asked - 1), pytest.raises(ValueError, match=f"smem_bytes={asked} "):
        lower()


@pytest.mark.parametrize("path", PACKAGED, ids=lambda path: path.stem)
def test_the_package_s_tables_are_whole_and_of_this_kernel(path):
    device = json.loads(path.read_text(encoding="utf-8"))["device"]
    entries = tuning.read_table(path, device)
    assert path.name == tuning.table_name(device)
    assert len({entry.place for entry in entries}) == len(entries) > 0
    assert {entry.versions["kernel"] for entry in entries} == {tuning.KERNEL_VERSION}
    assert all(tuning.is_valid(tuning.parse_tiling(entry.tiling, entry.gated), entry.gated) for entry in entries)


def test_the_heuristics_choices_are_valid_at_any_sizes():
    sizes = {
        "rows": [8 * 4**i for i in range(9)],
        "experts": (1, 8, 20, 64, 160, 256),
        "n": (64, 192, 768, 1536, 2880, 5120, 14336),
        "k": (64, 192, 512, 768, 1536, 2880, 7168),
        "gated": (False, True),
    }
    for values in itertools.product(*sizes.values()):
        call = dict(zip(sizes, values, strict=True))
        tiling = heuristic(**call)
        assert tuning.is_valid(tiling, call["gated"]), (call, tiling, tuning.shared_memory_bytes(tiling, call["gated"]))
