"""Attention against NumPy, one query at a time; both kinds on meshes with as many, fewer and more heads than devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from small_models import compiled, lively, numpy_attend, numpy_norm, numpy_rotate, relative_error

from jax_epmoe import make_mesh
from jax_epmoe.config import GQAConfig, MLAConfig, RopeConfig
from jax_epmoe.models import attention as attention_module
from jax_epmoe.models.attention import GQA, MLA, attend, causal_attention
from jax_epmoe.models.blocks import rope_frequencies, rope_table

HIDDEN, EPS = 20, 1e-5
ROPE = RopeConfig(theta=100.0, attention_factor=1.2, softmax_scale_factor=1.3)
SIZES = [(1, 1, 1), (2, 1, 2), (4, 4, 1), (8, 2, 1)]
on_meshes = pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("sinks", [None, np.array([-9.0, -1.0, 0.0, 0.5, 2.0, 50.0])], ids=["", "sinks"])
@pytest.mark.parametrize("window", [None, 1, 3], ids=lambda w: f"window {w}")
@pytest.mark.parametrize("kv_heads", [1, 2, 6], ids=lambda n: f"{n} kv heads")
def test_attend_is_a_softmax_over_what_each_query_may_see(window, kv_heads, sinks):
    q, k, v = random(2, 4, 6, 5), random(2, 9, kv_heads, 5, seed=1), random(2, 9, kv_heads, 3, seed=2)
    query_positions = np.array([[0, 3, 4, 8], [5, 5, 1, 2]])
    key_positions = np.array([[*range(9)], [4, 2, 0, 1, 5, 7, 3, 8, 6]])  # the second in another order
    of_jax = None if sinks is None else jnp.asarray(sinks, jnp.float32)
    got = attend(*map(jnp.asarray, (q, k, v, query_positions, key_positions)), 0.7, window, of_jax)
    want = numpy_attend(q, k, v, query_positions, key_positions, 0.7, window, sinks)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_attend_keeps_vs_dtype_and_sums_in_float32():
    q, k, v = (jnp.asarray(random(1, 300, 2, 64, seed=i), jnp.bfloat16) for i in range(3))
    positions = jnp.arange(300)[None]
    got = attend(q, k, v, positions, positions, 0.125)
    want = numpy_attend(
        *(np.asarray(a, np.float64) for a in (q, k, v)), np.asarray(positions), np.asarray(positions), 0.125
    )
    assert got.dtype == jnp.bfloat16
    assert relative_error(got, want) < 5e-3


@pytest.mark.parametrize("fitting", [1, 2, 3, 7], ids="{} queries at a time".format)
def test_attend_is_the_same_for_a_few_queries_at_a_time(fitting, monkeypatch):
    rng = np.random.default_rng(3)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, length, heads, 4)), jnp.float32) for length, heads in ((7, 4), (9, 2), (9, 2))
    )
    positions = jnp.asarray(rng.integers(0, 9, (2, 7))), jnp.broadcast_to(jnp.arange(9), (2, 9))
    sinks = jnp.asarray(rng.normal(size=4), jnp.float32)
    whole = attend(q, k, v, *positions, 0.5, 6, sinks)
    monkeypatch.setattr(attention_module, "_SCORES_BYTES", fitting * 4 * 2 * 4 * 9)
    np.testing.assert_allclose(attend(q, k, v, *positions, 0.5, 6, sinks), whole, rtol=1e-6, atol=1e-7)


def test_the_memory_of_scores_is_bounded():
    shapes = [(2, 2048, 8, 16), (2, 4096, 2, 16), (2, 4096, 2, 16)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    positions = [jax.ShapeDtypeStruct((2, length), jnp.int32) for length in (2048, 4096)]
    compiled = jax.jit(lambda *args: attend(*args, 0.5)).lower(*arrays, *positions).compile()
    assert 2 * attention_module._SCORES_BYTES == 4 * 2 * 8 * 2048 * 4096
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * attention_module._SCORES_BYTES


def test_attend_is_finite_for_scores_of_any_size():
    q, k = jnp.full((1, 2, 1, 4), 1e4), jnp.full((1, 2, 1, 4), -1e4)
    out = attend(q, k, jnp.ones((1, 2, 1, 4)), jnp.arange(2)[None], jnp.arange(2)[None], 1.0)
    np.testing.assert_array_equal(out, np.ones((1, 2, 1, 4)))


@pytest.fixture
def on_a_gpu(monkeypatch):
    """What would go to cuDNN goes to JAX's own implementation of the same function; its calls are returned."""
    calls = []

    def recorded(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        calls.append(kwargs)
        return library(*args, implementation="xla", **kwargs)

    def underneath(q, k, v, bias, mask, q_lengths, kv_lengths, *, mask_type, sliding_window_length, **kwargs):
        """What JAX keeps to itself, from its public function in float32."""
        calls.append(kwargs)
        dim, window = v.shape[-1], sliding_window_length
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, q.shape[-1] - dim)))
        found = library(
            *(a.astype(jnp.float32) for a in (q, k, v)), bias, mask,
            query_seq_lengths=q_lengths, key_value_seq_lengths=kv_lengths, implementation="xla",
            is_causal=mask_type == cudnn.MaskType.CAUSAL, local_window_size=window and (window - 1, 0), **kwargs,
        )  # fmt: skip
        if not kwargs["return_residual"]:
            return found[..., :dim].astype(q.dtype)
        out, log_sums = found
        return out[..., :dim].astype(q.dtype), jnp.swapaxes(log_sums, 1, 2)

    library = jax.nn.dot_product_attention
    monkeypatch.setattr(cudnn, "dot_product_attention", underneath)
    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    monkeypatch.setattr(attention_module, "compute_capability", lambda: 80)
    return calls


