"""Loading: the same arrays on every mesh, each device with its share and no more, and one line for what is damaged."""

import json
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1

from jax_epmoe import dummy_model, load_model, make_mesh
from jax_epmoe.checkpoint import parameter_shapes
from jax_epmoe.models.families import read_config
from jax_epmoe.quant import Quantization
from weights_convert import convert

PARITY = Path(__file__).parent / "parity" / "checkpoints"
NAMES = ["mixtral", "olmoe", "deepseek_v2"]
MESHES = [(1, 1, 1), (2, 1, 2), (4, 2, 1), (8, 1, 1), (8, 4, 1)]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """`converted[name]`: the folder of a parity checkpoint in our format."""
    folder = tmp_path_factory.mktemp("converted")
    for name in NAMES:
        convert(PARITY / name, folder / name, progress=False)
    return {name: folder / name for name in NAMES}


@pytest.fixture
def copy(converted, tmp_path):
    """A copy of the smallest checkpoint, to be damaged."""
    return Path(shutil.copytree(converted["mixtral"], tmp_path / "copy"))


def arrays_of(model) -> dict[str, jax.Array]:
    return {".".join(map(str, keys)): variable.get_value() for keys, variable in nnx.to_flat_state(nnx.state(model))}


def refusal(folder, **kwargs) -> str:
    """The one line that refuses to load `folder`."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (every test checks the line itself)
        load_model(folder, **({"mesh": make_mesh()} | kwargs))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_mesh_loads_the_same_arrays_and_zeros_in_their_padding(converted, name):
    folder = converted[name]
    shapes = parameter_shapes(read_config(folder))
    want = arrays_of(load_model(folder, mesh=make_mesh()))
    assert {key: array.shape for key, array in want.items()} == {key: shape.shape for key, shape in shapes.items()}
    assert all(np.any(np.asarray(array)) for array in want.values())
    padded = 0
    for sizes in MESHES[1:]:
        for key, array in arrays_of(load_model(folder, mesh=make_mesh(*sizes))).items():
            got, real = np.asarray(array), tuple(slice(n) for n in want[key].shape)
            np.testing.assert_array_equal(got[real], np.asarray(want[key]), err_msg=f"{key} on {sizes}")
            got = got.copy()
            got[real] = 0
            assert not np.any(got), f"{key} on {sizes}"
            padded += got.shape != want[key].shape
    assert padded > 0


def is_on_every_device(key: str, tp_size: int, kv_heads: int) -> bool:
    """By design.md's table: norms, the router and MLA's latent projections; k and v where devices outnumber their heads."""
    kv = (".attention.k", ".attention.v", ".attention.k_norm.scale")
    if key.endswith(kv) and "kv_a" not in key:
        return kv_heads < tp_size
    if key.endswith(".attention.q_norm.scale"):
        return False
    return key.endswith((".scale", ".router.weight", ".q_a", ".kv_a"))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_each_device_holds_its_share_and_no_more(converted, name, sizes):
    folder, tp_size = converted[name], sizes[0]
    kv_heads = getattr(read_config(folder).attention, "num_kv_heads", 0)
    arrays = arrays_of(load_model(folder, mesh=make_mesh(*sizes)))
    devices = dict.fromkeys(jax.devices()[: sizes[0] * sizes[2]], 0)
    expected = 0
    for key, array in arrays.items():
        parts = 1 if is_on_every_device(key, tp_size, kv_heads) else tp_size
        shares = {shard.data.nbytes for shard in array.addressable_shards}
        assert shares == {array.nbytes // parts}, f"{key}: {array.nbytes} bytes over {parts} parts"
        expected += array.nbytes // parts
        for shard in array.addressable_shards:
            devices[shard.device] += shard.data.nbytes
    assert set(devices.values()) == {expected}


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", jnp.float32])
def test_weights_take_the_asked_dtype_and_another_routers_float32(converted, dtype):
    model = load_model(converted["mixtral"], mesh=make_mesh(4, 2), dtype=dtype)
    wanted = jnp.dtype(dtype or "bfloat16")
    assert model.dtype == wanted
    stored = arrays_of(load_model(converted["mixtral"], mesh=make_mesh(4, 2)))
    for key, array in arrays_of(model).items():
        is_kept = not key.endswith("router.weight") or wanted == jnp.bfloat16  # as it is stored
        assert array.dtype == (wanted if is_kept else jnp.float32), key
        np.testing.assert_array_equal(np.asarray(array), np.asarray(stored[key].astype(array.dtype)), err_msg=key)


def test_the_stored_dtype_is_the_default(tmp_path):
    convert(PARITY / "mixtral", tmp_path / "float32", dtype="float32", progress=False)
    model = load_model(str(tmp_path / "float32"), mesh=make_mesh())
    assert model.dtype == jnp.float32
    assert {array.dtype.name for array in arrays_of(model).values()} == {"float32"}


def test_a_relative_path_and_a_progress_bar(converted, monkeypatch, capfd):
    monkeypatch.chdir(converted["mixtral"].parent)
    load_model("mixtral", mesh=make_mesh())
    assert capfd.readouterr() == ("", "")
    load_model("mixtral", mesh=make_mesh(), progress=True)
    assert "loading: 100%" in capfd.readouterr().err


@pytest.mark.parametrize("dtype", ["int8", "float64", "fp8", 3.5], ids=str)
def test_an_unsupported_dtype_is_refused(converted, dtype):
    line = f"dtype is '{dtype}'; it should be one of bfloat16, float16, float32"
    assert refusal(converted["mixtral"], dtype=dtype) == line


def test_a_mesh_that_does_not_divide_the_model_is_refused(converted):
    line = "ep_size is 8; it should be a divisor of the 12 experts"
    assert refusal(converted["mixtral"], mesh=make_mesh(8, 8)) == line


def test_a_folder_that_was_never_converted_is_refused(tmp_path):
    for folder in (PARITY / "mixtral", tmp_path / "nowhere"):
        line = "has no readable epmoe.json; it should be one that `python -m weights_convert` wrote"
        assert refusal(folder) == f"model folder '{folder}' {line}"


@pytest.mark.parametrize(
    ("header", "line"),
    [
        ({"format_version": 2}, "epmoe.json: format_version is 2; it should be 1"),
        ({"format_version": "1"}, "epmoe.json: format_version is '1'; it should be 1"),
        ({"dtype": "int4"}, "epmoe.json: dtype is 'int4'; it should be one of bfloat16, float16, float32"),
    ],
    ids=str,
)
def test_another_format_is_refused(copy, header, line):
    (copy / "epmoe.json").write_text(json.dumps(json.loads((copy / "epmoe.json").read_text()) | header))
    assert refusal(copy) == f"{copy}/{line}"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"dtype": "bfloat16"}', "7"])
def test_a_damaged_header_is_refused(copy, text):
    (copy / "epmoe.json").write_text(text)
    assert refusal(copy) == f"{copy}/epmoe.json is damaged; convert the checkpoint again"


def test_a_missing_config_is_refused(copy):
    (copy / "config.json").unlink()
    assert refusal(copy) == f"model folder '{copy}': cannot read config.json: No such file or directory"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"vocab_size": 300}, "embed.table's shape is (269, 32); it should be (300, 32)"),
        ({"vocab_size": 200}, "embed.table's shape is (269, 32); it should be (200, 32)"),
        ({"intermediate_size": 40}, "layers.0.moe.w_down's shape is (12, 32, 37); it should be (12, 32, 40)"),
        ({"num_hidden_layers": 3}, "parameter layers.2.attention.k is missing; it should be there"),
        ({"num_hidden_layers": 1}, "parameter layers.1.attention.k is there; it should not be"),
        ({"tie_word_embeddings": True}, "parameter head.weight is there; it should not be"),
    ],
    ids=str,
)
def test_a_config_of_another_model_is_refused(copy, change, line):
    """Also where padding, or ignoring what is left over, would make it fit."""
    (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text()) | change))
    for mesh in (make_mesh(), make_mesh(4, 2)):
        assert (
            refusal(copy, mesh=mesh) == f"checkpoint '{copy}': {line}, to fit config.json; convert the checkpoint again"
        )


def test_arrays_in_orbax_s_ocdbt_load_too(converted, copy):
    """What `weights_convert` wrote before it wrote files of chunks."""
    arrays = v1.load(copy / "params")
    shutil.rmtree(copy / "params")
    v1.save(copy / "params", arrays)
    assert (copy / "params" / "state" / "manifest.ocdbt").is_file()
    want = arrays_of(load_model(converted["mixtral"], mesh=make_mesh(4, 2)))
    got = arrays_of(load_model(copy, mesh=make_mesh(4, 2)))
    for key, array in want.items():
        np.testing.assert_array_equal(np.asarray(got[key]), np.asarray(array), err_msg=key)


PARTS = (
    "params",
    "params/state",
    "params/state/_METADATA",
    "params/state/embed.table",
    "params/state/norm.scale/zarr.json",
)


@pytest.mark.parametrize("part", PARTS)
def test_missing_parts_of_params_are_refused(copy, part):
    shutil.rmtree(copy / part) if (copy / part).is_dir() else (copy / part).unlink()
    assert refusal(copy).startswith(f"checkpoint '{copy}': params cannot be read, damaged or cut short: ")


@pytest.mark.parametrize("damage", ["deleted", "cut short", "emptied"])
def test_damaged_data_is_refused_with_the_parameters_name_and_no_traceback(copy, damage, caplog, capfd):
    """The largest file holds a layer's arrays."""
    file = max((f for f in (copy / "params").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = file.read_bytes()
    file.unlink()
    if damage != "deleted":
        file.write_bytes(content[: len(content) // 2 if damage == "cut short" else 0])
    with caplog.at_level(logging.DEBUG):
        line = refusal(copy)
    assert line.startswith(f"checkpoint '{copy}': params cannot be read, damaged or cut short: ")
    assert "layers." in line
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_dummy_model_needs_only_config_json(tmp_path):
    shutil.copy(PARITY / "deepseek_v2" / "config.json", tmp_path)
    model = dummy_model(tmp_path, mesh=make_mesh(4, 2))
    assert model.dtype == jnp.bfloat16
    shapes = parameter_shapes(model.config)
    arrays = arrays_of(model)
    assert {key: array.dtype for key, array in arrays.items()} == {key: shape.dtype for key, shape in shapes.items()}
    for key, array in arrays.items():
        values = np.asarray(array, np.float32)[tuple(slice(n) for n in shapes[key].shape)]
        assert np.all(values == 1) if key.endswith(".scale") else 0.01 < values.std() < 0.04, key


@pytest.mark.parametrize("name", ["deepseek_v2", "qwen2_moe"])
def test_a_quantised_dummy_model_has_a_quantised_checkpoint_s_arrays(tmp_path, name):
    shutil.copy(PARITY / name / "config.json", tmp_path)
    model = dummy_model(tmp_path, mesh=make_mesh(), quantization="fp8-channel")
    shapes = parameter_shapes(model.config, Quantization("fp8-channel"))
    arrays = arrays_of(model)
    assert {key: (a.shape, a.dtype) for key, a in arrays.items()} == {k: (s.shape, s.dtype) for k, s in shapes.items()}
    assert arrays["layers.1.attention.o.values"].dtype == jnp.float8_e4m3fn
    assert 0.01 < np.asarray(model.layers[1].attention.o[...], np.float32).std() < 0.04


def test_a_dummy_model_is_its_seeds(tmp_path):
    shutil.copy(PARITY / "mixtral" / "config.json", tmp_path)

    def table(**kwargs):
        return np.asarray(dummy_model(tmp_path, dtype="float32", **kwargs).embed.table[...])[:269]

    want = table(mesh=make_mesh(), seed=3)
    np.testing.assert_array_equal(table(mesh=make_mesh(4, 4), seed=3), want)
    assert not np.array_equal(table(mesh=make_mesh(), seed=4), want)


def test_a_dummy_model_is_refused_as_a_loaded_one_is(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read config\.json"):
        dummy_model(tmp_path, mesh=make_mesh())
    shutil.copy(PARITY / "mixtral" / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"^dtype is 'int8'; it should be one of"):
        dummy_model(tmp_path, mesh=make_mesh(), dtype="int8")
    with pytest.raises(ValueError, match=r"^ep_size is 8; it should be a divisor of the 12 experts$"):
        dummy_model(tmp_path, mesh=make_mesh(8, 8))
