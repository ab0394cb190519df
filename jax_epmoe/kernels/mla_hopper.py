"""One query a sequence over multi-head latent attention's cache, on Hopper: all heads attend to the same latents.

    scores[h, l] = scale * q[h] . latent[l]        over the whole latent, its rotated part included
    out[h]       = softmax(scores[h]) @ latent[:, :rank]

A tile of latents serves both products from shared memory. Many heads have a kernel of their own, `mla_hopper_many_heads`.
"""

import jax
import jax.numpy as jnp

from jax_epmoe.kernels import decode_hopper, mla_hopper_many_heads
from jax_epmoe.kernels.decode_splits import merged, num_splits
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
