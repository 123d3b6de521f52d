"""BlockPattern: where the blocks of a block-sparse matrix are, and the orders and plans by which kernels walk them."""

import dataclasses
import functools
import numbers
from collections.abc import Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_blocksparse import plan, plan_layout, sddmm_layout, sddmm_plan
from jax_blocksparse.arrays import count_up_to, flat_size, keep_freed_memory, order_by
from jax_blocksparse.geometry import block_grid, check_block_size, check_geometry, is_live
from jax_blocksparse.plan_layout import PlanLayout
from jax_blocksparse.sddmm_layout import SddmmLayout

INDEX_NAMES = ("rows", "cols", "col_ptr", "col_order", "row_ptr", "row_order", "y_plan", "dx_plan", "dw_plan")
"""The leaves of a BlockPattern."""


def is_concrete(*arrays: ArrayLike) -> bool:
    """True if none of the arrays is being traced, so that their values can be looked at."""
    return not any(isinstance(array, jax.core.Tracer) for array in arrays)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlockPattern:
    """The positions of the non-zero blocks of a matrix of `shape` (K, N), cut into square blocks.

    Block `z` covers rows `rows[z] * b` to `(rows[z] + 1) * b` and columns `cols[z] * b` to `(cols[z] + 1) * b`. Which
    block has which id means nothing: moving a block changes two integers and no values. The other leaves are derived
    orders, so a pattern is made by `from_coordinates`, `from_mask` or a generator of `jax_blocksparse.patterns`, not by
    calling the class.

    All index arrays are pytree leaves: a jitted function takes another pattern with as many blocks without compiling
    again, and patterns can be scanned and vmapped over. Shape and block size are static.

    A matrix whose size is no multiple of the block size has blocks that reach beyond it; what lies outside the matrix
    reads as zero and stays zero. An entry with `rows[z] == grid[0]` is inert: it stands for no block, which lets
    patterns of several sizes share one array size.

    Attributes:
      rows: (nnz,) int32, the block row of each block.
      cols: (nnz,) int32, the block column of each block.
      col_ptr: (grid[1] + 1,) int32; block column c owns `col_order[col_ptr[c]:col_ptr[c + 1]]`.
      col_order: (nnz,) int32, block ids sorted by (column, row), inert ones last.
      row_ptr: (grid[0] + 1,) int32; block row r owns `row_order[row_ptr[r]:row_ptr[r + 1]]`.
      row_order: (nnz,) int32, block ids sorted by (row, column), inert ones last.
      y_plan: int32, what the Hopper kernels copy and multiply for x @ W, step by step (see `jax_blocksparse.plan`).
      dx_plan: int32, the same for x @ W.T.
      dw_plan: int32, the same for the blocks of x.T @ dy (see `jax_blocksparse.sddmm_plan`).
      shape: (K, N), the size of the matrix in elements; static.
      block_size: b, one of `BLOCK_SIZES`; static.
    """

    rows: jax.Array
    cols: jax.Array
    col_ptr: jax.Array
    col_order: jax.Array
    row_ptr: jax.Array
    row_order: jax.Array
    y_plan: jax.Array
    dx_plan: jax.Array
    dw_plan: jax.Array
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    block_size: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_coordinates(
        cls,
        rows: ArrayLike,
        cols: ArrayLike,
        *,
        shape: Sequence[int],
        block_size: int,
        capacity: int | None = None,
    ) -> "BlockPattern":
        """Makes the pattern with a block at each (rows[z], cols[z]), in block units.

        Args:
          rows: (nnz,) integers in [0, ceil(K / block_size)); the value one past the end marks an inert entry.
          cols: (nnz,) integers in [0, ceil(N / block_size)), or anything where the entry is inert.
          shape: (K, N) of the matrix, in elements.
          block_size: one of `BLOCK_SIZES`.
          capacity: pads the pattern with inert entries to this many.

        Raises:
          ValueError: if shape, block size or capacity make no sense, the arrays are not one-dimensional and equally
            long, or (where the values are known, i.e. outside jit) a position is out of range or occurs twice.
          TypeError: if the arrays do not hold integers.

        Example:
          >>> import jax_blocksparse as jbs
          >>> pattern = jbs.BlockPattern.from_coordinates([0, 1, 1], [0, 0, 2], shape=(32, 48), block_size=16)
          >>> pattern.nnz, pattern.grid
          (3, (2, 3))
        """
        shape, block_size = check_geometry(shape, block_size)
        concrete = is_concrete(rows, cols)
        xp = np if concrete else jnp
        rows, cols = xp.asarray(rows), xp.asarray(cols)
        for name, array in (("rows", rows), ("cols", cols)):
            if array.size and not np.issubdtype(array.dtype, np.integer):
                raise TypeError(f"{name} must hold integers, got dtype {array.dtype}")
        if rows.ndim != 1 or rows.shape != cols.shape:
            raise ValueError(f"rows and cols must be one-dimensional and equally long, got {rows.shape}, {cols.shape}")
        grid = block_grid(shape, block_size)
        if concrete:
            _check_positions(rows, cols, grid)
        rows, cols = rows.astype(np.int32), cols.astype(np.int32)
        if capacity is not None:
            if not isinstance(capacity, numbers.Integral):
                raise ValueError(f"capacity must be an integer or None, got {capacity!r}")
            missing = int(capacity) - rows.shape[0]
            if missing < 0:
                raise ValueError(f"capacity must be at least the number of blocks {rows.shape[0]}, got {capacity}")
            rows = xp.pad(rows, (0, missing), constant_values=grid[0])
            cols = xp.pad(cols, (0, missing), constant_values=grid[1])
        leaves = (rows, cols, *_orders(xp, rows, cols, grid), *_plans(xp, rows, cols, shape, block_size))
        if concrete:
            # Even inside jit, what the host knows stays known: layers look at their pattern when they initialise.
            with jax.ensure_compile_time_eval():
                leaves = tuple(jnp.asarray(leaf) for leaf in leaves)
        return cls(*leaves, shape=shape, block_size=block_size)

    @classmethod
    def from_mask(
        cls, mask: np.ndarray, *, block_size: int, shape: Sequence[int] | None = None, capacity: int | None = None
    ) -> "BlockPattern":
        """Makes the pattern with a block wherever `mask` is true; their ids go down one column after the other.

        Args:
          mask: (ceil(K / block_size), ceil(N / block_size)) booleans, known on the host.
          block_size: one of `BLOCK_SIZES`.
          shape: (K, N) of the matrix, in elements; by default the whole grid, `mask.shape` times the block size.
          capacity: pads the pattern with inert entries to this many.

        Raises:
          ValueError: if the mask is not two-dimensional or does not fit the shape.
          jax.errors.TracerArrayConversionError: under jit, where the number of blocks is not known.

        Example:
          >>> import jax_blocksparse as jbs, numpy as np
          >>> jbs.BlockPattern.from_mask(np.eye(4, dtype=bool), block_size=32).shape
          (128, 128)
        """
        mask = np.asarray(mask, dtype=bool)
        if mask.ndim != 2:
            raise ValueError(f"mask must have two dimensions, got shape {mask.shape}")
        if shape is None:
            shape = tuple(size * check_block_size(block_size) for size in mask.shape)
        shape, block_size = check_geometry(shape, block_size)
        if mask.shape != block_grid(shape, block_size):
            raise ValueError(
                f"mask must have shape {block_grid(shape, block_size)} for a matrix of shape {shape} in blocks of "
                f"{block_size}, got {mask.shape}"
            )
        cols, rows = np.nonzero(mask.T)
        return cls.from_coordinates(rows, cols, shape=shape, block_size=block_size, capacity=capacity)

    @property
    def nnz(self) -> int:
        """Number of blocks stored, inert entries included."""
        return self.rows.shape[-1]

    @property
    def grid(self) -> tuple[int, int]:
        """(block rows, block columns): the shape in blocks, rounded up."""
        return block_grid(self.shape, self.block_size)

    @property
    def density(self) -> float:
        """Stored blocks over all blocks of the grid."""
        return self.nnz / (self.grid[0] * self.grid[1])

    @property
    def T(self) -> "BlockPattern":  # noqa: N802
        """The pattern of the transposed matrix: the same arrays under swapped names, but for a new `dw_plan`."""
        layout = sddmm_layout.choose_layout(*self.shape[::-1], self.block_size, self.nnz)
        if is_concrete(self.rows, self.cols) and self.rows.ndim == 1:
            dw_plan = sddmm_plan.make_flat_plan(np.asarray(self.cols), np.asarray(self.rows), layout, np)
            with jax.ensure_compile_time_eval():
                dw_plan = jnp.asarray(dw_plan)
        else:
            make = functools.partial(sddmm_plan.make_flat_plan, layout=layout, xp=jnp)
            dw_plan = jnp.vectorize(make, signature="(n),(n)->(m)")(self.cols, self.rows)
        return BlockPattern(
            rows=self.cols,
            cols=self.rows,
            col_ptr=self.row_ptr,
            col_order=self.row_order,
            row_ptr=self.col_ptr,
            row_order=self.col_order,
            y_plan=self.dx_plan,
            dx_plan=self.y_plan,
            dw_plan=dw_plan,
            shape=self.shape[::-1],
            block_size=self.block_size,
        )

    @property
    def index_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes that the index arrays of one pattern of this shape, block size and number of blocks have."""
        ids, (grid_k, grid_n) = (self.nnz,), self.grid
        plans = ((flat_size(layout),) for layout in _layouts(self.shape, self.block_size, self.nnz))
        return ids, ids, (grid_n + 1,), ids, (grid_k + 1,), ids, *plans

    @property
    def indices(self) -> tuple[jax.Array, ...]:
        """The index arrays in the order of `INDEX_NAMES`, in which the primitives take them."""
        return tuple(getattr(self, name) for name in INDEX_NAMES)

    def mask(self) -> np.ndarray:
        """Returns a (grid[0], grid[1]) boolean array on the host, true where a block is.

        Raises:
          jax.errors.TracerArrayConversionError: under jit, where the positions are not known.

        Example:
          >>> import jax_blocksparse as jbs
          >>> jbs.BlockPattern.from_coordinates([0], [1], shape=(16, 16), block_size=8).mask().tolist()
          [[False, True], [False, False]]
        """
        rows, cols = np.asarray(self.rows), np.asarray(self.cols)
        live = is_live(rows, cols, self.grid)
        mask = np.zeros(self.grid, dtype=bool)
        mask[rows[live], cols[live]] = True
        return mask

    def __repr__(self) -> str:
        k, n = self.shape
        if hasattr(self.rows, "shape"):
            blocks = f"nnz={self.nnz}, density={self.density:.3g}"
        else:  # the leaves are not arrays, for example after jax.tree.map(jnp.shape, pattern)
            blocks = f"indices={self.indices}"
        return f"BlockPattern({k}x{n}, block_size={self.block_size}, {blocks})"


def check_is_pattern(name: str, pattern: object) -> None:
    """Raises TypeError, naming the argument, for anything but a BlockPattern."""
    if not isinstance(pattern, BlockPattern):
        raise TypeError(f"{name} must be a BlockPattern, got {type(pattern).__name__}")


def same_pattern(a: BlockPattern, b: BlockPattern) -> bool:
    """True if both patterns are known to have the same blocks under the same ids."""
    if (a.shape, a.block_size, a.rows.shape) != (b.shape, b.block_size, b.rows.shape):
        return False
    if a.rows is b.rows and a.cols is b.cols:
        return True
    if not is_concrete(a.rows, a.cols, b.rows, b.cols):
        return False
    return np.array_equal(a.rows, b.rows) and np.array_equal(a.cols, b.cols)


def _orders(xp: ModuleType, rows: jax.Array, cols: jax.Array, grid: tuple[int, int]) -> tuple[jax.Array, ...]:
    """(col_ptr, col_order, row_ptr, row_order), by NumPy on the host or jax.numpy under jit."""
    live = is_live(rows, cols, grid)
    rows, cols = xp.where(live, rows, grid[0]), xp.where(live, cols, grid[1])

    def walk(outer: jax.Array, outers: int, inner: jax.Array, inners: int) -> tuple[jax.Array, jax.Array]:
        order = order_by(xp, outer, inner, inners + 1)
        ptr = xp.pad(count_up_to(xp, outer, outers), (1, 0))
        return ptr.astype(np.int32), order.astype(np.int32)

    return *walk(cols, grid[1], rows, grid[0]), *walk(rows, grid[0], cols, grid[1])


def _layouts(shape: tuple[int, int], block_size: int, nnz: int) -> tuple[PlanLayout, PlanLayout, SddmmLayout]:
    """The layouts of y_plan, dx_plan and dw_plan."""
    return (
        plan_layout.choose_layout(*shape, block_size, nnz),
        plan_layout.choose_layout(*shape[::-1], block_size, nnz),
        sddmm_layout.choose_layout(*shape, block_size, nnz),
    )


def _plans(
    xp: ModuleType, rows: jax.Array, cols: jax.Array, shape: tuple[int, int], block_size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(y_plan, dx_plan, dw_plan), by NumPy on the host or jax.numpy under jit."""
    y_layout, dx_layout, dw_layout = _layouts(shape, block_size, rows.shape[0])
    if xp is np:
        keep_freed_memory()
    return (
        plan.make_flat_plan(rows, cols, y_layout, xp),
        plan.make_flat_plan(cols, rows, dx_layout, xp),
        sddmm_plan.make_flat_plan(rows, cols, dw_layout, xp),
    )


def _check_positions(rows: np.ndarray, cols: np.ndarray, grid: tuple[int, int]) -> None:
    placed = rows != grid[0]
    outside = placed & ~is_live(rows, cols, grid)
    if outside.any():
        z = int(outside.argmax())
        raise ValueError(
            f"block {z} is at (rows, cols) = ({rows[z]}, {cols[z]}), outside the grid of {grid[0]} x {grid[1]} blocks"
        )
    positions = rows[placed].astype(np.int64) * grid[1] + cols[placed]
    unique, counts = np.unique(positions, return_counts=True)
    if (counts > 1).any():
        row, col = divmod(int(unique[counts.argmax()]), grid[1])
        raise ValueError(f"the block at (rows, cols) = ({row}, {col}) is given {counts.max()} times; give it once")
