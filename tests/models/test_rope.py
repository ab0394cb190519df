"""Rotary embedding against its formulas, written out in NumPy."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import numpy_rotate

from jax_epmoe.config import RopeConfig
from jax_epmoe.models.blocks import rope_frequencies, rope_table, rotate

DIM = 64
YARN = RopeConfig(theta=10000.0, kind="yarn", factor=40.0, original_max_position_embeddings=4096)


def plain(theta: float, dim: int = DIM) -> np.ndarray:
    return np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])


def yarn(config: RopeConfig, dim: int = DIM) -> np.ndarray:
    """YaRN as its authors and DeepSeek published it: the inverse of `rotations(pair) = L * frequency / 2 pi`, and a ramp."""
    frequencies = []
    for pair in range(dim // 2):
        extrapolated = 1 / config.theta ** (2 * pair / dim)
        interpolated = extrapolated / config.factor
        low, high = (
            dim * math.log(config.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))
            for rotations in (config.beta_fast, config.beta_slow)
        )  # fmt: skip
        if config.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high += 0.001 if low == high else 0
        kept = 1 - min(max((pair - low) / (high - low), 0), 1)
        frequencies.append(interpolated * (1 - kept) + extrapolated * kept)
    return np.array(frequencies)


@pytest.mark.parametrize("theta", [10000.0, 1e6])
def test_plain_frequencies_are_powers_of_theta(theta):
    np.testing.assert_allclose(rope_frequencies(RopeConfig(theta=theta), DIM), plain(theta), rtol=1e-6)
    assert rope_frequencies(RopeConfig(theta=theta), 4).tolist() == np.float32([1, theta**-0.5]).tolist()


def test_linear_scaling_divides_every_frequency():
    config = RopeConfig(theta=1e4, kind="linear", factor=4.0)
    np.testing.assert_allclose(rope_frequencies(config, DIM), plain(1e4) / 4, rtol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"truncate": False},
        {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        {"original_max_position_embeddings": 16},  # the ramp's start is cut off at pair 0
        {"theta": 100.0, "original_max_position_embeddings": 2**20, "beta_fast": 4096.0},  # and its end at dim - 1
        {"beta_fast": 1.0, "original_max_position_embeddings": 1024, "truncate": False},  # no ramp at all
        {"factor": 1.0},
    ],
    ids=str,
)
def test_yarn_is_the_published_formula(changes):
    config = dataclasses.replace(YARN, **changes)
    np.testing.assert_allclose(rope_frequencies(config, DIM), yarn(config), rtol=2e-6)


def test_yarn_keeps_fast_pairs_and_slows_slow_ones_as_the_paper_says():
    """Section 3.2: pairs that turn more than beta times in L positions keep their frequency, less than alpha: over s."""
    config = dataclasses.replace(YARN, truncate=False)
    frequencies, unscaled = rope_frequencies(config, DIM), plain(config.theta)
    rotations = config.original_max_position_embeddings * unscaled / (2 * math.pi)
    fast, slow = rotations > config.beta_fast, rotations < config.beta_slow
    assert (fast.sum(), slow.sum()) == (11, 9)
    np.testing.assert_allclose(frequencies[fast], unscaled[fast], rtol=1e-6)
    np.testing.assert_allclose(frequencies[slow], unscaled[slow] / config.factor, rtol=1e-6)
    between = ~fast & ~slow
    assert np.all(frequencies[between] < unscaled[between])
    assert np.all(frequencies[between] > unscaled[between] / config.factor)


def test_yarn_with_truncation_widens_the_ramp_to_whole_pairs():
    whole, exact = (rope_frequencies(dataclasses.replace(YARN, truncate=t), DIM) for t in (True, False))
    changed = np.flatnonzero(~np.isclose(whole, exact, rtol=1e-6))
    assert (changed.min(), changed.max()) == (11, 22)  # the ramp is from 10.4 to 22.5, or from 10 to 23


def test_the_table_is_cos_and_sin_of_position_times_frequency_and_the_attention_factor():
    config = dataclasses.replace(YARN, attention_factor=0.1 * math.log(40) + 1)
    positions = np.array([[0, 1, 5000], [163839, 7, 7]])
    cos, sin = rope_table(config, DIM, jnp.asarray(positions))
    # float32 angles: positions of 17 bits leave 7 of 24 for the fraction, so compare with angles rounded like that.
    angles = (positions[..., None].astype(np.float32) * rope_frequencies(config, DIM)).astype(np.float64)
    np.testing.assert_allclose(cos, np.cos(angles) * config.attention_factor, atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angles) * config.attention_factor, atol=1e-6)
    assert cos.dtype == sin.dtype == jnp.float32
    assert config.attention_factor == pytest.approx(1.3688879)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_complex_multiplication_of_pairs(interleaved):
    rng = np.random.default_rng(0)
    x, angles = rng.normal(size=(2, 3, 4, 8)), rng.normal(size=(2, 3, 4))
    turned = rotate(jnp.float32(x), (jnp.float32(np.cos(angles)), jnp.float32(np.sin(angles))), interleaved)
    np.testing.assert_allclose(turned, numpy_rotate(x, angles, interleaved), atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_dimensions_past_the_tables_stay_as_they_are(interleaved):
    table = rope_table(RopeConfig(), 4, jnp.arange(3)[None])
    x = jnp.arange(1.0, 19).reshape(1, 3, 1, 6)
    turned = rotate(x, table, interleaved)
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(turned[..., :4], rotate(x[..., :4], table, interleaved))


def test_pairs_are_halves_or_neighbours():
    table = (jnp.zeros((1, 1, 2)), jnp.ones((1, 1, 2)))  # a quarter turn: (a, b) becomes (-b, a)
    x = jnp.arange(1.0, 5).reshape(1, 1, 1, 4)
    assert rotate(x, table, interleaved=False).ravel().tolist() == [-3, -4, 1, 2]
    assert rotate(x, table, interleaved=True).ravel().tolist() == [-2, 1, -4, 3]


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_distance_alone(interleaved):
    rng = np.random.default_rng(1)
    q, k = (jnp.broadcast_to(jnp.float32(rng.normal(size=(1, 1, 1, 16))), (1, 5, 1, 16)) for _ in range(2))
    query_positions, key_positions = jnp.arange(100, 105)[None], jnp.arange(93, 98)[None]
    turned = [
        rotate(x, rope_table(RopeConfig(), 16, p), interleaved) for x, p in ((q, query_positions), (k, key_positions))
    ]
    scores = jnp.sum(turned[0] * turned[1], axis=-1).ravel()
    np.testing.assert_allclose(scores, scores[0], rtol=1e-4)
    assert abs(scores[0] - jnp.sum(q[0, 0] * k[0, 0])) > 0.01
