"""The Triton backend without a GPU: interpreted on the CPU, compiled for GPUs that are not there, and what it refuses."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import triton_interpreter
from kernels.float8_cases import KINDS, make_inputs, run
from kernels.grouped_gemm_suite import GroupedGemmSuite

from jax_epmoe.kernels.grouped_gemm import grouped_gemm, reference, triton
from jax_epmoe.quant import dequantize

needs_triton = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("triton", "jax_triton"))), reason="triton and jax-triton are not installed"
)


@pytest.fixture(scope="module")
def interpreter():
    if "EPMOE_TEST_GPU" in os.environ:
        pytest.skip("this process is to compile: tests/gpu runs the suite on the GPU")
    return triton_interpreter.make_module()


@pytest.fixture
def interpreted(interpreter, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", interpreter)
    monkeypatch.setattr(triton, "compute_capability", lambda: 80)


@needs_triton
@pytest.mark.usefixtures("interpreted")
class TestTriton(GroupedGemmSuite):
    backend = "triton"

    @pytest.fixture(autouse=True)
    def leave_out_what_takes_long(self, request):
        """A program takes milliseconds in the interpreter. The tests without many draws have all dtypes."""
        name = request.node.originalname
        if name not in ("test_equals_the_loop_over_groups", "test_gradients_equal_the_dense_definition"):
            return
        variant, dtype = (request.node.callspec.params[key] for key in ("variant", "dtype"))
        if dtype != "bfloat16" or ("gradients" in name and not (variant.bias and variant.row_index)):
            pytest.skip("many draws of bfloat16, and for gradients of bias and row_index, stand for the others")


@needs_triton
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("backend", "asked"), [(None, 3), ("triton", 3), ("xla", 0)])
def test_it_is_asked_before_the_definition_in_both_directions(backend, asked, monkeypatch):
    calls = []
    for name in ("matmul", "outer"):
        function = getattr(triton, name)
        monkeypatch.setattr(triton, name, lambda *a, function=function, **kw: calls.append(a) or function(*a, **kw))
    x, w, sizes = jnp.ones((6, 4)), jnp.ones((3, 5, 4)), jnp.array([1, 2, 3])
    jax.grad(lambda x, w: jnp.sum(grouped_gemm(x, w, sizes, backend=backend)), (0, 1))(x, w)
    assert len(calls) == asked


@needs_triton
@pytest.mark.usefixtures("interpreted")
class TestFloat8:
    """Against the definition; sizes that no tile divides, and a scale of its own for each row, expert and half."""

    @pytest.fixture(autouse=True)
    def pretend_ada(self, interpreted, monkeypatch):
        monkeypatch.setattr(triton, "compute_capability", lambda: 89)

    @pytest.mark.parametrize("gather", [None, 19], ids=["rows", "gather"])
    @pytest.mark.parametrize("activation", [None, "silu"])
    @pytest.mark.parametrize("x_kind", reference.X_KINDS)
    @pytest.mark.parametrize("w_kind", reference.W_KINDS)
    def test_it_computes_the_definition_whatever_the_scales(self, w_kind, x_kind, activation, gather):
        x, w, sizes, index = make_inputs(
            (x_kind, w_kind), gated=activation is not None, sizes=(37, 0, 30, 5), rows=80, gather=gather
        )
        options = {"row_index": index, "activation": activation, "out_dtype": jnp.float32}
        out, expected = (
            np.asarray(run(module.quantized_matmul, x, w, sizes, **options), np.float64)
            for module in (triton, reference)
        )
        assert np.linalg.norm(out[:72] - expected[:72]) < 1e-6 * np.linalg.norm(expected[:72])
        assert np.isnan(out[72:]).all(), "rows of no group were written"

    def test_a_bias_is_added_to_what_was_scaled(self):
        x, w, sizes, _ = make_inputs(KINDS["channel"], sizes=(20, 3), rows=23)
        bias = jax.random.normal(jax.random.key(0), (2, 136))
        options = {"bias": bias, "out_dtype": jnp.bfloat16}
        out, expected = (
            np.asarray(run(module.quantized_matmul, x, w, sizes, **options), np.float64)
            for module in (triton, reference)
        )
        assert np.linalg.norm(out - expected) < 5e-3 * np.linalg.norm(expected)

    @pytest.mark.parametrize("out_scale", [None, jnp.array([0.01, 0.02, 0.03])], ids=["dynamic", "static"])
    @pytest.mark.parametrize("granularity", ["group", "token", "tensor"])
    def test_the_output_is_quantised_from_its_float32_values(self, granularity, out_scale):
        if out_scale is not None and granularity != "tensor":
            pytest.skip("static scales are of tensors")
        x, w, sizes, _ = make_inputs(gated=True, sizes=(20, 8, 30), rows=64)
        options = {"activation": "silu", "out_dtype": jnp.bfloat16, "quantize_out": granularity, "out_scale": out_scale}
        got, expected = (run(module.quantized_matmul, x, w, sizes, **options) for module in (triton, reference))
        assert got.granularity == expected.granularity
        values, scales = (dequantize(each)[:58] for each in (got, expected)), (got.scales, expected.scales)
        np.testing.assert_allclose(*(each if each.ndim == 0 else each[..., :58] for each in scales), rtol=1e-5)
        got, expected = values
        assert np.mean(np.abs(got - expected) > 1e-3 * np.abs(expected)) < 1e-3

    @pytest.mark.parametrize(("backend", "asked"), [(None, 1), ("triton", 1), ("xla", 0)])
    def test_it_is_asked_before_the_definition(self, backend, asked, monkeypatch):
        calls = []
        function = triton.quantized_matmul
        monkeypatch.setattr(triton, "quantized_matmul", lambda *a, **kw: calls.append(a) or function(*a, **kw))
        x, w, sizes, _ = make_inputs(sizes=(3, 2), rows=8)
        run(grouped_gemm, x, w, sizes, backend=backend)
        assert len(calls) == asked


@pytest.fixture(scope="module")
def kernels():
    """Every tile that may be chosen, with and without a gate, for three GPUs, as jax-triton lowers it."""
    flags = "--xla_force_host_platform_device_count=4"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "TRITON_INTERPRET": "0"}
    program = Path(__file__).with_name("triton_lowering.py")
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@needs_triton
def test_every_tile_compiles_for_its_gpu_and_fits_it(kernels):
    limit = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
    assert {kernel["capability"] for kernel in kernels} == set(limit)
    for kernel in kernels:
        assert kernel["shared"] <= limit[kernel["capability"]], kernel
        assert kernel["spilled"] <= 128, kernel
        assert kernel["tensor_cores"] == ("float32" not in kernel["case"]), kernel


@needs_triton
def test_float8_is_multiplied_as_float8_where_tensor_cores_take_it(kernels):
    """Hopper's take it in tiles of 64 rows and more; lower ones are multiplied as float16, which holds every product."""
    of_float8 = [kernel for kernel in kernels if "fp8" in kernel["case"]]
    assert {kernel["capability"] for kernel in of_float8} == {89, 90}
    for kernel in of_float8:
        rows = int(kernel["case"].split()[0])
        assert kernel["float8"] == (kernel["capability"] == 89 or rows >= 384), kernel
    assert not any(kernel["float8"] for kernel in kernels if "fp8" not in kernel["case"])


