"""Rows quantised by the Hopper kernel without a GPU: interpreted on the CPU against the definition, and lowered for CUDA."""

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


@pytest.mark.parametrize(
    ("total", "num_rows", "n", "dtype"),
    [
        (200, 150, 384, jnp.float32),
        (64, 64, 128, jnp.float32),
        (128, 0, 128, jnp.float32),
        (256, 256, 256, jnp.bfloat16),
    ],
)
def test_it_quantises_the_rows_that_there_are_bit_for_bit(total, num_rows, n, dtype):
    keys = jax.random.split(jax.random.key(0), 2)
    rows = jax.random.normal(keys[0], (total, n)) * jnp.exp(4 * jax.random.normal(keys[1], (total, 1)))
    rows = rows.astype(dtype).at[3].set(0).at[num_rows:].set(jnp.nan)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = jax.tree.map(np.asarray, quantize_hopper.quantize_groups(rows, jnp.int32(num_rows)))
    expected = quantize(rows, "group")
    np.testing.assert_array_equal(got.scales[:, :num_rows], expected.scales[:, :num_rows])
    np.testing.assert_array_equal(
        got.values[:num_rows].view(np.uint8), np.asarray(expected.values[:num_rows]).view(np.uint8)
    )
    assert got.granularity == "group"


@pytest.mark.parametrize(
    ("total", "num_rows", "n", "dtype"),
    [
        (30, 21, 384, jnp.float32),
        (9, 9, 128, jnp.bfloat16),
        (8, 0, 128, jnp.float32),
        (9, 6, 5120, jnp.float32),  # in parts
        (4, 4, 9216, jnp.bfloat16),
    ],
)
def test_a_row_is_quantised_bit_for_bit(total, num_rows, n, dtype):
    keys = jax.random.split(jax.random.key(0), 2)
    rows = jax.random.normal(keys[0], (total, n)) * jnp.exp(4 * jax.random.normal(keys[1], (total, 1)))
    rows = rows.astype(dtype).at[1].set(0).at[num_rows:].set(jnp.nan)
    expected = quantize(rows, "token")
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = jax.tree.map(np.asarray, quantize_hopper.quantize_tokens(rows, jnp.int32(num_rows)))
        by_given = np.asarray(quantize_hopper.quantize_by(rows, jnp.int32(num_rows), 2 * expected.scales))
        largest = np.asarray(quantize_hopper.largest_of_rows(rows, jnp.int32(num_rows)))
    assert got.granularity == "token"
    np.testing.assert_array_equal(got.scales[:num_rows], expected.scales[:num_rows])
    of_given = quantize(rows, "token", 2 * expected.scales)
    for values, right in ((got.values, expected.values), (by_given, of_given.values)):
        np.testing.assert_array_equal(values[:num_rows].view(np.uint8), np.asarray(right)[:num_rows].view(np.uint8))
    np.testing.assert_array_equal(largest[:num_rows], np.max(np.abs(rows.astype(jnp.float32)), axis=1)[:num_rows])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("of", ["groups", "tokens"])
def test_it_lowers_for_cuda(of, dtype):
    rows, num_rows = jax.ShapeDtypeStruct((49152, 7168), dtype), jax.ShapeDtypeStruct((), jnp.int32)
    quantize_rows = getattr(quantize_hopper, f"quantize_{of}")
    lowered = quantize_rows.trace(rows, num_rows).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_what_is_served():
    def of(*shape, dtype=jnp.float32, granularity="group"):
        return quantize_hopper.serves(jax.ShapeDtypeStruct(shape, dtype), granularity)

    assert of(64, 128)
    assert of(4, 128, granularity="token")
    assert not of(3, 128, granularity="token")
    assert not of(56, 128)
    assert not of(64, 192)
    assert of(64, 128, dtype=jnp.bfloat16)
    assert not of(64, 128, dtype=jnp.int32)
