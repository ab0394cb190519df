"""`EPMoE` on every kind of mesh against one dense definition, which computes all experts for all tokens in float32."""

import dataclasses
import re
from collections import Counter
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_epmoe import EPMoE, MoEConfig, make_mesh
from jax_epmoe.config import ClampedSwiGLU

H, I, SHARED, E, K = 16, 13, 11, 8, 3  # noqa: E741  odd intermediate sizes: most meshes have to pad them
CONFIG = MoEConfig(H, I, E, K, norm_topk_prob=True, shared_intermediate_size=SHARED)
SIGMOID = MoEConfig(
    H, I, E, K, activation="gelu_pytorch_tanh", scoring="sigmoid", correction_bias=True, n_group=4, topk_group=2,
    group_score="top2_sum", norm_topk_prob=True, routed_scaling_factor=2.5, shared_intermediate_size=SHARED,
    shared_expert_gate=True,
)  # fmt: skip
# gpt-oss; the limit is so low that it clamps.
BIASED = MoEConfig(
    H, I, E, K, activation=ClampedSwiGLU(limit=0.7), norm_topk_prob=True, router_bias=True, expert_bias=True,
)  # fmt: skip
MESHES = ((1, 1, 1), (8, 8, 1), (8, 4, 1), (8, 1, 1), (4, 2, 2), (2, 2, 4))
SHAPE = (8, 3, H)  # of x: 24 tokens
TOLERANCE = 1e-5

each_mesh = pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "tp{}-ep{}-dp{}".format(*sizes))

# Fewer seconds of compilation; the programs run for microseconds.
fast_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
Arrays = dict[str, Any]  # nested, by the names of the layer's parameters


def make_parameters(config: MoEConfig, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)

    router = {"weight": 3 * normal(E, H)}
    if config.correction_bias:
        router["correction_bias"] = normal(E)
    if config.router_bias:
        router["bias"] = normal(E)
    parameters = {"router": router, "w_gate_up": normal(E, 2, I, H), "w_down": normal(E, H, I)}
    if config.expert_bias:
        parameters |= {"gate_up_bias": normal(E, 2, I), "down_bias": normal(E, H)}
    if config.shared_intermediate_size:
        parameters["shared"] = {"w_gate_up": normal(2, SHARED, H), "w_down": normal(H, SHARED)}
    if config.shared_expert_gate:
        parameters["shared"]["output_gate"] = 3 * normal(1, H)
    return parameters


