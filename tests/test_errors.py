"""Bad arguments of the products: an error where the call is traced, naming the argument, what it is and should be."""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_blocksparse as jbs

CASE = cases.Case("errors", (24, 16), 8, rows=(0, 2), cols=(1, 0))
W = CASE.w()
PATTERN = CASE.pattern
X, DY = CASE.x(), CASE.dy()


def matmul(x=X, w=W, **options):
    return jbs.matmul(x, w, **options)


def sddmm(x=X, dy=DY, pattern=PATTERN, **options):
    return jbs.sddmm(x, dy, pattern, **options)


def replaced(**leaves):
    return dataclasses.replace(PATTERN, **leaves)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: matmul(w=X), TypeError, r"w must be a BlockSparseMatrix, got ndarray"),
        (lambda: matmul(x=W), TypeError, r"x must be an array, got BlockSparseMatrix"),
        (lambda: matmul(x="text"), TypeError, r"x must be an array, got str"),
        (lambda: matmul(x=X.astype(int)), TypeError, r"x must have one of the dtypes float32, .*float16, got int32"),
        (lambda: matmul(x=X + 1j), TypeError, r"x must have one of the dtypes float32, .*float16, got complex64"),
        (
            lambda: matmul(w=dataclasses.replace(W, data=W.data.astype(int))),
            TypeError,
            r"w\.data must have one of the dtypes float32, .*float16, got int32",
        ),
        (
            lambda: matmul(w=dataclasses.replace(W, data=W.data[:, :4])),
            ValueError,
            r"w\.data must have shape \(nnz, block_size, block_size\) = \(2, 8, 8\), got \(2, 4, 8\)",
        ),
        (
            lambda: matmul(w=dataclasses.replace(W, pattern=None)),
            TypeError,
            r"w\.pattern must be a BlockPattern, got NoneType",
        ),
        (
            lambda: matmul(x=DY),
            ValueError,
            r"x must have 24 features \(w has shape \(24, 16\)\) in its last axis, got \(7, 16\)",
        ),
        (
            lambda: matmul(x=X, w=W.T),
            ValueError,
            r"x must have 16 features \(w has shape \(16, 24\)\) in its last axis, got \(7, 24\)",
        ),
        (lambda: matmul(x=1.0), ValueError, r"x must have 24 features .* got \(\)"),
        (
            lambda: matmul(w=dataclasses.replace(W, pattern=replaced(col_ptr=PATTERN.col_ptr[:-1]))),
            ValueError,
            r"w\.pattern is .* must have shapes \(\(2,\), \(2,\), \(3,\), .* got \(\(2,\), \(2,\), \(2,\), .*made for",
        ),
        (
            lambda: matmul(w=jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), W)),
            ValueError,
            r"w\.pattern is .*got \(\(2, 2\), .*stacked without vmap",
        ),
        (
            lambda: matmul(preferred_element_type="bfloat16"),
            ValueError,
            r"preferred_element_type must be float32 for float32 inputs, got bfloat16",
        ),
        (
            lambda: matmul(X.astype("float16"), W.astype("float16"), preferred_element_type="bfloat16"),
            ValueError,
            r"preferred_element_type must be float16 or float32 for float16 inputs, got bfloat16",
        ),
        (
            lambda: matmul(precision="best"),
            ValueError,
            r"precision must be None, a jax\.lax\.Precision or one of 'default', 'high', 'highest', got 'best'",
        ),
        (
            lambda: matmul(implementation="cuda"),
            ValueError,
            r"implementation must be None, 'native' or 'xla', got 'cuda'",
        ),
        (lambda: sddmm(x=PATTERN), TypeError, r"x must be an array, got BlockPattern"),
        (lambda: sddmm(x=[[1.0], []]), TypeError, r"x must be an array, got list"),
        (lambda: sddmm(dy=None), TypeError, r"dy must be an array, got NoneType"),
        (lambda: sddmm(dy=DY.astype(bool)), TypeError, r"dy must have one of the dtypes float32, .*float16, got bool"),
        (lambda: sddmm(pattern=W), TypeError, r"pattern must be a BlockPattern, got BlockSparseMatrix"),
        (
            lambda: sddmm(x=DY),
            ValueError,
            r"x must have 24 features in its last axis for BlockPattern\(24x16, .*\), got \(7, 16\)",
        ),
        (
            lambda: sddmm(dy=X),
            ValueError,
            r"dy must have 16 features in its last axis for BlockPattern\(24x16, .*\), got \(7, 24\)",
        ),
        (
            lambda: sddmm(dy=DY[:5]),
            ValueError,
            r"x and dy must have the same leading dimensions, got \(7, 24\) and \(5, 16\)",
        ),
        (
            lambda: sddmm(pattern=replaced(rows=PATTERN.rows[:1])),
            ValueError,
            r"pattern is .* must have shapes \(\(1,\), \(1,\), \(3,\), .* got \(\(1,\), \(2,\), \(3,\)",
        ),
        (
            lambda: sddmm(preferred_element_type=jnp.float16),
            ValueError,
            r"preferred_element_type must be float32 for float32 inputs, got float16",
        ),
        (lambda: sddmm(precision=7), ValueError, r"precision must be None, .* got 7"),
        (lambda: sddmm(implementation=True), ValueError, r"implementation must be None, .* got True"),
    ],
)
def test_message_names_argument_value_and_what_is_wanted(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_errors_come_when_traced():
    """Not when compiled, nor when run."""
    with pytest.raises(ValueError, match="x must have 24 features"):
        jax.eval_shape(matmul, jax.ShapeDtypeStruct((7, 23), np.float32))


def test_good_arguments_raise_nothing():
    assert matmul().shape == (7, 16)
    assert sddmm().shape == (2, 8, 8)
