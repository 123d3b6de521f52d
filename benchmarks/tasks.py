"""Products to be timed: how to compute one, on which inputs, with how many FLOPs, and whether the result is right."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_blocksparse
from benchmarks.cases import PRECISIONS, Sparsity
from benchmarks.checking import relative_error
from benchmarks.inputs import Inputs, todense
from jax_blocksparse import BlockPattern, BlockSparseMatrix


@dataclasses.dataclass(frozen=True)
class Task:
    """A product ready to be timed.

    Attributes:
      operands: returns the i-th set of arguments, pytrees of arrays, N(0, 1) and different for each i.
      error: the relative error of an output, given the arguments it was computed from.
      flops: counted on the blocks that are there, and of those only on what lies within W.
      density: the fraction of W's blocks that are there.
    """

    operands: Callable[[int], tuple[Any, ...]]
    error: Callable[[tuple[Any, ...], jax.Array], float]
    flops: int
    density: float


@dataclasses.dataclass(frozen=True)
class JaxTask(Task):
    """A product in JAX.

    Attributes:
      function: computes it from the operands; free of side effects.
    """

    function: Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a library.

    Attributes:
      launch: queues the product on PyTorch's current stream, always from and to the same memory.
      output: what was computed, shaped as ours.
    """

    launch: Callable[[], None]
    output: Callable[[], jax.Array]


@dataclasses.dataclass(frozen=True)
class LibraryTask(Task):
    """A product in a library outside JAX, on the memory and the streams of PyTorch.

    Attributes:
      prepare: makes the call on one set of operands.
    """

    prepare: Callable[[tuple[Any, ...]], Call]


def dense(inputs: Inputs) -> JaxTask:
    """`jnp.dot` with a dense W."""
    workload = inputs.workload
    transpose_a, transpose_b = transposed = (workload.product == "dw", workload.product == "dx")
    precision = PRECISIONS.get(workload.dtype)
    return JaxTask(
        function=lambda a, b: jnp.dot(a.T if transpose_a else a, b.T if transpose_b else b, precision=precision),
        operands=lambda i: inputs.dense(i) if workload.product == "dw" else (*inputs.dense(i), inputs.weight(i)),
        error=lambda arguments, output: relative_error(*arguments, output, transposed=transposed),
        flops=workload.dense_flops,
        density=1.0,
    )


def ours(inputs: Inputs, sparsity: Sparsity, implementation: str) -> JaxTask:
    """The public functions of jax_blocksparse."""
    workload = inputs.workload
    options = {"implementation": implementation, "precision": PRECISIONS.get(workload.dtype)}
    functions = {
        "y": lambda x, w: jax_blocksparse.matmul(x, w, **options),
        "dx": lambda dy, w: jax_blocksparse.matmul(dy, w.T, **options),
        "dw": lambda x, dy, pattern: jax_blocksparse.sddmm(x, dy, pattern, **options),
    }
    return JaxTask(**sparse_task(inputs, sparsity), function=functions[workload.product])


def sparse_task(inputs: Inputs, sparsity: Sparsity) -> dict[str, Any]:
    """What is the same for all who compute with blocks: the fields of `Task`.

    The operands are (x, W), (dy, W) or (x, dy, pattern), the outputs those of `matmul` and `sddmm`.
    """
    workload = inputs.workload
    pattern = sparsity.make(workload.shape)
    block = (pattern.nnz, pattern.block_size, pattern.block_size)

    def operands(i: int) -> tuple[Any, ...]:
        if workload.product == "dw":
            return *inputs.dense(i), pattern
        return *inputs.dense(i), BlockSparseMatrix(inputs.blocks(i, block), pattern)

    errors = {
        "y": lambda x, w, y: relative_error(x, todense(w), y),
        "dx": lambda dy, w, dx: relative_error(dy, todense(w.T), dx),
        "dw": lambda x, dy, pattern, data: relative_error(
            x,
            dy,
            todense(BlockSparseMatrix(data, pattern)),
            transposed=(True, False),
            mask=todense(BlockSparseMatrix(np.ones(block, bool), pattern)),
        ),
    }
    return {
        "operands": operands,
        "error": lambda arguments, output: errors[workload.product](*arguments, output),
        "flops": 2 * workload.shape.m * _elements(pattern),
        "density": float(pattern.mask().mean()),
    }


def _elements(pattern: BlockPattern) -> int:
    """Entries of W inside its blocks; a block at the edge may reach beyond W."""
    b = pattern.block_size
    heights, widths = (
        np.minimum(b, size - b * np.arange(blocks)) for size, blocks in zip(pattern.shape, pattern.grid, strict=True)
    )
    return int(heights @ pattern.mask() @ widths)
