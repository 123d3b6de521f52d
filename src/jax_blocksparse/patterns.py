"""Pattern generators: where to put the blocks of a weight. Reproducible: the same arguments give the same pattern."""

import math
import numbers
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_blocksparse.geometry import block_grid, check_density, check_geometry
from jax_blocksparse.pattern import BlockPattern, is_concrete


def random(
    shape: Sequence[int],
    block_size: int,
    *,
    density: float,
    seed: int | jax.Array = 0,
    distribution: Literal["balanced", "bernoulli"] = "balanced",
) -> BlockPattern:
    """Blocks at random places.

    Args:
      shape: (K, N) of the matrix, in elements.
      block_size: one of `BLOCK_SIZES`.
      density: fraction of the blocks to keep, in (0, 1].
      seed: an integer, or a JAX random key; the pattern is the same on every device.
      distribution: "balanced" gives every block column the same number of blocks, `density` times the number of block
        rows, rounded, and at least one, so all outputs have one fan-in. "bernoulli" keeps each block independently.

    Returns:
      The pattern, whose block ids go down one column after the other.

    Raises:
      ValueError: if an argument is out of range, or if "bernoulli", whose number of blocks is random, is asked for with
        a key that is being traced.
      TypeError: if `seed` is neither an integer nor a key.

    Example:
      >>> import jax_blocksparse as jbs
      >>> jbs.patterns.random((1024, 4096), 32, density=0.1, seed=1)
      BlockPattern(1024x4096, block_size=32, nnz=384, density=0.0938)
    """
    shape, block_size = check_geometry(shape, block_size)
    density = check_density(density)
    k, n = block_grid(shape, block_size)
    if distribution not in ("balanced", "bernoulli"):
        raise ValueError(f"distribution must be 'balanced' or 'bernoulli', got {distribution!r}")
    if distribution == "bernoulli" and not is_concrete(seed):
        raise ValueError("seed must not be traced for distribution='bernoulli': its number of blocks is random")
    with jax.ensure_compile_time_eval():
        noise = jax.random.bits(_as_key(seed), (n, k), np.uint32)
    if distribution == "bernoulli":
        kept = np.less(np.asarray(noise).T, density * 2.0**32)
        return BlockPattern.from_mask(kept, shape=shape, block_size=block_size)
    fan_in = max(1, round(density * k))
    xp = np if is_concrete(noise) else jnp
    rows = xp.sort(xp.argsort(xp.asarray(noise), axis=1, stable=True)[:, :fan_in], axis=1)
    cols = xp.repeat(xp.arange(n), fan_in)
    return BlockPattern.from_coordinates(rows.ravel(), cols, shape=shape, block_size=block_size)


def barabasi_albert(
    shape: Sequence[int], block_size: int, *, density: float, seed: int | jax.Array = 0
) -> BlockPattern:
    """A skewed pattern, whose block rows and columns have power-law counts: a few hubs, many with few blocks.

    Rows and columns of blocks join a matrix one after the other. Each brings the same number of blocks, placed on
    columns, respectively rows, that are there already, chosen with a chance in proportion to the blocks they have: the
    preferential attachment of Barabasi and Albert, between two kinds of nodes. The oldest come first and are the hubs.

    Source: "Emergence of scaling in random networks", Science 286 (1999).

    Args:
      shape: (K, N) of the matrix, in elements.
      block_size: one of `BLOCK_SIZES`.
      density: fraction of the blocks to keep, in (0, 1]; reached but for rounding.
      seed: an integer, or a JAX random key; the pattern is the same on every device.

    Returns:
      The pattern, whose block ids go down one column after the other.

    Raises:
      ValueError: if an argument is out of range.
      TypeError: if `seed` is neither an integer nor a key.
      jax.errors.TracerArrayConversionError: if `seed` is being traced.

    Example:
      >>> import jax_blocksparse as jbs
      >>> pattern = jbs.patterns.barabasi_albert((2048, 2048), 32, density=0.1, seed=1)
      >>> counts = sorted(pattern.mask().sum(axis=0).tolist())
      >>> round(pattern.density, 3), counts[0], counts[-1]
      (0.1, 3, 29)
    """
    shape, block_size = check_geometry(shape, block_size)
    density = check_density(density)
    k, n = block_grid(shape, block_size)
    # A core of old rows and columns is full, so that the first to join find enough of the others. With a fraction f of
    # both in the core and brought by each newcomer, k n (2 f - f^2) blocks result: as many as the density wants.
    fraction = 1 - math.sqrt(1 - density)
    rows_joined, cols_joined = math.ceil(fraction * k), math.ceil(fraction * n)
    mask = np.zeros((k, n), bool)
    mask[:rows_joined, :cols_joined] = True
    with jax.ensure_compile_time_eval():
        noise = jax.random.bits(_as_key(seed), (k + n, max(k, n)), np.uint32)
    # The least of exponential variables over their rates: a draw without replacement, each in proportion to its rate.
    waiting = -np.log1p(-(np.asarray(noise) / 2.0**32))
    row_counts, col_counts = mask.sum(axis=1), mask.sum(axis=0)
    for turn in waiting[rows_joined + cols_joined :]:
        if rows_joined * n <= cols_joined * k:  # both kinds join at the pace that keeps the proportions
            chosen = _first(turn, col_counts[:cols_joined], fraction * n, rows_joined)
            mask[rows_joined, chosen] = True
            row_counts[rows_joined] = chosen.size
            col_counts[chosen] += 1
            rows_joined += 1
        else:
            chosen = _first(turn, row_counts[:rows_joined], fraction * k, cols_joined)
            mask[chosen, cols_joined] = True
            col_counts[cols_joined] = chosen.size
            row_counts[chosen] += 1
            cols_joined += 1
    return BlockPattern.from_mask(mask, shape=shape, block_size=block_size)


