"""One query a sequence over multi-head latent attention's cache, on Hopper: all heads attend to the same latents.

    scores[h, l] = scale * q[h] . latent[l]        over the whole latent, its rotated part included
    out[h]       = softmax(scores[h]) @ latent[:, :rank]

A tile of latents serves both products from shared memory. Many heads have a kernel of their own, `mla_hopper_many_heads`.
"""

import jax
import jax.numpy as jnp

from jax_epmoe.kernels import decode_hopper, mla_hopper_many_heads
from jax_epmoe.kernels.decode_splits import POSITIONS, merged, num_splits
from jax_epmoe.kernels.device import num_sms

_MOST_SPLITS = 4  # of many heads' kernel, whose parts are four times as large


def serves(q: jax.Array, latent: jax.Array, rank: int) -> bool:
    """Whether `decode` can compute it: bfloat16 or float16, L a multiple of 8, sizes multiples of 64 that fit the SM."""
    return (
        q.dtype == latent.dtype
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and latent.shape[1] % 8 == 0
        and latent.shape[-1] % 64 == 0
        and rank % 64 == 0
        and rank <= 512
        and latent.shape[-1] <= 640
        and q.size > 0
        and latent.size > 0
    )


def serves_float8(q: jax.Array, latent: jax.Array, rotated: jax.Array) -> bool:
    """Whether `decode_float8` should compute it: of few heads, q bfloat16 or float16, L and rank multiples of 64, 64 numbers rotated."""
    return (
        q.dtype in (jnp.bfloat16, jnp.float16)
        and latent.dtype == rotated.dtype == jnp.uint8
        and q.shape[1] < mla_hopper_many_heads.HEADS
        and latent.shape[1] % POSITIONS == 0
        and latent.shape[-1] % 64 == 0
        and latent.shape[-1] <= 512
        and rotated.shape[-1] == 64
        and q.size > 0
        and latent.size > 0
    )


def decode_float8(
    q: jax.Array,
    latent: jax.Array,
    rotated: jax.Array,
    scales: tuple[jax.Array, jax.Array],
    lengths: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """`decode` over a cache in float8, which is read as it is.

    Args:
      q: `[B, heads, rank + 64]`, with the cache one that `serves_float8`.
      latent: `[B, L, rank]`, float8_e4m3fn as bytes (uint8); its values are all of it.
      rotated: `[B, L, 64]`, the same: the rotated part of the keys.
      scales: of both, `[B, L]` float32 each, positive where there are positions.
      lengths, scale: as `decode`'s.

    Returns:
      `[B, heads, rank]` in q's dtype.
    """
    heads = q.shape[1]
    q = jnp.pad(q, ((0, 0), (0, -heads % 8), (0, 0)))
    one_head = [array[:, :, None] for array in (latent, rotated, *scales)]
    options = {"scales": tuple(one_head[2:]), "rotated": one_head[1], "rank": latent.shape[-1], "scale": scale}
    return decode_hopper.decode(q, one_head[0], None, lengths, **options)[:, :heads]


def decode(q: jax.Array, latent: jax.Array, lengths: jax.Array, *, rank: int, scale: float) -> jax.Array:
    """Softmax attention in float32 of one query a sequence.

    Args:
      q: `[B, heads, D]`, bfloat16 or float16.
      latent: `[B, L, D]` in q's dtype, the cache.
      lengths: `[B]` int32: how many positions of each sequence there are, from 1 to L. Others must be finite.
      rank: how many of the D numbers are values.
      scale: multiplies the scores.

    Returns:
      `[B, heads, rank]` in q's dtype.
    """
    batch, heads, _ = q.shape
    if mla_hopper_many_heads.serves(q, rank):
        splits = num_splits(batch * (heads // mla_hopper_many_heads.HEADS), latent.shape[1], num_sms())
        if splits <= _MOST_SPLITS:
            parts = mla_hopper_many_heads.run(q, latent, lengths, rank=rank, scale=scale, splits=splits)
            return parts[0] if splits == 1 else merged(*parts).astype(q.dtype)
    q = jnp.pad(q, ((0, 0), (0, -heads % 8), (0, 0)))
    return decode_hopper.decode(q, latent[:, :, None], None, lengths, rank=rank, scale=scale)[:, :heads]
