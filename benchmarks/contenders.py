"""Who is measured: the dense product and ours, each as a function of JAX arrays with inputs, FLOPs and a check."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_blocksparse
from benchmarks.cases import DTYPES, Sparsity, Workload
from benchmarks.checking import relative_error
from jax_blocksparse import BlockPattern, BlockSparseMatrix


@dataclasses.dataclass(frozen=True)
class Task:
    """A product ready to be compiled and timed.

    Attributes:
      function: computes it, from pytrees of arrays; free of side effects.
      operands: returns the i-th set of arguments, N(0, 1) and different for each i.
      error: the relative error of an output, given the arguments it was computed from.
      flops: counted on the blocks that are there, and of those only on what lies within W.
      density: the fraction of W's blocks that are there.
    """

    function: Callable[..., jax.Array]
    operands: Callable[[int], tuple[Any, ...]]
    error: Callable[[tuple[Any, ...], jax.Array], float]
    flops: int
    density: float


def dense(workload: Workload) -> Task:
    """`jnp.dot` with a dense W; W holds no zeros, which would let the chip run cooler and faster."""
    m, k, n = workload.shape
    shapes = {"y": ((m, k), (k, n)), "dx": ((m, n), (k, n)), "dw": ((m, k), (m, n))}[workload.product]
    # Each product is one `a @ b` of its two operands, transposed where needed.
    factors = {
        "y": lambda x, w: (x, w),
        "dx": lambda dy, w: (dy, w.T),
        "dw": lambda x, dy: (x.T, dy),
    }[workload.product]
    return Task(
        function=lambda *arguments: jnp.dot(*factors(*arguments)),
        operands=lambda i: _normal(workload, i, *shapes),
        error=lambda arguments, output: relative_error(*factors(*arguments), output),
        flops=workload.dense_flops,
        density=1.0,
    )


def ours(workload: Workload, sparsity: Sparsity, implementation: str) -> Task:
    """The public functions of jax_blocksparse."""
    m, k, n = workload.shape
    pattern = sparsity.make(workload.shape)
    block = (pattern.nnz, pattern.block_size, pattern.block_size)

    def operands(i: int) -> tuple[Any, ...]:
        if workload.product == "dw":
            return *_normal(workload, i, (m, k), (m, n)), pattern
        dense_operand, data = _normal(workload, i, (m, k if workload.product == "y" else n), block)
        return dense_operand, BlockSparseMatrix(data, pattern)

    functions = {
        "y": lambda x, w: jax_blocksparse.matmul(x, w, implementation=implementation),
        "dx": lambda dy, w: jax_blocksparse.matmul(dy, w.T, implementation=implementation),
        "dw": lambda x, dy, pattern: jax_blocksparse.sddmm(x, dy, pattern, implementation=implementation),
    }
    errors = {
        "y": lambda x, w, y: relative_error(x, _todense(w), y),
        "dx": lambda dy, w, dx: relative_error(dy, _todense(w.T), dx),
        "dw": lambda x, dy, pattern, data: relative_error(
            x.T,
            dy,
            _todense(BlockSparseMatrix(data, pattern)),
            mask=_todense(BlockSparseMatrix(jnp.ones(block), pattern)),
        ),
    }
    return Task(
        function=functions[workload.product],
        operands=operands,
        error=lambda arguments, output: errors[workload.product](*arguments, output),
        flops=2 * m * _elements(pattern),
        density=float(pattern.mask().mean()),
    )


DENSE = "dense"

CONTENDERS: dict[str, Callable[[Workload, Sparsity | None], Task]] = {
    DENSE: lambda workload, _: dense(workload),
    "native": lambda workload, sparsity: ours(workload, sparsity, "native"),
    "xla": lambda workload, sparsity: ours(workload, sparsity, "xla"),
}
"""By name. All but dense, the measure of the others, are made for a sparsity."""


_todense = jax.jit(BlockSparseMatrix.todense)


def _normal(workload: Workload, i: int, *shapes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(i), len(shapes))
    dtype = DTYPES[workload.dtype]
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))


def _elements(pattern: BlockPattern) -> int:
    """Entries of W inside its blocks; a block at the edge may reach beyond W."""
    b = pattern.block_size
    heights, widths = (
        np.minimum(b, size - b * np.arange(blocks)) for size, blocks in zip(pattern.shape, pattern.grid, strict=True)
    )
    return int(heights @ pattern.mask() @ widths)
