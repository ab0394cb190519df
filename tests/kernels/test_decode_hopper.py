"""Grouped-query attention's decode kernel without a GPU: interpreted on the CPU with race detection, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.kernels import decode_hopper
from jax_epmoe.models.attention import attend


@pytest.fixture
def interpreted(monkeypatch):
    reset_gpu_interpret_mode_state()
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield lambda num_sms: monkeypatch.setattr(decode_hopper, "num_sms", lambda: num_sms)
    jax.clear_caches()  # that number is no argument
    reset_gpu_interpret_mode_state()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "num_sms", "sliding_window", "sinks", "dtype"),
    [
        (16, 2, 128, 3, None, False, "bfloat16"),  # a CTA a key head
        (8, 1, 64, 9, None, True, "float16"),  # several, some of which have no tile
        (16, 2, 64, 3, 100, True, "bfloat16"),
        (32, 2, 64, 9, 70, False, "bfloat16"),
    ],
)
def test_it_attends_as_the_definition(heads, kv_heads, dim, num_sms, sliding_window, sinks, dtype, interpreted):
    interpreted(num_sms)
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    q, k, v = normal(3, heads, dim), normal(3, 304, kv_heads, dim), normal(3, 304, kv_heads, dim)
    sinks = jnp.asarray(rng.normal(size=heads), jnp.float32) if sinks else None
    lengths, scale = jnp.array([1, 64, 304], jnp.int32), dim**-0.5
    got = decode_hopper.decode(q, k, v, lengths, sinks, scale=scale, sliding_window=sliding_window)
    assert got.dtype == dtype
    q, k, v, got = (a.astype(jnp.float32) for a in (q, k, v, got))
    places = jnp.broadcast_to(jnp.arange(304), (3, 304))
    want = attend(q[:, None], k, v, lengths[:, None] - 1, places, scale, sliding_window, sinks)[:, 0]
    assert jnp.linalg.norm(got - want) < 5e-3 * jnp.linalg.norm(want)


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length", "dim", "sliding_window"),
    [(64, 32, 4, 1024, 128, None), (1, 64, 4, 4096, 128, None), (64, 64, 8, 1000, 64, 128)],
)
def test_real_sizes_lower_for_cuda(batch, heads, kv_heads, length, dim, sliding_window, monkeypatch):
    monkeypatch.setattr(decode_hopper, "num_sms", lambda: 132)
    q, kv = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((batch, heads, dim), (batch, length, kv_heads, dim))
    )
    lengths, sinks = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((heads,), jnp.bfloat16)
    assert decode_hopper.serves(q, kv, kv)
    traced = decode_hopper.decode.trace(q, kv, kv, lengths, sinks, scale=0.1, sliding_window=sliding_window)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_what_is_served():
    def of(heads=32, kv_heads=4, dim=128, dtype=jnp.bfloat16, length=96):
        q, kv = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((4, heads, dim), (4, length, kv_heads, dim)))
        return decode_hopper.serves(q, kv, kv)

    assert of()
    assert of(heads=64)
    assert not of(heads=16)
    assert not of(heads=128)
    assert not of(dim=96)
    assert not of(dim=256)
    assert not of(length=100)
    assert not of(dtype=jnp.float32)
