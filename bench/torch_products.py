"""Grouped products as torch's users have them, bfloat16 and float8; only the process of `bench.peers` runs this."""

import importlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from bench import roofline
from bench.roofline import DEEPGEMM, SCALED, SCALED_DENSE, SCALED_FAST, TORCH, failure
from bench.torch_timing import graph_us, torch_times

_BLOCK = 128


def ceilings(quantized: bool) -> dict[str, float]:
    """The dense rate (TFLOP/s), of float8 if `quantized` and else of bfloat16, and the copy rate (GB/s, read and written)."""
    import torch

    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = partial(torch.mm, a, b)
    if quantized:
        product = _scaled_dense(quantize(a, None, None), quantize(b, None, None))
    source = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    product_us = statistics.median(graph_us([product], 10))
    copy_us = statistics.median(graph_us([lambda: target.copy_(source)], 10))
    return {"dense_tflops": 2 * 8192**3 / product_us * 1e-6, "copy_gbs": 2 * source.nbytes / copy_us * 1e-3}


def products_case(
    sizes: list[list[int]],
    k: int,
    n: int,
    iterations: int,
    peers: list[str],
    quantized: bool = False,
    device: str = "cuda",
) -> dict[str, Any]:
    """Checks and times each peer on one case; `sizes` are those of consecutive runs. DeepGEMM's operands are float8 if `quantized`."""
    import torch

    torch.manual_seed(0)
    w = torch.randn(len(sizes[0]), n, k, device=device, dtype=torch.bfloat16).mul_(k**-0.5)
    xs = [torch.randn(sum(each), k, device=device, dtype=torch.bfloat16) for each in sizes]
    results: dict[str, Any] = {}
    for name in peers:
        try:
            prepared = (FLOAT8_MAKERS if quantized else MAKERS)[name](xs, w, sizes)
            results[name] = {
                **torch_times(prepared.calls, iterations),
                "error": _error(prepared),
                "config": prepared.config,
            }
        except Exception as problem:
            results[name] = failure(problem)
            torch.cuda.synchronize()  # raises, and so ends the process, if the device is lost
    return results


class Prepared(NamedTuple):
    """What to time, in turn; the first call's output with the rows as they were given; and what that is the product of.

    `x[rows]` are rows and `w[e]` is the matrix of an expert, floats of any kind; `sizes` are the rows of each.
    """

    calls: Sequence[Callable[[], Any]]
    read: Callable[[], Any]
    x: Any
    w: Any
    sizes: list[int]
    config: str = ""


def _grouped_mm(xs: list[Any], w: Any, sizes: list[list[int]]) -> Prepared:
    """Offsets are made beforehand: to the peer's advantage."""
    import torch

    calls = [partial(torch._grouped_mm, x, w.mT, offs=_ends(x, each)) for x, each in zip(xs, sizes, strict=True)]
    return Prepared(calls, calls[0], xs[0], w, sizes[0])


def _ends(x: Any, sizes: list[int]) -> Any:
    import torch

    return torch.tensor(np.cumsum(sizes), device=x.device, dtype=torch.int32)


def _deep_gemm(xs: list[Any], w: Any, sizes: list[list[int]]) -> Prepared:
    deep_gemm = importlib.import_module("deep_gemm")

    def multiply(x: Any, out: Any, layout: Any) -> Callable[[], Any]:
        return partial(deep_gemm.m_grouped_bf16_gemm_nt_contiguous, x, w, out, layout)

    return _contiguous(deep_gemm, multiply, xs, w, sizes)


def _contiguous(
    deep_gemm: Any, multiply: Callable[..., Any], xs: list[Any], w: Any, sizes: list[list[int]]
) -> Prepared:
    """DeepGEMM's contiguous layout: each group padded to a multiple of 128 rows beforehand, to the peer's advantage.

    `multiply(x, out, layout)` is the call for padded rows, bfloat16.
    """
    alignment = getattr(deep_gemm, "get_mk_alignment_for_contiguous_layout", lambda: 128)()
    calls, places, outs = [], [], []
    for x, each in zip(xs, sizes, strict=True):
        x_padded, layout, place = _padded(x, np.array(each), alignment)
        outs.append(x.new_full((len(x_padded), w.shape[1]), float("nan")))
        calls.append(multiply(x_padded, outs[-1], layout))
        places.append(place)

    def read() -> Any:
        calls[0]()
        return outs[0][places[0]]

    return Prepared(calls, read, xs[0], w, sizes[0], f"rows padded to {len(outs[0])}")


