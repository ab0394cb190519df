"""Float8 checkpoints in each of the hub's layouts, and quantising bf16 ones: kept as they are, loaded on any mesh, near float32."""

import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from fp8_checkpoint import BF16, FP8, LAYOUTS, LINEAR, SMALL_MIXTRAL, in_fp8, quantize, tensors_of
from hf_checkpoint import write

import weights_convert
from jax_epmoe import load_model, make_mesh, sizing_cli
from jax_epmoe.quant import FORMATS
from weights_convert.cli import main

MESHES = {
    "deepseek_blocks": [(1, 1), (2, 2), (4, 2), (8, 8)],
    "static_tensors": [(1, 1), (8, 8)],
    "compressed_channels": [(1, 1), (8, 4)],
    "dynamic_tensors": [(4, 2)],
}
FAST_COMPILE = {"xla_backend_optimization_level": 0}
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 12), dtype=np.int32)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """`converted(layout)`: the folder that a layout's checkpoint became."""

    @cache
    def make(layout: str):
        folder = tmp_path_factory.mktemp(layout)
        config, tensors, _ = in_fp8(layout)
        weights_convert.convert(write(folder / "hf", config, tensors, 2), folder / "ours", progress=False)
        return folder / "ours"

    return make


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """`expected(layout)`: the logits of the float32 checkpoint that a layout's stands for."""

    @cache
    def make(layout: str):
        folder = tmp_path_factory.mktemp(layout)
        config, _, stand_for = in_fp8(layout)
        del config["quantization_config"]
        src = write(folder / "hf", config, stand_for)
        weights_convert.convert(src, folder / "ours", dtype="float32", progress=False)
        return logits(load_model(folder / "ours", mesh=make_mesh()))

    return make


def logits(model) -> np.ndarray:
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens), compiler_options=FAST_COMPILE)
    return np.asarray(run(state, TOKENS))


def relative_error(out: np.ndarray, ref: np.ndarray) -> float:
    return float(np.linalg.norm(out - ref) / np.linalg.norm(ref))


def arrays_in(folder) -> dict[str, np.ndarray]:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "params" / "state")


CASES = [(layout, mesh) for layout, meshes in MESHES.items() for mesh in meshes]


@pytest.mark.parametrize(("layout", "mesh"), CASES, ids=str)
def test_each_layout_is_near_float32_over_its_dequantised_weights_on_every_mesh(converted, expected, layout, mesh):
    got = logits(load_model(converted(layout), mesh=make_mesh(*mesh), dtype="float32"))
    error = relative_error(got, expected(layout))
    assert 0.001 < error < 0.05, error


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_scales_are_kept_and_gate_and_up_keep_their_own(converted, layout):
    folder = converted(layout)
    arrays, (config, tensors, _) = arrays_in(folder), in_fp8(layout)
    _, _, _, suffixes, name = LAYOUTS[layout]
    header = json.loads((folder / "epmoe.json").read_text())
    assert (header["dtype"], header["quantization"]) == ("bfloat16", {"format": name, "kept": []})
    moe = "block_sparse_moe" if config["model_type"] == "mixtral" else "mlp"
    gate, up, down = ("w1", "w3", "w2") if moe == "block_sparse_moe" else ("gate_proj", "up_proj", "down_proj")
    for expert in (0, 5):
        prefix = f"model.layers.1.{moe}.experts.{expert}"
        ours = {"values": ".weight", "scales": suffixes[0], **({"input_scales": suffixes[1]} if suffixes[1:] else {})}
        for kind, suffix in ours.items():
            got_pair, got = (arrays[f"layers.1.moe.{w}.{kind}"][expert] for w in ("w_gate_up", "w_down"))
            want_pair = np.stack([tensors[f"{prefix}.{half}{suffix}"] for half in (gate, up)])
            assert np.array_equal(got_pair.reshape(-1).view(np.uint8), want_pair.reshape(-1).view(np.uint8))
            want = tensors[f"{prefix}.{down}{suffix}"]
            assert np.array_equal(got.reshape(-1).view(np.uint8), want.reshape(-1).view(np.uint8))
        scales = arrays["layers.1.moe.w_gate_up.scales"][expert]
        assert not np.array_equal(scales[0], scales[1])
    assert {a.dtype.name for n, a in arrays.items() if n.endswith(".values")} == {"float8_e4m3fn"}
    assert arrays["embed.table"].dtype == arrays["layers.1.moe.router.weight"].dtype == BF16


