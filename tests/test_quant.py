"""Quantised arrays: scales that are the tiles' own, rounding to the nearest value, zeros that stay zeros, ragged ends."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_epmoe.quant import (
    FORMATS,
    FP8,
    FP8_MAX,
    Quantization,
    QuantizedArray,
    dequantize,
    expand_scales,
    quantize,
    scale_shape,
    scales_of,
)

TILES = {"tensor": (10**6, 10**6), "channel": (1, 10**6), "token": (1, 10**6), "block": (128, 128), "group": (1, 128)}
SIZES = [(3, 5), (128, 256), (130, 257)]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_hand(x: np.ndarray, granularity: str) -> tuple[np.ndarray, np.ndarray]:
    """Values as float32 and a scale for each value, a tile at a time, by NumPy and ml_dtypes."""
    height, width = TILES[granularity]
    values, scales = np.empty_like(x), np.empty_like(x)
    for i, j in itertools.product(range(0, x.shape[0], height), range(0, x.shape[1], width)):
        tile = np.s_[i : i + height, j : j + width]
        largest = np.abs(x[tile]).max()
        scales[tile] = largest * np.float32(1 / FP8_MAX) if largest else 1
        values[tile] = np.clip(x[tile] * (1 / scales[tile]), -FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn)
    return values, scales


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("granularity", TILES)
def test_values_and_scales_are_those_of_the_definition(granularity, size):
    x = normal(*size)
    x[x > 2] *= 1e4
    array = jax.jit(quantize, static_argnums=1)(x, granularity)
    values, scales = by_hand(x, granularity)
    assert (array.values.dtype, array.scales.dtype) == (FP8, jnp.float32)
    assert array.scales.shape == scale_shape(size, granularity)
    np.testing.assert_array_equal(np.broadcast_to(expand_scales(array.scales, granularity, size), size), scales)
    np.testing.assert_array_equal(array.values.astype(jnp.float32), values)
    np.testing.assert_array_equal(dequantize(array), values * scales)


def test_scales_have_the_shapes_of_the_table():
    shapes = {name: scale_shape((3, 2, 300, 257), name) for name in ("tensor", "channel", "block")}
    assert shapes == {"tensor": (3, 2), "channel": (3, 2, 300), "block": (3, 2, 3, 3)}
    shapes = {name: scale_shape((300, 257), name) for name in ("tensor", "token", "group")}
    assert shapes == {"tensor": (), "token": (300,), "group": (3, 300)}


@pytest.mark.parametrize("granularity", TILES)
def test_dimensions_before_the_last_two_share_no_scale(granularity):
    x = normal(2, 3, 130, 140) * np.arange(1, 7, dtype=np.float32).reshape(2, 3, 1, 1)
    array = quantize(jnp.asarray(x), granularity)
    for index in np.ndindex(2, 3):
        one = quantize(jnp.asarray(x[index]), granularity)
        np.testing.assert_array_equal(array.scales[index], one.scales)
        np.testing.assert_array_equal(array.values[index].view(jnp.uint8), one.values.view(jnp.uint8))


@pytest.mark.parametrize("granularity", TILES)
def test_zeros_stay_zeros_and_do_not_divide(granularity):
    x = normal(200, 200)
    x[:130] = 0
    x[:, :130] = 0
    array = quantize(jnp.asarray(x), granularity)
    assert np.all(np.isfinite(array.scales))
    assert np.all(array.scales > 0)
    assert not np.any(np.asarray(dequantize(array))[x == 0])
    nothing = dequantize(quantize(jnp.zeros((5, 7)), granularity))
    np.testing.assert_array_equal(nothing, np.zeros((5, 7)))
    tiny = dequantize(quantize(jnp.full((5, 7), 1e-37), granularity))
    assert np.all(np.isfinite(tiny))
    assert np.all(np.abs(tiny) <= 1e-37)
    assert quantize(jnp.zeros((0, 7)), granularity).shape == (0, 7)


def test_the_largest_value_is_kept_and_nothing_overflows():
    x = jnp.asarray(normal(64, 300, seed=1)) * 1e30
    for granularity in TILES:
        back = dequantize(quantize(x, granularity))
        assert np.all(np.isfinite(back))
        np.testing.assert_allclose(np.abs(back).max(), np.abs(x).max(), rtol=1e-6)
    clipped = quantize(jnp.asarray([[1.0, -1000.0, 460.0]]), "tensor", jnp.float32(1.0))
    np.testing.assert_array_equal(clipped.values.astype(jnp.float32), [[1.0, -448.0, 448.0]])


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_a_part_finds_its_own_scales_in_those_of_the_whole(granularity):
    """Also where it begins within a block, and where padding follows the last."""
    x = normal(300, 290)
    array = quantize(jnp.asarray(x), granularity)
    whole = np.broadcast_to(expand_scales(array.scales, granularity, x.shape), x.shape)
    for first, size in ((0, 100), (100, 100), (200, 100)):
        rows = jax.jit(lambda s, first: expand_scales(s, granularity, (100, 290), (first, 0)))(array.scales, first)
        np.testing.assert_array_equal(np.broadcast_to(rows, (100, 290)), whole[first : first + size])
    columns = expand_scales(array.scales, granularity, (300, 150), (0, 150))
    assert np.broadcast_to(columns, (300, 150)).shape == (300, 150)
    np.testing.assert_array_equal(np.broadcast_to(columns, (300, 150))[:, :140], whole[:, 150:])


def test_it_passes_through_jit_with_its_granularity():
    array = quantize(jnp.asarray(normal(4, 300)), "group")
    same = jax.jit(lambda a: a)(array)
    assert isinstance(same, QuantizedArray)
    assert same.granularity == "group"
    assert same.scales.shape == (3, 4)


def test_formats_and_their_exceptions():
    assert [f"{f.weights}/{f.activations}{'/static' * f.static}" for f in FORMATS.values()] == [
        "block/group", "channel/token", "tensor/tensor", "tensor/tensor/static",
    ]  # fmt: skip
    whole = Quantization("fp8-block", frozenset({"layers.1.attention.kv_b", "layers.1.mlp.w_down"}))
    attention = whole.inside("layers.1").inside("attention")
    assert attention.of("kv_b") is None
    assert attention.of("q") == FORMATS["fp8-block"]
    assert whole.inside("layers.10").of("attention.kv_b") == FORMATS["fp8-block"]
    assert Quantization().of("q") is None
    with pytest.raises(ValueError, match=r"^quantization is 'int4'; it should be None or one of fp8-block, "):
        Quantization("int4")


def test_scales_are_the_same_under_jit_and_without():
    x = jnp.asarray(normal(256, 256, seed=3))
    for granularity in TILES:
        np.testing.assert_array_equal(jax.jit(scales_of, static_argnums=1)(x, granularity), scales_of(x, granularity))
