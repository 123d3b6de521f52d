"""The cases that the tests of the products share, dense references in NumPy, and the rule of how exact is exact.

Everything stored that must not matter holds NaN: the values of inert entries and what blocks hold outside the matrix.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_blocksparse import BLOCK_SIZES, BlockPattern, BlockSparseMatrix, patterns

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class Case:
    """One product x @ W: W has `shape` and blocks at (rows[z], cols[z]), x is (*leading, K)."""

    name: str
    shape: tuple[int, int]
    block_size: int
    rows: tuple[int, ...]
    cols: tuple[int, ...]
    leading: tuple[int, ...] = (7,)

    def __str__(self):
        return self.name

    @property
    def pattern(self):
        return BlockPattern.from_coordinates(
            np.array(self.rows, int), np.array(self.cols, int), shape=self.shape, block_size=self.block_size
        )

    def x(self, dtype="float32"):
        return normal((*self.leading, self.shape[0]), dtype, seed=1)

    def dy(self, dtype="float32"):
        return normal((*self.leading, self.shape[1]), dtype, seed=2)

    def w(self, dtype="float32"):
        pattern, b = self.pattern, self.block_size
        data = normal((pattern.nnz, b, b), dtype, seed=3)
        return BlockSparseMatrix(jnp.asarray(np.where(inside(pattern), data, np.array(np.nan, dtype))), pattern)


def _cut(name, grid, block_size, *, density=0.6, ragged=(0, 0), inert=0, leading=(7,)):
    """A case with random blocks in random storage order, in a matrix smaller than its grid by `ragged`."""
    rng = np.random.default_rng(0)
    count = round(density * math.prod(grid))
    rows, cols = np.divmod(rng.choice(math.prod(grid), count, replace=False), grid[1])
    places = rng.choice(count + inert, count, replace=False)
    stored = np.tile(np.array(grid)[:, None], count + inert)
    stored[:, places] = rows, cols
    shape = tuple(blocks * block_size - less for blocks, less in zip(grid, ragged, strict=True))
    return Case(name, shape, block_size, *(tuple(map(int, axis)) for axis in stored), leading)


# For each block size: tails in both dimensions, an empty block row, an empty block column, inert entries in between.
BLOCKS = tuple(
    Case(f"block_{b}", (4 * b - 3, 3 * b - 5), b, rows=(3, 4, 0, 3, 0, 1), cols=(2, 3, 0, 0, 2, 2)) for b in BLOCK_SIZES
)

# Several tiles of every GPU kernel, the last ones cut off, in sizes that tensor copies accept.
TILES = tuple(
    _cut(
        f"tiles_{b}",
        (-(-328 // b), -(-392 // b)),
        b,
        density=0.3,
        ragged=(-328 % b, -392 % b),
        inert=3,
        leading=(3, 100),
    )
    for b in BLOCK_SIZES
)

# The same in sizes that they accept of float32 only.
TILES_OF_FLOAT32 = tuple(
    _cut(f"float_tiles_{b}", (-(-332 // b), -(-388 // b)), b, density=0.3, ragged=(-332 % b, -388 % b), leading=(130,))
    for b in BLOCK_SIZES
)

# So small that a kernel for GPUs holds all of it in shared memory, in sizes that 16-byte copies accept.
TINY = tuple(
    _cut(f"tiny_{b}", grid, b, density=density, ragged=(8 % b, 8 % b), inert=inert)
    for b, grid, density, inert in (
        (8, (5, 7), 0.5, 2),
        (16, (5, 7), 0.5, 2),
        (32, (4, 3), 0.6, 1),
        (64, (3, 2), 0.5, 1),
        (128, (2, 2), 0.25, 0),
    )
)

# So many tiles that GPUs take large ones, several for each SM, the last ones cut off and, where there are few blocks,
# some empty. With few blocks of 64 and 128, two teams take turns; with few of 16 and 32, halves of chunks share steps.
MANY_TILES = tuple(
    _cut(
        f"many_tiles_{b}_{density}",
        (-(-776 // b), -(-1288 // b)),
        b,
        density=density,
        ragged=(-776 % b, -1288 % b),
        inert=1,
        leading=(3300,),
    )
    for b, density in ((64, 0.05), (128, 0.1), (16, 0.3), (64, 0.5), (128, 0.5), (16, 0.02), (32, 0.04), (32, 0.4))
)

CASES = (
    *BLOCKS,
    *TILES,
    *TINY,
    _cut("full", (3, 5), 16, density=1.0),
    _cut("full_ragged", (2, 3), 32, density=1.0, ragged=(1, 31)),
    _cut("one_block", (5, 4), 16, density=1 / 20),
    _cut("no_block", (3, 2), 16, density=0.0),
    _cut("only_inert", (3, 2), 16, density=0.0, inert=3),
    _cut("smaller_than_a_block", (1, 1), 8, density=1.0, ragged=(3, 7)),
    _cut("one_row_of_blocks", (1, 40), 8, density=0.5),
    _cut("long_sums", (130, 2), 8, density=0.9, inert=2),
    _cut("no_rows", (3, 4), 16, leading=(0,)),
    _cut("one_row", (3, 4), 16, leading=(1,)),
    _cut("many_rows", (3, 4), 16, leading=(515,)),
    _cut("vector", (3, 4), 16, leading=()),
    _cut("batches", (3, 4), 16, ragged=(2, 3), leading=(2, 1, 3)),
    _cut("empty_batch", (3, 4), 16, leading=(2, 0, 3)),
)

# (implementation, dtype, case): the native kernels were compiled apart for each dtype and block size; for plain XLA,
# which takes long to compile, all are one.
PRODUCTS = (
    *(("native", dtype, case) for case in BLOCKS for dtype in DTYPES),
    *(("native", dtype, case) for case in TILES + TINY for dtype in ("bfloat16", "float16")),
    *(
        ("native", dtype, case)
        for case in CASES
        if case not in BLOCKS + TILES + TINY
        for dtype in ("float32", "bfloat16")
    ),
    *(("xla", dtype, BLOCKS[1]) for dtype in DTYPES),
    *(("xla", "float32", case) for case in CASES if case not in BLOCKS + TILES + TINY),
)


def random_w(shape, block_size, *, density, dtype="float32"):
    """A matrix on a random pattern, larger than those of the cases."""
    pattern = patterns.random(shape, block_size, density=density)
    return BlockSparseMatrix(jnp.asarray(normal((pattern.nnz, block_size, block_size), dtype, seed=3)), pattern)


def uneven_w(block_size, dtype, *, transposed=False):
    """A matrix with some columns so long that GPUs share them, two of them neighbours, short ones and an empty one."""
    mask = np.zeros(({8: 800, 16: 420, 32: 210, 64: 110, 128: 60}[block_size], 21), bool)
    mask[[3, 50]] = True
    mask[:, [0, 3, 11, 12, 20]] = True
    mask[:7, 12] = mask[:, 5] = False
    shape = (mask.shape[0] * block_size - 8 % block_size, mask.shape[1] * block_size - 3)
    if transposed:
        mask, shape = mask.T, shape[::-1]
    pattern = BlockPattern.from_mask(mask, block_size=block_size, shape=shape)
    w = BlockSparseMatrix(jnp.asarray(normal((pattern.nnz, block_size, block_size), dtype, seed=3)), pattern)
    return w.T if transposed else w


def normal(shape, dtype, seed):
    """Standard normal numbers as a NumPy array, rounded to the dtype."""
    return np.random.default_rng(seed).standard_normal(shape).astype(jnp.dtype(dtype))


def wide(array):
    """The array in a dtype that makes no error worth counting beside that of its own."""
    return np.asarray(array, np.longdouble if array.dtype == np.float64 else np.float64)


def uses_tf32(dtype, precision, device):
    """Whether factors of a product may be rounded to TF32, by XLA and by us."""
    return dtype == "float32" and precision != "highest" and device.platform == "gpu"


def enable_x64(*dtypes):
    """A context in which JAX knows float64 if one of the dtypes is."""
    return jax.enable_x64("float64" in dtypes)


def available(implementation, device, dtype):
    """The implementation to ask for: there is no float64 kernel for GPUs, so the default falls back to XLA."""
    return None if (implementation, device.platform, dtype) == ("native", "gpu", "float64") else implementation


def inside(pattern):
    """(nnz, b, b), true where a stored value is an entry of the matrix."""
    (k, n), b = pattern.shape, pattern.block_size
    entry_row = np.asarray(pattern.rows)[:, None, None] * b + np.arange(b)[:, None]
    entry_col = np.asarray(pattern.cols)[:, None, None] * b + np.arange(b)
    return (entry_row >= 0) & (entry_row < k) & (entry_col >= 0) & (entry_col < n)


def dense(w):
    """The matrix that a BlockSparseMatrix stands for, in a wide dtype, by a loop over its blocks."""
    pattern, b = w.pattern, w.pattern.block_size
    is_entry = inside(pattern)
    data = np.where(is_entry, wide(w.data), 0)
    padded = np.zeros([size * b for size in pattern.grid], data.dtype)
    for z, (row, col) in enumerate(zip(*map(np.asarray, (pattern.rows, pattern.cols)), strict=True)):
        if is_entry[z].any():
            padded[row * b : (row + 1) * b, col * b : (col + 1) * b] += data[z]
    result = padded[: pattern.shape[0], : pattern.shape[1]]
    return result.T if w.transposed else result


def sampled(product, pattern):
    """The blocks of a dense matrix that a pattern asks for, zeros where there is nothing."""
    b, grid = pattern.block_size, pattern.grid
    padded = np.zeros([size * b for size in grid], product.dtype)
    padded[: pattern.shape[0], : pattern.shape[1]] = product
    blocks = np.zeros((pattern.nnz, b, b), product.dtype)
    for block, row, col in zip(blocks, *map(np.asarray, (pattern.rows, pattern.cols)), strict=True):
        if 0 <= row < grid[0] and 0 <= col < grid[1]:
            block[...] = padded[row * b : (row + 1) * b, col * b : (col + 1) * b]
    return blocks


def relative_error(got, wanted):
    """In the Frobenius norm, of an array against a wide one; NaN if anything is."""
    error, size = np.linalg.norm(wide(got) - wanted), np.linalg.norm(wanted)
    return error / size if error else 0.0


def assert_exact(got, wanted, dense_result, *, tf32=False):
    """The rule: at most twice the error that the dense product of the same dtype makes on the same device.

    More is allowed only where sums are so short that the dense error may be nothing by luck: some roundings of the
    accumulator and half of one of the result; and where XLA is free to round to TF32, but may prefer not to.

    Args:
      got: what is tested.
      wanted: the same by NumPy in a wide dtype, from inputs rounded to theirs.
      dense_result: the same by dense jax.numpy products, in the dtype of `got`.
      tf32: whether factors may be rounded to TF32.
    """
    assert got.dtype == dense_result.dtype
    assert got.shape == wanted.shape
    error, allowed = relative_error(got, wanted), relative_error(dense_result, wanted)
    accumulator = jnp.promote_types(got.dtype, jnp.float32)
    floor = jnp.finfo(got.dtype).eps / 4 + 2 * jnp.finfo(accumulator).eps + tf32 * 2**-11
    assert error <= 2 * allowed + floor, f"relative error {error:.2e}, of the dense product {allowed:.2e}"


def equations(jaxpr, *primitives):
    """All uses of some primitives in a program and those nested in it."""
    found = []
    for equation in jaxpr.eqns:
        found += [equation] if equation.primitive in primitives else []
        for inner in equation.params.values():
            inner = getattr(inner, "jaxpr", inner)
            found += equations(inner, *primitives) if hasattr(inner, "eqns") else []
    return found
