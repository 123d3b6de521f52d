"""Layers of Flax NNX to test, and what they are compared with."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_blocksparse.nnx import BlockSparseLinear

IN, OUT = 60, 90  # no multiples of the block size
FULL = {"block_size": 16, "density": 1.0}
HALF = {"block_size": 16, "density": 0.5}


def layer(seed=0, in_features=IN, out_features=OUT, **options):
    options = options if "pattern" in options else HALF | options
    return BlockSparseLinear(in_features, out_features, rngs=nnx.Rngs(seed), **options)


def twins(**options):
    """The dense layer and the block-sparse one with every block, made with the same keys."""
    return tuple(
        make(IN, OUT, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0), **options | kind)
        for make, kind in ((nnx.Linear, {}), (BlockSparseLinear, FULL))
    )


def x_of(*leading, features=IN, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal((*leading, features)).astype(jnp.dtype(dtype))


def float64(*arrays):
    return (np.asarray(array, np.float64) for array in arrays)


def mask(of):
    return of.pattern.get_value().mask()
