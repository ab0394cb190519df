"""Products with quantised matrices that devices share: each device's scales are those of its own part, and x is quantised by its own k."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jax_epmoe import make_mesh
from jax_epmoe.mesh import TP_AXES
from jax_epmoe.moe.gated_mlp import linear
from jax_epmoe.parameters import run_on_shards
from jax_epmoe.quant import FORMATS, dequantize, quantize, scale_shape, slice_scales
from jax_epmoe.quantized_parameters import DenseWeights

ROWS, DEVICES = 24, 4
quantized = jax.jit(quantize, static_argnums=1)
SPLIT, WHOLE = 512, 300  # devices have whole blocks of the one dimension; the other ends within one
CUT = 256  # as four devices have it, half blocks


def random(*shape: int, seed: int = 0) -> jax.Array:
    """Sizes that differ from block to block and from row to row, so that another's scale shows."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=shape) * np.exp(rng.normal(size=(*shape[:-1], 1)))
    return jnp.asarray(values * np.exp(np.repeat(rng.normal(size=-(-shape[-1] // 128)), 128)[: shape[-1]]), jnp.float32)


class Layer(nnx.Module):
    """`linear` by the parts that devices have of `w [..., n, k]`, n or k over all of them."""

    def __init__(self, w: jax.Array, name: str, axis: str, devices: int = DEVICES, **options: Any):
        self.mesh = make_mesh(devices)
        self.axis = axis
        partition = [None] * (w.ndim - 2) + ([TP_AXES, None] if axis == "n" else [None, TP_AXES])
        new: dict[str, Any] = {"mesh": self.mesh, "rngs": nnx.Rngs(0), "dtype": jnp.float32}
        self.w = DenseWeights(w.shape, partition, FORMATS[name], **new, **options)
        array = quantized(w, FORMATS[name].weights)
        self.stands_for = dequantize(array)
        for parameter, value in ((self.w.values, array.values), (self.w.scales, array.scales)):
            padded = jnp.zeros(parameter.shape, parameter.dtype).at[tuple(map(slice, value.shape))].set(value)
            parameter[...] = jax.device_put(padded, parameter[...].sharding)

    def __call__(self, x: jax.Array, activation: str | None = None) -> np.ndarray:
        """`[devices, ROWS, ...]`: what each device gives."""

        def on_device(self: "Layer", x: jax.Array) -> jax.Array:
            return linear(x, self.w, activation)[None]

        x_spec = P(None, TP_AXES if self.axis == "k" else None)
        options: dict[str, Any] = {"mesh": self.mesh, "in_specs": (x_spec,), "out_specs": P(TP_AXES)}
        return np.asarray(jax.jit(lambda x: run_on_shards(self, on_device, x, **options))(x))


def product(x: Any, w: Any) -> np.ndarray:
    return np.einsum("rk,...nk->r...n", np.asarray(x, np.float64), np.asarray(w, np.float64))


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


DYNAMIC = pytest.mark.parametrize("name", [name for name in FORMATS if not FORMATS[name].static])


@DYNAMIC
def test_where_n_is_split_a_device_has_its_rows_scales(name):
    layer, x = Layer(random(SPLIT, WHOLE), name, "n"), random(ROWS, WHOLE, seed=1)
    got = np.concatenate(layer(x), axis=-1)
    rounded = dequantize(quantized(x, FORMATS[name].activations))
    assert error(got, product(rounded, layer.stands_for)) < 1e-6
    assert error(got, product(x, layer.stands_for)) > 0.01


@DYNAMIC
def test_where_k_is_split_a_device_has_its_columns_scales_and_those_of_its_own_x(name):
    layer, x = Layer(random(WHOLE, SPLIT), name, "k"), random(ROWS, SPLIT, seed=1)
    got = layer(x)
    for device, columns in enumerate(np.split(np.arange(SPLIT), DEVICES)):
        rounded = dequantize(quantize(x[:, columns], FORMATS[name].activations))
        assert error(got[device], product(rounded, layer.stands_for[:, columns])) < 1e-6


@pytest.mark.parametrize("axis", ["n", "k"])
def test_a_part_that_cuts_a_block_is_dequantised_and_x_stays_as_it_is(axis):
    shape, x = ((CUT, WHOLE), random(ROWS, WHOLE)) if axis == "n" else ((WHOLE, CUT), random(ROWS, CUT))
    layer = Layer(random(*shape, seed=1), "fp8-block", axis)
    got = layer(x)
    got = np.concatenate(got, axis=-1) if axis == "n" else got.sum(0)
    assert error(got, product(x, layer.stands_for)) < 1e-6


@pytest.mark.parametrize("name", ["fp8-channel", "fp8-block"])
def test_padding_past_the_last_rows_takes_no_other_s_scale(name):
    """1021 rows over eight devices: the last has 125 and three of padding."""
    layer, x = Layer(random(1021, WHOLE), name, "n", 8), random(ROWS, WHOLE, seed=1)
    got = np.concatenate(layer(x), axis=-1)
    assert got.shape == (ROWS, 1024)
    rounded = dequantize(quantized(x, FORMATS[name].activations))
    assert error(got[:, :1021], product(rounded, layer.stands_for)) < 1e-6
    assert not got[:, 1021:].any()


@DYNAMIC
def test_gate_and_up_keep_their_own_scales(name):
    layer, x = Layer(random(2, SPLIT, WHOLE) / 100, name, "n"), random(ROWS, WHOLE, seed=1)
    gate, up = np.moveaxis(product(dequantize(quantized(x, FORMATS[name].activations)), layer.stands_for), 1, 0)
    want = gate / (1 + np.exp(-gate)) * up
    assert error(np.concatenate(layer(x, "silu"), axis=-1), want) < 1e-6


def test_a_static_scale_is_the_files_the_larger_of_gate_s_and_up_s():
    layer, x = Layer(random(2, SPLIT, WHOLE) / 100, "fp8-tensor-static", "n"), random(ROWS, WHOLE, seed=1)
    layer.w.input_scales[...] = jnp.array([0.25, 0.5])
    gate, up = np.moveaxis(product(dequantize(quantize(x, "tensor", jnp.float32(0.5))), layer.stands_for), 1, 0)
    assert error(np.concatenate(layer(x, "silu"), axis=-1), gate / (1 + np.exp(-gate)) * up) < 1e-6


def test_heads_are_a_dimension_of_their_own():
    layer, x = Layer(random(SPLIT, WHOLE), "fp8-channel", "n", head_dim=32), random(2, 3, WHOLE, seed=1)
    out = jax.eval_shape(lambda x: linear(x, layer.w), x)
    assert (out.shape, out.dtype) == ((2, 3, SPLIT // 32, 32), jnp.float32)
    assert layer.w[...].shape == (SPLIT // 32, 32, WHOLE)


def test_there_is_no_gradient():
    layer, x = Layer(random(SPLIT, WHOLE), "fp8-channel", "n"), random(ROWS, WHOLE)
    with pytest.raises(ValueError, match=r"^quantised weights have no gradient; "):
        jax.grad(lambda x: linear(x, layer.w).sum())(x)


def test_an_unserved_kernel_leaves_the_product_to_xla_in_x_s_dtype(monkeypatch):
    """No kernel runs here: both operands are then dequantised to bfloat16, not to float32."""
    layer, x = Layer(random(SPLIT, WHOLE), "fp8-block", "n", 1), random(ROWS, WHOLE, seed=1)
    layer.w.backend = "hopper"
    program = jax.jit(lambda x: linear(x, layer.w)).lower(x.astype(jnp.bfloat16)).as_text()
    assert f"(tensor<{ROWS}x{WHOLE}xbf16>, tensor<{SPLIT}x{WHOLE}xbf16>) -> tensor<{ROWS}x{SPLIT}xf32>" in program
    assert error(np.asarray(linear(x, layer.w)), product(dequantize(quantize(x, "group")), layer.stands_for)) < 1e-6


def test_scales_of_the_whole_have_the_shape_of_the_whole():
    for granularity in ("tensor", "channel", "block"):
        scales = jnp.zeros(scale_shape((2, 300, 257), granularity))
        assert slice_scales(scales, granularity, (2, 300, 257), (0, 0)) is scales


@pytest.mark.parametrize("rows", [8, 600])
def test_a_sum_is_rounded_once_to_the_output_s_dtype(rows):
    x, w = (
        jnp.asarray(np.random.default_rng(i).normal(size=shape), jnp.bfloat16)
        for i, shape in enumerate(((rows, 96), (2, 5, 96)))
    )
    rounded = linear(x, w, out_dtype=x.dtype)
    assert rounded.shape == (rows, 2, 5)
    assert rounded.dtype == x.dtype
    np.testing.assert_array_equal(rounded, linear(x, w).astype(x.dtype))
    gated = linear(x, w, "silu", x.dtype)
    np.testing.assert_array_equal(gated, linear(x, w, "silu").astype(x.dtype))
