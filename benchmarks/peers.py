"""The peers: other libraries for block-sparse products, on the same inputs as ours and checked by the same reference.

Each gets its operands in the layout it likes best, made outside the time: W sorted, and transposed where it needs that,
x and dy transposed where it takes them so.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse

from benchmarks.cases import DTYPES, Sparsity
from benchmarks.inputs import Inputs
from benchmarks.tasks import Call, JaxTask, LibraryTask, sparse_task
from jax_blocksparse import BlockSparseMatrix

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Bsr:
    """A block-sparse matrix as most libraries want it: the blocks of one row of blocks after those of another.

    Attributes:
      order: at each place, which block of ours it is.
      row_ptr: where each row of blocks begins.
      rows: the row of each block.
      cols: the column of each block.
      values: (nnz, b, b).
      shape: of the matrix, in elements.
    """

    order: "Tensor"
    row_ptr: "Tensor"
    rows: "Tensor"
    cols: "Tensor"
    values: "Tensor"
    shape: tuple[int, int]

    @classmethod
    def of(cls, matrix: BlockSparseMatrix) -> "Bsr":
        """Sorts the blocks of a matrix."""
        pattern = matrix.pattern.T if matrix.transposed else matrix.pattern
        order = np.asarray(pattern.row_order)
        rows, cols = (np.asarray(index)[order] for index in (pattern.rows, pattern.cols))
        order, row_ptr, rows, cols = (_tensor(jnp.asarray(index)) for index in (order, pattern.row_ptr, rows, cols))
        values = _tensor(matrix.data)[order.long()]
        values = (values.mT if matrix.transposed else values).contiguous()
        return cls(order, row_ptr, rows, cols, values, pattern.shape)


Launch = Callable[[], Any]
"""Queues a product; returns it where the library makes a new tensor, None where it is in the output it was given."""


def _spmm(inputs: Inputs, sparsity: Sparsity, multiply: Callable[[Bsr, "Tensor", "Tensor"], Launch]) -> LibraryTask:
    """A product y or dx as c = A b with a block-sparse A = W^T or W, from what makes a launch of (A, b, c)."""

    def prepare(operands: tuple[Any, ...]) -> Call:
        dense_operand, w = operands
        a = Bsr.of(w.T if inputs.workload.product == "y" else w)
        b = _tensor(dense_operand).t().contiguous()
        c = b.new_empty((a.shape[0], b.shape[1]))
        return _call(multiply(a, b, c), c, lambda result: _array(result).T)

    return LibraryTask(**sparse_task(inputs, sparsity), prepare=prepare)


def _sddmm(inputs: Inputs, sparsity: Sparsity, multiply: Callable[[Bsr, "Tensor", "Tensor"], Launch]) -> LibraryTask:
    """The blocks C of a b = x^T dy, from what makes a launch of (C, a, b)."""

    def prepare(operands: tuple[Any, ...]) -> Call:
        x, dy, pattern = operands
        zeros = jnp.zeros((pattern.nnz, pattern.block_size, pattern.block_size), x.dtype)
        c = Bsr.of(BlockSparseMatrix(zeros, pattern))

        def output(values: "Tensor") -> jax.Array:
            return _array(values[c.order.long().argsort()])

        return _call(multiply(c, _tensor(x).t().contiguous(), _tensor(dy)), c.values, output)

    return LibraryTask(**sparse_task(inputs, sparsity), prepare=prepare)


def torch_bsr(inputs: Inputs, sparsity: Sparsity) -> LibraryTask:
    """PyTorch's Triton kernels for its BSR tensors."""
    from torch import sparse_bsr_tensor
    from torch.sparse import _triton_ops

    def tensor(bsr: Bsr) -> "Tensor":
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.sparse|benchmarks\.peers")
        return sparse_bsr_tensor(bsr.row_ptr, bsr.cols, bsr.values, size=bsr.shape, check_invariants=False)

    def spmm(a: Bsr, b: "Tensor", c: "Tensor") -> Launch:
        matrix = tensor(a)
        return lambda: _triton_ops.bsr_dense_addmm(c, matrix, b, beta=0, out=c)

    def sddmm(c: Bsr, a: "Tensor", b: "Tensor") -> Launch:
        matrix = tensor(c)
        return lambda: _triton_ops.sampled_addmm(matrix, a, b, beta=0.0).values()

    return _sddmm(inputs, sparsity, sddmm) if inputs.workload.product == "dw" else _spmm(inputs, sparsity, spmm)


