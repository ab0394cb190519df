"""MLA's decode kernel without a GPU: interpreted on the CPU with race detection, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernels.test_decode_hopper import wgmma_of_registers

from jax_epmoe.kernels import decode_hopper, decode_splits, mla_hopper, mla_hopper_many_heads
from jax_epmoe.models import kv_cache


def expected(q, latent, lengths, rank, scale):
    q, latent = (np.asarray(a, np.float64) for a in (q, latent))
    out = np.zeros((*q.shape[:2], rank))
    for sequence, length in enumerate(lengths):
        seen = latent[sequence, :length]
        scores = scale * q[sequence] @ seen.T
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[sequence] = p / p.sum(axis=-1, keepdims=True) @ seen[:, :rank]
    return out


def add_product(total, a, b):
    """As the interpreter knows it: neither sums nor factors of `wgmma` in registers."""
    return total + jnp.dot(a.astype(jnp.float32), b[...].astype(jnp.float32))


def set_num_sms(monkeypatch, number: int) -> None:
    for module in (mla_hopper, decode_hopper):
        monkeypatch.setattr(module, "num_sms", lambda: number)
    jax.clear_caches()  # it is no argument


@pytest.fixture
def interpreted(monkeypatch):
    reset_gpu_interpret_mode_state()
    monkeypatch.setattr(mla_hopper_many_heads, "add_product", add_product)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield functools.partial(set_num_sms, monkeypatch)
    reset_gpu_interpret_mode_state()


def float8_inputs(batch: int, heads: int, rank: int, rotated: int, length: int):
    """Queries, latents and rotated keys in float8, vectors of very different sizes."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def cached(size):
        return kv_cache.in_float8(normal(batch, length, size) * jnp.exp2(2 * normal(batch, length, 1)))

    return normal(batch, heads, rank + rotated).astype(jnp.bfloat16), cached(rank), cached(rotated)


@pytest.mark.parametrize(
    ("heads", "rank", "num_ctas", "dtype"), [(16, 256, 3, jnp.bfloat16), (3, 128, 12, jnp.float16)]
)
def test_a_float8_cache_is_read_as_it_is(heads, rank, num_ctas, dtype, interpreted, monkeypatch):
    interpreted(num_ctas)
    monkeypatch.setattr(plgpu, "wgmma", wgmma_of_registers(plgpu.wgmma))
    q, latent, rotated = float8_inputs(3, heads, rank, 64, 192)
    q, lengths = q.astype(dtype), jnp.array([1, 130, 192], jnp.int32)
    assert mla_hopper.serves_float8(q, latent.data, rotated.data)
    scales = latent.scales, rotated.scales
    got = mla_hopper.decode_float8(q, latent.data, rotated.data, scales, lengths, scale=0.05)
    assert got.dtype == dtype
    whole = kv_cache.read_latents((latent, rotated), jnp.float32)
    want = expected(q.astype(jnp.float32), whole, lengths, rank, 0.05)
    assert np.linalg.norm(got.astype(jnp.float32) - want) < 5e-3 * np.linalg.norm(want)


def test_a_float8_cache_lowers_for_cuda(monkeypatch):
    set_num_sms(monkeypatch, 132)
    q, data = jax.ShapeDtypeStruct((64, 16, 576), jnp.bfloat16), jax.ShapeDtypeStruct((64, 1024, 512), jnp.uint8)
    rotated, scales = jax.ShapeDtypeStruct((64, 1024, 64), jnp.uint8), jax.ShapeDtypeStruct((64, 1024), jnp.float32)
    lengths = jax.ShapeDtypeStruct((64,), jnp.int32)
    run = jax.jit(functools.partial(mla_hopper.decode_float8, scale=0.05))
    text = run.trace(q, data, rotated, (scales, scales), lengths).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.parametrize(
    ("heads", "size", "rank", "length", "num_ctas", "dtype"),
    [
        (16, 192, 128, 200, 3, "bfloat16"),  # a CTA a sequence
        (8, 128, 64, 300, 12, "float16"),  # several, some of which have no tile
        (48, 128, 128, 64, 9, "bfloat16"),  # three groups of heads
        (3, 128, 64, 64, 3, "bfloat16"),  # heads that 8 does not divide
        (128, 192, 128, 200, 6, "bfloat16"),  # many heads: two groups
        (64, 192, 128, 300, 12, "float16"),  # in several splits
    ],
)
def test_it_is_a_softmax_over_each_sequences_own_positions(heads, size, rank, length, num_ctas, dtype, interpreted):
    interpreted(num_ctas)
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(3, heads, size)), dtype)
    latent = jnp.asarray(rng.normal(size=(3, length, size)), dtype)
    lengths = [1, 64, length]
    got = mla_hopper.decode(q, latent, jnp.array(lengths, jnp.int32), rank=rank, scale=size**-0.5)
    want = expected(q, latent, lengths, rank, size**-0.5)
    assert got.shape == want.shape
    assert got.dtype == dtype
    assert np.linalg.norm(np.asarray(got, np.float64) - want) < 5e-3 * np.linalg.norm(want)


def test_large_scores_do_not_overflow(interpreted):
    interpreted(1)
    q, latent = jnp.full((1, 8, 64), 100, jnp.bfloat16), jnp.full((1, 70, 64), 100, jnp.bfloat16)
    latent = latent.at[:, 3].set(-100)
    out = mla_hopper.decode(q, latent, jnp.array([70]), rank=64, scale=1.0)
    np.testing.assert_array_equal(out, np.full((1, 8, 64), 100))


@pytest.mark.parametrize(
    ("batch", "heads", "length", "size"),
    [
        (64, 16, 1024, 576),
        (64, 128, 1024, 576),
        (64, 64, 1024, 576),
        (1, 128, 4096, 576),
        (64, 128, 1024, 640),  # more than many heads' kernel has room for
        (7, 8, 776, 576),
        (1, 16, 8, 576),
    ],
)
def test_real_sizes_lower_for_cuda(batch, heads, length, size, monkeypatch):
    set_num_sms(monkeypatch, 132)
    q, latent = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((batch, heads, size), (batch, length, size)))
    assert mla_hopper.serves(q, latent, 512)
    run = jax.jit(lambda q, latent, lengths: mla_hopper.decode(q, latent, lengths, rank=512, scale=0.1))
    lowered = run.trace(q, latent, jax.ShapeDtypeStruct((batch,), jnp.int32)).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(
    ("parts", "length", "best"),
    [(64, 1024, 2), (128, 1024, 1), (1, 1024, 16), (1, 64, 1), (132, 8192, 1), (66, 8192, 2), (1000, 1024, 1)],
)
def test_positions_are_dealt_over_as_many_ctas_as_there_are(parts, length, best):
    assert decode_splits.num_splits(parts, length, 132) == best


def test_what_is_served():
    def of(heads=16, size=576, rank=512, dtype=jnp.bfloat16, length=96):
        q, latent = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((4, heads, size), (4, length, size)))
        return mla_hopper.serves(q, latent, rank)

    assert of()
    assert of(heads=128)
    assert of(heads=4)
    assert not of(length=100)
    assert not of(size=560)
    assert not of(rank=500)
    assert not of(dtype=jnp.float32)
