"""A decoder with random weights on a mesh, its prefill and decode programs, and token ids that load its experts in a known way.

Weights are drawn on the devices that hold them, by one program, from an integer hash of each element's index: the same on every
mesh, and nothing is drawn twice or sent. Programs are lowered from shapes alone.

An embedding is `_LOUD` times as large as anything that layers add to it, and its first E numbers are the router's logits: a
token's id decides which experts it goes to, in every layer. Nothing else in the model is other than a user's.
"""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_epmoe as ep
from bench import layers
from jax_epmoe.checkpoint import abstract_model, with_routers_of
from jax_epmoe.config import ModelConfig, require
from jax_epmoe.mesh import TP_AXES
from jax_epmoe.models.decoder import Decoder
from jax_epmoe.models.families import read_config
from jax_epmoe.quant import FP8, Quantization
from jax_epmoe.quantized_parameters import SCALE, SPREAD

LOADS = ("balanced", "zipf")
_LOUD = 256.0
_QUIET = 0.1  # without loads: what layers add is most of what comes out
PREFILL, DECODE = "prefill", "decode"


class Mode(NamedTuple):
    """How a decoder lies on the devices; names as in `docs/parallelism.md`."""

    name: str
    tp_size: int
    ep_size: int
    dp_attention: bool = False


ONE = Mode("one device", 1, 1)