def make_x(seed: int = 1, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dense(parameters: Arrays, x: jax.Array, mask: jax.Array, config: MoEConfig) -> tuple[jax.Array, jax.Array]:
    """Output and load; an expert that a token did not choose weighs 0. Chosen: fewer than k experts rank higher."""
    einsum = partial(jnp.einsum, precision="highest")

    def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
        if isinstance(config.activation, ClampedSwiGLU):
            alpha, limit = config.activation.alpha, config.activation.limit
            gate = jnp.clip(gate, None, limit)
            return gate / (1 + jnp.exp(-alpha * gate)) * (1 + jnp.clip(up, -limit, limit))
        return {"silu": jax.nn.silu, "gelu_pytorch_tanh": jax.nn.gelu}[config.activation](gate) * up

    def mlps(w_gate_up: jax.Array, w_down: jax.Array, gate_up_bias=None, down_bias=None) -> jax.Array:
        gate, up = (einsum("th,eih->tei", tokens, w_gate_up[:, i]) for i in (0, 1))
        if gate_up_bias is not None:
            gate, up = gate + gate_up_bias[:, 0], up + gate_up_bias[:, 1]
        out = einsum("tei,ehi->teh", gated(gate, up), w_down)
        return out if down_bias is None else out + down_bias

    def is_among_best(values: jax.Array, count: int) -> jax.Array:
        index = jnp.arange(values.shape[-1])
        mine, other = values[:, :, None], values[:, None, :]
        beaten_by = (other > mine) | ((other == mine) & (index[None, :] < index[:, None]))
        return beaten_by.sum(-1) < count

    tokens = x.reshape(-1, H)
    logits = einsum("th,eh->te", tokens, parameters["router"]["weight"]) + parameters["router"].get("bias", 0.0)
    scores = jax.nn.softmax(logits) if config.scoring == "softmax" else jax.nn.sigmoid(logits)
    choice = scores + parameters["router"].get("correction_bias", 0.0)
    groups = jnp.sort(choice.reshape(len(tokens), config.n_group, E // config.n_group))
    group_scores = groups[..., -1] if config.group_score == "max" else groups[..., -2:].sum(-1)
    eligible = jnp.repeat(is_among_best(group_scores, config.topk_group), E // config.n_group, axis=1)
    chosen = is_among_best(jnp.where(eligible, choice, -jnp.inf), config.top_k)
    weights = jnp.where(chosen, scores, 0.0)
    if config.norm_topk_prob:
        weights /= weights.sum(-1, keepdims=True)
    routed = jnp.where(mask.reshape(-1, 1), weights * config.routed_scaling_factor, 0.0)
    names = ("w_gate_up", "w_down", "gate_up_bias", "down_bias")
    out = einsum("te,teh->th", routed, mlps(*(parameters[name] for name in names if name in parameters)))
    if "shared" in parameters:
        shared = mlps(*(parameters["shared"][name][None] for name in ("w_gate_up", "w_down")))[:, 0]
        if config.shared_expert_gate:
            shared *= jax.nn.sigmoid(einsum("th,gh->tg", tokens, parameters["shared"]["output_gate"]))
        out += shared
    return out.reshape(x.shape), (chosen & mask.reshape(-1, 1)).sum(0)


def loss_of(out: jax.Array) -> jax.Array:
    """Every output counts, each in its own way."""
    return jnp.sum(jnp.sin(out) * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))


@fast_jit(static_argnames="config")
def run_dense(parameters: Arrays, x: jax.Array, mask: jax.Array, config: MoEConfig):
    """(out, load), (gradients of the parameters, gradient of x)."""

    def loss(parameters: Arrays, x: jax.Array):
        out, load = dense(parameters, x, mask, config)
        return loss_of(out), (out, load)

    gradients, outputs = jax.grad(loss, argnums=(0, 1), has_aux=True)(parameters, x)
    return outputs, gradients


@fast_jit(static_argnames="graphdef")
def run_layer(graphdef: Any, state: nnx.State, x: jax.Array, mask: jax.Array | None):
    """The same of an `EPMoE`, its parameters as they lie on the mesh."""

    def loss(state: nnx.State, x: jax.Array):
        out, load = nnx.merge(graphdef, state).with_load(x, mask)
        return loss_of(out), (out, load)

    gradients, outputs = jax.grad(loss, argnums=(0, 1), has_aux=True)(state, x)
    return outputs, gradients


@fast_jit(static_argnames="graphdef")
def run_forward(graphdef: Any, state: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return nnx.merge(graphdef, state).with_load(x)


@cache
def abstract_layer(config: MoEConfig, mesh: Mesh, **kwargs: Any) -> tuple[Any, nnx.State]:
    """Graphdef and state of a layer that has shapes and shardings but no values: random ones take seconds to compile."""
    new = partial(EPMoE, config, mesh=mesh, dtype=jnp.float32, **kwargs)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: new(rngs=nnx.Rngs(0))))

    def describe(value: jax.ShapeDtypeStruct, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(mesh, spec))

    return graphdef, jax.tree.map(describe, state, nnx.get_partition_spec(state))


def layer_with(parameters: Arrays, config: MoEConfig, mesh: Mesh, **kwargs: Any) -> tuple[Any, nnx.State]:
    """A layer's graphdef and its state with these parameters, zero-padded to the sizes that the mesh needs."""
    graphdef, state = abstract_layer(config, mesh, **kwargs)

    def place(value: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
        padded = np.pad(value, [(0, to - n) for n, to in zip(value.shape, like.shape, strict=True)])
        return jax.device_put(padded.astype(like.dtype), like.sharding)

    values = jax.tree.map(place, parameters, nnx.to_pure_dict(state))
    state = jax.tree.map(lambda like: like, state)
    nnx.replace_by_pure_dict(state, values)
    return graphdef, state


def relative_error(out: Any, ref: Any) -> float:
    """`norm(out - ref) / norm(ref)`; the norm of `out` where `ref` is all zeros."""
    out, ref = (np.asarray(array).astype(np.float64) for array in (out, ref))
    assert out.shape == ref.shape, f"shape {out.shape}, should be {ref.shape}"
    return float(np.linalg.norm(out - ref) / (np.linalg.norm(ref) or 1.0))


def check_against_dense(config: MoEConfig, parameters: Arrays, x: np.ndarray, mask: np.ndarray, mesh: Mesh, **kwargs):
    """Outputs, load and all gradients; returns the layer's own (out, load)."""
    (out, load), (d_parameters, d_x) = run_layer(*layer_with(parameters, config, mesh, **kwargs), x, mask)
    (ref_out, ref_load), (ref_d_parameters, ref_d_x) = run_dense(parameters, x, mask, config)
    np.testing.assert_array_equal(load, ref_load)
    errors = {"out": relative_error(out, ref_out), "gradient of x": relative_error(d_x, ref_d_x)}
    padding = {}
    d_parameters = dict(jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(d_parameters)))
    for path, ref in jax.tree_util.tree_leaves_with_path(ref_d_parameters):
        name, gradient = jax.tree_util.keystr(path), np.array(d_parameters.pop(path))
        inside = tuple(slice(n) for n in ref.shape)
        errors[name] = relative_error(gradient[inside], ref)
        gradient[inside] = 0
        padding[name] = np.abs(gradient).max()
    assert not d_parameters, f"the definition lacks {list(d_parameters)}"
    worst = max(errors, key=lambda name: (not np.isfinite(errors[name]), errors[name]))
    assert errors[worst] < TOLERANCE, f"{worst} is off by {errors[worst]:.2e}; all: {errors}"
    assert not any(padding.values()), f"gradients of padding: {padding}"
    return out, load


@each_mesh
@pytest.mark.parametrize("config", [CONFIG, SIGMOID], ids=["softmax_and_shared", "sigmoid_and_gated_shared"])
def test_outputs_and_gradients_equal_the_dense_definition(config, sizes):
    mask = np.ones(SHAPE[:-1], bool)
    _, load = check_against_dense(config, make_parameters(config), make_x(), mask, make_mesh(*sizes))
    assert int(load.sum()) == mask.size * K, load


@pytest.mark.parametrize(
    "sizes",
    [(8, 4, 1), (8, 1, 1), *(pytest.param(s, marks=pytest.mark.slow) for s in ((1, 1, 1), (8, 8, 1), (4, 2, 2)))],
    ids=str,
)
def test_each_bias_is_added_once_however_many_devices_share_an_expert(sizes):
    mask = np.ones(SHAPE[:-1], bool)
    check_against_dense(BIASED, make_parameters(BIASED), make_x(), mask, make_mesh(*sizes))


@each_mesh
def test_masked_tokens_take_no_routed_expert(sizes):
    mask = np.random.default_rng(2).random(SHAPE[:-1]) < 0.5
    out, load = check_against_dense(CONFIG, make_parameters(CONFIG), make_x(), mask, make_mesh(*sizes))
    assert int(load.sum()) == mask.sum() * K, (load, mask.sum())
    assert np.abs(out).max(axis=-1).all(), "the shared experts serve masked tokens too"
    _, load = check_against_dense(CONFIG, make_parameters(CONFIG), make_x(), np.zeros_like(mask), make_mesh(*sizes))
    assert not load.any(), load


@each_mesh
@pytest.mark.parametrize("favourite", [0, 5, E - 1])
def test_no_token_is_dropped_when_all_choose_the_same_expert(favourite, sizes):
    parameters, x = make_parameters(CONFIG), make_x()
    x[..., 0] = 1.0
    parameters["router"]["weight"][favourite, 0] += 20.0
    _, load = check_against_dense(CONFIG, parameters, x, np.ones(SHAPE[:-1], bool), make_mesh(*sizes))
    assert load[favourite] == x.size // H, load


@each_mesh
def test_no_token_is_dropped_when_one_rank_gets_every_row(sizes):
    """All tokens choose experts 3, 4 and 5; with eight ranks, five of them have nothing to do."""
    parameters, x = make_parameters(CONFIG), make_x()
    x[..., 0] = 1.0
    parameters["router"]["weight"][3:6, 0] += [20.0, 21.0, 22.0]
    _, load = check_against_dense(CONFIG, parameters, x, np.ones(SHAPE[:-1], bool), make_mesh(*sizes))
    assert load.tolist() == [0, 0, 0, 24, 24, 24, 0, 0]


@pytest.mark.parametrize(
    ("sizes", "config"),
    [((1, 1, 1), CONFIG), ((8, 8, 1), CONFIG), ((8, 4, 1), BIASED), ((4, 2, 2), CONFIG)],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_rows_in_chunks_give_the_same(sizes, config):
    """Chunks of 8: three devices have several, the others none; each device loops as often as it must."""
    parameters, x = make_parameters(config), make_x()
    x[..., 0] = 1.0
    parameters["router"]["weight"][3:6, 0] += [20.0, 21.0, 22.0]
    mask = np.ones(SHAPE[:-1], bool)
    check_against_dense(config, parameters, x, mask, make_mesh(*sizes), chunk_rows=8)


def test_without_a_mask_every_token_counts():
    state = layer_with(make_parameters(CONFIG), CONFIG, make_mesh(4, 2, 2))
    unmasked, all_true = run_layer(*state, make_x(), None), run_layer(*state, make_x(), np.ones(SHAPE[:-1], bool))
    jax.tree.map(np.testing.assert_array_equal, unmasked, all_true)


COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter|collective-permute|collective-broadcast)"
    r"(?:-start)?\("
)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [(sizes, {"all-reduce": 1}) for sizes in MESHES[1:]] + [((1, 1, 8), {}), ((1, 1, 1), {})],
    ids=str,
)
@pytest.mark.parametrize("config", [CONFIG, SIGMOID], ids=["softmax_and_shared", "sigmoid_and_gated_shared"])
def test_the_compiled_program_has_one_all_reduce_and_no_other_collective(config, sizes, expected):
    mesh = make_mesh(*sizes)
    graphdef, state = abstract_layer(config, mesh)
    x = jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=NamedSharding(mesh, P("data")))
    text = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)).lower(state, x).compile().as_text()
    assert Counter(COLLECTIVE.findall(text)) == expected, COLLECTIVE.findall(text)


