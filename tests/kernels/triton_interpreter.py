"""A stand-in for jax-triton on the CPU: kernels run in Triton's interpreter, on NumPy arrays.

An environment variable chooses the interpreter for the whole process, and Triton reads it when it is imported.
"""

import os
import threading
import types
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import ml_dtypes
import numpy as np

_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Pointer:
    """What the interpreter asks of a tensor."""

    array: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def data_ptr(self) -> int:
        return self.array.ctypes.data


def triton_call(
    *arrays: jax.Array, kernel: Any, out_shape: jax.ShapeDtypeStruct, grid: tuple[int, ...], **options: Any
):
    """As `jax_triton.triton_call`; what the kernel does not write is NaN."""
    return jax.pure_callback(partial(_interpret, kernel, out_shape, grid, options), out_shape, *arrays)


def _interpret(kernel, out_shape, grid, options, *arrays):
    out = np.full(out_shape.shape, np.nan, out_shape.dtype)
    with _one_at_a_time:
        kernel[grid](*[Pointer(np.ascontiguousarray(array)) for array in (*arrays, out)], **options)
    return out


def make_module() -> types.ModuleType:
    """`jax_triton`, for `sys.modules`."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (_to_float32(operand.data, operand.dtype) for operand in (a, b))
        return interpreter.TensorHandle(a @ b + d.data, d.dtype.scalar)

    def cast(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return interpreter.TensorHandle(source.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)
        return cast_as_before(self, source, target)

    def patch_tensor(tensor, scope):
        patch_tensor_as_before(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    # It would ask for torch's tensors, multiply bfloat16's bits as integers, cut bits off rather than round to it, and loop up to
    # an array of one element, which NumPy takes for an integer no more.
    interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
    interpreter.GridExecutor._restore_args_dev = lambda self, *args: None
    interpreter.InterpreterBuilder.create_dot = create_dot
    cast_as_before, interpreter.InterpreterBuilder.cast_impl = interpreter.InterpreterBuilder.cast_impl, cast
    patch_tensor_as_before = interpreter._patch_lang_tensor
    interpreter._patch_lang_tensor = patch_tensor
    module = types.ModuleType("jax_triton")
    module.triton_call = triton_call
    return module


def _to_float32(data: np.ndarray, dtype: Any) -> np.ndarray:
    stored_as_integers = {"bf16": ml_dtypes.bfloat16, "fp8e4nv": ml_dtypes.float8_e4m3fn}
    return data.view(stored_as_integers.get(dtype.scalar.name, data.dtype)).astype(np.float32)
