"""Lowers grouped GEMMs for NVIDIA GPUs that are not there and assembles their kernels: `python triton_lowering.py`, a process of
its own, since Triton compiles in a process or interprets.

jax-triton runs as it is, but for the part of jaxlib that only its CUDA plugin has: stand-ins keep what they are given. (It asks
that part for the device's compute capability too, unless it is told, as the backend does.)
Each line printed is a `Kernel` in JSON.
"""

import json
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxlib import gpu_triton

from jax_epmoe.kernels.grouped_gemm import grouped_gemm, triton
from jax_epmoe.quant import FORMATS, FP8, scale_shape

# What makes the backend choose each of its tiles: rows of 8 experts, columns of w.
SIZES = ((64, 256), (192, 256), (384, 256), (4096, 128), (4096, 256))
CAPABILITIES = (80, 89, 90)  # whose kernels are assembled; those of 100 and 120 are only compiled


@dataclass
class Kernel:
    """One kernel as jax-triton compiled it, and what ptxas says of it."""

    case: str
    capability: int
    name: str
    num_warps: int
    shared: int  # bytes
    registers: int = 0
    spilled: int = 0  # bytes
    tensor_cores: bool = False
    float8: bool = False  # on tensor cores


class Recorder:
    """The stand-ins' memory: the kernels of the case that is being lowered, each once for all cases."""

    def __init__(self) -> None:
        self.case = ""
        self.kernels: list[tuple[Kernel, str]] = []

    def add(self, name, num_warps, num_ctas, shared, ptx, ttir, capability):
        kernel = Kernel(self.case, capability, name, num_warps, shared, tensor_cores="mma" in ptx)
        kernel.float8 = bool(re.search(r"mma\S*\.e4m3\.e4m3", ptx))
        self.kernels.append((kernel, ptx))

    def install(self) -> None:
        class Call:
            def __init__(self, *args):
                pass

            def to_proto(self, name, metadata):
                return b""

        gpu_triton.TritonKernel, gpu_triton.TritonKernelCall = self.add, Call
        gpu_triton.create_array_parameter = gpu_triton.create_scalar_parameter = lambda *args: None
        gpu_triton.get_compute_capability = gpu_triton.get_serialized_metadata = None  # must be there


def shapes(rows, columns, dtype, gated, experts=8, k=256):
    w = (experts, 2, columns // 2, k) if gated else (experts, columns, k)
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((rows, k), w, w[:-1])]
    return *arrays, jax.ShapeDtypeStruct((experts,), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)


def float8(x, w, x_scale, w_scale, sizes, index):
    """All that there is; its output goes on to the second product."""
    options = {"row_index": index, "activation": "silu", "quantize_out": "group", "backend": "triton"}
    return grouped_gemm(x, w, sizes, x_scale=x_scale, w_scale=w_scale, **options).values


def float8_shapes(rows, columns, weights, activations):
    x, w, _, sizes, index = shapes(rows, columns, FP8, gated=True, k=400)
    scales = (scale_shape(array.shape, kind) for array, kind in ((x, activations), (w, weights)))
    return x, w, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in scales), sizes, index


def gated_loss(x, w, bias, sizes, index):
    return jnp.sum(
        grouped_gemm(x, w, sizes, row_index=index, bias=bias, activation="gelu_pytorch_tanh", backend="triton")
    )


def plain(x, w, bias, sizes, index):
    return grouped_gemm(x, w, sizes, backend="triton")


def lower_all(recorder: Recorder) -> None:
    def lower_as(case, capability, function, *arrays):
        recorder.case, triton.compute_capability = case, lambda: capability
        jax.jit(lambda *args: function(*args)).trace(*arrays).lower(lowering_platforms=("cuda",))

    both = jax.grad(gated_loss, (0, 1))  # with all that there is, again without the gate, and two products backward
    for rows, columns in SIZES:
        for capability in CAPABILITIES:
            lower_as(f"{rows} rows", capability, both, *shapes(rows, columns, "bfloat16", gated=True))
    for rows, columns in SIZES:
        for capability in CAPABILITIES[1:]:
            for name in ("fp8-block", "fp8-channel", "fp8-tensor"):
                format = FORMATS[name]
                arrays = float8_shapes(rows, columns, format.weights, format.activations)
                lower_as(f"{rows} rows, {name}", capability, float8, *arrays)
    for rows in (64, 4096):
        lower_as(f"{rows} rows, float32", 89, both, *shapes(rows, 256, "float32", gated=True))
    lower_as("odd sizes", 89, plain, *shapes(29, 7, "float16", gated=False, experts=3, k=13))
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (P(), P("expert"), P("expert"), P("expert"), P())
    sharded = jax.shard_map(plain, mesh=mesh, in_specs=specs, out_specs=P("expert"), check_vma=False)
    lower_as("sharded", 89, sharded, *shapes(4096, 256, "float16", gated=False))
    for capability in (100, 120):
        lower_as("newer", capability, both, *shapes(4096, 256, "bfloat16", gated=True))
        lower_as("newer, fp8", capability, float8, *float8_shapes(4096, 256, "block", "group"))


def assemble(ptxas: str, kernel: Kernel, ptx: str) -> Kernel:
    target = re.search(r"\.target (\w+)", ptx)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    kernel.registers, kernel.spilled = (
        int(re.search(pattern, said)[1]) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")
    )
    return kernel


def main() -> None:
    recorder = Recorder()
    recorder.install()
    lower_all(recorder)
    from triton import knobs

    # Triton has another ptxas for what is newer.
    ours = [pair for pair in recorder.kernels if pair[0].capability in CAPABILITIES]
    with ThreadPoolExecutor(2) as pool:
        for kernel in pool.map(lambda pair: assemble(knobs.nvidia.ptxas.path, *pair), ours):
            print(json.dumps(asdict(kernel)))


if __name__ == "__main__":
    main()
