"""`EPMoE`: a Mixture-of-Experts layer whose experts are dealt over a device mesh."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_epmoe.collectives import gather_tokens, sum_tokens
from jax_epmoe.config import MoEConfig, require
from jax_epmoe.kernels.device import backend_on
from jax_epmoe.mesh import DATA, EXPERT, TENSOR, axes_size
from jax_epmoe.moe.experts import default_chunk_rows, run_experts
from jax_epmoe.moe.gated_mlp import GatedMLP
from jax_epmoe.moe.plan import ROW_ALIGNMENT, make_plan
from jax_epmoe.moe.router import route
from jax_epmoe.parameters import parameter, run_on_shards
from jax_epmoe.quant import BLOCK, NOT_QUANTIZED, Quantization
from jax_epmoe.quantized_parameters import expert_weights


class Router(nnx.Module):
    """Parameters `weight [E, H]` and, where the config asks, `bias [E]` and `correction_bias [E]`; float32 when made, on every device."""

    def __init__(self, config: MoEConfig, *, mesh: Mesh, rngs: nnx.Rngs):
        shape = (config.num_experts, config.hidden_size)
        self.weight = parameter(shape, (None, None), mesh=mesh, dtype=jnp.float32, rngs=rngs)
        vector: dict[str, Any] = {"mesh": mesh, "dtype": jnp.float32, "rngs": rngs, "init": nnx.initializers.zeros}
        self.bias = parameter(shape[:1], (None,), **vector) if config.router_bias else None
        self.correction_bias = parameter(shape[:1], (None,), **vector) if config.correction_bias else None


class EPMoE(nnx.Module):
    """Routes tokens to experts that lie on different devices; works inside any Flax NNX model, under `jit` and `grad`.

    The mesh's shape alone decides: experts are dealt over `expert_axis` (expert parallelism), each expert's intermediate
    dimension is split over `tensor_axis` (tensor parallelism), and both together are the hybrid. Tokens are split over
    `data_axes` and every device of the expert and tensor axes sees all tokens of its part; the partial outputs
    are summed by one all-reduce, in x's dtype. With `split_tokens`, tokens come and go split over those axes too: one all-gather
    before, one reduce-scatter after. No token is ever dropped.

    Parameters (`E` experts, `I` intermediate, `H` hidden): `router.weight [E, H]`, `w_gate_up [E, 2, I, H]` (gate first),
    `w_down [E, H, I]`; where the config asks, `router.bias [E]`, `router.correction_bias [E]`, `gate_up_bias [E, 2, I]`, `down_bias [E, H]`,
    `shared.w_gate_up [2, Is, H]`, `shared.w_down [H, Is]`, `shared.output_gate [1, H]`. An I that the mesh does not divide is padded
    with zeros, which change neither outputs nor gradients. Quantised, each of these weights is a module with `values`, `scales` and, in
    a static format, `input_scales` (see `jax_epmoe.quant`).
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        mesh: Mesh,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        rngs: nnx.Rngs,
        data_axes: str | Sequence[str] | None = DATA,
        expert_axis: str | None = EXPERT,
        tensor_axis: str | None = TENSOR,
        backend: str | None = None,
        chunk_rows: int | None = None,
        split_tokens: bool = False,
        quantization: str | Quantization = NOT_QUANTIZED,
    ):
        """
        Args:
          config: sizes and routing.
          mesh: any mesh that has the axes named below; its axes may be Auto or Explicit, and it need not be set.
          dtype: of the experts' weights; the router's are float32, unless a checkpoint in this dtype is loaded into them.
          rngs: whose `params` stream initialises the weights.
          data_axes: over which tokens (the first dimension of x) are split, or None.
          expert_axis: over which experts are dealt, or None.
          tensor_axis: over which each expert is split, or None.
          backend: of `grouped_gemm`; None picks the fastest.
          chunk_rows: how many rows, copies of tokens in expert order, a device processes at a time: a multiple of 8, which bounds
            its activations. None: half as many again as balanced routing gives it, within 2 GiB.
          split_tokens: x and the output are split over the expert and tensor axes as well as over `data_axes`.
          quantization: of the experts' weights, a name in `jax_epmoe.quant.FORMATS`; they have no gradient then.

        Raises:
          ValueError: an axis that the mesh lacks or that is named twice, a number of experts that the mesh does not divide, or an
            I of which it would cut quantised blocks.
        """
        data = () if data_axes is None else (data_axes,) if isinstance(data_axes, str) else tuple(data_axes)
        reduced = tuple(axis for axis in (expert_axis, tensor_axis) if axis is not None)
        for axis in (*data, *reduced):
            require(axis in mesh.axis_names, "axis name", axis, f"one of the mesh's: {', '.join(mesh.axis_names)}")
            require((*data, *reduced).count(axis) == 1, "axis name", axis, "named once: each axis splits one thing")
        ep_size = axes_size(mesh, expert_axis)
        require(config.num_experts % ep_size == 0, "ep_size", ep_size, f"a divisor of the {config.num_experts} experts")
        require(
            chunk_rows is None or (chunk_rows > 0 and chunk_rows % ROW_ALIGNMENT == 0),
            "chunk_rows",
            chunk_rows,
            f"None or a positive multiple of {ROW_ALIGNMENT}",
        )
        self.config = config
        self.mesh = mesh
        self.chunk_rows = chunk_rows
        self.backend = backend_on(mesh, backend)
        self.data_axes = data
        self.expert_axis = expert_axis
        self.tensor_axis = tensor_axis
        self.reduce_axes = reduced
        self.split_tokens = split_tokens and axes_size(mesh, reduced) > 1
        experts, inner, hidden = config.num_experts, config.intermediate_size, config.hidden_size
        self.router = Router(config, mesh=mesh, rngs=rngs)
        if isinstance(quantization, str):
            quantization = Quantization(quantization)
        format = quantization.of("w_gate_up")
        require(
            format == quantization.of("w_down"),
            "quantization",
            quantization,
            "of w_gate_up and w_down both, or of neither",
        )
        formats = [quantization.of(name) for name in ("w_gate_up", "shared.w_gate_up", "shared.w_down")]
        self.tokens_share_a_scale = any(f is not None and f.activations == "tensor" and not f.static for f in formats)
        if format is not None and format.weights == "block":
            _require_whole_blocks(config, ep_size, axes_size(mesh, tensor_axis))
        new: dict[str, Any] = {"mesh": mesh, "dtype": dtype, "rngs": rngs}
        self.w_gate_up = expert_weights(
            (experts, 2, inner, hidden), (expert_axis, None, tensor_axis, None), format, shared_input=True, **new
        )
        self.w_down = expert_weights(
            (experts, hidden, inner), (expert_axis, None, tensor_axis), format, shared_input=False, **new
        )
        if config.expert_bias:
            zeros = nnx.initializers.zeros
            self.gate_up_bias = parameter((experts, 2, inner), (expert_axis, None, tensor_axis), init=zeros, **new)
            self.down_bias = parameter((experts, hidden), (expert_axis, None), init=zeros, **new)
        shared_size = config.shared_intermediate_size
        self.shared = (
            GatedMLP(
                hidden,
                shared_size,
                activation=config.activation,
                axes=reduced,
                output_gate=config.shared_expert_gate,
                quantization=quantization.inside("shared"),
                backend=backend,
                **new,
            )
            if shared_size
            else None
        )

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """`[..., H]` -> `[..., H]`, in x's dtype. Call it under `jit`: without, JAX compiles one operation at a time.

        Args:
          x: tokens; its first dimension divides by the devices that it is split over (a single token `[H]` needs just one).
          mask: `[...]` bool: tokens that are False (padding) take no routed experts.

        Raises:
          ValueError: shapes that do not fit.
        """
        return self.with_load(x, mask)[0]

    def with_load(self, x: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """The layer's output, and how many rows each expert got: `[E]` int32."""
        hidden = self.config.hidden_size
        require(x.ndim >= 1 and x.shape[-1] == hidden, "x.shape", x.shape, f"[..., {hidden}]")
        if mask is None:
            mask = jnp.ones(x.shape[:-1], bool)
        require(mask.shape == x.shape[:-1], "mask.shape", mask.shape, f"{x.shape[:-1]}, as x's")
        if x.ndim == 1:
            y, load = self.with_load(x[None], mask[None])
            return y[0], load
        dp_size = axes_size(self.mesh, self.data_axes)
        split_over = (*self.data_axes, *(self.reduce_axes if self.split_tokens else ()))
        parts = axes_size(self.mesh, split_over)
        require(x.shape[0] % parts == 0, "x.shape[0]", x.shape[0], f"a multiple of the {parts} devices of {split_over}")
        x_spec = P(split_over or None, *[None] * (x.ndim - 1))
        load_axes = (*self.data_axes, *([self.expert_axis] if self.expert_axis else []))
        y, load = run_on_shards(
            self,
            EPMoE._on_device,
            x,
            mask,
            mesh=self.mesh,
            in_specs=(x_spec, P(*x_spec[:-1])),
            out_specs=(x_spec, P(load_axes or None)),
        )
        return y, jnp.sum(load.reshape(dp_size, self.config.num_experts), axis=0)

    def _on_device(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One device's part, inside the shard_map: its tokens through its experts, and the all-reduce."""
        config = self.config
        x, mask = (gather_tokens(part, self.reduce_axes, split=self.split_tokens) for part in (x, mask))
        tokens = x.reshape(-1, config.hidden_size)  # [T, H]
        local_experts = self.w_down.shape[0]
        first_expert = jax.lax.axis_index(self.expert_axis) * local_experts if self.expert_axis else 0
        with jax.named_scope("router"):
            bias, correction_bias = (
                None if vector is None else vector[...] for vector in (self.router.bias, self.router.correction_bias)
            )
            weights, ids = route(tokens, self.router.weight[...], correction_bias, config, bias, mask.reshape(-1))
        with jax.named_scope("plan"):
            plan = make_plan(ids, first_expert, local_experts)
        if self.tokens_share_a_scale:
            tokens = jnp.where(mask.reshape(-1, 1), tokens, 0)  # padding has no say in it
        with jax.named_scope("shared_experts"):
            shared = None if self.shared is None else self.shared.partial_sum(tokens)
        out = run_experts(
            tokens,
            self.w_gate_up[...],
            self.w_down[...],
            weights,
            plan,
            shared,
            config.activation,
            self.backend,
            self._chunk_rows(ids.size, x.dtype.itemsize),
            -(-ids.size // axes_size(self.mesh, self.expert_axis)),
            self._expert_biases(),
        ).reshape(x.shape)
        if axes_size(self.mesh, self.reduce_axes) > 1:
            out = sum_tokens(out, self.reduce_axes, split=self.split_tokens)
        return out, plan.group_sizes

    def _expert_biases(self) -> tuple[jax.Array, jax.Array] | None:
        """This device's; what the devices of `tensor_axis` give is summed, so the first of them alone adds `down_bias`."""
        if not self.config.expert_bias:
            return None
        down_bias = self.down_bias[...]
        if axes_size(self.mesh, self.tensor_axis) > 1:
            down_bias = jnp.where(jax.lax.axis_index(self.tensor_axis) == 0, down_bias, 0)
        return self.gate_up_bias[...], down_bias

    def _chunk_rows(self, pairs: int, itemsize: int) -> int:
        if self.chunk_rows is not None:
            return self.chunk_rows
        _, hidden, inner = self.w_down.shape
        return default_chunk_rows(pairs, hidden, inner, itemsize)


def _require_whole_blocks(config: MoEConfig, ep_size: int, tensor_size: int) -> None:
    """Refuses devices that would share a block of an expert's weights: its scale would then depend on the mesh."""
    inner, tp_size = config.intermediate_size, ep_size * tensor_size

    def cuts(parts: int) -> bool:
        return parts > 1 and -(-inner // parts) % BLOCK != 0

    sizes = [n for n in range(1, tp_size + 1) if tp_size % n == config.num_experts % n == 0 and not cuts(tp_size // n)]
    works = f"one of {', '.join(map(str, sizes))}" if sizes else f"used with a tp_size below {tp_size}"
    reason = f"{tensor_size} devices to an expert would cut its {inner} within blocks of {BLOCK}"
    require(not cuts(tensor_size), "ep_size", ep_size, f"{works}: {reason}")
