"""Initialisation by the fan-in that each output really has."""

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_blocksparse.pattern import BlockPattern, check_is_pattern, is_concrete

Initializer = Callable[[jax.Array, Sequence[int], DTypeLike], jax.Array]
"""What `jax.nn.initializers` makes: a function of (key, shape, dtype)."""


def init_blocks(
    kernel_init: Initializer, key: jax.Array, pattern: BlockPattern, dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Initialises the blocks of a weight as `kernel_init` would initialise a dense one with as many inputs per output.

    A dense initialiser must not see the packed shape (nnz, b, b): it would take nnz for a receptive field and b for the
    fan-in. Here each block column takes its values from a dense matrix (its fan-in, N) that `kernel_init` draws, so
    every initialiser keeps its meaning, the outputs' variance does not depend on the density, and at density 1 the
    values are those of the dense layer with this key.

    Under jit, where the pattern may not be known, every column is taken to have the mean number of blocks, rounded:
    exact, and the same as outside jit, for patterns that are balanced per column, as `patterns.random` makes them.

    Args:
      kernel_init: an initialiser of `jax.nn.initializers` or any function of (key, shape, dtype).
      key: a JAX random key.
      pattern: where the blocks are.
      dtype: dtype of the values.

    Returns:
      (nnz, b, b) values; zeros for inert entries and outside the matrix.

    Raises:
      TypeError: if `pattern` is no BlockPattern.

    Example:
      >>> import jax, jax_blocksparse as jbs
      >>> pattern = jbs.patterns.random((512, 512), 16, density=0.25)
      >>> data = jbs.initializers.init_blocks(jax.nn.initializers.lecun_normal(), jax.random.key(0), pattern)
      >>> data.shape, round(float(data.std()) * (0.25 * 512) ** 0.5, 1)
      ((256, 16, 16), 1.0)
    """
    check_is_pattern("pattern", pattern)
    n, grid_n, b = pattern.shape[1], pattern.grid[1], pattern.block_size
    data = jnp.zeros((pattern.nnz, b, b), dtype)
    for fan_in, columns, ids in _columns_by_fan_in(pattern):
        # One key for all: no two block columns take the same columns of what is drawn.
        width = n if columns[-1] < grid_n else len(columns) * b
        data = _place(data, ids, columns, kernel_init(key, (fan_in, width), dtype))
    return _zero_outside(data, pattern)


def _columns_by_fan_in(pattern: BlockPattern) -> Iterator[tuple[int, np.ndarray, jax.Array]]:
    """For each fan-in that there is: (fan-in, columns (C,), the ids of their blocks (C, blocks in each))."""
    grid_k, b = pattern.grid[0], pattern.block_size
    beyond = grid_k * b - pattern.shape[0]  # columns with a block in the last row have as many inputs less
    if is_concrete(*pattern.indices):
        ptr, order = np.asarray(pattern.col_ptr), np.asarray(pattern.col_order)
        heights = np.diff(ptr)
        fan_ins = heights * b - beyond * pattern.mask()[-1]
        for fan_in in np.unique(fan_ins[heights > 0]):
            columns = np.flatnonzero(fan_ins == fan_in)
            yield int(fan_in), columns, order[ptr[columns, None] + np.arange(heights[columns[0]])]
    elif pattern.nnz:
        height = max(1, round(pattern.nnz / pattern.grid[1]))
        ids = jnp.pad(pattern.col_order, (0, -pattern.nnz % height), constant_values=pattern.nnz).reshape(-1, height)
        columns = np.arange(ids.shape[0])
        shorter = pattern.rows[ids[:, -1:]] == grid_k - 1
        if beyond and height < grid_k:
            yield height * b, columns, jnp.where(shorter, pattern.nnz, ids)
            yield height * b - beyond, columns, jnp.where(shorter, ids, pattern.nnz)
        else:
            yield height * b - beyond, columns, ids


@jax.jit
def _place(data: jax.Array, ids: jax.Array, columns: jax.Array, drawn: jax.Array) -> jax.Array:
    """Sets the blocks `ids` (C, height) to those of the given block columns of a dense matrix; drops ids >= nnz."""
    height, b = ids.shape[1], data.shape[-1]
    width = -(-drawn.shape[1] // b)
    padded = jnp.pad(drawn, ((0, height * b - drawn.shape[0]), (0, width * b - drawn.shape[1])))
    blocks = padded.reshape(height, b, width, b).transpose(2, 0, 1, 3)
    return data.at[ids].set(blocks[columns], mode="drop")


@jax.jit
def _zero_outside(data: jax.Array, pattern: BlockPattern) -> jax.Array:
    """Sets what is no entry of the matrix to zero: inert blocks, and what reaches beyond the last row and column."""
    offsets = jnp.arange(pattern.block_size)
    row, col = (index[:, None] * pattern.block_size + offsets for index in (pattern.rows, pattern.cols))
    row_inside, col_inside = (row >= 0) & (row < pattern.shape[0]), (col >= 0) & (col < pattern.shape[1])
    return jnp.where(row_inside[:, :, None] & col_inside[:, None, :], data, 0)
