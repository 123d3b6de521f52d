"""Both products in plain jax.numpy: the specification, the fallback where there is no native kernel, the tests' oracle.

As in the native kernels, what lies out of range in the index arrays is skipped.

Neither makes a temporary of the size of the dense matrix, and neither uses a scatter, whose sums a GPU would do in any
order. `matmul` goes through the blocks of all output columns at once, the k-th block of each column in step k; so its
time follows the fullest column.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_blocksparse.primitives import batch_size


def matmul(
    x: jax.Array,
    data: jax.Array,
    *indices: jax.Array,
    transpose: bool,
    shape: tuple[int, int],
    out_dtype: DTypeLike,
    precision: jax.lax.Precision | None,
) -> jax.Array:
    """What `matmul_p` computes, operand for operand."""

    def one(x: jax.Array, data: jax.Array, indices: tuple[jax.Array, ...]) -> jax.Array:
        rows, cols, col_ptr, col_order, row_ptr, row_order, *_ = indices
        ptr, order, inner = (row_ptr, row_order, cols) if transpose else (col_ptr, col_order, rows)
        in_size, out_size = shape[::-1] if transpose else shape
        return _matmul(x, data.mT if transpose else data, ptr, order, inner, in_size, out_size, precision)

    return _over_batch(one, x, data, indices).astype(out_dtype)


def sddmm(
    x: jax.Array,
    dy: jax.Array,
    *indices: jax.Array,
    block_size: int,
    shape: tuple[int, int],
    out_dtype: DTypeLike,
    precision: jax.lax.Precision | None,
) -> jax.Array:
    """What `sddmm_p` computes, operand for operand."""

    def one(x: jax.Array, dy: jax.Array, indices: tuple[jax.Array, ...]) -> jax.Array:
        return _sddmm(x, dy, indices[0], indices[1], block_size, shape, precision)

    return _over_batch(one, x, dy, indices).astype(out_dtype)


def _over_batch(one, a, b, indices):
    """Maps `one` over the leading axes, where an axis of size 1 is shared by all."""
    size = batch_size(a, b, indices[0])
    if size == 1:
        return one(a[0], b[0], tuple(index[0] for index in indices))[None]
    axes = tuple(None if operand.shape[0] == 1 else 0 for operand in (a, b, indices[0]))
    operands = [
        jax.tree.map(lambda leaf: leaf[0], operand) if axis is None else operand
        for operand, axis in zip((a, b, indices), axes, strict=True)
    ]
    return jax.vmap(one, in_axes=axes)(*operands)


def _columns(x: jax.Array, b: int) -> jax.Array:
    """(M, C) to (ceil(C / b), M, b), padded with zeros."""
    blocks = -(-x.shape[1] // b)
    padded = jnp.pad(x, ((0, 0), (0, blocks * b - x.shape[1])))
    return padded.reshape(x.shape[0], blocks, b).swapaxes(0, 1)


def _accumulator(dtype: DTypeLike) -> DTypeLike:
    return jnp.promote_types(dtype, jnp.float32)


def _in_range(index: jax.Array, size: int) -> jax.Array:
    return (index >= 0) & (index < size)


def _matmul(x, data, ptr, order, inner, in_size, out_size, precision):
    m, (nnz, b) = x.shape[0], data.shape[:2]
    out_blocks = ptr.shape[0] - 1
    # Made from x so that in a shard_map it varies over the same axes, as the carry of a loop must.
    y = jnp.zeros_like(x, shape=(out_blocks, m, b), dtype=_accumulator(x.dtype))
    if nnz and m:
        x_columns = _columns(x, b)
        inside = jnp.arange(x_columns.shape[0] * b).reshape(-1, b) < in_size
        ptr = jnp.clip(ptr, 0, nnz)

        def add_kth_block(k: jax.Array, y: jax.Array) -> jax.Array:
            walk = ptr[:-1] + k
            block = order[jnp.minimum(walk, nnz - 1)]
            column = inner[block]
            valid = (walk < ptr[1:]) & _in_range(block, nnz) & _in_range(column, x_columns.shape[0])
            # Entries of a block beyond the matrix may hold anything; what they stand for is zero.
            w = jnp.where(inside[column][:, :, None], data[block], 0)
            term = jnp.einsum("omk,okj->omj", x_columns[column], w, precision=precision, preferred_element_type=y.dtype)
            return jnp.where(valid[:, None, None], y + term, y)

        y = jax.lax.fori_loop(0, jnp.max(ptr[1:] - ptr[:-1]), add_kth_block, y)
    return y.swapaxes(0, 1).reshape(m, out_blocks * b)[:, :out_size]


def _sddmm(x, dy, rows, cols, b, shape, precision):
    x_columns, dy_columns = _columns(x, b), _columns(dy, b)
    accumulator = _accumulator(x.dtype)

    def one_block(position: tuple[jax.Array, jax.Array]) -> jax.Array:
        row, col = position
        product = jnp.einsum(
            "mi,mj->ij", x_columns[row], dy_columns[col], precision=precision, preferred_element_type=accumulator
        )
        row_inside = _in_range(row, x_columns.shape[0]) & (row * b + jnp.arange(b) < shape[0])
        col_inside = _in_range(col, dy_columns.shape[0]) & (col * b + jnp.arange(b) < shape[1])
        return jnp.where(row_inside[:, None] & col_inside, product, 0)

    if not rows.shape[0]:
        return jnp.zeros((0, b, b), accumulator)
    # As many blocks at once as make a temporary of the size of x.
    return jax.lax.map(one_block, (rows, cols), batch_size=x_columns.shape[0])