@each_mesh
def test_every_device_of_a_replica_holds_the_same_bits_on_every_run(sizes):
    layer = layer_with(make_parameters(CONFIG), CONFIG, make_mesh(*sizes))
    first = run_forward(*layer, make_x())[0]
    for _ in range(3):
        for shard in run_forward(*layer, make_x())[0].addressable_shards:
            np.testing.assert_array_equal(shard.data, first[shard.index])


def test_a_new_layer_lies_in_padded_parts_and_its_values_depend_on_the_seed_alone():
    alone, spread = (
        nnx.to_pure_dict(nnx.state(EPMoE(CONFIG, mesh=make_mesh(*sizes), dtype=jnp.float32, rngs=nnx.Rngs(0))))
        for sizes in ((1, 1, 1), (8, 4, 1))
    )
    part_shapes = {}
    for path, value in jax.tree_util.tree_leaves_with_path(spread):
        ref = dict(jax.tree_util.tree_leaves_with_path(alone))[path]
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        padded = np.pad(ref, [(0, to - n) for n, to in zip(ref.shape, value.shape, strict=True)])
        np.testing.assert_array_equal(value, padded, err_msg=name)
        part_shapes[name] = value.addressable_shards[0].data.shape
    # E / 4 experts; I = 13 padded to 14, over 2 devices; the shared 11 padded to 16, over 8.
    assert part_shapes == {
        "router.weight": (8, 16), "w_gate_up": (2, 2, 7, 16), "w_down": (2, 16, 7),
        "shared.w_gate_up": (2, 2, 16), "shared.w_down": (16, 2),
    }  # fmt: skip


