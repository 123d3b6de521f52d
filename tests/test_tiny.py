"""Products so small that kernels for GPUs hold all of W, or of x and dy, in shared memory."""

import cases
import jax.numpy as jnp
import numpy as np
import pytest

import jax_blocksparse as jbs

SIZES = pytest.mark.parametrize("case", cases.TINY, ids=str)
OPTIONS = {"implementation": "native", "preferred_element_type": "float32"}


def check(product, wanted):
    """Compares a product with NumPy's, and with itself done again."""
    got = np.asarray(product())
    assert cases.relative_error(got, wanted) < 1e-5
    assert np.asarray(product()).tobytes() == got.tobytes()


@SIZES
@pytest.mark.parametrize("rows", [1, 16, 23, 64, 200])
@pytest.mark.parametrize("transposed", [False, True], ids=["w", "wT"])
def test_matmul(case, rows, transposed, device):
    dtype = "float16" if rows == 23 else "bfloat16"
    w = case.w(dtype).T if transposed else case.w(dtype)
    x = cases.normal((rows, w.shape[0]), dtype, seed=2)
    check(lambda: jbs.matmul(x, w, **OPTIONS), cases.wide(x) @ cases.dense(w))


@pytest.mark.parametrize("block_size", jbs.BLOCK_SIZES)
def test_matmul_with_ends_of_rows_anywhere(block_size, device):
    """y in rows that are no multiples of 16 bytes, in its own type."""
    pattern = jbs.BlockPattern.from_coordinates(
        np.array([0]), np.array([0]), shape=(block_size, block_size - 3), block_size=block_size
    )
    w = jbs.BlockSparseMatrix(jnp.asarray(cases.normal((1, block_size, block_size), "bfloat16", seed=3)), pattern)
    x = cases.normal((19, block_size), "bfloat16", seed=2)
    y = jbs.matmul(x, w, implementation="native")
    assert cases.relative_error(y, cases.wide(x) @ cases.dense(w)) < 4e-3


@SIZES
@pytest.mark.parametrize("rows", [1, 32, 45, 64])
def test_sddmm(case, rows, device):
    dtype = "float16" if rows == 45 else "bfloat16"
    x, dy = (cases.normal((rows, size), dtype, seed=2 + i) for i, size in enumerate(case.shape))
    wanted = cases.sampled(cases.wide(x).T @ cases.wide(dy), case.pattern)
    check(lambda: jbs.sddmm(x, dy, case.pattern, **OPTIONS), wanted)
