"""Initialisation by the fan-in that each output really has."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_blocksparse.pattern import BlockPattern, is_concrete

Initializer = Callable[[jax.Array, Sequence[int], DTypeLike], jax.Array]
"""What `jax.nn.initializers` makes: a function of (key, shape, dtype)."""


def init_blocks(
    kernel_init: Initializer, key: jax.Array, pattern: BlockPattern, dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Initialises the blocks of a weight as `kernel_init` would initialise a dense one with as many inputs per output.

    A dense initialiser must not see the packed shape (nnz, b, b): it would take nnz for a receptive field and b for the
    fan-in. Here all block columns with the same fan-in are drawn as one dense matrix (fan-in, their width) and cut up,
    so every initialiser keeps its meaning, the outputs' variance does not depend on the density, and at density 1 the
    values are those of the dense layer with this key.

    Under jit, where the pattern is not known, every column is drawn with the mean fan-in, which is exact for patterns
    that are balanced per column over whole blocks.

    Args:
      kernel_init: an initialiser of `jax.nn.initializers` or any function of (key, shape, dtype).
      key: a JAX random key.
      pattern: where the blocks are.
      dtype: dtype of the values.

    Returns:
      (nnz, b, b) values; zeros for inert entries and outside the matrix.

    Example:
      >>> import jax, jax_blocksparse as jbs
      >>> pattern = jbs.patterns.random((512, 512), 16, density=0.25)
      >>> data = jbs.initializers.init_blocks(jax.nn.initializers.lecun_normal(), jax.random.key(0), pattern)
      >>> data.shape, round(float(data.std()) * (0.25 * 512) ** 0.5, 1)
      ((256, 16, 16), 1.0)
    """
    data = jnp.zeros((pattern.nnz, pattern.block_size, pattern.block_size), dtype)
    if not pattern.nnz:
        return data
    if is_concrete(*pattern.indices):
        data = _by_fan_in(kernel_init, key, pattern, data)
    else:
        data = _by_mean_fan_in(kernel_init, key, pattern, data)
    return jnp.where(_inside(pattern), data, 0)


def _by_fan_in(kernel_init: Initializer, key: jax.Array, pattern: BlockPattern, data: jax.Array) -> jax.Array:
    (k, n), b = pattern.shape, pattern.block_size
    ptr, order, rows = (np.asarray(leaf) for leaf in (pattern.col_ptr, pattern.col_order, pattern.rows))
    blocks = np.diff(ptr)
    last_row = np.where(blocks > 0, rows[order[np.maximum(ptr[1:] - 1, 0)]], 0)
    fan_in = blocks * b - np.maximum((last_row + 1) * b - k, 0)
    sizes = [int(size) for size in np.unique(fan_in) if size]
    for size in sizes:
        columns = np.flatnonzero(fan_in == size)
        width = sum(min(b, n - int(column) * b) for column in columns)  # the last column may be narrower than a block
        drawn = kernel_init(key if len(sizes) == 1 else jax.random.fold_in(key, size), (size, width), data.dtype)
        ids = order[ptr[columns][:, None] + np.arange(blocks[columns[0]])]
        data = data.at[ids].set(_cut(drawn, int(blocks[columns[0]]), len(columns), b))
    return data


def _by_mean_fan_in(kernel_init: Initializer, key: jax.Array, pattern: BlockPattern, data: jax.Array) -> jax.Array:
    n, b = pattern.shape[1], pattern.block_size
    height = max(1, round(pattern.nnz / pattern.grid[1]))
    columns = -(-pattern.nnz // height)
    width = n if columns == pattern.grid[1] else columns * b
    drawn = _cut(kernel_init(key, (height * b, width), data.dtype), height, columns, b)
    return drawn.reshape(columns * height, b, b)[: pattern.nnz]


def _cut(drawn: jax.Array, height: int, columns: int, b: int) -> jax.Array:
    """A dense matrix as (columns, height, b, b) blocks, padded with zeros at the end."""
    padded = jnp.pad(drawn, ((0, height * b - drawn.shape[0]), (0, columns * b - drawn.shape[1])))
    return padded.reshape(height, b, columns, b).transpose(2, 0, 1, 3)


def _inside(pattern: BlockPattern) -> jax.Array:
    """(nnz, b, b), true for entries of live blocks that lie in the matrix."""
    offsets = jnp.arange(pattern.block_size)
    row, col = (index[:, None] * pattern.block_size + offsets for index in (pattern.rows, pattern.cols))
    row_inside, col_inside = (row >= 0) & (row < pattern.shape[0]), (col >= 0) & (col < pattern.shape[1])
    return row_inside[:, :, None] & col_inside[:, None, :]
