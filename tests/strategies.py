"""Random cases for hypothesis."""

import math

import numpy as np
from cases import DTYPES, Case
from hypothesis import strategies as st

from jax_blocksparse import BLOCK_SIZES


@st.composite
def cases(draw):
    """Any block size and shape of up to 5 x 5 blocks, any pattern in any storage order, any leading dimensions."""
    b = draw(st.sampled_from(BLOCK_SIZES))
    grid = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    shape = tuple(blocks * b - draw(st.integers(0, b - 1)) for blocks in grid)
    inert = math.prod(grid)  # as a position, this is row grid[0]
    positions = [*draw(st.sets(st.integers(0, inert - 1))), *[inert] * draw(st.integers(0, 2))]
    rows, cols = np.divmod(np.array(draw(st.permutations(positions)), int), grid[1])
    leading = draw(st.lists(st.integers(0, 9), max_size=3).map(tuple))
    return Case("random", shape, b, tuple(rows.tolist()), tuple(cols.tolist()), leading)


dtypes = st.sampled_from(DTYPES)
