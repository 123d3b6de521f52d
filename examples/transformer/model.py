"""The model: a decoder-only Transformer over bytes whose large matrices are block-sparse."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jax_blocksparse import patterns
from jax_blocksparse.nnx import BlockSparseLinear
from transformer.settings import Settings

VOCABULARY = 256
_ROTATION_BASE = 10_000.0

Linear = nnx.Linear | BlockSparseLinear
MakeLinear = Callable[[int, int], Linear]


def linear_factory(settings: Settings, rngs: nnx.Rngs) -> MakeLinear:
    """Return what builds every large matrix: block-sparse layers, or ordinary ones for the dense twin."""
    dtype = jnp.dtype(settings.dtype)
    if settings.dense:
        return lambda fan_in, fan_out: nnx.Linear(fan_in, fan_out, use_bias=False, dtype=dtype, rngs=rngs)
    make_pattern = getattr(patterns, settings.pattern)
    seeds = itertools.count(1000 * settings.seed)

    def block_sparse(fan_in: int, fan_out: int) -> BlockSparseLinear:
        chance = {"seed": next(seeds)} if settings.pattern == "random" else {}
        pattern = make_pattern((fan_in, fan_out), settings.block_size, density=settings.density, **chance)
        return BlockSparseLinear(fan_in, fan_out, pattern=pattern, use_bias=False, dtype=dtype, rngs=rngs)

    return block_sparse


def rotate(x: jax.Array) -> jax.Array:
    """Rotary position embedding: turns pairs of features by angles that grow with the position.

    Args:
      x: (batch, time, heads, features), features even.

    Returns:
      The same shape and dtype; the angles are computed in float32.
    """
    time, features = x.shape[1], x.shape[-1]
    frequencies = _ROTATION_BASE ** (-jnp.arange(0, features, 2, dtype=jnp.float32) / features)
    angles = jnp.arange(time, dtype=jnp.float32)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, settings: Settings, linear: MakeLinear) -> None:
        """Build the four projections."""
        width = settings.d_model
        self.heads = settings.heads
        self.kernel = settings.attention
        self.query, self.key, self.value, self.out = (linear(width, width) for _ in range(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, time, d_model) to the same shape."""
        heads = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        query, key, value = (project(x).reshape(heads) for project in (self.query, self.key, self.value))
        mixed = jax.nn.dot_product_attention(
            rotate(query), rotate(key), value, is_causal=True, implementation=self.kernel
        )
        return self.out(mixed.reshape(x.shape))


class Block(nnx.Module):
    """Attention, then an MLP, each reading a normalised residual stream and adding to it."""

    def __init__(self, settings: Settings, linear: MakeLinear, rngs: nnx.Rngs) -> None:
        """Build the layers of one block."""
        width, hidden = settings.d_model, settings.mlp_ratio * settings.d_model
        dtype = jnp.dtype(settings.dtype)
        self.attention_norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.attention = Attention(settings, linear)
        self.mlp_norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.up = linear(width, hidden)
        self.down = linear(hidden, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, time, d_model) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x))))

    def matrices(self) -> dict[str, Linear]:
        """The six large matrices of the block by name."""
        attention = self.attention
        projections = {"query": attention.query, "key": attention.key, "value": attention.value, "out": attention.out}
        return projections | {"up": self.up, "down": self.down}


class Transformer(nnx.Module):
    """A decoder-only Transformer over bytes."""

    def __init__(self, settings: Settings) -> None:
        """Build the model; every random choice follows from `settings.seed`."""
        rngs = nnx.Rngs(settings.seed)
        linear = linear_factory(settings, rngs)
        width = settings.d_model
        options = {"use_bias": False, "dtype": jnp.dtype(settings.dtype), "rngs": rngs}
        # Embeddings as large as what the blocks add to them, and a first guess that all bytes are equally likely.
        self.embed = nnx.Linear(VOCABULARY, width, kernel_init=nnx.initializers.normal(1.0), **options)
        self.blocks = nnx.List([Block(settings, linear, rngs) for _ in range(settings.layers)])
        self.norm = nnx.RMSNorm(width, dtype=options["dtype"], rngs=rngs)
        self.logits = nnx.Linear(width, VOCABULARY, kernel_init=nnx.initializers.zeros_init(), **options)

    def __call__(self, text: jax.Array) -> jax.Array:
        """Predict the byte after each position.

        Args:
          text: uint8 (batch, time).

        Returns:
          float32 logits (batch, time, 256).
        """
        # A product with one-hot rows and not a gather: its gradient adds in the same order on every run.
        x = self.embed(jax.nn.one_hot(text, VOCABULARY, dtype=self.embed.dtype))
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x)).astype(jnp.float32)
