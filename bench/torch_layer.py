"""The MoE layer as torch's users have it, for one rank; only the process of `bench.peers` runs this.

All of them are given the routing (expert ids and weights) and do the rest: the order of rows, both products, the sum.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from bench.layer_tables import SGLANG, TORCH_LAYER, VLLM
from bench.roofline import failure
from bench.torch_products import Quantized, quantize
from bench.torch_timing import torch_times


class Rank(NamedTuple):
    """One rank's tensors: `x [T, H]`, `ids [T, k]` int32, `weights [T, k]` float32; one of the copies of the experts' weights,
    `w_gate_up [E of the rank, 2 * I, H]` and `w_down [E of the rank, H, I]`, tensors or `Quantized` with a scale a row."""

    x: Any
    ids: Any
    weights: Any
    w_gate_up: Any
    w_down: Any
    first_expert: int
    all_experts: int

    @property
    def experts(self) -> int:
        return len(self.w_down.values if self.quantized else self.w_down)

    @property
    def quantized(self) -> bool:
        return isinstance(self.w_down, Quantized)


def layer_case(
    hidden: int,
    inner: int,
    experts: int,
    all_experts: int,
    first_expert: int,
    ids: list[list[int]],
    copies: int,
    iterations: int,
    peers: list[str],
    quantized: bool = False,
    device: str = "cuda",
) -> dict[str, Any]:
    """Checks and times each peer; `copies` of the weights are used in turn. `quantized`: float8 weights, with a scale a row."""
    import torch

    torch.manual_seed(0)
    chosen = torch.tensor(ids, dtype=torch.int32, device=device)

    def normal(*shape: int, scale: float = 1.0) -> Any:
        return torch.randn(shape, device=device, dtype=torch.bfloat16).mul_(scale)

    def matrices(*shape: int) -> Any:
        w = normal(*shape, scale=shape[-1] ** -0.5)
        return quantize(w, 1, None) if quantized else w

    x, weights = normal(len(ids), hidden), torch.rand(chosen.shape, device=device)
    ranks = [
        Rank(
            x,
            chosen,
            weights,
            matrices(experts, 2 * inner, hidden),
            matrices(experts, hidden, inner),
            first_expert,
            all_experts,
        )
        for _ in range(copies)
    ]
    results: dict[str, Any] = {}
    for name in peers:
        try:
            calls = [MAKERS[name](rank) for rank in ranks]
            error = _error(calls[0](), ranks[0])
            results[name] = {**torch_times(calls, -(-iterations // copies) * copies), "error": error}
        except Exception as problem:
            results[name] = failure(problem)
            torch.cuda.synchronize()  # raises, and so ends the process, if the device is lost
    return results


def _grouped_mm_layer(rank: Rank) -> Callable[[], Any]:
    """`torch._grouped_mm` over gathered rows, and a gather back to the tokens; how many rows there are is known beforehand, to
    the peer's advantage. What lies between the products is compiled. Quantised: `torch._scaled_grouped_mm`, with sums in float32
    as ours; tokens are quantised before they are gathered."""
    import torch

    local = rank.ids - rank.first_expert
    rows = int(((local >= 0) & (local < rank.experts)).sum())
    top_k = rank.ids.shape[1]
    numbers = torch.arange(rank.ids.numel(), device=rank.x.device)
    experts = torch.arange(rank.experts, device=rank.x.device, dtype=torch.int32)

    def layer() -> Any:
        local = rank.ids - rank.first_expert
        is_local = (local >= 0) & (local < rank.experts)
        key, order = torch.sort(torch.where(is_local, local, rank.experts).flatten(), stable=True)
        ends = torch.searchsorted(key, experts, right=True).int()
        row_of_pair = torch.empty_like(order)
        row_of_pair[order] = numbers
        source = order[:rows] // top_k
        if rank.quantized:
            values, scales = _quantize_rows(rank.x)
            gathered = (
                values.view(torch.uint8).index_select(0, source).view(values.dtype),
                scales.index_select(0, source),
            )
            gate_up = _scaled_grouped_mm(*gathered, rank.w_gate_up, ends)
            y = _scaled_grouped_mm(*_activate_and_quantize(gate_up), rank.w_down, ends)
        else:
            gate_up = torch._grouped_mm(rank.x.index_select(0, source), rank.w_gate_up.mT, offs=ends)
            y = torch._grouped_mm(_activate(gate_up), rank.w_down.mT, offs=ends)
        return _combine(y, row_of_pair.view(rank.ids.shape).clamp(max=rows - 1), rank.weights * is_local)

    return layer


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function by `torch.compile`, for all shapes; as it is where that does not work."""
    state: dict[str, Any] = {}

    def call(*args: Any) -> Any:
        if not state:
            import torch

            try:
                compiled = torch.compile(function, dynamic=True)
                compiled(*args)
                state["function"] = compiled
            except Exception:
                state["function"] = function
        return state["function"](*args)

    return call