def stk(inputs: Inputs, sparsity: Sparsity) -> LibraryTask:
    """The Sparse Toolkit of MegaBlocks: Triton kernels for blocks of 128."""
    import stk

    def matrix(bsr: Bsr) -> Any:
        return stk.Matrix(bsr.shape, bsr.values, bsr.rows.short(), bsr.cols.short(), bsr.row_ptr)

    def spmm(a: Bsr, b: "Tensor", c: "Tensor") -> Launch:
        sparse_a = matrix(a)
        return lambda: stk.ops.dsd(sparse_a, b)

    def sddmm(c: Bsr, a: "Tensor", b: "Tensor") -> Launch:
        sparse_c = matrix(c)
        return lambda: stk.ops.sdd(a, b, sparse_c).data

    return _sddmm(inputs, sparsity, sddmm) if inputs.workload.product == "dw" else _spmm(inputs, sparsity, spmm)


def cusparse_bsr(inputs: Inputs, sparsity: Sparsity) -> LibraryTask:
    """The BSR products of cuSPARSE."""
    from benchmarks import cusparse

    def spmm(a: Bsr, b: "Tensor", c: "Tensor") -> Launch:
        # cuSPARSE multiplies BSR by matrices that are contiguous in columns.
        columns = b.t().contiguous().t()
        result = c.new_empty(c.shape[::-1]).t()
        launch = cusparse.spmm(cusparse.bsr(a.row_ptr, a.cols, a.values, a.shape), columns, result)

        def launch_and_return() -> "Tensor":
            launch()
            return result

        return launch_and_return

    def sddmm(c: Bsr, a: "Tensor", b: "Tensor") -> Launch:
        return cusparse.sddmm(a, b, cusparse.bsr(c.row_ptr, c.cols, c.values, c.shape))

    return _sddmm(inputs, sparsity, sddmm) if inputs.workload.product == "dw" else _spmm(inputs, sparsity, spmm)


def cusparse_bell(inputs: Inputs, sparsity: Sparsity) -> LibraryTask:
    """The Blocked-ELL product of cuSPARSE, whose rows all have the blocks of the longest: the others are padded."""
    from benchmarks import cusparse

    def spmm(a: Bsr, b: "Tensor", c: "Tensor") -> Launch:
        block_rows, size = a.row_ptr.numel() - 1, a.values.shape[-1]
        width = int(a.row_ptr.diff().max())
        rows = a.rows.long()
        places = rows.new_tensor(range(rows.numel())) - a.row_ptr.long()[rows]
        cols = a.cols.new_full((block_rows, width), -1)
        cols[rows, places] = a.cols
        values = a.values.new_zeros((block_rows, size, width, size))
        values[rows, :, places] = a.values
        return cusparse.spmm(cusparse.blocked_ell(cols, values, a.shape), b, c, cusparse.BLOCKED_ELL_ALGORITHM)

    return _spmm(inputs, sparsity, spmm)


def jax_bcoo(inputs: Inputs, sparsity: Sparsity) -> JaxTask:
    """`jax.experimental.sparse`, which knows single entries only; in float32, the only type its GPU kernels take."""
    # Off by default, and what is done instead gathers a row of b for every single entry of A.
    jax.config.update("jax_bcoo_cusparse_lowering", True)
    common = sparse_task(inputs, sparsity)
    pattern = sparsity.make(inputs.workload.shape)
    pattern = pattern.T if inputs.workload.product == "y" else pattern
    rows, cols = (np.asarray(index)[:, None, None] * pattern.block_size for index in (pattern.rows, pattern.cols))
    within = np.arange(pattern.block_size)
    rows, cols = (index.ravel() for index in np.broadcast_arrays(rows + within[:, None], cols + within))
    order = np.lexsort((cols, rows))
    indices = jnp.asarray(np.stack([rows[order], cols[order]], axis=1))
    order = jnp.asarray(order)

    def operands(i: int) -> tuple[Any, ...]:
        dense_operand, w = common["operands"](i)
        values = (w.data.mT if inputs.workload.product == "y" else w.data).astype(jnp.float32).ravel()[order]
        entries = sparse.BCOO((values, indices), shape=pattern.shape, indices_sorted=True, unique_indices=True)
        return dense_operand.astype(jnp.float32), entries, w

    def error(arguments: tuple[Any, ...], output: jax.Array) -> float:
        dense_operand, _, w = arguments
        return common["error"]((dense_operand, w), output)

    return JaxTask(
        **common | {"operands": operands, "error": error},
        function=lambda dense_operand, entries, _: (entries @ dense_operand.T).T.astype(DTYPES[inputs.workload.dtype]),
    )


def _tensor(array: jax.Array) -> "Tensor":
    """The same memory, as PyTorch sees it."""
    from torch import from_dlpack

    return from_dlpack(jax.block_until_ready(array))


def _array(tensor: "Tensor") -> jax.Array:
    """A copy, as JAX sees it."""
    import torch

    copy = tensor.clone().contiguous()
    torch.cuda.synchronize()
    return jnp.from_dlpack(copy)


def _call(launch: Launch, result: "Tensor", output: Callable[["Tensor"], jax.Array]) -> Call:
    latest = [result]

    def launch_and_remember() -> None:
        made = launch()
        latest[0] = result if made is None else made

    return Call(launch_and_remember, lambda: output(latest[0]))
