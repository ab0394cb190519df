"""What attention keeps of past positions: keys and values, or latents, in the model's dtype or in float8.

In float8 every vector that is cached has a float32 scale of its own, taken from its largest value as it is written: a key or
value of one head at one position; of MLA, the latent and the rotated key, each by itself. So nothing is calibrated, no head
rounds another's values away, and what is cached does not change when later positions come.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_epmoe.config import require
from jax_epmoe.quant import FP8, QuantizedArray, dequantize, quantize

KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3")  # the last two are the same


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Float8Vectors:
    """Vectors of D float8_e4m3fn as they lie in memory, `data [B, L, ..., D]` uint8, and their `scales [B, L, ...]` float32.

    As bytes, because XLA's CPU backend widens all of a float8 array to float16 to write into it.
    """

    data: jax.Array
    scales: jax.Array


# `[B, L, D]` or `[B, L, heads, D]`.
Cached = jax.Array | Float8Vectors
Cache = tuple[Cached, ...]


def check_kv_cache_dtype(name: str) -> None:
    """Raises a `ValueError` for what is not in `KV_CACHE_DTYPES`."""
    require(name in KV_CACHE_DTYPES, "kv_cache_dtype", name, f"one of {', '.join(KV_CACHE_DTYPES)}")


def cache_dtype(name: str, dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """What a name in `KV_CACHE_DTYPES` means for a model of `dtype`; a `ValueError` for another."""
    check_kv_cache_dtype(name)
    return jnp.dtype(dtype) if name == "auto" else FP8


def abstract_cached(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, mesh: Mesh, spec: P) -> Any:
    """A `Cached` of values `shape` that lie on the mesh by `spec`: shapes, dtypes and shardings."""
    arrays: Any = jax.ShapeDtypeStruct(shape, dtype)
    if jnp.dtype(dtype) == FP8:
        data, scales = jax.ShapeDtypeStruct(shape, jnp.uint8), jax.ShapeDtypeStruct(shape[:-1], jnp.float32)
        arrays = Float8Vectors(data, scales)  # type: ignore[arg-type]
    return jax.tree.map(
        lambda array, spec: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec)),
        arrays,
        specs(arrays, spec),
    )


def specs(cache: Any, spec: P) -> Any:
    """The partition of each array in a cache whose values lie by `spec`: a scale is where its vector is."""
    return jax.tree.map(lambda array: P(*tuple(spec)[: array.ndim]), cache)


def write(cached: Cached, new: jax.Array, positions: jax.Array) -> Cached:
    """Puts `new [B, S, ...]` at `positions [B, S]` of `cached [B, L, ...]`; positions past L are dropped."""
    if not isinstance(cached, Float8Vectors):
        return _scatter(cached, new.astype(cached.dtype), positions)
    vectors = in_float8(new)
    data, scales = (
        _scatter(*pair, positions) for pair in ((cached.data, vectors.data), (cached.scales, vectors.scales))
    )
    return Float8Vectors(data, scales)


def in_float8(vectors: jax.Array) -> Float8Vectors:
    """`[B, L, ..., D]` as a float8 cache has them."""
    quantized = quantize(vectors, "token")
    return Float8Vectors(jax.lax.bitcast_convert_type(quantized.values, jnp.uint8), quantized.scales)


def _scatter(cached: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    sequence = jnp.arange(cached.shape[0])[:, None]
    return cached.at[sequence, positions].set(new, mode="drop")


def stored(cached: Cached) -> tuple[jax.Array, jax.Array | None]:
    """The values as they lie in memory, and their scales, if it has any."""
    return (cached.data, cached.scales) if isinstance(cached, Float8Vectors) else (cached, None)


def read(cached: Cached, dtype: jax.typing.DTypeLike) -> jax.Array:
    """All that is cached `[B, L, ...]`, in `dtype` if it was float8: the size of one layer's cache in that dtype."""
    if not isinstance(cached, Float8Vectors):
        return cached
    values = jax.lax.bitcast_convert_type(cached.data, FP8)
    return dequantize(QuantizedArray(values, cached.scales, "token"), dtype)


def read_latents(parts: Cache, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`[B, L, D]`, of MLA's latents, which a float8 cache has in two parts; as `read` does."""
    return jnp.concatenate([read(part, dtype) for part in parts], axis=-1)