def _scaled_grouped_mm(x: Any, scales: Any, w: Quantized, ends: Any) -> Any:
    import torch

    options = {"offs": ends, "out_dtype": torch.bfloat16, "use_fast_accum": False}
    return torch._scaled_grouped_mm(x, w.values.mT, scales, w.scales[..., 0], **options)


def _gated(gate_up: Any) -> Any:
    import torch

    gate, up = gate_up.chunk(2, dim=1)
    return torch.nn.functional.silu(gate.float()).mul(up)


def _rounded_rows(x: Any) -> tuple[Any, Any]:
    """`x [rows, k]` in float8, and the scales `[rows]`."""
    rounded = quantize(x, 1, None)
    return rounded.values, rounded.scales[:, 0]


@_compiled
def _activate(gate_up: Any) -> Any:
    return _gated(gate_up).to(gate_up.dtype)


@_compiled
def _activate_and_quantize(gate_up: Any) -> tuple[Any, Any]:
    return _rounded_rows(_gated(gate_up))


@_compiled
def _quantize_rows(x: Any) -> tuple[Any, Any]:
    return _rounded_rows(x)


@_compiled
def _combine(y: Any, rows: Any, weights: Any) -> Any:
    return (y[rows].float() * weights[:, :, None]).sum(dim=1).to(y.dtype)


def _vllm_layer(rank: Rank) -> Callable[[], Any]:
    import torch

    _refuse_quantized(rank)
    fused_experts = importlib.import_module("vllm.model_executor.layers.fused_moe").fused_experts
    place = torch.full((rank.all_experts,), -1, dtype=torch.int32, device=rank.x.device)
    place[rank.first_expert : rank.first_expert + rank.experts] = torch.arange(rank.experts, dtype=torch.int32)
    partly = {"global_num_experts": rank.all_experts, "expert_map": place} if rank.experts < rank.all_experts else {}
    return lambda: fused_experts(rank.x, rank.w_gate_up, rank.w_down, rank.weights, rank.ids, inplace=False, **partly)


def _sglang_layer(rank: Rank) -> Callable[[], Any]:
    _refuse_quantized(rank)
    module = importlib.import_module("sglang.srt.layers.moe.fused_moe_triton.fused_moe")
    if rank.experts < rank.all_experts:
        raise NotImplementedError("skipped: measured where the rank has a part of every expert")
    return lambda: module.fused_experts_impl(rank.x, rank.w_gate_up, rank.w_down, rank.weights, rank.ids, inplace=False)


def _refuse_quantized(rank: Rank) -> None:
    if rank.quantized:
        raise NotImplementedError("skipped: measured in bfloat16 only")


MAKERS: dict[str, Callable[[Rank], Callable[[], Any]]] = {
    TORCH_LAYER: _grouped_mm_layer,
    VLLM: _vllm_layer,
    SGLANG: _sglang_layer,
}


def _error(out: Any, rank: Rank, count: int = 8) -> float:
    """Of a few tokens against float32, by norms; NaN if there is one anywhere in the output.

    A quantised layer against one that rounds what goes into the products as it does.
    """
    import torch

    def rounded(x: Any) -> Any:
        return quantize(x, 1, None)[torch.zeros(1, dtype=torch.int64, device=x.device)] if rank.quantized else x.float()

    if bool(torch.isnan(out).any()):
        return float("nan")
    local = (rank.ids - rank.first_expert).long()
    is_local = (local >= 0) & (local < rank.experts)
    own = torch.nonzero(is_local.any(dim=1))[:, 0]
    difference = reference = 0.0
    for token in own[torch.linspace(0, len(own) - 1, count).long().to(own.device)].tolist():
        x, expected = rounded(rank.x[token][None]), torch.zeros(out.shape[1], device=out.device)
        for choice in torch.nonzero(is_local[token])[:, 0].tolist():
            expert = int(local[token, choice])
            gate_up = x @ rank.w_gate_up[expert].float().T
            hidden = rounded(_gated(gate_up.to(rank.x.dtype))) if rank.quantized else _gated(gate_up)
            expected += rank.weights[token, choice] * (hidden @ rank.w_down[expert].float().T)[0]
        difference += float((out[token].float() - expected).square().sum())
        reference += float(expected.square().sum())
    return (difference / reference) ** 0.5
