"""x @ w for few rows of x, where kernels for GPUs do what they do not for more: share long lists, pack x."""

import cases
import numpy as np
import pytest

import jax_blocksparse as jbs
from jax_blocksparse import lowering

DIRECTIONS = pytest.mark.parametrize("transposed", [False, True], ids=["w", "wT"])


def check(x, w, **options):
    """Compares a product with NumPy's, and with itself done again."""
    got = jbs.matmul(x, w, implementation="native", preferred_element_type="float32", **options)
    assert cases.relative_error(got, cases.wide(x) @ cases.dense(w)) < 1e-5
    again = jbs.matmul(x, w, implementation="native", preferred_element_type="float32", **options)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(again))


@DIRECTIONS
@pytest.mark.parametrize("rows", [1, 23, 64])
@pytest.mark.parametrize("block_size", jbs.BLOCK_SIZES)
def test_uneven_columns(block_size, rows, transposed, device):
    """What long lists have beyond others is shared by the CTAs of a cluster."""
    dtype = "float16" if rows == 23 else "bfloat16"
    w = cases.uneven_w(block_size, dtype, transposed=transposed)
    check(cases.normal((rows, w.shape[0]), dtype, seed=2), w)


@DIRECTIONS
@pytest.mark.parametrize("leading", [(9,), (47,), (3, 62)], ids=str)
@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_packed_x(block_size, leading, transposed, device, monkeypatch):
    """Large matrices of small blocks have x packed first; here small ones, which nothing else compiles."""
    monkeypatch.setattr(lowering, "PACKING_PAYS_FROM", 0)
    w = cases.uneven_w(block_size, "bfloat16", transposed=transposed)
    check(cases.normal((*leading, w.shape[0]), "bfloat16", seed=2), w)
