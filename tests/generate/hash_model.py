"""A language model that is exact, quick to compile and strict about the engine's side of `Decoder`'s contract."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

VOCAB = 97


class HashModel(nnx.Module):
    """The next token is a hash of all tokens so far and where they are; its cache holds the tokens.

    A cache entry that is wrong, or seen too early, changes the text. `observe` is called with `num_tokens` of every call.
    """

    def __init__(
        self, mesh: jax.sharding.Mesh, *, context: int = 512, eos: tuple[int, ...] = (), observe=None, vocab=VOCAB
    ):
        self.config = SimpleNamespace(vocab_size=vocab, max_position_embeddings=context, eos_token_ids=eos)
        self.mesh = mesh
        self.batch_multiple = mesh.shape["data"]
        self.observe = observe
        self.factor = nnx.Param(jax.device_put(jnp.asarray(31, jnp.int32), NamedSharding(mesh, P())))

    def init_cache(self, batch_size, length, kv_cache_dtype):
        assert kv_cache_dtype == "auto"
        return {
            "tokens": jnp.full((batch_size, length), 90, jnp.int32, device=NamedSharding(self.mesh, P("data", None)))
        }

    def hidden(self, tokens, start, cache, num_tokens, *, is_start):
        if self.observe is not None:
            jax.debug.callback(self.observe, num_tokens)
        size, length = tokens.shape
        position = start[:, None] + jnp.arange(length)
        # What padding leaves behind is as wrong as can be.
        written = jnp.where(jnp.arange(length) < num_tokens[:, None], tokens, 77)
        old = jnp.where(is_start & (start[:, None] >= 0), 55, cache["tokens"])
        cached = old.at[jnp.arange(size)[:, None], position].set(written, mode="drop")
        seen = jnp.arange(cached.shape[1]) <= position[..., None]  # [B, S, L]
        weight = (jnp.arange(cached.shape[1]) * self.factor[...] + 7) % 89
        hashed = jnp.sum(jnp.where(seen, (cached[:, None] + 3) * weight, 0), axis=-1) % self.config.vocab_size
        return hashed[..., None].astype(jnp.float32), {"tokens": cached}

    def logits(self, hidden):
        """Highest at the hash; `vocab - distance` elsewhere, so sampling has something to choose among."""
        vocab = self.config.vocab_size
        distance = (jnp.arange(vocab) - hidden.astype(jnp.int32)) % vocab
        return -0.05 * distance.astype(jnp.float32)