@pytest.mark.parametrize("sinks", [None, jnp.array([-9.0, -1.0, 1.0, 4.0])], ids=["", "sinks"])
@pytest.mark.parametrize("window", [None, 3], ids=lambda w: f"window {w}")
@pytest.mark.parametrize(
    ("starts", "length", "cached"),
    [([0, 0], 7, False), ([4, 0], 3, True), ([5, 8], 1, True)],
    ids=["a whole sequence", "a chunk", "a token"],
)
def test_the_library_sees_what_the_definition_sees(starts, length, cached, window, sinks, on_a_gpu):
    num_keys = 9 if cached else length
    shapes = ((2, length, 4, 16), (2, num_keys, 2, 16), (2, num_keys, 2, 8))
    q, k, v = (jnp.asarray(random(*shape, seed=i), jnp.bfloat16) for i, shape in enumerate(shapes))
    positions = jnp.asarray(starts)[:, None] + jnp.arange(length)
    got = causal_attention(q, k, v, positions, 0.3, cached=cached, sliding_window=window, sinks=sinks)
    key_positions = jnp.broadcast_to(jnp.arange(9), (2, 9)) if cached else positions
    want = attend(q, k, v, positions, key_positions, 0.3, window, sinks)
    assert len(on_a_gpu) == 1
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert relative_error(got, want) < 1e-2


@pytest.mark.parametrize(("version", "padded"), [(90800, True), (91000, False)])
def test_smaller_values_are_padded_where_cudnn_does_not_know_them(version, padded, on_a_gpu, monkeypatch):
    monkeypatch.setattr(attention_module, "on_hopper", lambda: True)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: version)
    q, k, v = (jnp.asarray(random(2, 7, 4, dim, seed=i), jnp.bfloat16) for i, dim in enumerate((24, 24, 16)))
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    got = causal_attention(q, k, v, positions, 0.3, cached=False)
    want = attend(q, k, v, positions, positions, 0.3)
    (call,) = on_a_gpu
    assert ("return_residual" not in call) == padded  # of the public function, which pads, or of what is underneath
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert relative_error(got, want) < 1e-2


def test_what_the_library_does_not_serve_goes_to_the_definition(on_a_gpu, monkeypatch):
    def of(dim, dtype=jnp.bfloat16, v_dim=None):
        shapes = ((1, 2, 2, dim), (1, 2, 2, dim), (1, 2, 2, v_dim or dim))
        arrays = (jnp.ones(shape, dtype) for shape in shapes)
        return causal_attention(*arrays, jnp.arange(2)[None], 1.0, cached=False)

    of(20)
    of(136)
    of(16, jnp.float32)
    of(16, v_dim=24)
    assert on_a_gpu == []
    monkeypatch.setattr(attention_module, "on_hopper", lambda: True)
    of(136)
    assert len(on_a_gpu) == 1


def run(attention, x, rope, positions):
    def call(attention, x, positions):
        return attention(x, rope_table(rope, attention.config.rope_dim, positions), positions, None)[0]

    return compiled(attention, call)(x, positions)


def weights_of(attention):
    """Every parameter in float64, by its dotted name."""
    return {
        ".".join(map(str, keys)): np.asarray(variable.get_value(), np.float64)
        for keys, variable in nnx.to_flat_state(nnx.state(attention, nnx.Param))
    }


