"""How long a JAX function takes on the GPU, and the two rates that a floor is made of."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from bench.roofline import failure
from jax_epmoe.quant import FP8
from jax_epmoe.tune import Rotation, normal


def times(compiled: Callable[..., Any], arguments: Sequence[tuple[jax.Array, ...]], iterations: int) -> dict[str, Any]:
    """Microseconds a call: all kernels, the longest kernel, and on the stream."""
    stream = stream_us(Rotation(compiled, arguments), iterations)
    result: dict[str, Any] = {"device_us": stream["stream_us"], "main_us": None, **stream, "method": "stream"}
    try:
        result.update(_kernel_us(compiled, arguments, iterations))
    except Exception as error:  # another profiler is attached, or not every call launched the same kernels
        tqdm.write(f"  no kernel times: {failure(error)['failed']}")
    return result


def stream_us(call: Callable[[], Any], iterations: int) -> dict[str, float]:
    """Microseconds of calls back to back. Where `dispatch_us` comes near `stream_us`, it is the host that the calls wait for."""
    runs = []
    jax.block_until_ready(call())
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(iterations):
            out = call()
        dispatched = time.perf_counter()
        jax.block_until_ready(out)
        runs.append((time.perf_counter() - start, dispatched - start))
    stream, dispatch = (1e6 * value / iterations for value in min(runs))
    return {"stream_us": stream, "dispatch_us": dispatch}


def _kernel_us(
    compiled: Callable[..., Any], arguments: Sequence[tuple[jax.Array, ...]], iterations: int
) -> dict[str, Any]:
    from jax.experimental.mosaic.gpu import profiler

    _, runs = profiler.measure(Rotation(compiled, arguments), aggregate=False, iterations=iterations)()
    if not runs:
        raise RuntimeError("CUPTI saw no kernel")
    totals = [1e3 * sum(ms for _, ms in run) for run in runs]
    each = [1e3 * statistics.median(kernel) for kernel in zip(*([ms for _, ms in run] for run in runs), strict=True)]
    names = [name for name, _ in runs[0]]
    return {
        "device_us": statistics.median(totals),
        "device_us_min": min(totals),
        "device_us_max": max(totals),
        "main_us": max(each),
        "kernels": [{"name": name[:60], "us": us} for name, us in zip(names, each, strict=True)][:20],
        "method": "kernel times",
    }


def ceilings(torch: dict[str, Any], *, quantized: bool = False) -> dict[str, Any]:
    """The dense rate (TFLOP/s; of float8 operands if `quantized`, or else of bfloat16) and the copy rate (GB/s, read and
    written): the better of JAX's and torch's, whose process's answer is `torch`, `{"failed": why}` if there is none."""
    a, b = (normal(i, (8192, 8192)).astype(FP8 if quantized else jnp.bfloat16) for i in range(2))
    big = normal(2, (2**29,))
    product = jax.jit(
        lambda a, b: jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)
    )
    dense = times(product.lower(a, b).compile(), [(a, b)], 21)["device_us"]
    copy = times(jax.jit(jnp.negative).lower(big).compile(), [(big,)], 11)["device_us"]
    seen = {"jax": {"dense_tflops": 2 * 8192**3 / dense * 1e-6, "copy_gbs": 2 * big.nbytes / copy * 1e-3}}
    if "failed" not in torch:
        seen["torch"] = torch
    return {key: max(each[key] for each in seen.values()) for key in ("dense_tflops", "copy_gbs")} | {"seen": seen}