def _padded(x: Any, sizes: np.ndarray, alignment: int) -> tuple[Any, Any, Any]:
    """Rows with each group padded, which expert each padded row belongs to (-1: none), and where the rows went."""
    import torch

    spaces = -(-sizes // alignment) * alignment
    shift = np.repeat(np.cumsum(spaces) - spaces - (np.cumsum(sizes) - sizes), sizes)
    place = torch.tensor(np.arange(len(x)) + shift, device=x.device)
    expert = torch.tensor(np.repeat(np.arange(len(sizes)), sizes), device=x.device, dtype=torch.int32)
    x_padded = x.new_zeros(int(spaces.sum()), x.shape[1])
    x_padded[place] = x
    layout = torch.full((len(x_padded),), -1, device=x.device, dtype=torch.int32)
    layout[place] = expert
    return x_padded, layout, place


@dataclass(frozen=True)
class Quantized:
    """`values [..., n, k]` float8_e4m3fn, `scales [..., n / height, k / width]` float32, both quotients rounded up."""

    values: Any
    scales: Any
    height: int
    width: int

    def __getitem__(self, index: Any) -> Any:
        """In float32: of a matrix, its rows `index`; of several, the matrix `index`."""
        import torch

        values = self.values.view(torch.uint8)[index].view(self.values.dtype).float()
        rows = index
        scales = self.scales
        if self.values.ndim == 3:
            rows, scales = torch.arange(len(values), device=values.device), scales[index]
        columns = torch.arange(values.shape[-1], device=values.device)
        return values * scales[rows // self.height][:, columns // self.width]


def quantize(x: Any, height: int | None, width: int | None) -> Quantized:
    """A scale for each `height` x `width` values of the last two dimensions (None: all), the largest of which becomes 448."""
    import torch

    *lead, n, k = x.shape
    height, width = height or n, width or k
    rows, columns = -(-n // height), -(-k // width)
    padding = (0, columns * width - k, 0, rows * height - n)
    tiles = torch.nn.functional.pad(x.float(), padding).reshape(*lead, rows, height, columns, width)
    scales = tiles.abs().amax((-3, -1)).clamp(min=1e-30) / 448
    values = (tiles / scales[..., :, None, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    values = values.reshape(*lead, rows * height, columns * width)[..., :n, :k].contiguous()
    return Quantized(values, scales, height, width)


def _scaled_grouped_mm(fast: bool, xs: list[Any], w: Any, sizes: list[list[int]]) -> Prepared:
    """A scale a row of x and a row of w; quantised beforehand, as ours."""
    import torch

    quantized, weights = [quantize(x, 1, None) for x in xs], quantize(w, 1, None)
    calls = [
        partial(
            torch._scaled_grouped_mm,
            x.values,
            weights.values.mT,
            x.scales[:, 0],
            weights.scales[..., 0],
            offs=_ends(x.values, each),
            out_dtype=torch.bfloat16,
            use_fast_accum=fast,
        )
        for x, each in zip(quantized, sizes, strict=True)
    ]
    return Prepared(calls, calls[0], quantized[0], weights, sizes[0])


def _deep_gemm_float8(xs: list[Any], w: Any, sizes: list[list[int]]) -> Prepared:
    """A scale for 128 values of x and for 128 x 128 of w; those of x in the layout that its kernel reads, made beforehand."""
    deep_gemm = importlib.import_module("deep_gemm")
    weights = quantize(w, _BLOCK, _BLOCK)
    align = getattr(deep_gemm, "get_mn_major_tma_aligned_tensor", lambda scales: scales)

    def multiply(x: Any, out: Any, layout: Any) -> Callable[[], Any]:
        rows = quantize(x, 1, _BLOCK)
        operands = (rows.values, align(rows.scales)), (weights.values, weights.scales)
        return partial(deep_gemm.m_grouped_fp8_gemm_nt_contiguous, *operands, out, layout)

    prepared = _contiguous(deep_gemm, multiply, xs, w, sizes)
    return prepared._replace(x=quantize(xs[0], 1, _BLOCK), w=weights)


def _dense(xs: list[Any], w: Any, sizes: list[list[int]]) -> Prepared:
    """All rows times one expert's weights, another's in each call; one scale a matrix."""
    rows = [quantize(x, None, None) for x in xs]
    weights = [quantize(w[i % len(w)], None, None) for i in range(len(xs))]
    calls = [_scaled_dense(*operands) for operands in zip(rows, weights, strict=True)]
    only = Quantized(weights[0].values[None], weights[0].scales[None], weights[0].height, weights[0].width)
    return Prepared(calls, calls[0], rows[0], only, [len(xs[0])])


def _scaled_dense(a: Quantized, b: Quantized) -> Callable[[], Any]:
    """`a @ b.T` by cuBLAS, to bfloat16; both with one scale."""
    import torch

    scales = {"scale_a": a.scales.reshape(()), "scale_b": b.scales.reshape(())}
    return partial(torch._scaled_mm, a.values, b.values.T, **scales, out_dtype=torch.bfloat16, use_fast_accum=True)


MAKERS: dict[str, Callable[..., Prepared]] = {TORCH: _grouped_mm, DEEPGEMM: _deep_gemm}
FLOAT8_MAKERS: dict[str, Callable[..., Prepared]] = {
    SCALED: partial(_scaled_grouped_mm, False),
    SCALED_FAST: partial(_scaled_grouped_mm, True),
    DEEPGEMM: _deep_gemm_float8,
    SCALED_DENSE: _dense,
}


def _error(prepared: Prepared) -> float:
    """Of sampled rows against float32, by norms. Memory that the output may get holds NaN before."""
    import torch

    x, w = prepared.x, prepared.w
    first = w[0]
    rows = sum(prepared.sizes)
    poison = torch.full((rows, len(first)), float("nan"), device=first.device, dtype=torch.bfloat16)
    del poison
    out = prepared.read()
    if bool(torch.isnan(out).any()):
        raise RuntimeError("there is NaN in its output")
    difference = reference = 0.0
    for expert, rows in zip(*roofline.samples(np.array(prepared.sizes)), strict=True):
        index = torch.tensor(rows, device=first.device, dtype=torch.int64)
        expected = (x[index].float() @ w[int(expert)].float().T).double()
        difference += float((out[index].double() - expected).square().sum())
        reference += float(expected.square().sum())
    return (difference / reference) ** 0.5