def numpy_gqa(w, config: GQAConfig, rope: RopeConfig, x, positions):
    q, k, v = (np.einsum("bsh,ndh->bsnd", x, w[name]) for name in "qkv")
    if config.qkv_bias:
        q, k, v = (a + w[f"{name}_bias"] for a, name in ((q, "q"), (k, "k"), (v, "v")))
    if config.qk_norm == "head":
        q, k = (numpy_norm(a, w[name], EPS) for a, name in ((q, "q_norm.scale"), (k, "k_norm.scale")))
    elif config.qk_norm == "full":
        q, k = (
            numpy_norm(a.reshape(*a.shape[:2], -1), w[name], EPS).reshape(a.shape)
            for a, name in ((q, "q_norm.scale"), (k, "k_norm.scale"))
        )
    if config.clip_qkv is not None:
        q, k, v = (np.clip(a, -config.clip_qkv, config.clip_qkv) for a in (q, k, v))
    angles, dim = positions[..., None] * rope_frequencies(rope, config.rope_dim), config.rope_dim
    q, k = (
        np.concatenate(
            [rope.attention_factor * numpy_rotate(a[..., :dim], angles, rope.interleaved), a[..., dim:]], axis=-1
        )
        for a in (q, k)
    )
    scale = config.head_dim**-0.5 * rope.softmax_scale_factor
    out = numpy_attend(q, k, v, positions, positions, scale, config.sliding_window, w.get("sinks"))
    return np.einsum("bsnd,hnd->bsh", out, w["o"]) + w.get("o_bias", 0.0)


