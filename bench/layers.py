"""One rank's MoE layer at the sizes of real models: which part is a rank's, what is asked of it, what that must cost.

Nothing here runs on a device. Letters: `T` tokens, `k` experts a token, `E` experts, `H` hidden, `I` intermediate.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bench import roofline
from jax_epmoe.config import MoEConfig
from jax_epmoe.moe.experts import default_chunk_rows
from jax_epmoe.quant import BLOCK
from jax_epmoe.tune import MODELS as SIZES

RANKS = 8
# As each model's config.json has it.
_ROUTING: dict[str, dict[str, Any]] = {
    "deepseek-coder-v2": {
        "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0, "shared_intermediate_size": 2 * 1536,
    },
    "deepseek-v3": {
        "scoring": "sigmoid", "correction_bias": True, "norm_topk_prob": True, "n_group": 8, "topk_group": 4,
        "group_score": "top2_sum", "routed_scaling_factor": 2.5, "shared_intermediate_size": 2048,
    },
    "qwen3-30b-a3b": {"norm_topk_prob": True},
    "olmoe-1b-7b": {},
    "mixtral-8x7b": {"norm_topk_prob": True},
}  # fmt: skip
MODELS = {name: dataclasses.replace(SIZES[name], **routing) for name, routing in _ROUTING.items()}
TOKENS = (8192, 32768, 64, 256)
LOADS = ("balanced", "zipf", "worst")
# A dynamic scale a tensor is over all of a layer's rows, which samples of them are not checked against.
QUANTIZATIONS = ("fp8-block", "fp8-channel", "fp8-tensor-static")
_ELEMENT = 2  # bytes, bfloat16


class Layout(NamedTuple):
    """How a layer lies on `ep_size * slices` GPUs: experts dealt over `ep_size`, each cut into `slices`."""

    name: str
    ep_size: int
    slices: int


EP, TP, WHOLE = LAYOUTS = (Layout("EP8", RANKS, 1), Layout("TP8", 1, RANKS), Layout("EP1", 1, 1))


def layouts(model: str, quantize: str | None = None) -> tuple[Layout, ...]:
    """Those to measure: a rank of eight either way, and the whole layer of a model that one GPU holds.

    None that `EPMoE` refuses: ranks that would share blocks of an expert's weights.
    """
    found = (EP, TP) if model.startswith("deepseek") else (EP, TP, WHOLE)
    if quantize != "fp8-block":
        return found
    return tuple(x for x in found if x.slices == 1 or MODELS[model].intermediate_size % (x.slices * BLOCK) == 0)


@dataclass(frozen=True)
class Case:
    """One rank's layer for a number of tokens; `quantize`: the format of its experts, one of `QUANTIZATIONS`, or None."""

    model: str
    layout: Layout
    tokens: int
    quantize: str | None = None

    @property
    def name(self) -> str:
        return f"{self.model} {self.layout.name} {self.tokens}"

    @property
    def config(self) -> MoEConfig:
        return MODELS[self.model]

    @property
    def experts(self) -> int:
        """Of the rank."""
        return self.config.num_experts // self.layout.ep_size

    @property
    def inner(self) -> int:
        """What the rank has of an expert's intermediate dimension."""
        return self.config.intermediate_size // self.layout.slices

    @property
    def shared_inner(self) -> int:
        """What the rank has of the shared experts' intermediate dimension, which all ranks split."""
        return self.config.shared_intermediate_size // (self.layout.ep_size * self.layout.slices)

    @property
    def weight_bytes(self) -> int:
        up, down = (self.inner, self.config.hidden_size), (self.config.hidden_size, self.inner)
        matrices = (roofline.operand_bytes(*shape, self.quantize, weights=True) for shape in (up, up, down))
        return self.experts * sum(matrices)

    @property
    def expected_rows(self) -> int:
        """As `EPMoE` expects."""
        return -(-self.tokens * self.config.top_k // self.layout.ep_size)

    @property
    def chunk_rows(self) -> int:
        """`EPMoE`'s default."""
        config = self.config
        return default_chunk_rows(self.tokens * config.top_k, config.hidden_size, self.inner, _ELEMENT)

    def group_sizes(self, ids: np.ndarray, rank: int) -> np.ndarray:
        """`[E of the rank]`: the rows of each, for `ids [T, k]`; ranks are numbered along the experts."""
        counts = np.bincount(ids.ravel(), minlength=self.config.num_experts)
        return counts[rank * self.experts : (rank + 1) * self.experts]

    def floor_us(self, ids: np.ndarray, rank: int, dense_tflops: float, copy_gbs: float) -> float:
        """What a rank's rows must take: both products, and combine, which reads their rows and writes `[T, H]` once.

        A product takes the larger of its operations at the dense rate and, at the copy rate, its bytes: tokens that have
        rows, weights of experts that have rows, and the rows that it writes. Shared experts are not counted,
        nor is it counted that tokens are quantised.
        """
        hidden = self.config.hidden_size
        sizes = self.group_sizes(ids, rank)
        tokens = np.nonzero(ids // self.experts == rank)[0].astype(np.int32)
        up = roofline.product_work(
            sizes, hidden, 2 * self.inner, gated=True, index=tokens, quantize=self.quantize, quantize_out=True
        )
        down = roofline.product_work(sizes, self.inner, hidden, quantize=self.quantize)
        combine = roofline.Work(0, _ELEMENT * hidden * (len(tokens) + self.tokens))
        return sum(work.floor_us(dense_tflops, copy_gbs) for work in (up, down, combine))

    def busiest_rank(self, ids: np.ndarray) -> int:
        """The expert-parallel rank with the highest floor, at an H100's rates: all others wait for it."""
        dense_tflops = 1590 if self.quantize else 800
        floors = [self.floor_us(ids, rank, dense_tflops, 2940) for rank in range(self.layout.ep_size)]
        return int(np.argmax(floors))


def logits(config: MoEConfig, tokens: int, load: str) -> np.ndarray:
    """`[T, E]` float32 router logits that give a load, the same every time.

    "balanced": every expert gets as many rows, give or take one. "zipf": the r-th most popular expert is drawn with
    probability proportional to 1 / r, without repetition; which are popular is random. "worst": all that a
    token can choose on the first of 8 ranks, it does.
    """
    rng = np.random.default_rng((tokens, config.num_experts, LOADS.index(load)))
    if load == "zipf":
        popularity = -np.log(1 + rng.permutation(config.num_experts))
        # The k largest of log p + Gumbel noise are such draws. Halved, so that a sigmoid keeps them apart.
        return ((popularity + rng.gumbel(size=(tokens, config.num_experts))) / 2).astype(np.float32)
    local = config.num_experts // RANKS
    if load == "balanced":
        ids = _spread(rng, config, tokens)
    else:
        here = min(config.top_k, local)
        own, others = _deal(rng, local, here), _deal(rng, config.num_experts - local, config.top_k - here)
        ids = np.stack([np.concatenate([next(own), next(others) + local]) for _ in range(tokens)])
    values = rng.normal(0, 0.3, (tokens, config.num_experts))
    np.put_along_axis(values, ids, rng.uniform(4, 6, ids.shape), axis=1)
    return values.astype(np.float32)


def _spread(rng: np.random.Generator, config: MoEConfig, tokens: int) -> np.ndarray:
    """`[T, k]` ids, evenly over all experts, each token's in as many groups as it may choose from."""
    size = config.num_experts // config.n_group
    groups = _deal(rng, config.n_group, config.topk_group)
    experts = [_deal(rng, size, config.top_k // config.topk_group) for _ in range(config.n_group)]
    return np.stack([np.concatenate([next(experts[g]) + g * size for g in next(groups)]) for _ in range(tokens)])


def _deal(rng: np.random.Generator, count: int, at_a_time: int) -> Iterator[np.ndarray]:
    """Endless hands of `at_a_time` different numbers below `count`, in a random order in which all come equally often."""
    while True:
        order = rng.permutation(count)
        for hand in range(count // math.gcd(count, at_a_time)):
            yield order[(hand * at_a_time + np.arange(at_a_time)) % count]
