"""The MoE layer as torch's users have it, for one rank; only the process of `bench.peers` runs this.

All of them are given the routing (expert ids and weights) and do the rest: the order of rows, both products, the sum.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from bench.layer_tables import SGLANG, TORCH_LAYER, VLLM
from bench.roofline import failure
from bench.torch_timing import torch_times


class Rank(NamedTuple):
    """One rank's tensors: `x [T, H]`, `ids [T, k]` int32, `weights [T, k]` float32; one of the copies of the experts' weights,
    `w_gate_up [E of the rank, 2 * I, H]` and `w_down [E of the rank, H, I]`."""

    x: Any
    ids: Any
    weights: Any
    w_gate_up: Any
    w_down: Any
    first_expert: int
    all_experts: int

    @property
    def experts(self) -> int:
        return len(self.w_down)


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
    device: str = "cuda",
) -> dict[str, Any]:
    """Checks and times each peer; `copies` of the weights are used in turn."""
    import torch

    torch.manual_seed(0)
    chosen = torch.tensor(ids, dtype=torch.int32, device=device)

    def normal(*shape: int, scale: float = 1.0) -> Any:
        return torch.randn(shape, device=device, dtype=torch.bfloat16).mul_(scale)

    x, weights = normal(len(ids), hidden), torch.rand(chosen.shape, device=device)
    ranks = [
        Rank(
            x,
            chosen,
            weights,
            normal(experts, 2 * inner, hidden, scale=hidden**-0.5),
            normal(experts, hidden, inner, scale=inner**-0.5),
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
    the peer's advantage. What lies between the products is compiled."""
    import torch

    local = rank.ids - rank.first_expert
    rows = int(((local >= 0) & (local < rank.experts)).sum())
    top_k, inner = rank.ids.shape[1], rank.w_down.shape[2]
    numbers = torch.arange(rank.ids.numel(), device=rank.x.device)
    experts = torch.arange(rank.experts, device=rank.x.device, dtype=torch.int32)

    def layer() -> Any:
        local = rank.ids - rank.first_expert
        is_local = (local >= 0) & (local < rank.experts)
        key, order = torch.sort(torch.where(is_local, local, rank.experts).flatten(), stable=True)
        ends = torch.searchsorted(key, experts, right=True).int()
        row_of_pair = torch.empty_like(order)
        row_of_pair[order] = numbers
        gathered = rank.x.index_select(0, order[:rows] // top_k)
        gate_up = torch._grouped_mm(gathered, rank.w_gate_up.mT, offs=ends)
        y = torch._grouped_mm(_activate(gate_up, inner), rank.w_down.mT, offs=ends)
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


@_compiled
def _activate(gate_up: Any, inner: int) -> Any:
    import torch

    return torch.nn.functional.silu(gate_up[:, :inner].float()).mul(gate_up[:, inner:]).to(gate_up.dtype)


@_compiled
def _combine(y: Any, rows: Any, weights: Any) -> Any:
    return (y[rows].float() * weights[:, :, None]).sum(dim=1).to(y.dtype)


def _vllm_layer(rank: Rank) -> Callable[[], Any]:
    import torch

    fused_experts = importlib.import_module("vllm.model_executor.layers.fused_moe").fused_experts
    place = torch.full((rank.all_experts,), -1, dtype=torch.int32, device=rank.x.device)
    place[rank.first_expert : rank.first_expert + rank.experts] = torch.arange(rank.experts, dtype=torch.int32)
    partly = {"global_num_experts": rank.all_experts, "expert_map": place} if rank.experts < rank.all_experts else {}
    return lambda: fused_experts(rank.x, rank.w_gate_up, rank.w_down, rank.weights, rank.ids, inplace=False, **partly)


def _sglang_layer(rank: Rank) -> Callable[[], Any]:
    module = importlib.import_module("sglang.srt.layers.moe.fused_moe_triton.fused_moe")
    if rank.experts < rank.all_experts:
        raise NotImplementedError("skipped: measured where the rank has a part of every expert")
    return lambda: module.fused_experts_impl(rank.x, rank.w_gate_up, rank.w_down, rank.weights, rank.ids, inplace=False)


MAKERS: dict[str, Callable[[Rank], Callable[[], Any]]] = {
    TORCH_LAYER: _grouped_mm_layer,
    VLLM: _vllm_layer,
    SGLANG: _sglang_layer,
}


def _error(out: Any, rank: Rank, count: int = 8) -> float:
    """Of a few tokens against float32, by norms; NaN if there is one anywhere in the output."""
    import torch

    if bool(torch.isnan(out).any()):
        return float("nan")
    local = (rank.ids - rank.first_expert).long()
    is_local = (local >= 0) & (local < rank.experts)
    own = torch.nonzero(is_local.any(dim=1))[:, 0]
    difference = reference = 0.0
    for token in own[torch.linspace(0, len(own) - 1, count).long().to(own.device)].tolist():
        expected = torch.zeros(out.shape[1], device=out.device)
        for choice in torch.nonzero(is_local[token])[:, 0].tolist():
            expert = int(local[token, choice])
            gate, up = (rank.w_gate_up[expert].float() @ rank.x[token].float()).chunk(2)
            hidden = torch.nn.functional.silu(gate) * up
            expected += rank.weights[token, choice] * (rank.w_down[expert].float() @ hidden)
        difference += float((out[token].float() - expected).square().sum())
        reference += float(expected.square().sum())
    return (difference / reference) ** 0.5