def modes(devices: int) -> dict[str, Mode]:
    """All of a number of devices, by name; "+DP" is with data-parallel attention."""
    sizes = {"TP": 1, "EP": devices} | ({"hybrid": devices // 2} if devices >= 4 and devices % 2 == 0 else {})
    found = [Mode(f"{name}{'+DP' * dp}", devices, size, dp) for dp in (True, False) for name, size in sizes.items()]
    return {mode.name: mode for mode in found}


class Step(NamedTuple):
    """One call: `tokens` in total, prompts of `length` tokens or, in decoding, sequences that are `length` positions long."""

    phase: str
    tokens: int
    length: int

    @property
    def batch(self) -> int:
        return self.tokens // self.length if self.phase == PREFILL else self.tokens

    @property
    def name(self) -> str:
        return f"{self.phase} {self.tokens}"

    def share(self, parts: int) -> "Step":
        """The same for so many times fewer tokens."""
        return self._replace(tokens=self.tokens // parts)


class Variant(NamedTuple):
    """A way to compile a step: XLA's options, and into how many independent batches it is cut."""

    options: dict[str, Any]
    batches: int = 1


_HIDE = {"xla_gpu_enable_latency_hiding_scheduler": True}
_GRAPHS = {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,COLLECTIVES"}
VARIANTS = {
    "default": Variant({}),
    "latency-hiding": Variant(_HIDE),  # collectives beside compute that does not need them
    "two batches": Variant(_HIDE, 2),  # one's collectives beside the other's compute
    "graphs": Variant(_GRAPHS),  # CUDA graphs that hold collectives too
}


def reduced(folder: Path, num_layers: int) -> tuple[ModelConfig, ModelConfig]:
    """A folder's configuration, and the same with its first layers alone."""
    whole = read_config(folder)
    require(
        0 < num_layers <= whole.num_layers and any(whole.moe_layers[:num_layers]),
        "--layers", num_layers, f"at most {whole.num_layers}, one with experts among the first",
    )  # fmt: skip
    return whole, whole.replace(moe_layers=whole.moe_layers[:num_layers])


class Loads:
    """Router logits by token id: the first `count` ids have the first load, the next the second, and so on."""

    def __init__(self, config: ModelConfig, most_tokens: int) -> None:
        self.count = min(most_tokens, config.vocab_size // len(LOADS))
        self.logits = np.concatenate([layers.logits(config.moe, self.count, load) for load in LOADS])  # [ids, E]

    def tokens(self, step: Step, load: str) -> np.ndarray:
        """`[B, S]` int32 ids."""
        ids = LOADS.index(load) * self.count + np.arange(step.tokens) % self.count
        return ids.astype(np.int32).reshape(step.batch, -1)


class ShardedDecoder:
    """A model's shapes on a mesh, from which programs are made; `weights` draws its arrays."""

    def __init__(
        self,
        config: ModelConfig,
        mode: Mode,
        quantization: str | None,
        *,
        dtype: Any = jnp.bfloat16,
        loads: Loads | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        dtype = jnp.dtype(dtype)
        self.config, self.mode, self.dtype, self.loads = config, mode, dtype, loads
        self.mesh = ep.make_mesh(mode.tp_size, mode.ep_size, devices=devices)
        graphdef, state = abstract_model(config, self.mesh, dtype, None, mode.dp_attention, Quantization(quantization))
        self._state = with_routers_of(state, dtype, dtype)
        self._graphdef = graphdef
        self.leaves, self._tree = jax.tree.flatten(self._state)
        self._model = nnx.merge(graphdef, self._state)
        self.everywhere = NamedSharding(self.mesh, P())

    def lower_weights(self) -> jax.stages.Lowered:
        """The program that `weights` runs."""
        logits = None if self.loads is None else jax.ShapeDtypeStruct(self.loads.logits.shape, jnp.float32)

        def draw(logits: jax.Array | None) -> list[jax.Array]:
            state = nnx.map_state(lambda keys, leaf: leaf.replace(_draw(keys, leaf.get_value(), logits)), self._state)
            return jax.tree.leaves(state)

        return jax.jit(draw, out_shardings=[leaf.sharding for leaf in self.leaves]).lower(logits)

    def weights(self, program: Callable) -> list[jax.Array]:
        logits = None if self.loads is None else self.loads.logits.astype(np.float32)
        return jax.block_until_ready(program(logits))

    @property
    def weight_bytes(self) -> int:
        """Of each device."""
        return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in self.leaves)

    def abstract_caches(self, step: Step, batches: int = 1) -> list[Any]:
        """For each batch that a step is cut into, each layer's cache."""
        batch, multiple = step.batch // batches, self._model.batch_multiple
        require(
            step.batch % batches == 0 and batch % multiple == 0 and batch > 0,
            f"{step.name}: sequences", step.batch, f"a multiple of {batches * multiple} on this mesh",
        )  # fmt: skip
        caches = [layer.attention.abstract_cache(batch, step.length, self.dtype) for layer in self._model.layers]
        return [caches] * batches

    def lower_step(self, step: Step, batches: int = 1) -> jax.stages.Lowered:
        """`(weights, caches, tokens [B, S], start [B], num_tokens [B])` -> caches, next tokens `[B]`, rows of each expert.

        What the engine runs, greedily, but for its account of who has finished.
        """
        caches = self.abstract_caches(step, batches)

        def put(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.everywhere)

        def run(weights, caches, tokens, start, num_tokens):
            model = self.merged(weights)
            parts = zip(caches, *(jnp.split(array, batches) for array in (tokens, start, num_tokens)), strict=True)
            done = [self._run(model, step.phase == PREFILL, *part) for part in parts]
            caches, out, loads = zip(*done, strict=True)
            return list(caches), jnp.concatenate(out), sum(loads)

        of_caches = jax.tree.map(lambda array: array.sharding, caches)
        jitted = jax.jit(run, donate_argnums=1, out_shardings=(of_caches, self.everywhere, None))
        columns = step.length if step.phase == PREFILL else 1
        return jitted.lower(self.leaves, caches, put(step.batch, columns), put(step.batch), put(step.batch))

    @staticmethod
    def _run(model, is_start, caches, tokens, start, num_tokens):
        hidden, caches, load = model.hidden_with_load(tokens, start, caches, num_tokens, is_start=is_start)
        with jax.named_scope("head"):
            last = jnp.take_along_axis(hidden, num_tokens[:, None, None] - 1, axis=1)[:, 0]
            return caches, jnp.argmax(model.logits(last), axis=-1), load

    def lower_caches(self, step: Step, batches: int = 1) -> jax.stages.Lowered:
        """The program that draws what caches hold."""
        abstract = self.abstract_caches(step, batches)

        def draw() -> Any:
            return jax.tree.map(lambda array: _normal(1, array.shape).astype(array.dtype), abstract)

        return jax.jit(draw, out_shardings=jax.tree.map(lambda array: array.sharding, abstract)).lower()

    def merged(self, weights: list[jax.Array]) -> Decoder:
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._tree, weights))

    def put(self, value: np.ndarray) -> jax.Array:
        """On every device, of every process."""
        return jax.make_array_from_callback(value.shape, self.everywhere, lambda index: value[index])


class Running:
    """A step's arrays; `run(program)` is the next call of one of its programs."""

    def __init__(self, model: ShardedDecoder, weights: list[jax.Array], caches: list[Any], step: Step) -> None:
        self._model, self._weights, self._step, self.caches = model, weights, step, caches
        start, columns = (0, step.length) if step.phase == PREFILL else (step.length - 1, 1)
        self._start = model.put(np.full(step.batch, start, np.int32))
        self._num_tokens = model.put(np.full(step.batch, columns, np.int32))
        self.load: Any = None  # rows of each expert of each MoE layer, in the last call

    def use(self, load: str) -> None:
        assert self._model.loads is not None
        self._tokens = self._model.put(self._model.loads.tokens(self._step, load))

    def run(self, program: Callable) -> jax.Array:
        arguments = self._tokens, self._start, self._num_tokens
        self.caches, out, self.load = program(self._weights, self.caches, *arguments)
        return out


def _draw(keys: Sequence[Any], leaf: jax.ShapeDtypeStruct, logits: jax.Array | None) -> jax.Array:
    """A parameter's values, by its name and shape."""
    shape, name = leaf.shape, keys[-1]
    seed = zlib.crc32(".".join(map(str, keys)).encode())
    if name == "scales":
        values = jnp.full(shape, SCALE)
    elif name == "scale":  # of a norm
        values = jnp.ones(shape)
    elif name == "correction_bias":
        values = jnp.zeros(shape)
    elif leaf.dtype == FP8:
        values = SPREAD * _normal(seed, shape)
    elif keys[-2:] == ("embed", "table"):
        values = _normal(seed, shape)
        if logits is None:
            values *= _QUIET
        else:
            rows = jnp.minimum(jnp.arange(shape[0]), len(logits) - 1)
            values = _LOUD * jnp.concatenate([logits[rows], values[:, logits.shape[1] :]], axis=1)
    elif keys[-2:] == ("router", "weight") and logits is not None:
        values = jnp.eye(*shape) + 1e-3 * _normal(seed, shape)
    else:
        values = shape[-1] ** -0.5 * _normal(seed, shape)
    return values.astype(leaf.dtype)


def _normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """Roughly normal float32 of standard deviation 1: four bytes of a hash (MurmurHash3's finalizer) of each index, added up."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size & 0xFFFFFFFF) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    bits = index * jnp.uint32(0x9E3779B1) + jnp.uint32(seed)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    bits ^= bits >> 16
    total = sum(((bits >> shift) & 0xFF).astype(jnp.float32) for shift in (0, 8, 16, 24))
    return (total - 510) * (1 / 147.8)  # a byte's mean is 127.5, its variance 5461


def exchanges(mesh: jax.sharding.Mesh, tokens: int, hidden: int, dtype: Any) -> dict[str, tuple[Any, jax.Array]]:
    """Each kind of collective alone: a program and its argument, for `[tokens, hidden]`.

    Every device brings numbers of its own, so that nothing can be known beforehand.
    """
    devices = mesh.devices.size
    over = P(TP_AXES)
    kinds = {
        "all-reduce": (lambda x: jax.lax.psum(x, TP_AXES), devices * tokens, P()),
        "all-gather": (lambda x: jax.lax.all_gather(x, TP_AXES, axis=0, tiled=True), tokens, P()),
        "reduce-scatter": (
            lambda x: jax.lax.psum_scatter(x, TP_AXES, scatter_dimension=0, tiled=True), devices * tokens, over,
        ),
    }  # fmt: skip
    found: dict[str, tuple[Any, jax.Array]] = {}
    for kind, (call, rows, out) in kinds.items():
        program = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=over, out_specs=out, check_vma=False))
        draw = jax.jit(
            lambda rows=rows: _normal(2, (rows, hidden)).astype(dtype), out_shardings=NamedSharding(mesh, over)
        )
        found[kind] = program, draw()
    return found