@needs_triton
@pytest.mark.parametrize(
    ("capability", "rows", "experts", "columns", "dtype", "tile"),
    [
        (90, 6144, 20, 3072, "bfloat16", (128, 256, 64)),
        (89, 6144, 20, 3072, "bfloat16", (128, 128, 64)),
        (80, 49152, 160, 384, "bfloat16", (128, 128, 64)),  # 256 would pad a third
        (90, 512, 128, 1536, "bfloat16", (16, 128, 64)),
        (90, 768, 20, 5120, "bfloat16", (64, 128, 64)),
        (90, 6144, 20, 3072, "float32", (64, 64, 32)),
        (90, 6144, 20, 3072, "float8_e4m3fn", (128, 128, 128)),
        (89, 512, 128, 1536, "float8_e4m3fn", (16, 128, 128)),
    ],
)
def test_tiles_follow_the_rows_of_an_expert_and_the_shared_memory(capability, rows, experts, columns, dtype, tile):
    chosen = triton.choose_tile(rows=rows, experts=experts, columns=columns, dtype=dtype, capability=capability)
    assert chosen[:3] == tile


X, W, SIZES = jnp.zeros((16, 128), jnp.bfloat16), jnp.zeros((4, 64, 128), jnp.bfloat16), jnp.array([4, 4, 4, 4])


@pytest.mark.parametrize(
    ("change", "capability", "reason"),
    [
        ({}, 0, "the device is not an NVIDIA GPU of compute capability 8.0 or newer"),
        ({}, 75, "the device is not an NVIDIA GPU of compute capability 8.0 or newer"),
        ({"w": W.astype(jnp.float32)}, 80, "dtypes bfloat16, float32, bfloat16: the operands' differ"),
        ({"out_dtype": jnp.float8_e4m3fn}, 80, "dtypes .* are not bfloat16, float16 or float32"),
        ({"x": X[:, :0], "w": W[..., :0]}, 80, "an operand is empty"),
        ({}, 80, "jax-triton cannot be used: .*jax_triton.*"),
    ],
    ids=str,
)
def test_what_it_cannot_serve_it_leaves_to_the_next(change, capability, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)  # not installed
    monkeypatch.setattr(triton, "compute_capability", lambda: capability)
    arguments = {"x": X, "w": W, "group_sizes": SIZES, "out_dtype": X.dtype} | change
    with pytest.raises(NotImplementedError, match=f"^grouped_gemm's triton backend: {reason}$"):
        triton.matmul(**arguments)
    with pytest.raises(NotImplementedError, match=r"^grouped_gemm's triton backend: "):
        triton.outer(X, X.astype(jnp.float32), SIZES, out_dtype=X.dtype)


@pytest.mark.parametrize(
    ("change", "capability", "reason"),
    [
        ({}, 80, "the device is not an NVIDIA GPU of compute capability 8.9 or newer"),
        ({"out_dtype": jnp.float8_e4m3fn}, 89, "dtypes .* are not bfloat16, float16 or float32"),
        ({}, 89, "jax-triton cannot be used: .*jax_triton.*"),
    ],
    ids=["Ampere", "out_dtype", "no jax-triton"],
)
def test_float8_that_it_cannot_serve_it_leaves_to_the_next(change, capability, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    monkeypatch.setattr(triton, "compute_capability", lambda: capability)
    x, w, sizes, _ = make_inputs(sizes=(3, 2), rows=8)
    with pytest.raises(NotImplementedError, match=f"^grouped_gemm's triton backend: {reason}$"):
        run(triton.quantized_matmul, x, w, sizes, **{"out_dtype": jnp.bfloat16} | change)
    if not change:
        assert run(grouped_gemm, x, w, sizes).shape == (8, 136)  # by the definition


def test_no_gpu_is_no_nvidia_gpu():
    assert triton.compute_capability() == 0
