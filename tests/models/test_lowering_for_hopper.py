"""Whole models in bfloat16, lowered for CUDA as on a Hopper GPU: every kernel and library takes its place inside the shard_maps."""

import re

import jax
import jax._src.cudnn.fused_attention_stablehlo as cudnn
import jax.numpy as jnp
import pytest
from flax import nnx

from jax_epmoe import EPMoE, MoEConfig, make_mesh
from jax_epmoe.config import ClampedSwiGLU, GQAConfig, MLAConfig, ModelConfig, RopeConfig
from jax_epmoe.kernels import decode_hopper, mla_hopper, quantize, rows
from jax_epmoe.kernels.grouped_gemm import hopper, hopper_fp8
from jax_epmoe.kernels.grouped_gemm.tuning import Tiling
from jax_epmoe.models import attention
from jax_epmoe.models.decoder import Decoder
from jax_epmoe.models.projections import quantize_projections
from jax_epmoe.moe import plan, router
from jax_epmoe.quant import FP8, NOT_QUANTIZED, Quantization

GQA = ModelConfig(
    vocab_size=64,
    hidden_size=256,
    attention=GQAConfig(num_heads=8, num_kv_heads=4, head_dim=64),
    rope=RopeConfig(),
    moe=MoEConfig(256, 256, num_experts=8, top_k=2, shared_intermediate_size=128),
    moe_layers=(True,),
)
MLA = GQA.replace(
    attention=MLAConfig(num_heads=8, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64)
)
GPT_OSS = GQA.replace(
    attention=GQAConfig(
        num_heads=8, num_kv_heads=4, head_dim=64, qkv_bias=True, o_bias=True, sinks=True, sliding_window=9
    ),
    moe=MoEConfig(256, 256, num_experts=8, top_k=2, activation=ClampedSwiGLU(), router_bias=True, expert_bias=True),
    moe_layers=(True, True),
    sliding_layers=(True, False),
)
LENGTH = 64


@pytest.fixture(autouse=True)
def pretend_hopper(monkeypatch):
    for module in (hopper, hopper_fp8, quantize, rows, plan, router, attention):
        monkeypatch.setattr(module, "on_hopper", lambda: True)
    monkeypatch.setattr(attention, "compute_capability", lambda: 90)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)


