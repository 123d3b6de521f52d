"""Layers of Flax Linen to test, and what to look at in them."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_blocksparse import BlockSparseMatrix
from jax_blocksparse.linen import PATTERN_COLLECTION, PATTERN_NAME, BlockSparseDense

IN, OUT = 60, 90  # no multiples of the block size
KEY = jax.random.key(0)


def layer(features=OUT, **options):
    return BlockSparseDense(features, **({} if "pattern" in options else {"block_size": 16, "density": 0.5}) | options)


def x_of(*leading, features=IN, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal((*leading, features)).astype(jnp.dtype(dtype))


def pattern_of(variables):
    return variables[PATTERN_COLLECTION][PATTERN_NAME]


def matrix_of(variables):
    return BlockSparseMatrix(variables["params"]["kernel"], pattern_of(variables))


def assert_trees_equal(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_allclose(left, right, **{"rtol": 0} | tolerance)