def test_tensors_left_in_bf16_stay_so(tmp_path):
    """Such as an attention projection that a file's `modules_to_not_convert` lists."""
    config, tensors, stand_for = in_fp8("deepseek_blocks")
    for name in list(tensors):
        if ".1.self_attn.kv_b_proj" in name or "layers.0.mlp" in name:
            del tensors[name]
            if name.endswith(".weight"):
                tensors[name] = stand_for[name].astype(BF16)
    weights_convert.convert(write(tmp_path / "src", config, tensors), tmp_path / "dst", progress=False)
    kept = json.loads((tmp_path / "dst" / "epmoe.json").read_text())["quantization"]["kept"]
    assert kept == ["layers.0.mlp.w_down", "layers.0.mlp.w_gate_up", "layers.1.attention.kv_b"]
    model = load_model(tmp_path / "dst", mesh=make_mesh(2, 2))
    assert isinstance(model.layers[1].attention.kv_b, nnx.Param)
    assert not isinstance(model.layers[0].attention.kv_b, nnx.Param)


@pytest.mark.parametrize("name", ["fp8-block", "fp8-channel", "fp8-tensor"])
def test_bf16_is_quantised_by_the_largest_of_each_tile(tmp_path, capsys, name):
    tensors = tensors_of(SMALL_MIXTRAL)
    src = write(tmp_path / "src", SMALL_MIXTRAL, tensors, 2)
    assert main([str(src), str(tmp_path / "dst"), "--quantize", name]) == 0
    assert f"of {name} and bfloat16" in capsys.readouterr().out
    assert json.loads((tmp_path / "dst" / "epmoe.json").read_text())["quantization"] == {"format": name, "kept": []}
    arrays = arrays_in(tmp_path / "dst")
    for ours, index, theirs in (
        ("layers.0.attention.q", (), "self_attn.q_proj"),
        ("layers.0.moe.w_gate_up", (3, 1), "block_sparse_moe.experts.3.w3"),
        ("layers.0.moe.w_down", (7,), "block_sparse_moe.experts.7.w2"),
    ):
        values, scales, _ = quantize(tensors[f"model.layers.0.{theirs}.weight"], FORMATS[name].weights)
        got_scales = arrays[f"{ours}.scales"][(*index, ...)]
        np.testing.assert_allclose(got_scales.reshape(scales.shape), scales, rtol=1e-6)
        got = arrays[f"{ours}.values"][(*index, ...)]
        assert (got.dtype, got.shape) == (FP8, values.shape)
        same = np.mean(got.view(np.uint8) == values.view(np.uint8))
        assert same > 0.99, same  # a scale's last bit may move a value that lies between two
    unquantised = {n for n in arrays if not n.endswith((".values", ".scales"))}
    assert unquantised == {
        "embed.table", "head.weight", "norm.scale",
        *(f"layers.{i}.{n}" for i in (0, 1) for n in ("attention_norm.scale", "mlp_norm.scale", "moe.router.weight")),
    }  # fmt: skip
    model = load_model(tmp_path / "dst", mesh=make_mesh(4, 2))
    assert model.layers[0].attention.q[...].dtype == jnp.bfloat16


W, Q = "model.layers.0.block_sparse_moe.experts.2.w1", "model.layers.1.self_attn.q_proj"


def drop(name):
    return lambda config, tensors: tensors.pop(name)


def put(name, array):
    return lambda config, tensors: tensors.update({name: array})


def say(**changes):
    return lambda config, tensors: config["quantization_config"].update(changes)


def say_of(part, **changes):
    return lambda config, tensors: config["quantization_config"]["config_groups"]["group_0"][part].update(changes)


def with_nan(config, tensors):
    tensors[f"{W}.weight"][3, 4] = np.nan


