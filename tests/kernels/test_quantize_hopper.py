"""Rows quantised by the Hopper kernel without a GPU: interpreted on the CPU against the definition, and lowered for CUDA."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.kernels import quantize_hopper
from jax_epmoe.quant import quantize


@pytest.fixture(autouse=True)
def few_ctas(monkeypatch):
    monkeypatch.setattr(quantize_hopper, "num_sms", lambda: 3)  # the interpreter runs one after another
    monkeypatch.setattr(quantize_hopper, "_CTAS", 2)
    reset_gpu_interpret_mode_state()
    yield
    reset_gpu_interpret_mode_state()


def made_up_rows(total, n, dtype):
    """Of all magnitudes; one of zeros."""
    keys = jax.random.split(jax.random.key(0), 2)
    rows = jax.random.normal(keys[0], (total, n)) * jnp.exp(4 * jax.random.normal(keys[1], (total, 1)))
    return rows.astype(dtype).at[1].set(0)


def check_equal(got, expected):
    np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(expected).view(np.uint8))


SIZES = pytest.mark.parametrize(
    ("total", "num_rows", "n", "dtype"),
    [
        (30, 21, 384, jnp.float32),
        (9, 9, 128, jnp.bfloat16),
        (8, 0, 128, jnp.float32),
        (9, 6, 5120, jnp.float32),  # in parts
        (4, 4, 9216, jnp.bfloat16),
    ],
)


@SIZES
@pytest.mark.parametrize("granularity", ["group", "token"])
def test_rows_are_quantised_bit_for_bit(total, num_rows, n, dtype, granularity):
    rows = made_up_rows(total, n, dtype).at[num_rows:].set(jnp.nan)
    run = {"group": quantize_hopper.quantize_groups, "token": quantize_hopper.quantize_tokens}[granularity]
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = jax.tree.map(np.asarray, run(rows, jnp.int32(num_rows)))
    expected = quantize(rows, granularity)
    assert got.granularity == granularity
    check_equal(got.scales[..., :num_rows], expected.scales[..., :num_rows])
    check_equal(got.values[:num_rows], expected.values[:num_rows])


@SIZES
def test_rows_are_quantised_by_given_scales_and_their_largest_numbers_found(total, num_rows, n, dtype):
    rows = made_up_rows(total, n, dtype).at[num_rows:].set(jnp.nan)
    expected = quantize(rows, "token", 2 * quantize(rows, "token").scales)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = np.asarray(quantize_hopper.quantize_by(rows, jnp.int32(num_rows), expected.scales))
        largest = np.asarray(quantize_hopper.largest_of_rows(rows, jnp.int32(num_rows)))
    check_equal(got[:num_rows], expected.values[:num_rows])
    np.testing.assert_array_equal(largest[:num_rows], np.max(np.abs(rows.astype(jnp.float32)), axis=1)[:num_rows])


@pytest.mark.parametrize("granularity", ["group", "token", "tensor"])
@pytest.mark.parametrize(("rows", "num_rows"), [(24, 19), (8, 0)])
def test_gathered_rows_are_quantised_bit_for_bit(granularity, rows, num_rows):
    x = made_up_rows(7, 1024, jnp.bfloat16)
    index = jax.random.randint(jax.random.key(2), (rows,), 0, len(x))
    scale = quantize(x, "tensor").scales if granularity == "tensor" else None
    expected = quantize(x[index], granularity, scale)
    run = partial(quantize_hopper.gather, granularity=granularity)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        got = jax.tree.map(np.asarray, run(x, index, jnp.int32(num_rows), scale))
    assert got.granularity == granularity
    if scale is None:
        check_equal(got.scales[..., :num_rows], expected.scales[..., :num_rows])
    check_equal(got.values[:num_rows], expected.values[:num_rows])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("of", ["quantize_groups", "quantize_tokens", "gather"])
def test_it_lowers_for_cuda(of, dtype):
    rows, num_rows = jax.ShapeDtypeStruct((49152, 7168), dtype), jax.ShapeDtypeStruct((), jnp.int32)
    if of == "gather":
        index = jax.ShapeDtypeStruct((8192,), jnp.int32)
        traced = quantize_hopper.gather.trace(rows, index, num_rows, None, granularity="token")
    else:
        traced = getattr(quantize_hopper, of).trace(rows, num_rows)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_what_is_served():
    def of(*shape, dtype=jnp.float32, by=quantize_hopper.serves):
        return by(jax.ShapeDtypeStruct(shape, dtype))

    assert of(4, 128)
    assert not of(3, 128)
    assert not of(64, 192)
    assert of(64, 128, dtype=jnp.bfloat16)
    assert not of(64, 128, dtype=jnp.int32)
    assert of(1, 512, by=quantize_hopper.serves_gather)
    assert not of(1, 768, by=quantize_hopper.serves_gather)
