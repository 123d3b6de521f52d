"""What the nnx and the linen layer share."""

import jax

from jax_blocksparse import patterns
from jax_blocksparse.pattern import BlockPattern, check_is_pattern

DEFAULT_BLOCK_SIZE = 32

_PATTERN_STREAM = 0x5B10C  # sets the key of the pattern apart from that of the kernel


def choose_pattern(
    shape: tuple[int, int],
    block_size: int | None,
    density: float | None,
    pattern: BlockPattern | None,
    kernel_key: jax.Array,
) -> BlockPattern:
    """The pattern that a layer was given, or a random one of the density that it was given.

    A random pattern follows from the kernel's key, so a layer draws as many keys as its dense twin.
    """
    if (density is None) == (pattern is None):
        raise ValueError(f"give either density or pattern, got density={density} and pattern={pattern}")
    if pattern is None:
        block_size = DEFAULT_BLOCK_SIZE if block_size is None else block_size
        key = jax.random.fold_in(kernel_key, _PATTERN_STREAM)
        return patterns.random(shape, block_size, density=density, seed=key)
    check_is_pattern("pattern", pattern)
    check_fit(pattern, shape, block_size)
    return pattern


def check_fit(pattern: BlockPattern, shape: tuple[int, int], block_size: int | None) -> None:
    """Raises ValueError if a layer of this shape and block size cannot have this pattern."""
    if pattern.shape != shape:
        raise ValueError(f"pattern must have the shape (in_features, out_features) = {shape}, got {pattern}")
    if block_size not in (None, pattern.block_size):
        raise ValueError(f"block_size must be that of the pattern, {pattern.block_size}, or left out, got {block_size}")
