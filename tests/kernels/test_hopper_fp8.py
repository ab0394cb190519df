"""The float8 kernel without a GPU: interpreted on the CPU against the definition, and lowered for CUDA.

Races are looked for where all scales come at the end. Where a row's scales come by TMA, an ordinary read of shared memory is
followed by another TMA write to it; the barrier between orders them on the GPU, but the interpreter asks for a fence as well.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernels.float8_cases import KINDS, make_inputs, run

from jax_epmoe.config import ClampedSwiGLU
from jax_epmoe.kernels import quantize_hopper
from jax_epmoe.kernels.grouped_gemm import hopper_fp8, hopper_fp8_large, reference, tuning
from jax_epmoe.kernels.grouped_gemm.tuning import Tiling
from jax_epmoe.quant import FP8, dequantize, scale_shape

LOW = Tiling(columns=128, heights=(16, 64), block_k=128, stages=2)
CASES = {
    "blocks": {},
    "blocks, a bias and gpt-oss's gate in float32": {"gated": True, "bias": True, "out_dtype": jnp.float32},
    "blocks, all k and n": {"k": 256, "n": 256, "tiling": Tiling(columns=256, heights=(64,), block_k=128, stages=2)},
    "blocks, tiles of 112 rows": {
        "k": 256, "n": 256, "sizes": (105, 7), "rows": 112, "tiling": Tiling(columns=256, heights=(112,), block_k=128, stages=2),
    },
    "blocks, two a step": {"tiling": Tiling(columns=128, heights=(16, 64), block_k=256, stages=2)},
    "channels, high tiles, two a step": {
        "kinds": KINDS["channel"], "k": 416, "sizes": (70, 0, 58), "bias": True,
        "tiling": Tiling(columns=128, heights=(64, 80), block_k=256, stages=2),
    },
    "large groups, channels, two a step": {
        "kinds": KINDS["channel"], "sizes": (70, 134), "rows": 204, "k": 416, "gated": True,
        "tiling": dataclasses.replace(hopper_fp8_large.large_tiling(rows_per_expert=512, gated=True), block_k=256, stages=2),
    },
    "channels, two a step": {"kinds": KINDS["channel"], "tiling": Tiling(columns=128, heights=(64,), block_k=256, stages=2)},
    "blocks, a gather": {"gather": 19, "sizes": (11, 0, 20), "rows": 40, "k": 256},
    "one scale a row of x, blocks of w": {"kinds": ("token", "block")},
    "one scale an expert, groups of x": {"kinds": ("group", "tensor")},
    "channels, a bias": {"kinds": KINDS["channel"], "bias": True},
    "channels, a gate, a gather": {"kinds": KINDS["channel"], "gated": True, "gather": 19, "sizes": (11, 0, 20), "rows": 40},
    "one scale each": {"kinds": KINDS["tensor"], "sizes": (1, 0, 1, 1), "gated": True},
    "blocks, k in parts": {"k": 480, "n": 160, "sizes": (37,), "rows": 40, "splits": 2},
    "blocks, a gate, a bias, k in parts": {
        "gated": True, "bias": True, "k": 512, "n": 128, "sizes": (13,), "rows": 13, "splits": 2, "out_dtype": jnp.float32,
    },
    "channels, a gate, k in parts": {
        "kinds": KINDS["channel"], "gated": True, "k": 384, "n": 136, "sizes": (16,), "rows": 16, "splits": 3,
    },
    "large groups": {
        "sizes": (3, 0, 198), "rows": 208, "k": 160,
        "tiling": hopper_fp8_large.large_tiling(rows_per_expert=512, gated=False),
    },
    "larger groups": {
        "sizes": (3, 0, 206, 5), "rows": 216, "k": 160,
        "tiling": hopper_fp8_large.large_tiling(rows_per_expert=8192, gated=False),
    },
    "large groups, gpt-oss's gate in float32, an odd number of column tiles": {
        "sizes": (3, 0, 206, 5), "rows": 216, "gated": True, "bias": True, "out_dtype": jnp.float32,
        "tiling": hopper_fp8_large.large_tiling(rows_per_expert=512, gated=True),
    },
    "larger groups, a gate in float32, an odd number of column tiles": {
        "sizes": (3, 0, 206, 5), "rows": 216, "gated": True, "out_dtype": jnp.float32,
        "tiling": hopper_fp8_large.large_tiling(rows_per_expert=8192, gated=True),
    },
    "large groups, channels, a bias": {
        "kinds": KINDS["channel"], "sizes": (70, 134), "rows": 204, "k": 256, "bias": True,
        "tiling": hopper_fp8_large.large_tiling(rows_per_expert=512, gated=False),
    },
    "rows that 8 does not divide": {"kinds": KINDS["tensor"], "rows": 61, "sizes": (30, 7, 24)},
}  # fmt: skip


@pytest.fixture(autouse=True)
def pretend_hopper(monkeypatch):
    monkeypatch.setattr(hopper_fp8, "on_hopper", lambda: True)
    monkeypatch.setattr(hopper_fp8, "num_sms", lambda: 3)  # the interpreter runs one after another
    reset_gpu_interpret_mode_state()
    yield
    reset_gpu_interpret_mode_state()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_it_computes_the_definition(case):
    x, w, sizes, index = make_inputs(**case)
    options = {"activation": "silu" if case.get("gated") else None, "row_index": index}
    how = {"tiling": case.get("tiling", LOW), "splits": case.get("splits", 1)}
    if "bias" in case:
        options["bias"] = jax.random.normal(jax.random.key(1), w.shape[:-1])
        options["activation"] = ClampedSwiGLU(limit=0.8) if case.get("gated") else None
    out_dtype = case.get("out_dtype", jnp.bfloat16)
    detect_races = "group" not in case.get("kinds", ("group",)) and "block" not in case.get("kinds", ())
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races)):
        out = run(hopper_fp8.quantized_matmul, x, w, sizes, out_dtype=out_dtype, **how, **options)
        assert out.dtype == out_dtype
        out = np.asarray(out, np.float64)
    expected = np.asarray(run(reference.quantized_matmul, x, w, sizes, out_dtype=jnp.float32, **options), np.float64)
    valid = int(sizes.sum())
    error = np.linalg.norm(out[:valid] - expected[:valid]) / np.linalg.norm(expected[:valid])
    assert error < (2e-6 if out_dtype == jnp.float32 else 5e-3)


@pytest.mark.parametrize(
    "tiling",
    [
        hopper_fp8_large.large_tiling(rows_per_expert=512, gated=True, quantizes=True),
        LOW,
        Tiling(columns=128, heights=(32,), block_k=256, stages=2),
    ],
    ids=["large", "operands swapped", "two a step"],
)
def test_a_gates_output_is_quantised_where_it_was_summed(monkeypatch, tiling):
    # It writes Mosaic GPU's own code, which the interpreter does not know.
    monkeypatch.setattr(quantize_hopper, "largest_of_columns", lambda values, room: jnp.max(values, axis=0))
    x, w, sizes, _ = make_inputs(gated=True, sizes=(3, 0, 70), rows=80, k=160, n=384)
    options = {"activation": "silu", "out_dtype": jnp.bfloat16, "quantize_out": "group"}
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = jax.tree.map(np.asarray, run(hopper_fp8.quantized_matmul, x, w, sizes, tiling=tiling, **options))
    expected = run(reference.quantized_matmul, x, w, sizes, **options)
    valid = int(sizes.sum())
    assert (got.granularity, got.values.shape, got.scales.shape) == ("group", (80, 384), (3, 80))
    np.testing.assert_allclose(got.scales[:, :valid], expected.scales[:, :valid], rtol=1e-5)
    assert np.mean(got.values[:valid] != np.asarray(expected.values)[:valid]) < 1e-3


@pytest.mark.parametrize("kinds", [KINDS["tensor"], KINDS["channel"]], ids=["tensor", "channel"])
@pytest.mark.parametrize(
    "tiling",
    [hopper_fp8_large.large_tiling(rows_per_expert=512, gated=True, quantizes=True), LOW],
    ids=["large", "operands swapped"],
)
def test_a_gates_output_is_quantised_by_its_experts_scale_where_it_was_summed(monkeypatch, tiling, kinds):
    def refuse(*args):
        raise AssertionError("rows are quantised in a kernel of their own")

    monkeypatch.setattr(hopper_fp8, "_quantize_rows", refuse)
    x, w, sizes, _ = make_inputs(kinds=kinds, gated=True, sizes=(3, 0, 67), rows=77, k=160, n=384)
    out_scale = jnp.array([2.0, 50.0, 3.0])  # the interpreter does not saturate
    options = {"activation": "silu", "out_dtype": jnp.bfloat16, "quantize_out": "tensor", "out_scale": out_scale}
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        got = jax.tree.map(np.asarray, run(hopper_fp8.quantized_matmul, x, w, sizes, tiling=tiling, **options))
    expected = run(reference.quantized_matmul, x, w, sizes, **options)
    valid = int(sizes.sum())
    assert (got.granularity, got.values.shape) == ("token", (77, 384))
    np.testing.assert_array_equal(got.scales, expected.scales)
    assert np.mean(got.values[:valid] != np.asarray(expected.values)[:valid]) < 1e-3


@pytest.mark.parametrize(
    ("granularity", "out_scale"),
    [("group", None), ("token", None), ("tensor", None), ("tensor", (1.0, 2.0, 3.0))],
    ids=["group", "token", "tensor", "an expert's own"],
)
@pytest.mark.parametrize("n", [128, 136])  # which is quantised by a kernel, and by XLA
def test_the_output_is_quantised_from_its_float32_values(monkeypatch, granularity, out_scale, n):
    monkeypatch.setattr(quantize_hopper, "num_sms", lambda: 1)
    x, w, sizes, _ = make_inputs(n=n, gated=n == 136, sizes=(60, 8, 60))
    out_scale = None if out_scale is None else jnp.array(out_scale)
    options = {"out_dtype": jnp.bfloat16, "quantize_out": granularity, "out_scale": out_scale}
    options["activation"] = "silu" if n == 136 else None
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = run(hopper_fp8.quantized_matmul, x, w, sizes, tiling=LOW, **options)
        got = jax.tree.map(np.asarray, got)
    expected = run(reference.quantized_matmul, x, w, sizes, **options)
    assert got.granularity == expected.granularity
    np.testing.assert_allclose(got.scales, expected.scales, rtol=1e-5)
    different = np.mean(np.asarray(dequantize(got)) != np.asarray(dequantize(expected)))
    assert np.mean(np.asarray(got.values) != np.asarray(expected.values)) < 1e-3, different


@pytest.mark.parametrize(
    ("rows", "experts", "k", "n", "gated", "kinds", "quantize_out"),
    [
        (6144, 20, 5120, 1536, True, KINDS["block"], "group"),
        (6144, 20, 1536, 5120, False, KINDS["block"], None),
        (192, 20, 5120, 1536, True, KINDS["block"], "group"),
        (512, 128, 768, 2048, False, KINDS["channel"], None),
        (96, 32, 416, 136, False, KINDS["block"], None),
        (4800, 20, 5120, 1536, True, KINDS["block"], "group"),
        (32768, 4, 7168, 2048, True, KINDS["channel"], None),
        (32768, 4, 7168, 2048, True, KINDS["channel"], "token"),
        (65536, 128, 2048, 768, True, KINDS["block"], "group"),
        (65536, 128, 768, 2048, False, KINDS["channel"], None),
        (512, 128, 2048, 768, True, KINDS["channel"], "token"),
        (6144, 20, 5120, 1536, True, KINDS["tensor"], "tensor"),  # by scales of the experts
        (32768, 4, 7168, 2048, True, KINDS["tensor"], "tensor"),
    ],
)
def test_real_sizes_fit_shared_memory_and_lower_for_cuda(rows, experts, k, n, gated, kinds, quantize_out):
    out_dtype = jnp.dtype({None: jnp.bfloat16, "token": jnp.float32}.get(quantize_out, FP8))
    tiling = hopper_fp8.choose_tiling(rows=rows, experts=experts, n=n, gated=gated, out_dtype=out_dtype)
    height, weights = tiling.heights[-1], tiling.columns * (1 + gated)
    output = height * 128 * out_dtype.itemsize
    if hopper_fp8_large.is_large(tiling):
        output = height * 128 * tiling.slots  # 128 bytes of a row at a time
    used = tiling.stages * (height + weights) * tiling.block_k + output
    assert tiling.stages >= 2
    assert used <= tuning.SHARED_MEMORY_LIMIT
    w_shape = (experts, 2, n, k) if gated else (experts, n, k)
    shapes = [jax.ShapeDtypeStruct(shape, FP8) for shape in ((rows, k), w_shape)]
    scales = [
        jax.ShapeDtypeStruct(scale_shape(shape.shape, kind), jnp.float32)
        for shape, kind in zip(shapes, kinds, strict=True)
    ]

    bias = jax.ShapeDtypeStruct(w_shape[:-1], jnp.bfloat16) if kinds == KINDS["channel"] else None

    def multiply(x, w, sizes, x_scale, w_scale, bias, out_scale):
        return hopper_fp8.quantized_matmul(
            x, w, sizes, x_scale=x_scale, w_scale=w_scale, activation="silu" if gated else None,
            bias=bias, quantize_out=quantize_out, out_scale=out_scale, out_dtype=jnp.bfloat16,
        )  # fmt: skip

    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
    out_scale = jax.ShapeDtypeStruct((experts,), jnp.float32) if quantize_out == "tensor" else None
    lowered = jax.jit(multiply).trace(*shapes, sizes, *scales, bias, out_scale).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(
    ("rows", "k", "n", "parts", "splits"),
    [
        (64, 7168, 1536, 1, 8),  # 12 tiles of 56 steps
        (64, 7168, 576, 1, 14),
        (16, 7168, 576, 1, 7),  # steps of 256
        (64, 16384, 7168, 1, 2),
        (64, 7168, 2048, 2, 4),
        (256, 7168, 1536, 1, 7),
        (64, 1536, 24576, 1, 1),
        (8192, 7168, 1536, 1, 1),
        (64, 7168, 200, 2, 1),  # gate and up would share a block
    ],
)
def test_few_tiles_of_one_group_are_cut_into_parts_of_k(monkeypatch, rows, k, n, parts, splits):
    monkeypatch.setattr(hopper_fp8, "num_sms", lambda: 132)
    shape = (1, 2, n, k) if parts == 2 else (1, n, k)
    tiling, found = hopper_fp8._choose(rows, rows, shape, parts, jnp.dtype(jnp.bfloat16), whole_blocks=True)
    assert found == splits
    assert -(-k // tiling.block_k) % splits == 0
    _, of_more = hopper_fp8._choose(rows, rows, (2, *shape[1:]), parts, jnp.dtype(jnp.bfloat16), whole_blocks=True)
    assert of_more == 1


@pytest.mark.parametrize(("rows", "height"), [(16, 16), (24, 32), (64, 64), (144, 80), (256, 128), (300, 104)])
def test_a_single_group_of_known_size_needs_one_height(rows, height):
    """Others would be traced and compiled, and never run; but where more rows may come than are expected they are needed."""
    of = ((1, 24576, 1536), 1, jnp.dtype(jnp.bfloat16))
    known, _ = hopper_fp8._choose(rows, rows, *of, whole_blocks=True)
    unknown, _ = hopper_fp8._choose(8 * rows, rows, *of, whole_blocks=True)
    assert known.heights == (height,)
    assert len(unknown.heights) > 1


@pytest.mark.parametrize(
    "change",
    [{"k": 272}, {"n": 132}, {"kinds": ("group", "channel")}, {"out_dtype": jnp.int8}],
    ids=lambda change: next(iter(change)),
)
def test_what_it_cannot_serve_it_refuses(change):
    x, w, sizes, _ = make_inputs(**change)
    with pytest.raises(NotImplementedError, match="hopper backend, float8: "):
        run(hopper_fp8.quantized_matmul, x, w, sizes, out_dtype=change.get("out_dtype", jnp.bfloat16))


def test_elsewhere_it_refuses(monkeypatch):
    monkeypatch.setattr(hopper_fp8, "on_hopper", lambda: False)
    x, w, sizes, _ = make_inputs()
    with pytest.raises(NotImplementedError, match="not a Hopper GPU"):
        run(hopper_fp8.quantized_matmul, x, w, sizes, out_dtype=jnp.bfloat16)


@pytest.mark.parametrize(
    ("rows", "experts", "k", "longer"),
    [
        (6144, 20, 5120, True),
        (65536, 128, 2048, True),
        (65536, 128, 2880, True),  # twelve steps of 256 for 23 of 128
        (65536, 128, 1408, False),  # six for eleven
        (49152, 160, 192, False),
        (32768, 4, 7168, False),  # three warpgroups
        (192, 20, 5120, False),  # decode
    ],
)
def test_where_scales_come_at_the_end_high_tiles_steps_are_longer(rows, experts, k, longer):
    options = {"n": 3072, "gated": False, "out_dtype": jnp.dtype(jnp.bfloat16)}
    tiling = hopper_fp8.choose_tiling(rows=rows, experts=experts, **options)
    found = hopper_fp8._with_longer_steps(tiling, k)
    assert (found.block_k, found.stages) == ((256, 2) if longer else (tiling.block_k, tiling.stages))