AXES = [
    {"data_axes": "replica", "expert_axis": "ep", "tensor_axis": "tp"},
    {"data_axes": ("replica", "tp"), "expert_axis": "ep", "tensor_axis": None},
    {"data_axes": None, "expert_axis": "ep", "tensor_axis": "tp"},
    {"data_axes": "replica", "expert_axis": None, "tensor_axis": "tp"},
    {"data_axes": "replica", "expert_axis": "ep", "tensor_axis": None},
    {"data_axes": None, "expert_axis": None, "tensor_axis": None},
]
each_axis_type = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])


def own_mesh(axis_type: AxisType) -> Mesh:
    return jax.make_mesh((2, 2, 2), ("replica", "ep", "tp"), axis_types=(axis_type,) * 3)


@each_axis_type
@pytest.mark.parametrize("axes", AXES, ids=lambda axes: "-".join(map(str, axes.values())))
def test_any_mesh_and_axis_names_do_without_set_mesh(axes, axis_type):
    mask = np.random.default_rng(3).random(SHAPE[:-1]) < 0.8
    check_against_dense(CONFIG, make_parameters(CONFIG), make_x(), mask, own_mesh(axis_type), **axes)


@each_axis_type
def test_works_the_same_under_set_mesh(axis_type):
    mesh, mask = own_mesh(axis_type), np.random.default_rng(3).random(SHAPE[:-1]) < 0.8
    with jax.set_mesh(mesh):
        check_against_dense(CONFIG, make_parameters(CONFIG), make_x(), mask, mesh, **AXES[0])


