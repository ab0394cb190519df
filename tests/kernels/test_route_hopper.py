"""The routing kernel without a GPU: interpreted on the CPU against the layer's own steps in XLA, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe import MoEConfig
from jax_epmoe.kernels import route_hopper
from jax_epmoe.moe import router

V3 = {
    "scoring": "sigmoid",
    "correction_bias": True,
    "group_score": "top2_sum",
    "top_k": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
CASES = {
    "a softmax": {"num_experts": 64, "top_k": 6},
    "every expert": {"num_experts": 8, "top_k": 8},
    "groups of 20": {"num_experts": 160, "top_k": 6, "n_group": 8, "topk_group": 3},
    "groups of 32 and a bias": {"num_experts": 256, **V3},
    "groups of 2": {"num_experts": 16, **V3},
    "many": {"num_experts": 384, "top_k": 8},
    "a bias": {"num_experts": 27, "top_k": 3, "scoring": "sigmoid", "correction_bias": True},
}


def config_of(case):
    return MoEConfig(hidden_size=8, intermediate_size=8, **case)


@pytest.fixture
def interpreted():
    reset_gpu_interpret_mode_state()
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
    reset_gpu_interpret_mode_state()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(
    ("tokens", "distinct"), [(130, 3), (64, 10**6), (1, 10**6)], ids=["many ties", "few", "a token"]
)
def test_it_chooses_as_the_layer_does(case, tokens, distinct, interpreted):
    config, rng = config_of(case), np.random.default_rng(0)
    logits = jnp.asarray(rng.integers(-distinct, distinct, (tokens, config.num_experts)) * (4 / distinct), jnp.float32)
    bias = jnp.asarray(rng.integers(-2, 3, config.num_experts) / 4, jnp.float32) if config.correction_bias else None
    mask = None if tokens == 1 else jnp.asarray(rng.random(tokens) < 0.8)
    expected, expected_ids = router._choose(logits, bias, mask, config)
    weights, ids = route_hopper.choose(logits, bias, mask, config)
    np.testing.assert_array_equal(ids, expected_ids)
    assert ids.dtype == jnp.int32
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


@pytest.mark.parametrize("case", ["groups of 20", "groups of 32 and a bias"])
def test_it_lowers_for_cuda(case):
    config = config_of(CASES[case])
    logits = jax.ShapeDtypeStruct((8192, config.num_experts), jnp.float32)
    bias = jax.ShapeDtypeStruct((config.num_experts,), jnp.float32) if config.correction_bias else None
    mask = jax.ShapeDtypeStruct(logits.shape[:1], bool)
    lowered = route_hopper.choose.trace(logits, bias, mask, config).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_what_is_served():
    def of(experts, dtype=jnp.float32):
        return route_hopper.serves(jax.ShapeDtypeStruct((100, experts), dtype))

    assert of(60)
    assert of(1024)
    assert not of(1025)
    assert not of(64, jnp.bfloat16)
