"""The inputs of a workload, N(0, 1): made once and shared by all who compute it."""

import functools
import math
import threading

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import DTYPES, Workload
from jax_blocksparse import BLOCK_SIZES, BlockSparseMatrix

_CHUNK = 2**22  # values that are drawn at a time: what makes them is compiled once for all shapes
_SHIFT = 16  # elements between the values of one set of blocks and the next


class Inputs:
    """Any number of input sets, which differ from each other."""

    def __init__(self, workload: Workload) -> None:
        """Makes nothing yet: what is asked for is kept for the next who asks."""
        self.workload = workload
        self._lock = threading.Lock()
        self._dense: dict[int, tuple[jax.Array, ...]] = {}

    def dense(self, i: int) -> tuple[jax.Array, ...]:
        """Returns what is dense for everybody: (x,) for y, (dy,) for dx and (x, dy) for dw."""
        m, k, n = self.workload.shape
        shapes = {"y": [(m, k)], "dx": [(m, n)], "dw": [(m, k), (m, n)]}[self.workload.product]
        with self._lock:
            if i not in self._dense:
                self._dense[i] = tuple(
                    jnp.asarray(self._normal(4 * i + place, shape)) for place, shape in enumerate(shapes)
                )
            return self._dense[i]

    def weight(self, i: int) -> jax.Array:
        """Returns a dense W; it holds no zeros, which would let the chip run cooler and faster."""
        return jnp.asarray(self._normal(4 * i + 2, self.workload.shape[1:]))

    def blocks(self, i: int, shape: tuple[int, int, int]) -> jax.Array:
        """Returns the values of blocks."""
        start = i * _SHIFT
        with self._lock:
            values = self._values
        return jnp.asarray(values[start : start + math.prod(shape)].reshape(shape))

    @functools.cached_property
    def _values(self) -> np.ndarray:
        """Enough for every block of W, at the edge too, and a few sets."""
        _, k, n = self.workload.shape
        largest = max(BLOCK_SIZES)
        padded = math.ceil(k / largest) * math.ceil(n / largest) * largest**2
        return self._normal(3, (padded + 64 * _SHIFT,))

    def _normal(self, seed: int, shape: tuple[int, ...]) -> np.ndarray:
        size = math.prod(shape)
        chunks = [_draw(seed, chunk, DTYPES[self.workload.dtype]) for chunk in range(math.ceil(size / _CHUNK))]
        return np.concatenate([np.asarray(chunk) for chunk in chunks])[:size].reshape(shape)


@functools.partial(jax.jit, static_argnums=2)
def _draw(seed: jax.Array, chunk: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(jax.random.key(seed), chunk), (_CHUNK,), dtype)


def todense(matrix: BlockSparseMatrix) -> np.ndarray:
    """The matrix with all its zeros, put together on the host: on the device each pattern would be compiled."""
    pattern = matrix.pattern
    (rows, cols), b = pattern.grid, pattern.block_size
    data = np.asarray(matrix.data)
    blocks = np.zeros((rows, cols, b, b), data.dtype)
    blocks[np.asarray(pattern.rows), np.asarray(pattern.cols)] = data
    dense = blocks.swapaxes(1, 2).reshape(rows * b, cols * b)[: pattern.shape[0], : pattern.shape[1]]
    return dense.T if matrix.transposed else dense