def banded(shape: Sequence[int], block_size: int, *, density: float) -> BlockPattern:
    """A band around the diagonal (stretched, if the matrix is not square), as wide as the density allows.

    Every block column has the same number of blocks: `density` times the number of block rows, rounded, at least one.

    Args:
      shape: (K, N) of the matrix, in elements.
      block_size: one of `BLOCK_SIZES`.
      density: fraction of the blocks to keep, in (0, 1].

    Returns:
      The pattern, whose block ids go down one column after the other.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax_blocksparse as jbs
      >>> jbs.patterns.banded((64, 64), 16, density=0.5).mask().astype(int).tolist()
      [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 1]]
    """
    shape, block_size = check_geometry(shape, block_size)
    density = check_density(density)
    k, n = block_grid(shape, block_size)
    fan_in = max(1, round(density * k))
    distance = np.abs((np.arange(k) + 0.5) / k - ((np.arange(n) + 0.5) / n)[:, None])
    rows = np.sort(np.argsort(distance, axis=1, kind="stable")[:, :fan_in], axis=1)
    return BlockPattern.from_coordinates(
        rows.ravel(), np.repeat(np.arange(n), fan_in), shape=shape, block_size=block_size
    )


def block_diagonal(shape: Sequence[int], block_size: int, *, density: float) -> BlockPattern:
    """Independent groups of features: dense squares along the diagonal, about 1 / density of them.

    Args:
      shape: (K, N) of the matrix, in elements.
      block_size: one of `BLOCK_SIZES`.
      density: in (0, 1]; there are round(1 / density) groups, but never more than there are block rows or columns.

    Returns:
      The pattern; its density is 1 over the number of groups where that divides the grid, else near it.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax_blocksparse as jbs
      >>> jbs.patterns.block_diagonal((64, 32), 16, density=0.5).mask().astype(int).tolist()
      [[1, 0], [1, 0], [0, 1], [0, 1]]
    """
    shape, block_size = check_geometry(shape, block_size)
    density = check_density(density)
    k, n = block_grid(shape, block_size)
    groups = min(round(1 / density), k, n)
    group_of_row, group_of_col = (np.arange(size) * groups // size for size in (k, n))
    mask = group_of_row[:, None] == group_of_col
    return BlockPattern.from_mask(mask, shape=shape, block_size=block_size)


def butterfly(shape: Sequence[int], block_size: int, *, density: float = 1.0) -> BlockPattern:
    """Flat block butterfly: the diagonal and the block pairs whose indices differ in one bit (Dao et al., ICLR 2022).

    With all strides every input block reaches every output block within log2(grid) layers. A grid that is not a square
    of a power of two is the butterfly of the next power of two, stretched.

    Source: "Pixelated Butterfly: Simple and Efficient Sparse training for Neural Network Models", arXiv 2112.00029.

    Args:
      shape: (K, N) of the matrix, in elements.
      block_size: one of `BLOCK_SIZES`.
      density: an upper bound in (0, 1]: as many strides, the longest first, as keep the density under it, but always
        the diagonal and one stride.

    Returns:
      The pattern; at most 1 + log2(grid) blocks in each row and column of a square power of two.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax_blocksparse as jbs
      >>> jbs.patterns.butterfly((64, 64), 16).mask().astype(int).tolist()
      [[1, 1, 1, 0], [1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 1]]
    """
    shape, block_size = check_geometry(shape, block_size)
    density = check_density(density)
    k, n = block_grid(shape, block_size)
    bits = (max(k, n) - 1).bit_length()
    fine = np.arange(2**bits)
    rows, cols = fine * k >> bits, fine * n >> bits
    mask = np.zeros((k, n), bool)
    mask[rows, cols] = True
    for level, bit in enumerate(reversed(range(bits))):
        wider = mask.copy()
        wider[rows, cols[fine ^ (1 << bit)]] = True
        if level and wider.mean() > density:
            break
        mask = wider
    return BlockPattern.from_mask(mask, shape=shape, block_size=block_size)


def _first(waiting: np.ndarray, rates: np.ndarray, count: float, turn: int) -> np.ndarray:
    """Those whose time comes first: `count` of them on average over the turns, at least one."""
    whole = max(1, math.floor((turn + 1) * count) - math.floor(turn * count))
    return np.argsort(waiting[: rates.size] / rates, kind="stable")[:whole]


def _as_key(seed: int | jax.Array) -> jax.Array:
    if isinstance(seed, numbers.Integral):
        return jax.random.key(seed)
    if isinstance(seed, jax.Array) and (jax.dtypes.issubdtype(seed.dtype, jax.dtypes.prng_key) or seed.ndim):
        return seed
    raise TypeError(f"seed must be an integer or a JAX random key, got {seed!r}")