def lowered(
    config: ModelConfig,
    tp_size: int,
    ep_size: int,
    new_tokens: int,
    is_start: bool = False,
    quantization: Quantization = NOT_QUANTIZED,
) -> str:
    """The program that runs `new_tokens` tokens of 4 sequences; all of a sequence at once, without a cache, if they are `LENGTH`."""
    mesh = make_mesh(tp_size, ep_size)
    options = {"mesh": mesh, "dtype": jnp.bfloat16, "backend": "hopper", "quantization": quantization}
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **options))
    graphdef, state = nnx.split(model)
    tokens, start = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4, new_tokens), (4,)))
    if new_tokens == LENGTH:
        traced = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens)).trace(state, tokens)
    else:
        cache = [layer.attention.abstract_cache(4, LENGTH, jnp.bfloat16) for layer in model.layers]
        run = jax.jit(lambda state, *args: nnx.merge(graphdef, state).hidden(*args, is_start=is_start))
        traced = run.trace(state, tokens, start, cache)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("sizes", [(1, 1), (4, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("new_tokens", [1, 16, LENGTH], ids=["a token", "a chunk", "a whole sequence"])
@pytest.mark.parametrize("config", [GQA, MLA], ids=["gqa", "mla"])
def test_products_rows_and_attention_have_their_kernels(config, new_tokens, sizes):
    program = lowered(config, *sizes, new_tokens)
    own_attention = config is MLA and new_tokens == 1
    assert ("cudnn" in program) != own_attention
    # Two products, their list of tiles (one function, where it is the same), rows brought together, combine; MLA's decoding.
    assert program.count("custom_call @mosaic_gpu") >= 5 + own_attention
    assert "CustomSPMDPartitioning" not in program  # nothing is left to the partitioner inside a shard_map


@pytest.mark.parametrize("new_tokens", [1, 16, LENGTH], ids=["a token", "a chunk", "a whole sequence"])
def test_gpt_oss_has_them_too(new_tokens):
    program = lowered(GPT_OSS, 4, 2, new_tokens)
    assert program.count("stablehlo.custom_call @__cudnn$fmha") == 2, "some attention was left to the definition in XLA"
    assert program.count("custom_call @mosaic_gpu") >= 5
    assert "stablehlo.while" not in program, "some product was left to the definition in XLA"


@pytest.mark.parametrize("config", [GQA, MLA], ids=["gqa", "mla"])
def test_a_prompts_first_chunk_reads_no_cache(config):
    later, first = (lowered(config, 1, 1, 16, is_start=is_start) for is_start in (False, True))
    assert "fmhaScaleBias" in later  # a mask over the cache
    assert "fmhaScaleBias" not in first
    assert "cudnn" in first


FP8_GQA = GQA.replace(attention=GQAConfig(num_heads=12, num_kv_heads=4, head_dim=64))
FP8_MLA = GQA.replace(
    attention=MLAConfig(
        num_heads=12, q_lora_rank=384, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64
    )
)
CASES = {  # a model, tokens, tp_size, the format; `[n, k]` of what a device has of its matrices
    "gqa, a token": (FP8_GQA, 1, 1, "fp8-block", ("768x256", "256x256", "256x768")),
    "gqa, a whole sequence": (FP8_GQA, LENGTH, 2, "fp8-channel", ("384x256", "128x256", "256x384")),
    "mla, a token": (FP8_MLA, 1, 2, "fp8-block", ("384x256", "768x384", "192x256", "256x384")),
    "mla, a whole sequence": (FP8_MLA, LENGTH, 1, "fp8-block", ("384x256", "1536x384", "192x256", "1536x128", "256x768")),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("config", "new_tokens", "tp_size", "name", "matrices"), CASES.values(), ids=CASES.keys())
def test_a_model_s_float8_matrices_are_multiplied_as_they_are(config, new_tokens, tp_size, name, matrices):
    program = lowered(config, tp_size, tp_size, new_tokens, quantization=Quantization(name))
    for matrix in matrices:
        assert f"tensor<1x1x{matrix}xf8E4M3FN>" in program  # as the kernel takes it
        assert not re.search(rf"stablehlo\.convert .*\(tensor<{matrix}xf8E4M3FN>\) ->", program), (
            f"{matrix} is dequantised"
        )


def test_attention_s_float8_matrices_are_multiplied_as_they_are(monkeypatch):
    """Queries, keys, values and output, all of one size here: one kernel."""
    monkeypatch.setattr(
        hopper_fp8, "choose_tiling", lambda **_: Tiling(columns=128, heights=(16,), block_k=128, stages=2)
    )
    config, new = GQAConfig(num_heads=8, num_kv_heads=8, head_dim=64), {"mesh": make_mesh(), "dtype": jnp.bfloat16}

    def make():
        rngs = nnx.Rngs(0)
        module = attention.GQA(config, GQA.rope, 512, 1e-6, rngs=rngs, **new)
        quantize_projections(module, Quantization("fp8-block"), backend="hopper", rngs=rngs, **new)
        return module

    graphdef, state = nnx.split(nnx.eval_shape(make))
    x, table = jax.ShapeDtypeStruct((4, 1, 512), jnp.bfloat16), jax.ShapeDtypeStruct((4, 1, 32), jnp.float32)
    positions = jax.ShapeDtypeStruct((4, 1), jnp.int32)
    run = jax.jit(lambda state, x, table, at: nnx.merge(graphdef, state)(x, (table, table), at, None)[0])
    program = run.trace(state, x, table, positions).lower(lowering_platforms=("cuda",)).as_text()
    assert "tensor<1x1x512x512xf8E4M3FN>" in program
    assert len(re.findall(r"call @_run\w*\(", program)) == 4
    for dequantised in ("512x512xbf16", "512x512xf32", "8x64x512xbf16", "512x8x64xbf16"):
        assert dequantised not in program


def test_a_layer_with_many_tokens_and_its_gradients_have_their_kernels():
    layer = nnx.eval_shape(
        lambda: EPMoE(GQA.moe, mesh=make_mesh(), dtype=jnp.bfloat16, rngs=nnx.Rngs(0), backend="hopper")
    )
    graphdef, state = nnx.split(layer)
    x = jax.ShapeDtypeStruct((2048, GQA.hidden_size), jnp.bfloat16)

    def loss(state, x):
        return jnp.sum(nnx.merge(graphdef, state)(x).astype(jnp.float32))

    for function, least in ((loss, 8), (jax.grad(loss, argnums=(0, 1), allow_int=True), 10)):
        program = jax.jit(function).trace(state, x).lower(lowering_platforms=("cuda",)).as_text()
        assert program.count("custom_call @mosaic_gpu") >= least
        assert "stablehlo.while" not in program, "some product was left to the definition in XLA"
        assert "@choose(" in program
        assert "@order(" in program


@pytest.mark.parametrize("sizes", [(1, 1), (8, 8), (8, 4)], ids=str)
@pytest.mark.parametrize(
    ("name", "by_rows", "gathered"),
    [
        ("fp8-block", set(), True),  # what goes into the second product: where it was summed
        ("fp8-channel", {"quantize_tokens"}, True),
        ("fp8-tensor", {"largest_of_rows", "quantize_by"}, False),  # one scale for all tokens
        ("fp8-tensor-static", set(), True),
    ],
)
def test_a_float8_layer_s_rows_are_quantised_by_kernels(monkeypatch, name, by_rows, gathered, sizes):
    one_height = Tiling(columns=128, heights=(16,), block_k=128, stages=2)  # quickly lowered
    monkeypatch.setattr(hopper_fp8, "choose_tiling", lambda **_: one_height)
    options = {"dtype": jnp.bfloat16, "backend": "hopper", "quantization": name}
    config = MoEConfig(512, 256, num_experts=8, top_k=2)
    layer = nnx.eval_shape(lambda: EPMoE(config, mesh=make_mesh(*sizes), rngs=nnx.Rngs(0), **options))
    graphdef, state = nnx.split(layer)
    x = jax.ShapeDtypeStruct((2048, config.hidden_size), jnp.bfloat16)
    traced = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)).trace(state, x)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"call @(quantize_\w+|largest_of_rows)\(", program)) == by_rows
    assert ("2048x4x128xbf16" in program) == gathered  # x in groups of 128, as the gathering kernel takes it


