"""Small models of the three kinds, with sizes that no mesh divides, and what the tests of this folder share."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_epmoe import MoEConfig, make_mesh
from jax_epmoe.config import ClampedSwiGLU, GQAConfig, MLAConfig, ModelConfig, RopeConfig
from jax_epmoe.models.decoder import Decoder

FAST_COMPILE = {"xla_backend_optimization_level": 0}

MIXTRAL_LIKE = ModelConfig(
    vocab_size=29,
    hidden_size=24,
    attention=GQAConfig(num_heads=8, num_kv_heads=2, head_dim=6, sliding_window=5),
    rope=RopeConfig(),
    moe=MoEConfig(24, 11, num_experts=8, top_k=2, norm_topk_prob=True),
    moe_layers=(True, True),
)
OLMOE_LIKE = MIXTRAL_LIKE.replace(
    attention=GQAConfig(num_heads=8, num_kv_heads=4, head_dim=6, qk_norm="full", clip_qkv=1.5),
    tie_word_embeddings=True,
)
DEEPSEEK_LIKE = MIXTRAL_LIKE.replace(
    attention=MLAConfig(
        num_heads=8, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, q_lora_rank=14
    ),
    rope=RopeConfig(interleaved=True),
    moe=MoEConfig(24, 11, num_experts=8, top_k=3, n_group=4, topk_group=2, shared_intermediate_size=13),
    moe_layers=(False, True),
    dense_intermediate_size=19,
)
QWEN2_LIKE = MIXTRAL_LIKE.replace(
    attention=GQAConfig(num_heads=8, num_kv_heads=2, head_dim=6, qkv_bias=True),
    moe=MoEConfig(24, 11, num_experts=8, top_k=3, shared_intermediate_size=13, shared_expert_gate=True),
)
GPT_OSS_LIKE = MIXTRAL_LIKE.replace(
    attention=GQAConfig(
        num_heads=8, num_kv_heads=2, head_dim=6, sliding_window=5, qkv_bias=True, o_bias=True, sinks=True
    ),
    moe=MoEConfig(
        24, 11, num_experts=8, top_k=2, activation=ClampedSwiGLU(limit=1.0), norm_topk_prob=True,
        router_bias=True, expert_bias=True,
    ),
    sliding_layers=(True, False),
)  # fmt: skip
KINDS = {"mixtral_like": MIXTRAL_LIKE, "olmoe_like": OLMOE_LIKE, "deepseek_like": DEEPSEEK_LIKE}


def relative_error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def tokens(batch: int, length: int, seed: int = 0, vocab_size: int = MIXTRAL_LIKE.vocab_size) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, (batch, length), dtype=np.int32)


def lively(cls, *args, mesh, dtype=jnp.float32, **kwargs):
    """A module with weights so large and norm scales so different that attention and routing choose sharply.

    The same on every mesh, zeros in the padding; drawn by NumPy, which compiles nothing.
    """

    def abstract(mesh):
        return nnx.split(nnx.eval_shape(lambda: cls(*args, mesh=mesh, dtype=dtype, rngs=nnx.Rngs(0), **kwargs)))

    shapes = {keys: variable.get_value().shape for keys, variable in nnx.to_flat_state(abstract(make_mesh())[1])}

    def draw(keys, variable):
        target, shape = variable.get_value(), shapes[keys]
        rng = np.random.default_rng(list(".".join(map(str, keys)).encode()))
        drawn = rng.uniform(0.5, 1.5, shape) if keys[-1] == "scale" else rng.normal(scale=0.2, size=shape)
        padded = np.pad(drawn, [(0, to - n) for n, to in zip(shape, target.shape, strict=True)])
        return variable.replace(jax.device_put(padded.astype(target.dtype), target.sharding))

    graphdef, state = abstract(mesh)
    return nnx.merge(graphdef, nnx.map_state(draw, state))


def decoder(config: ModelConfig, tp_size=1, ep_size=1, dp_size=1, dtype=jnp.float32, **kwargs) -> Decoder:
    return lively(Decoder, config, mesh=make_mesh(tp_size, ep_size, dp_size), dtype=dtype, **kwargs)


def compiled(model: nnx.Module, call):
    """`call(model, *args)` under jit, as a function of args."""
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, *args: call(nnx.merge(graphdef, state), *args), compiler_options=FAST_COMPILE)
    return lambda *args: run(state, *args)


def numpy_rotate(x: np.ndarray, angles: np.ndarray, interleaved: bool) -> np.ndarray:
    """Pairs of `x [B, S, heads, dim]` as complex numbers, turned by `angles [B, S, dim / 2]`."""
    turn = np.exp(1j * angles)[:, :, None]
    if interleaved:
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def numpy_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def numpy_attend(q, k, v, query_positions, key_positions, scale, window=None, sinks=None) -> np.ndarray:
    """One query of one head at a time: softmax over the keys that it may see, and its head's sink."""
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, s, head in np.ndindex(q.shape[:3]):
        distance = query_positions[b, s] - key_positions[b]
        seen = (distance >= 0) & (distance < (window or np.inf))
        kv_head = head // (q.shape[2] // k.shape[2])
        scores = k[b, seen, kv_head] @ q[b, s, head] * scale
        if sinks is not None:
            scores = np.append(scores, sinks[head])
        weights = np.exp(scores - scores.max())
        out[b, s, head] = (weights / weights.sum())[: seen.sum()] @ v[b, seen, kv_head]
    return out
