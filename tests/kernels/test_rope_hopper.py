"""The kernel between a decode step's QKV product and attention, without a GPU: interpreted on the CPU, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.kernels import rope_hopper
from jax_epmoe.models import kv_cache
from jax_epmoe.models.blocks import rotate
from jax_epmoe.quant import FP8, quantize

EPS = 1e-6


def inputs(heads: int, kv_heads: int, dim: int, dtype, with_norm: bool, fp8: bool, batch: int = 5, length: int = 16):
    rng = np.random.default_rng(0)

    def normal(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.normal(size=shape), dtype)

    q, k, v = normal(batch, heads, dim), normal(batch, kv_heads, dim), normal(batch, kv_heads, dim)
    angles = normal(batch, dim // 2)
    positions = jnp.asarray(rng.permutation(length + 1)[:batch], jnp.int32).at[0].set(length)  # the first is dropped
    caches = tuple(normal(batch, length, kv_heads, dim, dtype=dtype) for _ in range(2))
    if fp8:
        vectors = [quantize(cache, "token") for cache in caches]
        caches = tuple(jax.lax.bitcast_convert_type(a.values, jnp.uint8) for a in vectors)
        caches += tuple(a.scales for a in vectors)
    scales = (normal(dim, dtype=dtype), normal(dim, dtype=dtype)) if with_norm else None
    return q, k, v, (jnp.cos(angles), jnp.sin(angles)), positions, caches, scales


def expected(q, k, v, table, positions, caches, scales, dtype):
    """All that the kernel returns, in a row."""

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPS) * scale.astype(jnp.float32)

    if scales is not None:
        q, k = norm(q, scales[0]), norm(k, scales[1])
    q, k, v = (a[:, None] for a in (q, k, v))
    q, k = (rotate(a, tuple(t[:, None] for t in table), False) for a in (q, k))
    if len(caches) == 4:
        caches = kv_cache.Float8Vectors(caches[0], caches[2]), kv_cache.Float8Vectors(caches[1], caches[3])
    k, v = (
        kv_cache.write(cache, new.astype(dtype), positions[:, None]) for cache, new in zip(caches, (k, v), strict=True)
    )
    fp8 = (k.data, v.data, k.scales, v.scales) if isinstance(k, kv_cache.Float8Vectors) else (k, v)
    return q[:, 0].astype(dtype), *fp8


def numbers(array) -> np.ndarray:
    """In float32; bytes are float8."""
    if array.dtype == jnp.uint8:
        array = jax.lax.bitcast_convert_type(array, FP8)
    return np.asarray(array.astype(jnp.float32))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype", "with_norm", "fp8"),
    [
        (8, 4, 128, "bfloat16", True, False),
        (4, 8, 64, "float16", False, False),
        (8, 4, 128, "bfloat16", True, True),
        (4, 8, 64, "float16", False, True),
    ],
)
def test_it_does_what_attention_does(heads, kv_heads, dim, dtype, with_norm, fp8):
    arrays = inputs(heads, kv_heads, dim, dtype, with_norm, fp8)
    reset_gpu_interpret_mode_state()
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        got = jax.tree.leaves(rope_hopper.rotate_into_cache(*arrays, eps=EPS, dtype=dtype))
        got = [numbers(array) for array in got]
    reset_gpu_interpret_mode_state()
    for one, other in zip(got, map(numbers, expected(*arrays, dtype)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0.13 if fp8 else 1e-2, atol=1e-6)
        assert np.mean(one == other) > 0.99


@pytest.mark.parametrize(("with_norm", "fp8"), [(True, False), (False, False), (True, True)])
def test_it_lowers_for_cuda_and_writes_caches_in_place(with_norm, fp8):
    arrays = jax.eval_shape(lambda: inputs(32, 4, 128, jnp.bfloat16, with_norm, fp8, batch=64, length=64))
    rotate_into_cache = functools.partial(rope_hopper.rotate_into_cache, eps=EPS, dtype=jnp.bfloat16)
    jitted = jax.jit(lambda *arrays: rotate_into_cache(*arrays), donate_argnums=5)
    text = jitted.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    assert text.count("output_operand_alias") >= (4 if fp8 else 2)


def test_what_is_served():
    def of(heads=32, kv_heads=4, dim=128, table_dim=64, cache_dtype=jnp.bfloat16, dtype=jnp.bfloat16):
        q, k = (jax.ShapeDtypeStruct((4, n, dim), jnp.float32) for n in (heads, kv_heads))
        table = (jax.ShapeDtypeStruct((4, table_dim), jnp.float32),) * 2
        return rope_hopper.serves(q, k, table, jax.ShapeDtypeStruct((4, 8, kv_heads, dim), cache_dtype), dtype)

    assert of()
    assert of(cache_dtype=jnp.uint8)
    assert not of(heads=6)
    assert not of(kv_heads=1)
    assert not of(table_dim=32)
    assert not of(dim=96, table_dim=48)
    assert not of(cache_dtype=jnp.float16)
    assert not of(cache_dtype=jnp.float32, dtype=jnp.float32)
    assert not of(cache_dtype=jnp.uint8, dtype=jnp.float32)
