"""Matrices to test.

Values are small integers, so that every product is exact whatever the platform multiplies with.
"""

import jax.numpy as jnp
import numpy as np
from cases import inside

from jax_blocksparse import BlockSparseMatrix, patterns

SHAPES = [(32, 48), (30, 41), (16, 16), (5, 3), (33, 16)]


def integers(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(jnp.dtype(dtype))


def matrix(shape=(30, 41), block_size=16, density=0.5, seed=0, dtype=np.float32):
    """A matrix whose stored values beyond its edge are NaN: they must not matter."""
    pattern = patterns.random(shape, block_size, density=density, seed=seed)
    return with_values(pattern, seed, dtype)


def with_values(pattern, seed=0, dtype=np.float32):
    data = integers((pattern.nnz, pattern.block_size, pattern.block_size), seed, dtype)
    return BlockSparseMatrix(jnp.asarray(np.where(inside(pattern), data, np.array(np.nan, dtype))), pattern)


def assert_equal(got, wanted):
    got, wanted = (
        np.asarray(each.todense() if isinstance(each, BlockSparseMatrix) else each) for each in (got, wanted)
    )
    assert got.shape == wanted.shape
    np.testing.assert_array_equal(got.astype(np.float64), wanted.astype(np.float64))
