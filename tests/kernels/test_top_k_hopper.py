"""The top-k kernel without a GPU: interpreted on the CPU, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.kernels import top_k_hopper


@pytest.fixture
def interpreted():
    reset_gpu_interpret_mode_state()
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
    reset_gpu_interpret_mode_state()


@pytest.mark.parametrize(("tokens", "experts", "k"), [(64, 160, 6), (130, 8, 8), (1, 64, 1)])
@pytest.mark.parametrize("distinct", [3, 10**6], ids=["many ties", "few ties"])
def test_it_is_laxs_top_k(tokens, experts, k, distinct, interpreted):
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.integers(-distinct, distinct, (tokens, experts)) / distinct, jnp.float32)
    scores = scores.at[:, rng.permutation(experts)[: experts - k]].set(-jnp.inf)
    values, columns = top_k_hopper.top_k(scores, k)
    expected_values, expected_columns = jax.lax.top_k(scores, k)
    np.testing.assert_array_equal(values, expected_values)
    np.testing.assert_array_equal(columns, expected_columns)
    assert columns.dtype == jnp.int32


def test_it_lowers_for_cuda():
    scores = jax.ShapeDtypeStruct((8192, 256), jnp.float32)
    assert "mosaic_gpu" in top_k_hopper.top_k.trace(scores, 8).lower(lowering_platforms=("cuda",)).as_text()


def test_what_is_served():
    def of(experts, dtype=jnp.float32):
        return top_k_hopper.serves(jax.ShapeDtypeStruct((100, experts), dtype))

    assert of(8)
    assert of(256)
    assert not of(264)
    assert not of(60)
    assert not of(64, jnp.bfloat16)