CONFIG = "config.json: quantization_config"
GROUP = f"{CONFIG}: config_groups.group_0"
BAD = {
    "method": ("dynamic_tensors", say(quant_method="gptq"), f"{CONFIG}: quant_method is 'gptq'; it should be one of fp8, comp"),
    "block": ("deepseek_blocks", say(weight_block_size=[64, 64]), f"{CONFIG}: weight_block_size is [64, 64]; only [128, 128]"),
    "scheme": ("deepseek_blocks", say(activation_scheme="static"), f"{CONFIG}: activation_scheme is 'static'; only 'dynamic'"),
    "no scheme": ("dynamic_tensors", say(activation_scheme=None), f"{CONFIG}: activation_scheme is missing; it should be one of"),
    "bits": ("compressed_channels", say_of("weights", num_bits=4), f"{GROUP}.weights: num_bits is 4; only 8 is supported"),
    "per token static": ("compressed_channels", say_of("input_activations", dynamic=False), f"{GROUP}.input_activations: dynamic is False"),
    "mixed": ("compressed_channels", say_of("input_activations", strategy="tensor"), f"{GROUP}.input_activations: strategy is 'tensor'; it should be one of token"),
    "groups": ("compressed_channels", say(config_groups={}), f"{CONFIG}: config_groups has 0 groups; only one is supported"),
    "no groups": ("compressed_channels", say(config_groups=None), f"{CONFIG}: config_groups is None; it should be a JSON object"),
    "no scale": ("dynamic_tensors", drop(f"{W}.weight_scale"), f"tensor {W}.weight_scale is missing; it should be there, []"),
    "no blocks' scales": ("compressed_blocks", drop(f"{Q}.weight_scale"), f"tensor {Q}.weight_scale is missing; it should be there, [2, 2]"),
    "no input scale": ("static_tensors", drop(f"{W}.input_scale"), f"tensor {W}.input_scale is missing; it should be there, []"),
    "scale's shape": ("compressed_blocks", put(f"{Q}.weight_scale", np.ones((1, 2), np.float32)), f"tensor {Q}.weight_scale in model.safetensors is [1, 2] of F32; it should be [2, 2]"),
    "scale's dtype": ("dynamic_tensors", put(f"{W}.weight_scale", np.ones((), np.int32)), f"tensor {W}.weight_scale in model.safetensors is [] of I32; it should be [] of a dtype among BF16"),
    "one in bf16": ("dynamic_tensors", put(f"{W}.weight", np.ones((256, 192), BF16)), f"tensor {W}.weight in model.safetensors is [256, 192] of BF16; it should be [256, 192] of a dtype among F8_E4M3"),
    "zero scale": ("static_tensors", put(f"{W}.input_scale", np.zeros((), np.float32)), f"tensor {W}.input_scale has scales that are not positive numbers"),
    "infinite scale": ("dynamic_tensors", put(f"{W}.weight_scale", np.full((), np.inf, np.float32)), f"tensor {W}.weight_scale has scales that are not positive"),
    "NaN": ("dynamic_tensors", with_nan, f"tensor {W}.weight has values that are NaN"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_refused_in_one_line_that_names_it(tmp_path, capsys, case):
    layout, change, line = BAD[case]
    config, tensors, _ = in_fp8(layout)
    change(config, tensors)
    src = write(tmp_path / "src", config, tensors)
    assert main([str(src), str(tmp_path / "dst")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"epmoe-convert: {line}")
    assert said.count("\n") == 1
    assert not (tmp_path / "dst").exists()


def test_what_cannot_be_quantised_is_refused(tmp_path, capsys):
    config, tensors, _ = in_fp8("dynamic_tensors")
    src = write(tmp_path / "fp8", config, tensors)
    assert main([str(src), str(tmp_path / "dst"), "--quantize", "fp8-block"]) == 2
    assert capsys.readouterr().err.endswith(": SRC is quantised already, fp8-tensor\n")
    for value in (np.nan, np.inf):
        tensors = tensors_of(SMALL_MIXTRAL)
        tensors[f"{Q}.weight"][0, 0] = value
        src = write(tmp_path / str(value), SMALL_MIXTRAL, tensors)
        assert main([str(src), str(tmp_path / "dst"), "--quantize", "fp8-block"]) == 2
        line = f"epmoe-convert: tensor {Q}.weight has values that are not finite; it cannot be quantised\n"
        assert capsys.readouterr().err == line
    with pytest.raises(
        ValueError, match=r"^quantize is 'int4'; it should be one of fp8-block, fp8-channel, fp8-tensor$"
    ):
        weights_convert.convert(src, tmp_path / "dst", quantize="int4")


def test_scales_for_a_float8_cache_are_passed_over(tmp_path):
    config, tensors, _ = in_fp8("static_tensors")
    for name in ("k_scale", "v_scale", "k_proj.output_scale", "v_proj.output_scale"):
        tensors[f"model.layers.1.self_attn.{name}"] = np.ones((), np.float32)
    weights_convert.convert(write(tmp_path / "src", config, tensors), tmp_path / "dst", progress=False)
    assert len([n for n in tensors if LINEAR.fullmatch(n)]) == 2 * (4 + 3 * 8)


@pytest.mark.parametrize("entry", ["fp8-block", {"format": "int4", "kept": []}, {"format": "fp8-block"}], ids=str)
def test_a_header_that_says_something_else_is_refused(converted, tmp_path, entry):
    folder = converted("deepseek_blocks")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    header = json.loads((folder / "epmoe.json").read_text())
    (tmp_path / "epmoe.json").write_text(json.dumps(header | {"quantization": entry}))
    with pytest.raises(
        ValueError, match=r"^epmoe\.json: quantization is .*; it should be null, or an object with a format"
    ):
        load_model(tmp_path, mesh=make_mesh())


def test_a_mesh_that_cuts_an_expert_s_block_is_refused_when_loading(converted):
    folder = converted("deepseek_blocks")
    with pytest.raises(ValueError, match=r"^ep_size is 1; it should be one of 2, 4: 4 devices to an expert would cut"):
        load_model(folder, mesh=make_mesh(4, 1))


def test_epmoe_plan_does_not_count_quantised_weights_as_others(converted, capsys):
    assert sizing_cli.main(["--model", str(converted("deepseek_blocks")), "--gpus", "8"]) == 2
    assert (
        "quantization is 'fp8-block'; it should be none: quantised weights are not counted yet"
        in capsys.readouterr().err
    )