@pytest.mark.parametrize(
    ("kv_heads", "qk_norm", "has_rope_kernel", "has_decode_kernel"),
    [(4, "head", True, True), (4, "full", False, True), (16, None, True, False), (2, "head", False, True)],
)
@pytest.mark.parametrize("cache_dtype", [jnp.bfloat16, FP8], ids=["bfloat16", "float8"])
def test_a_token_s_attention_is_two_kernels_where_they_serve_it(
    kv_heads, qk_norm, has_rope_kernel, has_decode_kernel, cache_dtype, monkeypatch
):
    monkeypatch.setattr(decode_hopper, "num_sms", lambda: 132)
    config = GQAConfig(num_heads=32, num_kv_heads=kv_heads, head_dim=64, qk_norm=qk_norm)
    new = {"mesh": make_mesh(), "dtype": jnp.bfloat16}
    module = nnx.eval_shape(lambda: attention.GQA(config, GQA.rope, 256, 1e-6, rngs=nnx.Rngs(0), **new))
    graphdef, state = nnx.split(module)
    x, table = jax.ShapeDtypeStruct((4, 1, 256), jnp.bfloat16), jax.ShapeDtypeStruct((4, 1, 32), jnp.float32)
    positions, cache = jax.ShapeDtypeStruct((4, 1), jnp.int32), module.abstract_cache(4, 64, cache_dtype)
    run = jax.jit(lambda state, x, table, at, cache: nnx.merge(graphdef, state)(x, (table, table), at, cache))
    program = run.trace(state, x, table, positions, cache).lower(lowering_platforms=("cuda",)).as_text()
    assert ("call @rotate_into_cache(" in program) == has_rope_kernel
    assert ("stablehlo.scatter" in program) != has_rope_kernel
    assert ("call @decode(" in program) == has_decode_kernel
    assert ("fmha" in program) != has_decode_kernel


@pytest.mark.parametrize(
    ("cache_dtype", "heads", "dequantised"), [(jnp.bfloat16, 16, False), (FP8, 16, False), (FP8, 128, True)]
)
def test_mla_s_cache_is_read_as_it_is_where_a_kernel_does(cache_dtype, heads, dequantised, monkeypatch):
    for module in (decode_hopper, mla_hopper):
        monkeypatch.setattr(module, "num_sms", lambda: 132)
    config = MLAConfig(num_heads=heads, kv_lora_rank=512, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64)
    new = {"mesh": make_mesh(), "dtype": jnp.bfloat16}
    module = nnx.eval_shape(lambda: attention.MLA(config, MLA.rope, 256, rngs=nnx.Rngs(0), **new))
    graphdef, state = nnx.split(module)
    x, table = jax.ShapeDtypeStruct((4, 1, 256), jnp.bfloat16), jax.ShapeDtypeStruct((4, 1, 32), jnp.float32)
    positions, cache = jax.ShapeDtypeStruct((4, 1), jnp.int32), module.abstract_cache(4, 192, cache_dtype)
    run = jax.jit(lambda state, x, table, at, cache: nnx.merge(graphdef, state)(x, (table, table), at, cache))
    program = run.trace(state, x, table, positions, cache).lower(lowering_platforms=("cuda",)).as_text()
    assert "custom_call @mosaic_gpu" in program
    assert ("tensor<4x192x512xbf16>" in program) == dequantised
