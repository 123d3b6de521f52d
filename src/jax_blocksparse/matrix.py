"""BlockSparseMatrix: the values of the blocks and where they are."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_blocksparse import ops
from jax_blocksparse.geometry import block_grid, check_density, check_geometry
from jax_blocksparse.pattern import BlockPattern, check_is_pattern, is_concrete, same_pattern

if TYPE_CHECKING:
    import scipy.sparse


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlockSparseMatrix:
    """A matrix whose non-zero entries lie in square blocks; a pytree whose only float leaf is `data`.

    Supports `x @ w`, `w @ x`, `w.T`, `w * scalar`, `w + w` on one pattern, and jit, grad, vmap and scan like an array.

    Attributes:
      data: (nnz, b, b), the values; `data[z]` is the block at `(pattern.rows[z], pattern.cols[z])`.
      pattern: where the blocks are, as stored.
      transposed: whether this matrix is the transpose of what is stored; static.

    Example:
      >>> import jax, jax.numpy as jnp, jax_blocksparse as jbs
      >>> pattern = jbs.patterns.random((256, 512), 32, density=0.25, seed=0)
      >>> w = jbs.BlockSparseMatrix(jnp.ones((pattern.nnz, 32, 32)), pattern)
      >>> (jnp.ones((4, 256)) @ w).shape
      (4, 512)
    """

    data: jax.Array
    pattern: BlockPattern
    transposed: bool = dataclasses.field(default=False, metadata={"static": True})

    __array_ufunc__ = None  # so that numpy_array @ w comes here
    __hash__ = None

    @classmethod
    def fromdense(
        cls,
        dense: ArrayLike,
        *,
        block_size: int | None = None,
        density: float | None = None,
        pattern: BlockPattern | None = None,
    ) -> "BlockSparseMatrix":
        """Cuts a dense matrix into blocks and keeps some of them, with their values.

        Args:
          dense: (K, N).
          block_size: one of `BLOCK_SIZES`; not needed with `pattern`.
          density: keeps this fraction of the blocks (at least one), those of largest Frobenius norm.
          pattern: keeps the blocks of this pattern. With neither, every block that is not all zero is kept.

        Raises:
          ValueError: if `dense` is not two-dimensional or does not fit the pattern, if both `density` and `pattern` are
            given, if the density is not in (0, 1], or if under jit neither is given.
          TypeError: if `pattern` is no BlockPattern.

        Example:
          >>> import jax, jax_blocksparse as jbs
          >>> dense = jax.random.normal(jax.random.key(0), (64, 96))
          >>> jbs.BlockSparseMatrix.fromdense(dense, block_size=16, density=0.5)
          BlockSparseMatrix(64x96, float32, block_size=16, nnz=12, density=0.5)
        """
        dense = jnp.asarray(dense)
        if dense.ndim != 2:
            raise ValueError(f"dense must have two dimensions, got shape {dense.shape}")
        if pattern is not None:
            if density is not None:
                raise ValueError("give density or pattern, not both")
            check_is_pattern("pattern", pattern)
            if dense.shape != pattern.shape or block_size not in (None, pattern.block_size):
                raise ValueError(
                    f"dense of shape {dense.shape} with block_size={block_size} does not fit {pattern}: "
                    f"shape {pattern.shape} and block size {pattern.block_size} are wanted"
                )
            return cls(_cut(dense, pattern.block_size, pattern.rows, pattern.cols), pattern)
        if block_size is None:
            raise ValueError("fromdense needs block_size or pattern")
        shape, block_size = check_geometry(dense.shape, block_size)
        if density is None:
            if not is_concrete(dense):
                raise ValueError("under jit fromdense needs density or pattern: the number of blocks must be known")
            with jax.ensure_compile_time_eval():
                occupied = np.asarray(jnp.any(_blocks(dense, block_size) != 0, axis=(2, 3)))
            pattern = BlockPattern.from_mask(occupied, shape=shape, block_size=block_size)
        else:
            # Squares of float16 would overflow.
            blocks = _blocks(dense.astype(jnp.promote_types(dense.dtype, jnp.float32)), block_size)
            norms = jnp.linalg.norm(blocks, axis=(2, 3))
            count = max(1, round(check_density(density) * norms.size))
            kept = jnp.sort(jax.lax.top_k(norms.T.ravel(), count)[1])
            cols, rows = jnp.divmod(kept, norms.shape[0])
            pattern = BlockPattern.from_coordinates(rows, cols, shape=shape, block_size=block_size)
        return cls(_cut(dense, block_size, pattern.rows, pattern.cols), pattern)

    @classmethod
    def from_scipy_sparse(cls, matrix: "scipy.sparse.sparray", *, block_size: int | None = None) -> "BlockSparseMatrix":
        """Takes over a SciPy sparse matrix; blocks that hold any stored entry are kept whole.

        Args:
          matrix: (K, N), any SciPy sparse array or matrix.
          block_size: one of `BLOCK_SIZES`; by default the square block size of a BSR matrix.

        Raises:
          TypeError: if `matrix` is not a SciPy sparse matrix.
          ValueError: if it is not two-dimensional, or no block size is given and it is not BSR with square blocks of a
            size in `BLOCK_SIZES`.

        Example:
          >>> import scipy.sparse, jax_blocksparse as jbs
          >>> jbs.BlockSparseMatrix.from_scipy_sparse(scipy.sparse.eye_array(64, format="csr"), block_size=16)
          BlockSparseMatrix(64x64, float32, block_size=16, nnz=4, density=0.25)
        """
        import scipy.sparse

        if not scipy.sparse.issparse(matrix):
            raise TypeError(f"matrix must be a SciPy sparse array or matrix, got {type(matrix).__name__}")
        if block_size is None:
            if matrix.format != "bsr" or matrix.blocksize[0] != matrix.blocksize[1]:
                raise ValueError(f"block_size is needed for a matrix of format {matrix.format!r} without square blocks")
            block_size = matrix.blocksize[0]
        shape, b = check_geometry(matrix.shape, block_size)
        padded = matrix.tocoo(copy=True)  # resize works in place
        padded.resize(tuple(size * b for size in block_grid(shape, b)))
        bsr = padded.tobsr(blocksize=(b, b))
        bsr.sum_duplicates()
        rows = np.repeat(np.arange(len(bsr.indptr) - 1), np.diff(bsr.indptr))
        pattern = BlockPattern.from_coordinates(rows, bsr.indices, shape=shape, block_size=b)
        dtype = jax.dtypes.canonicalize_dtype(bsr.dtype)
        return cls(jnp.asarray(bsr.data.astype(dtype)), pattern)

    def to_scipy_sparse(self) -> "scipy.sparse.bsr_array | scipy.sparse.csr_array":
        """Returns the matrix as SciPy BSR, or as CSR if its size is no multiple of the block size (BSR cannot hold it).

        Values in a dtype that SciPy does not know (bfloat16, float16) come out as float32.

        Raises:
          jax.errors.TracerArrayConversionError: under jit.

        Example:
          >>> import jax.numpy as jnp, jax_blocksparse as jbs
          >>> w = jbs.BlockSparseMatrix.fromdense(jnp.eye(32), block_size=8)
          >>> w.to_scipy_sparse().nnz  # SciPy counts elements
          256
        """
        import scipy.sparse

        pattern, b = self.pattern, self.pattern.block_size
        order = np.asarray(pattern.row_order)[: int(pattern.row_ptr[-1])]
        data = np.asarray(self.data.astype(jnp.promote_types(self.data.dtype, jnp.float32)))[order]
        padded_shape = tuple(size * b for size in pattern.grid)
        indptr = np.asarray(pattern.row_ptr)
        matrix = scipy.sparse.bsr_array((data, np.asarray(pattern.cols)[order], indptr), shape=padded_shape)
        if padded_shape != pattern.shape:
            matrix = matrix.tocsr()[: pattern.shape[0], : pattern.shape[1]]
        return matrix.T.asformat(matrix.format) if self.transposed else matrix

    def todense(self) -> jax.Array:
        """Returns the (K, N) dense matrix.

        Example:
          >>> import jax.numpy as jnp, jax_blocksparse as jbs
          >>> bool((jbs.BlockSparseMatrix.fromdense(jnp.eye(20), block_size=8).todense() == jnp.eye(20)).all())
          True
        """
        return _todense(self)

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N), the size in elements."""
        return self.pattern.shape[::-1] if self.transposed else self.pattern.shape

    @property
    def ndim(self) -> int:
        """Always 2."""
        return 2

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values."""
        return self.data.dtype

    @property
    def block_size(self) -> int:
        """Rows and columns of a block."""
        return self.pattern.block_size

    @property
    def nnz(self) -> int:
        """Number of blocks stored, inert entries included."""
        return self.pattern.nnz

    @property
    def density(self) -> float:
        """Stored blocks over all blocks of the grid."""
        return self.pattern.density

    @property
    def T(self) -> "BlockSparseMatrix":  # noqa: N802
        """The transpose: a view, no value is moved."""
        return dataclasses.replace(self, transposed=not self.transposed)

    def astype(self, dtype: DTypeLike) -> "BlockSparseMatrix":
        """Returns the matrix with its values in another dtype.

        Args:
          dtype: of the new values.

        Example:
          >>> import jax.numpy as jnp, jax_blocksparse as jbs
          >>> jbs.BlockSparseMatrix.fromdense(jnp.eye(16), block_size=8).astype(jnp.bfloat16)
          BlockSparseMatrix(16x16, bfloat16, block_size=8, nnz=2, density=0.5)
        """
        return dataclasses.replace(self, data=self.data.astype(dtype))

    def __matmul__(self, x: ArrayLike) -> jax.Array:
        if isinstance(x, BlockSparseMatrix):
            raise TypeError("a product of two block-sparse matrices is not supported; use w.todense() for one of them")
        x = jnp.asarray(x)
        if x.ndim == 0 or x.shape[-2:][0] != self.shape[1]:
            raise ValueError(
                f"w @ x needs {self.shape[1]} rows in x (w has shape {self.shape}), got x of shape {x.shape}"
            )
        if x.ndim == 1:
            return ops.matmul(x, self.T)
        return ops.matmul(x.swapaxes(-1, -2), self.T).swapaxes(-1, -2)

    def __rmatmul__(self, x: ArrayLike) -> jax.Array:
        return ops.matmul(x, self)

    def __mul__(self, scalar: ArrayLike) -> "BlockSparseMatrix":
        return self._scaled(jnp.multiply, scalar)

    __rmul__ = __mul__

    def __truediv__(self, scalar: ArrayLike) -> "BlockSparseMatrix":
        return self._scaled(jnp.divide, scalar)

    def __neg__(self) -> "BlockSparseMatrix":
        return dataclasses.replace(self, data=-self.data)

    def __add__(self, other: "BlockSparseMatrix") -> "BlockSparseMatrix":
        return self._combined(jnp.add, other)

    def __sub__(self, other: "BlockSparseMatrix") -> "BlockSparseMatrix":
        return self._combined(jnp.subtract, other)

    def _scaled(self, operation: Callable[..., jax.Array], scalar: ArrayLike) -> "BlockSparseMatrix":
        if isinstance(scalar, BlockSparseMatrix) or jnp.ndim(scalar) != 0:
            return NotImplemented
        return dataclasses.replace(self, data=operation(self.data, scalar))

    def _combined(self, operation: Callable[..., jax.Array], other: Any) -> "BlockSparseMatrix":
        if not isinstance(other, BlockSparseMatrix):
            return NotImplemented
        if self.transposed != other.transposed or not same_pattern(self.pattern, other.pattern):
            raise ValueError(
                f"+ and - need two matrices on one pattern, and must know it: got {self} and {other}. Under jit pass "
                "one BlockPattern and build both matrices on it"
            )
        return dataclasses.replace(self, data=operation(self.data, other.data))

    def __repr__(self) -> str:
        view = ", transposed view" if self.transposed else ""
        if not hasattr(self.data, "dtype"):  # the leaves are not arrays, for example after jax.tree.map(jnp.shape, w)
            return f"BlockSparseMatrix(data={self.data}, pattern={self.pattern}{view})"
        k, n = self.shape
        return (
            f"BlockSparseMatrix({k}x{n}, {self.dtype}, block_size={self.block_size}, nnz={self.nnz}, "
            f"density={self.density:.3g}{view})"
        )


@jax.jit
def _todense(w: BlockSparseMatrix) -> jax.Array:
    (k, n), (grid_k, grid_n), b = w.pattern.shape, w.pattern.grid, w.pattern.block_size
    # A negative index would count from the end: make every inert entry point past the end, where scatters drop it.
    rows = jnp.where(w.pattern.rows < 0, grid_k, w.pattern.rows)
    cols = jnp.where(w.pattern.cols < 0, grid_n, w.pattern.cols)
    blocks = jnp.zeros((grid_k, grid_n, b, b), w.dtype).at[rows, cols].add(w.data, mode="drop")
    dense = blocks.swapaxes(1, 2).reshape(grid_k * b, grid_n * b)[:k, :n]
    return dense.T if w.transposed else dense


def _blocks(dense: jax.Array, b: int) -> jax.Array:
    """(K, N) to (ceil(K / b), ceil(N / b), b, b), padded with zeros."""
    grid = block_grid(dense.shape, b)
    padded = jnp.pad(dense, [(0, blocks * b - size) for blocks, size in zip(grid, dense.shape, strict=True)])
    return padded.reshape(grid[0], b, grid[1], b).swapaxes(1, 2)


@functools.partial(jax.jit, static_argnames="b")
def _cut(dense: jax.Array, b: int, rows: jax.Array, cols: jax.Array) -> jax.Array:
    """The blocks of `dense` at the given positions; zeros for inert entries."""
    grid = block_grid(dense.shape, b)
    rows, cols = jnp.where(rows < 0, grid[0], rows), jnp.where(cols < 0, grid[1], cols)
    return _blocks(dense, b).at[rows, cols].get(mode="fill", fill_value=0)