@each_axis_type
@pytest.mark.parametrize("set_mesh", [False, True], ids=["no_mesh_set", "mesh_set"])
@pytest.mark.parametrize("spec", [P(), P(("ep", "replica"), None, "tp")], ids=str)
def test_takes_x_however_it_is_sharded(spec, set_mesh, axis_type):
    mesh = own_mesh(axis_type)
    layer = layer_with(make_parameters(CONFIG), CONFIG, mesh, **AXES[0])
    x = jax.device_put(make_x(), NamedSharding(mesh, spec))
    with jax.set_mesh(mesh) if set_mesh else nullcontext():
        out, _ = run_forward(*layer, x)
    (ref, _), _ = run_dense(make_parameters(CONFIG), make_x(), np.ones(SHAPE[:-1], bool), CONFIG)
    assert relative_error(out, ref) < TOLERANCE, relative_error(out, ref)


@each_axis_type
def test_runs_without_jit(axis_type):
    layer = layer_with(make_parameters(CONFIG), CONFIG, own_mesh(axis_type), **AXES[0])
    (ref, _), _ = run_dense(make_parameters(CONFIG), make_x(), np.ones(SHAPE[:-1], bool), CONFIG)
    error = relative_error(nnx.merge(*layer)(make_x()), ref)
    assert error < TOLERANCE, error


class Regressor(nnx.Module):
    """Somebody's own model; it knows nothing of meshes but the one it hands on."""

    def __init__(self, mesh: Mesh, rngs: nnx.Rngs):
        self.first = nnx.Linear(4, H, rngs=rngs)
        self.norm = nnx.LayerNorm(H, rngs=rngs)
        self.moe = EPMoE(CONFIG, mesh=mesh, dtype=jnp.float32, rngs=rngs)
        self.last = nnx.Linear(H, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.first(x)
        return self.last(x + self.moe(self.norm(x)))


@pytest.mark.parametrize("sizes", [(8, 4, 1), pytest.param((4, 2, 2), marks=pytest.mark.slow)], ids=str)
def test_somebody_s_own_model_learns(sizes):
    model = Regressor(make_mesh(*sizes), nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2, weight_decay=1e-2), wrt=nnx.Param)
    x = make_x(4, (16, 4))
    y = np.sin(x.sum(-1, keepdims=True))
    experts_before = np.asarray(model.moe.w_down[...])

    @nnx.jit
    def step(model: Regressor, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
        loss, gradients = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer, x, y)) for _ in range(30)]
    assert losses[-1] < 0.3 * losses[0], losses
    experts = np.asarray(model.moe.w_down[...])
    assert (np.abs(experts - experts_before)[..., :I].max(axis=(1, 2)) > 0).all(), "an expert did not learn"
    assert experts.shape[-1] == 14
    np.testing.assert_array_equal(experts[..., I:], 0)
    assert model.moe.w_down[...].sharding.spec == P("expert", None, "tensor")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 8, 1), (8, 1, 1)], ids=str)
