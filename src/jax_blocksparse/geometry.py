"""Shapes, block sizes, grids of blocks: what patterns and plans are about."""

import numbers
import operator
from collections.abc import Sequence

import jax

BLOCK_SIZES = (8, 16, 32, 64, 128)
"""The block sizes that the native kernels have."""


def check_geometry(shape: Sequence[int], block_size: int) -> tuple[tuple[int, int], int]:
    """Returns shape and block size as plain ints, or raises ValueError naming what is wrong with them."""
    try:
        k, n = (operator.index(size) for size in shape)
    except (TypeError, ValueError):
        raise ValueError(f"shape must be two integers (in_features, out_features), got {shape!r}") from None
    if k < 1 or n < 1:
        raise ValueError(f"shape must have positive sizes, got {(k, n)}")
    return (k, n), check_block_size(block_size)


def check_block_size(block_size: int) -> int:
    """Returns the block size as a plain int, or raises ValueError."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size!r}")
    return int(block_size)


def check_density(density: float) -> float:
    """Returns a density that makes sense, or raises ValueError."""
    if not (isinstance(density, numbers.Real) and 0 < density <= 1):
        raise ValueError(f"density must be a number in (0, 1], got {density!r}")
    return float(density)


def block_grid(shape: tuple[int, int], block_size: int) -> tuple[int, int]:
    """(block rows, block columns) that cover a matrix of `shape`."""
    return -(-shape[0] // block_size), -(-shape[1] // block_size)


def is_live(rows: jax.Array, cols: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Where an entry stands for a block of the grid; the one definition of inert."""
    return (rows >= 0) & (rows < grid[0]) & (cols >= 0) & (cols < grid[1])
