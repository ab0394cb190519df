"""Grouped-query attention's decode kernel without a GPU: interpreted on the CPU with race detection, and lowered for CUDA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.kernels import decode_hopper
from jax_epmoe.models import kv_cache
from jax_epmoe.models.attention import attend


def wgmma_of_registers(multiply):
    """`wgmma`, which the interpreter does not know of registers."""

    def wgmma(accumulator, a, b):
        def from_memory(ref):
            ref[...] = a
            multiply(accumulator, ref, b)

        if isinstance(a, jax.Array):
            pl.run_scoped(from_memory, plgpu.SMEM(a.shape, a.dtype))
        else:
            multiply(accumulator, a, b)

    return wgmma


@pytest.fixture
def interpreted(monkeypatch):
    reset_gpu_interpret_mode_state()
    monkeypatch.setattr(plgpu, "wgmma", wgmma_of_registers(plgpu.wgmma))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield lambda num_sms: monkeypatch.setattr(decode_hopper, "num_sms", lambda: num_sms)
    jax.clear_caches()  # that number is no argument
    reset_gpu_interpret_mode_state()


def inputs(batch: int, heads: int, kv_heads: int, dim: int, length: int, dtype, fp8: bool):
    """Queries, keys, values and sinks; with `fp8` vectors of very different sizes, as a float8 cache has them."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    def cached():
        vectors = normal(batch, length, kv_heads, dim)
        if not fp8:
            return vectors
        return kv_cache.in_float8(vectors * jnp.exp2(2 * normal(batch, length, kv_heads, 1)))

    return normal(batch, heads, dim), cached(), cached(), normal(heads)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "num_sms", "sliding_window", "has_sinks", "dtype", "length", "fp8"),
    [
        (16, 2, 128, 3, None, False, "bfloat16", 304, False),  # a CTA a key head
        (8, 1, 64, 9, None, True, "float16", 304, False),  # several, some of which have no tile
        (16, 2, 64, 3, 100, True, "bfloat16", 304, False),
        (32, 2, 64, 9, 70, False, "bfloat16", 304, False),
        (16, 2, 128, 3, None, False, "bfloat16", 320, True),
        (8, 1, 64, 9, 100, True, "float16", 320, True),
    ],
)
def test_it_attends_as_the_definition(
    heads, kv_heads, dim, num_sms, sliding_window, has_sinks, dtype, length, fp8, interpreted
):
    interpreted(num_sms)
    q, k, v, sinks = inputs(3, heads, kv_heads, dim, length, dtype, fp8)
    sinks = sinks if has_sinks else None
    lengths, scale = jnp.array([1, 64, length], jnp.int32), dim**-0.5
    if fp8:  # beyond a sequence's end nothing was written
        k, v = (
            dataclasses.replace(a, scales=jnp.where(jnp.arange(length)[:, None] < lengths[:, None, None], a.scales, 0))
            for a in (k, v)
        )
    (keys, k_scales), (values, v_scales) = kv_cache.stored(k), kv_cache.stored(v)
    scales = (k_scales, v_scales) if fp8 else None
    got = decode_hopper.decode(q, keys, values, lengths, sinks, scales, scale=scale, sliding_window=sliding_window)
    assert got.dtype == dtype
    q, k, v, got = (kv_cache.read(a, jnp.float32).astype(jnp.float32) for a in (q, k, v, got))
    places = jnp.broadcast_to(jnp.arange(length), (3, length))
    want = attend(q[:, None], k, v, lengths[:, None] - 1, places, scale, sliding_window, sinks)[:, 0]
    assert jnp.linalg.norm(got - want) < 5e-3 * jnp.linalg.norm(want)


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length", "dim", "sliding_window", "fp8"),
    [
        (64, 32, 4, 1024, 128, None, False),
        (1, 64, 4, 4096, 128, None, False),
        (64, 64, 8, 1000, 64, 128, False),
        (64, 32, 4, 1024, 128, None, True),
        (64, 64, 8, 1024, 64, 128, True),
    ],
)
def test_real_sizes_lower_for_cuda(batch, heads, kv_heads, length, dim, sliding_window, fp8, monkeypatch):
    monkeypatch.setattr(decode_hopper, "num_sms", lambda: 132)
    q = jax.ShapeDtypeStruct((batch, heads, dim), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((batch, length, kv_heads, dim), jnp.uint8 if fp8 else jnp.bfloat16)
    lengths, sinks = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((heads,), jnp.bfloat16)
    scales = (jax.ShapeDtypeStruct(kv.shape[:-1], jnp.float32),) * 2 if fp8 else None
    assert decode_hopper.serves(q, kv, kv)
    traced = decode_hopper.decode.trace(q, kv, kv, lengths, sinks, scales, scale=0.1, sliding_window=sliding_window)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_what_is_served():
    def of(heads=32, kv_heads=4, dim=128, dtype=jnp.bfloat16, length=96, cache_dtype=None):
        q = jax.ShapeDtypeStruct((4, heads, dim), dtype)
        kv = jax.ShapeDtypeStruct((4, length, kv_heads, dim), cache_dtype or dtype)
        return decode_hopper.serves(q, kv, kv)

    assert of()
    assert of(heads=64)
    assert not of(heads=16)
    assert not of(heads=128)
    assert not of(dim=96)
    assert not of(dim=256)
    assert not of(length=100)
    assert not of(dtype=jnp.float32)
    assert of(cache_dtype=jnp.uint8, length=128)
    assert not of(cache_dtype=jnp.uint8)
    assert not of(cache_dtype=jnp.uint8, length=128, dtype=jnp.float32)
    assert not of(cache_dtype=jnp.float16)
