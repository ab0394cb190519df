"""The decoder: its cache leaves no trace of padding or pieces, every mesh computes the same, and so do gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import DEEPSEEK_LIKE, FAST_COMPILE, KINDS, MIXTRAL_LIKE, compiled, decoder, relative_error, tokens

from jax_epmoe import MoEConfig, make_mesh
from jax_epmoe.checkpoint import parameter_shapes
from jax_epmoe.models.decoder import Decoder

each_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
TOLERANCE = 1e-5


def stepper(model):
    """`(tokens, start, cache, num_tokens) -> (logits, cache)`, compiled; with `is_start` for tokens that begin their sequences."""

    def step(is_start, model, tokens, start, cache, num_tokens):
        hidden, cache = model.hidden(tokens, start, cache, num_tokens, is_start=is_start)
        return model.logits(hidden), cache

    runs = {is_start: compiled(model, partial(step, is_start)) for is_start in (False, True)}

    def run(tokens, start, cache, num_tokens, is_start=False):
        return runs[is_start](tokens, np.int32(start), cache, np.int32(num_tokens))

    return run


@each_kind
def test_a_ragged_batch_in_pieces_is_each_sequence_alone(config):
    """Rows of 9, 4, 1 and 12 tokens, right-padded, in pieces of 4, then decoded each at its own position."""
    model = decoder(config, 4, 2, 2)
    lengths, extra = np.array([9, 4, 1, 12]), 3
    text = tokens(4, 16)
    whole = compiled(model, lambda model, tokens: model(tokens))
    alone = [
        np.asarray(whole(np.repeat(text[b : b + 1], 4, axis=0)))[0] for b in range(4)
    ]  # causal: one program for all

    step, cache = stepper(model), model.init_cache(4, 16)
    got = [[] for _ in lengths]
    for position in range(0, 12, 4):
        real = np.clip(lengths - position, 0, 4)
        padded = np.where(np.arange(4) < real[:, None], text[:, position : position + 4], 28)
        logits, cache = step(padded, [position] * 4, cache, real, is_start=position == 0)
        for b in range(4):
            got[b].append(logits[b, : real[b]])
    for i in range(extra):
        next_token = np.take_along_axis(text, (lengths + i)[:, None], axis=1)
        logits, cache = step(next_token, lengths + i, cache, [1] * 4)
        for b in range(4):
            got[b].append(logits[b])
    errors = [relative_error(np.concatenate(got[b]), alone[b][: lengths[b] + extra]) for b in range(4)]
    assert max(errors) < TOLERANCE, errors


@each_kind
def test_padding_changes_no_bit_of_real_tokens_and_takes_no_experts(config):
    model = decoder(config, 4, 4)
    step, text, real = stepper(model), tokens(3, 6), np.array([6, 2, 0])
    other = np.where(np.arange(6) < real[:, None], text, (text + 5) % 29)
    outs = [step(t, [0] * 3, model.init_cache(3, 8), real)[0] for t in (text, other)]
    for b, n in enumerate(real):
        np.testing.assert_array_equal(outs[0][b, :n], outs[1][b, :n])

    _, load = compiled(model, lambda model, tokens, n: model.with_load(tokens, n))(text, real)
    assert load.sum(axis=1).tolist() == [real.sum() * config.moe.top_k] * sum(config.moe_layers)


@each_kind
def test_positions_past_the_cache_are_dropped(config):
    model = decoder(config, 2, 2)
    step, text = stepper(model), tokens(2, 6)
    _, short = step(text, [0, 0], model.init_cache(2, 4), [6, 6])
    _, long = step(text, [0, 0], model.init_cache(2, 6), [6, 6])
    for a, b in zip(jax.tree.leaves(short), jax.tree.leaves(long), strict=True):
        assert a.shape[1] == 4
        # Later positions cannot reach earlier ones' entries; only the program differs.
        assert relative_error(a, np.asarray(b)[:, :4]) < TOLERANCE
    _, after = step(text, [4, 400], short, [6, 6])
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(short), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_step_writes_its_own_positions_of_the_cache_alone():
    model = decoder(MIXTRAL_LIKE, 4, 2)
    _, cache = stepper(model)(tokens(2, 2), [3, 0], model.init_cache(2, 6), [2, 2])
    written = [np.abs(np.asarray(a)).sum(axis=(2, 3)) > 0 for a in jax.tree.leaves(cache)]
    assert all(w.tolist() == [[False] * 3 + [True] * 2 + [False], [True] * 2 + [False] * 4] for w in written)


@each_kind
def test_every_mesh_computes_the_same_logits_and_load(config):
    text = tokens(4, 7)
    want, want_load = compiled(decoder(config), lambda model, tokens: model.with_load(tokens))(text)
    assert (want.shape, want.dtype) == ((4, 7, config.vocab_size), jnp.float32)
    assert want_load.shape == (sum(config.moe_layers), config.moe.num_experts)
    assert want_load.sum(axis=1).tolist() == [text.size * config.moe.top_k] * sum(config.moe_layers)
    for sizes in [(4, 2, 2), (8, 8, 1)]:
        got, load = compiled(decoder(config, *sizes), lambda model, tokens: model.with_load(tokens))(text)
        assert relative_error(got, want) < TOLERANCE, sizes
        np.testing.assert_array_equal(load, want_load, err_msg=str(sizes))


def test_dense_layers_lie_where_moe_layers_says():
    config = DEEPSEEK_LIKE.replace(moe_layers=(True, False, True, False))
    model = decoder(config, 4, 2)
    assert [hasattr(layer, "moe") for layer in model.layers] == [True, False, True, False]
    assert [hasattr(layer, "mlp") for layer in model.layers] == [False, True, False, True]
    assert parameter_shapes(config)["layers.1.mlp.w_gate_up"].shape == (2, 19, 24)
    text = tokens(2, 5)
    logits, load = compiled(model, lambda model, tokens: model.with_load(tokens))(text)
    assert load.shape == (2, 8)
    assert relative_error(logits, compiled(decoder(config), lambda model, tokens: model(tokens))(text)) < TOLERANCE


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_the_embedding(tied):
    model = decoder(MIXTRAL_LIKE.replace(tie_word_embeddings=tied, moe_layers=(True,)), 4, 2)
    names = {".".join(map(str, keys)) for keys, _ in nnx.to_flat_state(nnx.state(model))}
    assert ("head.weight" in names, "embed.table" in names) == (not tied, True)
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 24)).astype(np.float32))
    weight = (model.embed.table if tied else model.head.weight)[...]
    assert relative_error(model.logits(hidden), hidden @ np.asarray(weight)[:29].T) < 1e-6


def inner_equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from inner_equations(inner)


@each_kind
def test_bfloat16_models_carry_bfloat16_between_layers_and_devices(config):
    """Weights, the cache, the residual stream and what is summed over devices; the router and logits are float32."""
    model = decoder(config, 4, 2, dtype=jnp.bfloat16)
    others = {
        ".".join(map(str, keys)): variable.get_value().dtype.name
        for keys, variable in nnx.to_flat_state(nnx.state(model))
        if variable.get_value().dtype != jnp.bfloat16
    }
    routers = [f"layers.{i}.moe.router.weight" for i, has_experts in enumerate(config.moe_layers) if has_experts]
    assert others == dict.fromkeys(routers, "float32")
    cache = model.init_cache(2, 8)
    assert {a.dtype.name for a in jax.tree.leaves(cache)} == {"bfloat16"}

    traced = jax.make_jaxpr(lambda cache: model.hidden(jnp.asarray(tokens(2, 3)), jnp.zeros(2, jnp.int32), cache))(
        cache
    )
    assert {out.dtype.name for out in traced.out_avals} == {"bfloat16"}
    summed = [e.invars[0].aval for e in inner_equations(traced.jaxpr) if "psum" in e.primitive.name]
    full = getattr(config.attention, "qk_norm", None) == "full"
    small = {aval.shape for aval in summed if aval.dtype == jnp.float32}
    assert small == ({(2, 2, 3, 1, 1)} if full else set())  # q's and k's mean squares of each token
    assert len(summed) == 1 + (3 if full else 2) * config.num_layers
    added = [e for e in traced.jaxpr.eqns if e.primitive.name == "add" and e.outvars[0].aval.shape == (2, 3, 24)]
    assert {e.outvars[0].aval.dtype.name for e in added} == {"bfloat16"}
    assert len(added) == 2 * config.num_layers
    assert model.logits(jnp.zeros((2, 24), jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize(
    "config",
    [pytest.param(config, marks=[pytest.mark.slow] * (name != "deepseek_like")) for name, config in KINDS.items()],
    ids=KINDS,
)
def test_gradients_are_those_of_one_device(config):
    """Of every parameter, a sum over devices or not; what lies in padding gets none."""
    text = tokens(4, 6)

    def gradients(*sizes):
        graphdef, state = nnx.split(decoder(config, *sizes))

        def loss(state):
            log_probs = jax.nn.log_softmax(nnx.merge(graphdef, state)(text[:, :-1]))
            return -jnp.mean(jnp.take_along_axis(log_probs, text[:, 1:, None], axis=-1))

        value, grads = jax.jit(jax.value_and_grad(loss), compiler_options=FAST_COMPILE)(state)
        return float(value), {".".join(map(str, k)): np.asarray(v.get_value()) for k, v in nnx.to_flat_state(grads)}

    want_loss, want = gradients(1, 1)
    got_loss, got = gradients(4, 2, 2)
    assert got_loss == pytest.approx(want_loss, rel=1e-5)
    assert got.keys() == want.keys() == parameter_shapes(config).keys()
    errors = {}
    for name, gradient in want.items():
        assert np.linalg.norm(gradient) > 0, name
        real = tuple(slice(n) for n in gradient.shape)
        errors[name] = relative_error(got[name][real], gradient)
        padding = got[name].copy()
        padding[real] = 0
        assert not padding.any(), name
    assert {name: error for name, error in errors.items() if error > 1e-4} == {}


@pytest.mark.parametrize(
    ("config", "sizes", "line"),
    [
        (MIXTRAL_LIKE.replace(moe=MoEConfig(24, 11, num_experts=12, top_k=2)), (8, 8, 1),
         "ep_size is 8; it should be a divisor of the 12 experts"),
        (DEEPSEEK_LIKE, (3, 1, 1), "tp_size is 3; it should be a divisor of the 8 query heads"),
    ],
)  # fmt: skip
def test_a_mesh_that_does_not_divide_the_model_is_refused(config, sizes, line):
    def build():
        return nnx.eval_shape(lambda: Decoder(config, mesh=make_mesh(*sizes), rngs=nnx.Rngs(0)))

    with pytest.raises(ValueError, match=r"tp_size|ep_size") as caught:
        build()
    assert str(caught.value) == line


def test_a_batch_that_replicas_do_not_divide_is_refused():
    model = decoder(MIXTRAL_LIKE.replace(moe_layers=(True,)), 1, 1, 4)
    with pytest.raises(ValueError, match=r"^batch_size is 6; it should be a multiple of dp_size \(4\)$"):
        model.init_cache(6, 8)
