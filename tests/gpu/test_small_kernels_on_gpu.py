"""The kernels around the grouped GEMM, on a Hopper GPU, against their definitions: rows, top-k, attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import test_decode_hopper, test_mla_hopper, test_plan_hopper, test_rope_hopper, test_route_hopper

from jax_epmoe.config import MoEConfig
from jax_epmoe.kernels import decode_hopper, device, mla_hopper, rope_hopper, route_hopper, rows, rows_hopper
from jax_epmoe.models import attention, kv_cache
from jax_epmoe.moe import router
from jax_epmoe.moe.experts import run_experts
from jax_epmoe.moe.plan import make_plan

pytestmark = pytest.mark.skipif(not device.on_hopper(), reason="needs a Hopper GPU")


def relative_error(got, expected) -> float:
    got, expected = (np.asarray(a.astype(jnp.float32), np.float64) for a in (got, expected))
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def random_lengths(batch: int, length: int) -> jax.Array:
    """The last one is all of it."""
    return jnp.asarray(np.random.default_rng(0).integers(1, length + 1, batch), jnp.int32).at[-1].set(length)


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "first", "local"),
    [(4096, 6, 160, 40, 20), (2048, 8, 128, 0, 128), (50000, 2, 300, 0, 300), (64, 8, 64, 0, 64), (3, 1, 8, 4, 4)],
)
@pytest.mark.parametrize("width", [1536, 2880])
def test_rows_go_to_their_experts_and_back(tokens, top_k, experts, first, local, width):
    scores = normal(0, tokens, experts, dtype=jnp.float32)
    ids = jax.lax.top_k(scores, top_k)[1].astype(jnp.int32)
    plan = jax.jit(make_plan, static_argnums=(1, 2))(ids, first, local)
    flat = np.asarray(ids).reshape(-1)
    wanted = np.flatnonzero((flat >= first) & (flat < first + local))
    wanted = wanted[np.argsort(flat[wanted], kind="stable")]
    np.testing.assert_array_equal(plan.row_pair[: len(wanted)], wanted)
    assert int(plan.group_sizes.sum()) == len(wanted)

    x, weights = normal(1, tokens, width), jax.random.uniform(jax.random.key(2), (tokens, top_k))
    base = normal(3, tokens, width, dtype=jnp.float32)
    row_token = plan.row_pair // top_k
    dealt = rows.dispatch(x, plan.pair_row, len(row_token))
    assert dealt is not None
    gathered = rows_hopper.gather(x, row_token, jnp.int32(len(wanted)))
    expected = x[row_token]
    for got in (dealt, gathered):
        np.testing.assert_array_equal(got[: len(wanted)], expected[: len(wanted)])
    y = dealt.at[len(wanted) :].set(jnp.nan)
    half = base.astype(jnp.bfloat16)
    for start, dtype in ((None, jnp.bfloat16), (base, jnp.bfloat16), (base, jnp.float32), (half, jnp.bfloat16)):
        got = rows.combine(y, plan.pair_row, weights, start, dtype)
        expected = rows._reference(jnp.float32, y, plan.pair_row, weights, start)
        np.testing.assert_allclose(got.astype(jnp.float32), expected, rtol=5e-3, atol=1e-2)


@pytest.mark.parametrize("draw", ["uniform", "one", "zipf"])
@pytest.mark.parametrize(
    ("pairs", "experts", "first", "local"),
    [
        (8, 64, 0, 64),
        (192, 160, 20, 20),
        (512, 128, 0, 128),
        (2048, 256, 64, 32),
        (8008, 128, 0, 128),
        (12288, 160, 20, 20),
        (32768, 128, 0, 128),
        (33024, 64, 0, 64),
        (49152, 160, 140, 20),
        (65536, 256, 0, 256),
    ],
)
def test_pairs_are_ordered_as_by_a_stable_sort(pairs, experts, first, local, draw):
    rng = np.random.default_rng(pairs)
    ids = {
        "uniform": lambda: rng.integers(0, experts, pairs),
        "one": lambda: np.full(pairs, first + local - 1),
        "zipf": lambda: np.minimum(rng.zipf(1.3, pairs) - 1, experts),
    }[draw]()
    for _ in range(3):
        test_plan_hopper.check_order(ids, first, local)


@pytest.mark.parametrize("tokens", [5000, 64, 1])
@pytest.mark.parametrize("case", test_route_hopper.CASES.values(), ids=test_route_hopper.CASES.keys())
def test_the_router_chooses_as_in_xla(case, tokens, monkeypatch):
    config = test_route_hopper.config_of(case)
    logits = normal(0, tokens, config.num_experts, dtype=jnp.float32)
    bias = normal(1, config.num_experts, dtype=jnp.float32) / 8 if config.correction_bias else None
    mask = None if tokens == 1 else normal(2, tokens) > -1
    values, ids = route_hopper.choose(logits, bias, mask, config)
    monkeypatch.setattr(router, "on_hopper", lambda: False)
    expected, expected_ids = jax.jit(router._choose, static_argnums=3)(logits, bias, mask, config)
    same = np.asarray(ids == expected_ids).all(axis=1)
    assert np.mean(same) > 0.998  # scores that are equal but for rounding
    np.testing.assert_allclose(values[same], expected[same], rtol=1e-5)


def test_many_tokens_are_routed_as_in_float32():
    config = MoEConfig(hidden_size=2048, intermediate_size=8, num_experts=160, top_k=6, n_group=8, topk_group=3)
    x, weight = normal(0, 4096, 2048), normal(1, 160, 2048).astype(jnp.float32) / 45
    weights, ids = jax.jit(router.route, static_argnums=3)(x, weight, None, config)
    expected_weights, expected_ids = jax.jit(router.route, static_argnums=3)(
        x.astype(jnp.float32), weight, None, config
    )
    assert np.mean(np.asarray(ids) != np.asarray(expected_ids)) < 2e-3  # scores that are equal but for rounding
    same = np.asarray(ids == expected_ids).all(axis=1)
    np.testing.assert_allclose(weights[same], expected_weights[same], rtol=1e-4)


@pytest.mark.parametrize(
    ("batch", "heads", "length"), [(64, 16, 1024), (1, 16, 4096), (7, 128, 776), (200, 8, 64), (64, 128, 1024)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_latent_attention_of_a_token(batch, heads, length, dtype):
    q, latent = normal(0, batch, heads, 576, dtype=dtype), normal(1, batch, length, 576, dtype=dtype)
    lengths = random_lengths(batch, length)
    got = jax.jit(lambda *args: mla_hopper.decode(*args, rank=512, scale=0.05))(q, latent, lengths)
    latent = jnp.where((jnp.arange(length) < lengths[:, None])[..., None], latent, 0)
    positions = attention._key_positions(batch, length)
    one_head = latent[:, :, None].astype(jnp.float32)
    expected = attention.attend(
        q[:, None].astype(jnp.float32), one_head, one_head[..., :512], lengths[:, None] - 1, positions, 0.05
    )
    assert relative_error(got, expected[:, 0]) < 5e-3


def check_attention_of_a_token(q, k, v, lengths, sinks, sliding_window):
    """Of `q [B, heads, D]`; k and v as a cache has them."""
    (keys, k_scales), (values, v_scales) = kv_cache.stored(k), kv_cache.stored(v)
    scales = None if k_scales is None else (k_scales, v_scales)
    decode = functools.partial(decode_hopper.decode, scale=0.1, sliding_window=sliding_window)
    got, again = (decode(q, keys, values, lengths, sinks, scales) for _ in range(2))
    q, k, v = (kv_cache.read(a, jnp.float32).astype(jnp.float32) for a in (q[:, None], k, v))
    places = attention._key_positions(*k.shape[:2])
    expected = attention.attend(q, k, v, lengths[:, None] - 1, places, 0.1, sliding_window, sinks)
    assert relative_error(got, expected[:, 0]) < 5e-3
    assert bool(jnp.all(got == again))


@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("sliding_window", [None, 128])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "dim", "length"),
    [(64, 32, 4, 128, 1024), (1, 64, 4, 128, 5000), (7, 64, 8, 64, 776), (300, 16, 2, 64, 72)],
)
def test_grouped_query_attention_of_a_token(batch, heads, kv_heads, dim, length, sliding_window, with_sinks):
    q, k, v = (
        normal(0, batch, heads, dim),
        normal(1, batch, length, kv_heads, dim),
        normal(2, batch, length, kv_heads, dim),
    )
    sinks = normal(3, heads) if with_sinks else None
    check_attention_of_a_token(q, k, v, random_lengths(batch, length), sinks, sliding_window)


@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("sliding_window", [None, 128])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "dim", "length"),
    [(64, 32, 4, 128, 1024), (1, 64, 4, 128, 4992), (7, 64, 8, 64, 768), (300, 16, 2, 64, 128)],
)
def test_a_token_attends_to_a_float8_cache(batch, heads, kv_heads, dim, length, sliding_window, with_sinks):
    q, k, v, sinks = test_decode_hopper.inputs(batch, heads, kv_heads, dim, length, jnp.bfloat16, fp8=True)
    sinks = sinks if with_sinks else None
    lengths = random_lengths(batch, length)
    written = jnp.arange(length)[:, None] < lengths[:, None, None]
    k, v = (dataclasses.replace(a, scales=jnp.where(written, a.scales, 0)) for a in (k, v))
    check_attention_of_a_token(q, k, v, lengths, sinks, sliding_window)


@pytest.mark.parametrize(("batch", "heads", "length"), [(64, 16, 1024), (1, 16, 4096), (7, 5, 768), (300, 32, 128)])
def test_a_token_attends_to_float8_latents(batch, heads, length):
    q, latent, rotated = test_mla_hopper.float8_inputs(batch, heads, 512, 64, length)
    lengths = random_lengths(batch, length)
    written = jnp.arange(length) < lengths[:, None]
    latent, rotated = (dataclasses.replace(a, scales=jnp.where(written, a.scales, 0)) for a in (latent, rotated))
    arrays = q, latent.data, rotated.data, (latent.scales, rotated.scales), lengths
    got, again = (mla_hopper.decode_float8(*arrays, scale=0.05) for _ in range(2))
    whole = kv_cache.read_latents((latent, rotated), jnp.float32)[:, :, None]
    places = attention._key_positions(batch, length)
    wide = q[:, None].astype(jnp.float32)
    expected = attention.attend(wide, whole, whole[..., :512], lengths[:, None] - 1, places, 0.05)
    assert relative_error(got, expected[:, 0]) < 5e-3
    assert bool(jnp.all(got == again))


@pytest.mark.parametrize("fp8", [False, True], ids=["", "float8"])
@pytest.mark.parametrize("with_norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 4, 128), (64, 8, 64), (16, 16, 128), (4, 4, 512)])
def test_what_lies_before_a_tokens_attention(heads, kv_heads, dim, with_norm, fp8):
    arrays = test_rope_hopper.inputs(heads, kv_heads, dim, jnp.bfloat16, with_norm, fp8, batch=64, length=100)
    got = jax.tree.leaves(rope_hopper.rotate_into_cache(*arrays, eps=test_rope_hopper.EPS, dtype=jnp.bfloat16))
    for one, other in zip(got, test_rope_hopper.expected(*arrays, jnp.bfloat16), strict=True):
        one, other = test_rope_hopper.numbers(one), test_rope_hopper.numbers(other)
        np.testing.assert_allclose(one, other, rtol=0.13 if fp8 else 1e-2, atol=1e-5)
        assert np.mean(one == other) > 0.99


@pytest.mark.parametrize("expected_rows", [None, 1000], ids=["of tokens", "of rows"])
@pytest.mark.parametrize("tokens", [1024, 1001])  # 1001: the last chunk of tokens overlaps the one before
def test_chunks_give_what_the_whole_gives(tokens, expected_rows):
    x, w_gate_up, w_down = normal(0, tokens, 512), normal(1, 16, 2, 256, 512) / 23, normal(2, 16, 512, 256) / 16
    weights = jax.nn.softmax(normal(3, tokens, 8, dtype=jnp.float32))
    ids = jax.lax.top_k(normal(4, tokens, 16, dtype=jnp.float32), 8)[1]
    plan, base = make_plan(ids, 0, 16), normal(5, tokens, 512)

    def run(chunk_rows):
        run = jax.jit(lambda *arrays: run_experts(*arrays, "silu", "hopper", chunk_rows, expected_rows))
        return run(x, w_gate_up, w_down, weights, plan, base)

    whole, chunked = run(8 * 1024), run(2048)
    assert relative_error(chunked, whole) < 5e-3


@pytest.mark.parametrize("has_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dims", "length", "keys"),
    [
        (16, 16, (128, 128), 1, 640),
        (32, 4, (128, 128), 1, 640),
        (32, 4, (128, 128), 64, 640),
        (16, 16, (192, 128), 256, None),
        (12, 4, (64, 64), 333, None),
        (64, 8, (64, 64), 1, 640),  # gpt-oss
    ],
)
def test_each_kernel_sees_what_the_definition_sees(heads, kv_heads, dims, length, keys, window, has_sinks):
    cached, keys = keys is not None, keys or length
    q, k, v = (
        normal(0, 5, length, heads, dims[0]),
        normal(1, 5, keys, kv_heads, dims[0]),
        normal(2, 5, keys, kv_heads, dims[1]),
    )
    start = jnp.asarray([0, 1, 130, 400, keys - length] if cached else [0] * 5)
    positions = start[:, None] + jnp.arange(length)
    sinks = jnp.linspace(-2, 8, heads) if has_sinks else None  # with so few keys, nothing to nearly all

    @jax.jit
    def both(q, k, v):
        key_positions = attention._key_positions(5, keys) if cached else positions
        got = attention.causal_attention(q, k, v, positions, 0.1, cached=cached, sliding_window=window, sinks=sinks)
        f32 = (a.astype(jnp.float32) for a in (q, k, v))
        return got, attention.attend(*f32, positions, key_positions, 0.1, window, sinks)

    got, expected = both(q, k, v)
    is_ours = cached and length == 1 and decode_hopper.serves(q[:, 0], k, v)
    assert ("cudnn" in both.lower(q, k, v).as_text()) != is_ours
    assert relative_error(got, expected) < 6e-3