@on_meshes
@pytest.mark.parametrize(
    "changes",
    [
        {"num_kv_heads": 8},
        {"num_kv_heads": 2, "sliding_window": 2},
        {"num_kv_heads": 2, "qk_norm": "head"},
        {"num_kv_heads": 2, "qkv_bias": True},
        {"num_kv_heads": 2, "rotary_dim": 4},
        {"num_kv_heads": 2, "sliding_window": 3, "sinks": True, "o_bias": True},
        {"num_kv_heads": 4, "qk_norm": "full", "clip_qkv": 1.0},
        {"num_kv_heads": 1, "qk_norm": "full"},
        {"num_kv_heads": 2, "qk_norm": "head", "clip_qkv": 0.8},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_gqa_is_its_formula_on_every_mesh(sizes, changes):
    config = GQAConfig(**({"num_heads": 8, "head_dim": 6} | changes))
    attention = lively(GQA, config, ROPE, HIDDEN, EPS, mesh=make_mesh(*sizes))
    x, positions = random(2, 5, HIDDEN), np.array([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    want = numpy_gqa(weights_of(attention), config, ROPE, x, positions)
    assert relative_error(run(attention, x, ROPE, positions), want) < 1e-5


def numpy_mla(w, config: MLAConfig, rope: RopeConfig, x, positions):
    nope, rank = config.qk_nope_head_dim, config.kv_lora_rank
    if config.q_lora_rank is None:
        q = np.einsum("bsh,ndh->bsnd", x, w["q"])
    else:
        q = np.einsum(
            "bsr,ndr->bsnd", numpy_norm(x @ w["q_a"].T, w["q_a_norm.scale"], config.latent_norm_eps), w["q_b"]
        )
    kv_a = x @ w["kv_a"].T
    latent = numpy_norm(kv_a[..., :rank], w["kv_a_norm.scale"], config.latent_norm_eps)
    kv = np.einsum("blr,ndr->blnd", latent, w["kv_b"])
    angles = positions[..., None] * rope_frequencies(rope, config.qk_rope_head_dim)
    k_rope = rope.attention_factor * numpy_rotate(kv_a[..., None, rank:], angles, rope.interleaved)
    q_rope = rope.attention_factor * numpy_rotate(q[..., nope:], angles, rope.interleaved)
    q = np.concatenate([q[..., :nope], q_rope], axis=-1)
    k = np.concatenate([kv[..., :nope], np.broadcast_to(k_rope, (*kv.shape[:3], k_rope.shape[-1]))], axis=-1)
    out = numpy_attend(q, k, kv[..., nope:], positions, positions, q.shape[-1] ** -0.5 * rope.softmax_scale_factor)
    return np.einsum("bsnd,hnd->bsh", out, w["o"])


MLA_CONFIG = MLAConfig(num_heads=8, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)


@on_meshes
@pytest.mark.parametrize("q_lora_rank", [None, 14], ids=["q", "q_lora"])
def test_mla_is_its_formula_on_every_mesh_expanded_and_absorbed(sizes, q_lora_rank):
    """Four tokens with a cache take the expanded form, the fifth, alone, the absorbed one."""
    config = dataclasses.replace(MLA_CONFIG, q_lora_rank=q_lora_rank)
    rope = dataclasses.replace(ROPE, interleaved=True)
    attention = lively(MLA, config, rope, HIDDEN, mesh=make_mesh(*sizes))

    def call(attention, x, positions, cache):
        return attention(x, rope_table(rope, config.qk_rope_head_dim, positions), positions, cache)

    x, positions = random(2, 5, HIDDEN), np.array([[0, 1, 2, 3, 4]] * 2)
    step = compiled(attention, call)
    expanded, cache = step(x[:, :4], positions[:, :4], attention.init_cache(2, 6, jnp.float32))
    absorbed, _ = step(x[:, 4:], positions[:, 4:], cache)
    want = numpy_mla(weights_of(attention), config, rope, x, positions)
    errors = {
        "expanded": relative_error(expanded, want[:, :4]),
        "absorbed": relative_error(absorbed, want[:, 4:]),
    }
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize(("sizes", "heads_cached"), [((2, 1, 2), 2), ((8, 2, 1), 8)], ids=["2x1x2", "8x2x1"])
def test_gqas_cache_holds_a_head_a_device_at_least_and_splits_sequences_over_replicas(sizes, heads_cached):
    config = GQAConfig(num_heads=8, num_kv_heads=2, head_dim=6)
    attention = lively(GQA, config, ROPE, HIDDEN, EPS, mesh=make_mesh(*sizes))
    for cached in attention.init_cache(4, 7, jnp.bfloat16):
        assert (cached.shape, cached.dtype) == ((4, 7, heads_cached, 6), jnp.bfloat16)
        assert {s.data.shape for s in cached.addressable_shards} == {(4 // sizes[2], 7, heads_cached // sizes[0], 6)}


def test_mlas_cache_holds_one_latent_and_one_rotated_key_a_position():
    attention = lively(MLA, MLA_CONFIG, ROPE, HIDDEN, mesh=make_mesh(4, 2, 2))
    (cached,) = attention.init_cache(4, 7, jnp.float32)
    assert cached.shape == (4, 7, MLA_CONFIG.kv_lora_rank + MLA_CONFIG.qk_rope_head_dim)
    assert {s.data.shape for s in cached.addressable_shards} == {(2, 7, 14)}


def test_heads_are_dealt_and_small_matrices_are_on_every_device():
    mesh = make_mesh(8, 4)
    gqa = lively(GQA, GQAConfig(8, 2, 6), ROPE, HIDDEN, EPS, mesh=mesh)
    mla = lively(MLA, MLA_CONFIG, ROPE, HIDDEN, mesh=mesh)
    held = {
        name: array.addressable_shards[0].data.shape
        for name, array in {
            "q": gqa.q[...], "k": gqa.k[...], "o": gqa.o[...], "kv_a": mla.kv_a[...], "kv_b": mla.kv_b[...],
        }.items()
    }  # fmt: skip
    assert held == {"q": (1, 6, 20), "k": (2, 6, 20), "o": (20, 1, 6), "kv_a": (14, 20), "kv_b": (1, 11, 10)}


@pytest.mark.parametrize(
    ("config", "sizes", "line"),
    [
        (GQAConfig(6, 2, 4), (4, 1, 1), "tp_size is 4; it should be a divisor of the 6 query heads"),
        (GQAConfig(12, 3, 4), (4, 1, 1), "tp_size is 4; it should be a divisor or a multiple of the 3 KV heads"),
        (GQAConfig(8, 2, 5), (1, 1, 1), "head_dim is 5; it should be even: rotary embedding turns pairs"),
        (dataclasses.replace(MLA_CONFIG, num_heads=6), (4, 1, 1), "tp_size is 4; it should be a divisor of the 6 query heads"),
        (dataclasses.replace(MLA_CONFIG, qk_rope_head_dim=3), (1, 1, 1),
         "qk_rope_head_dim is 3; it should be even: rotary embedding turns pairs"),
    ],
)  # fmt: skip
def test_heads_that_a_mesh_cannot_split_are_refused(config, sizes, line):
    new = {"mesh": make_mesh(*sizes), "dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    with pytest.raises(ValueError, match=f"^{line}$"):
        GQA(config, ROPE, HIDDEN, EPS, **new) if isinstance(config, GQAConfig) else MLA(config, ROPE, HIDDEN, **new)


def test_attention_runs_outside_jit_too():
    attention = lively(GQA, GQAConfig(4, 2, 6), ROPE, HIDDEN, EPS, mesh=make_mesh(2))
    x, positions = jnp.asarray(random(1, 3, HIDDEN)), jnp.arange(3)[None]
    eager = attention(x, rope_table(ROPE, 6, positions), positions, None)[0]
    assert relative_error(eager, run(attention, x, ROPE, positions)) < 1e-6
    assert isinstance(eager, jax.Array)
