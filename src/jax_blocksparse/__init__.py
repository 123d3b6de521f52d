"""Block-sparse weights for JAX and Flax: native CPU and CUDA kernels as XLA custom calls.

The layers live in `jax_blocksparse.nnx` and `jax_blocksparse.linen` (they need Flax), the pictures in
`jax_blocksparse.plot` (it needs matplotlib); each is imported at its first use.
"""

import importlib
import importlib.metadata
from types import ModuleType

from jax_blocksparse import patterns
from jax_blocksparse._native import Availability, has_cpu, has_cuda
from jax_blocksparse.advice import Advice, Expectation, advise
from jax_blocksparse.geometry import BLOCK_SIZES
from jax_blocksparse.lowering import DISABLED_EXPORT_CHECKS
from jax_blocksparse.matrix import BlockSparseMatrix
from jax_blocksparse.mlp import mlp
from jax_blocksparse.ops import matmul, sddmm
from jax_blocksparse.pattern import BlockPattern

__version__ = importlib.metadata.version("jax_blocksparse")

__all__ = [
    "BLOCK_SIZES",
    "DISABLED_EXPORT_CHECKS",
    "Advice",
    "Availability",
    "BlockPattern",
    "BlockSparseMatrix",
    "Expectation",
    "advise",
    "has_cpu",
    "has_cuda",
    "matmul",
    "mlp",
    "patterns",
    "sddmm",
]

_WITH_EXTRAS = ("initializers", "linen", "nnx", "plot")


def __getattr__(name: str) -> ModuleType:
    if name in _WITH_EXTRAS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