def test_half_precision_stays_half_precision_and_close(sizes, dtype):
    parameters = jax.tree.map(lambda a: np.asarray(jnp.asarray(a, dtype).astype(jnp.float32)), make_parameters(CONFIG))
    graphdef, state = layer_with(parameters, CONFIG, make_mesh(*sizes))
    router = state["router"]["weight"][...]
    state = jax.tree.map(lambda a: a.astype(dtype), state)
    state["router"]["weight"].set_value(router)
    x = jnp.asarray(make_x(), dtype)
    (out, _), (gradients, d_x) = run_layer(graphdef, state, x, None)
    assert (out.dtype, d_x.dtype) == (jnp.dtype(dtype),) * 2
    assert gradients["w_down"][...].dtype == jnp.dtype(dtype)
    assert gradients["router"]["weight"][...].dtype == jnp.float32
    (ref, _), (_, ref_d_x) = run_dense(parameters, x.astype(jnp.float32), np.ones(SHAPE[:-1], bool), CONFIG)
    errors = relative_error(out, ref), relative_error(d_x, ref_d_x)
    assert max(errors) < 1e-2, errors


@pytest.mark.parametrize("shape", [(H,), (24, H), (4, 6, H), (2, 3, 4, H), (0, H), (1, H)], ids=str)
def test_any_number_of_dimensions(shape):
    layer = layer_with(make_parameters(CONFIG), CONFIG, make_mesh(4, 2, 1))
    out, load = run_forward(*layer, make_x(5, shape))
    (ref, ref_load), _ = run_dense(make_parameters(CONFIG), make_x(5, shape), np.ones(shape[:-1], bool), CONFIG)
    assert relative_error(out, ref) < TOLERANCE
    np.testing.assert_array_equal(load, ref_load)


def test_the_router_is_float32_and_the_experts_are_bfloat16_unless_asked():
    layer = nnx.eval_shape(lambda: EPMoE(CONFIG, mesh=make_mesh(), rngs=nnx.Rngs(0)))
    dtypes = {str(path[-1]): str(value.dtype) for path, value in nnx.to_flat_state(nnx.state(layer))}
    assert dtypes == {"weight": "float32", "w_gate_up": "bfloat16", "w_down": "bfloat16"}


@pytest.mark.parametrize(
    ("name", "config", "sizes", "kwargs"),
    [
        ("axis name", {}, (1, 1, 1), {"data_axes": "batch"}),
        ("axis name", {}, (1, 1, 1), {"data_axes": ("data", "batch")}),
        ("axis name", {}, (1, 1, 1), {"expert_axis": "ep"}),
        ("axis name", {}, (1, 1, 1), {"tensor_axis": "tp"}),
        ("axis name", {}, (4, 2, 1), {"tensor_axis": "expert"}),
        ("axis name", {}, (4, 2, 1), {"data_axes": ("data", "expert")}),
        ("ep_size", {"num_experts": 12}, (8, 8, 1), {}),
        ("chunk_rows", {}, (1, 1, 1), {"chunk_rows": 0}),
        ("chunk_rows", {}, (1, 1, 1), {"chunk_rows": 100}),
    ],
)
def test_a_bad_layer_is_refused_in_one_line(name, config, sizes, kwargs):
    config = dataclasses.replace(CONFIG, **config)
    with pytest.raises(ValueError, match=f"^{name} is .*; it should be ") as error:
        EPMoE(config, mesh=make_mesh(*sizes), rngs=nnx.Rngs(0), **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "x", "mask"),
    [
        ("x.shape", (4, H + 1), None),
        ("x.shape", (), None),
        ("mask.shape", (4, H), (4, 1)),
        ("mask.shape", (4, 2, H), (8,)),
        (r"x\.shape\[0\]", (3, H), None),
        (r"x\.shape\[0\]", (H,), None),
    ],
    ids=str,
)
def test_a_bad_call_is_refused_in_one_line(name, x, mask):
    layer = nnx.merge(*abstract_layer(CONFIG, make_mesh(1, 1, 2)))
    with pytest.raises(ValueError, match=f"^{name} is .*; it should be ") as error:
        layer(jnp.zeros(x), None if mask is None else jnp.ones(mask, bool))
    assert "\n" not in str(error.value)


def test_a_backend_that_was_asked_for_is_never_quietly_replaced():
    parameters = make_parameters(CONFIG)
    with pytest.raises(ValueError, match=r"^backend is 'cublas'; it should be "):
        run_forward(*layer_with(parameters, CONFIG, make_mesh(), backend="cublas"), make_x())
    with pytest.raises(NotImplementedError):
        run_forward(*layer_with(parameters, CONFIG, make_mesh(), backend="hopper"), make_x())
