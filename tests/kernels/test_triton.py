"""The Triton backend without a GPU: interpreted on the CPU, compiled for GPUs that are not there, and what it refuses."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from kernels import triton_interpreter
from kernels.grouped_gemm_suite import GroupedGemmSuite

from jax_epmoe.kernels.grouped_gemm import grouped_gemm, triton

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
@pytest.mark.parametrize(
    ("capability", "rows", "experts", "columns", "dtype", "tile"),
    [
        (90, 6144, 20, 3072, "bfloat16", (128, 256, 64)),
        (89, 6144, 20, 3072, "bfloat16", (128, 128, 64)),
        (80, 49152, 160, 384, "bfloat16", (128, 128, 64)),  # 256 would pad a third
        (90, 512, 128, 1536, "bfloat16", (16, 128, 64)),
        (90, 768, 20, 5120, "bfloat16", (64, 128, 64)),
        (90, 6144, 20, 3072, "float32", (64, 64, 32)),
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


def test_no_gpu_is_no_nvidia_gpu():
    assert triton.compute_capability() == 0
