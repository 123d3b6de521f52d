"""Derivatives of both products: against finite differences, and against those of dense products."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jax_blocksparse as jbs

HIGHEST = jax.lax.Precision.HIGHEST
SMALL = cases.Case("small", (21, 13), 8, rows=(2, 0, 3, 1), cols=(0, 1, 2, 1), leading=(3,))
TOLERANCES = {"float32": 2e-2, "float64": 1e-6}

# The rules of differentiation do not look at the implementation, and plain XLA takes long to compile.
SECOND_ORDER = [("native", "float32"), ("native", "float64"), ("xla", "float64")]
FIRST_ORDER = [
    *(("native", "float32", case) for case in cases.CASES if case not in cases.TILES),
    *(("native", "bfloat16", case) for case in cases.TILES),
    *(("native", dtype, cases.BLOCKS[1]) for dtype in cases.DTYPES[1:]),
    *(("xla", dtype, cases.BLOCKS[1]) for dtype in ("float32", "bfloat16")),
]


def finite(case, dtype, *, transposed=False):
    """The case's matrix without NaN in what does not matter, which finite differences would trip over."""
    w = case.w(dtype)
    w = jbs.BlockSparseMatrix(jnp.nan_to_num(w.data), w.pattern)
    return w.T if transposed else w


def parts(w):
    """The values of a matrix and what makes a matrix of them again."""
    return w.data, lambda data: jbs.BlockSparseMatrix(data, w.pattern, w.transposed)


@pytest.mark.parametrize(
    ("implementation", "dtype", "transposed"),
    [*((*each, False) for each in SECOND_ORDER), *((*each, True) for each in SECOND_ORDER if each[0] == "native")],
)
def test_second_derivatives_of_matmul(implementation, dtype, transposed, device):
    implementation = cases.available(implementation, device, dtype)
    with cases.enable_x64(dtype):
        data, matrix = parts(finite(SMALL, dtype, transposed=transposed))
        x = SMALL.dy(dtype) if transposed else SMALL.x(dtype)

        def product(x, data):
            return jbs.matmul(x, matrix(data), implementation=implementation, precision=HIGHEST)

        check_grads(product, (x, data), order=2, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize(("implementation", "dtype"), SECOND_ORDER)
def test_second_derivatives_of_sddmm(implementation, dtype, device):
    implementation = cases.available(implementation, device, dtype)
    with cases.enable_x64(dtype):

        def product(x, dy):
            return jbs.sddmm(x, dy, SMALL.pattern, implementation=implementation, precision=HIGHEST)

        x, dy = SMALL.x(dtype), SMALL.dy(dtype)
        check_grads(product, (x, dy), order=2, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("transposed", [False, True], ids=["w", "wT"])
@pytest.mark.parametrize(("implementation", "dtype", "case"), FIRST_ORDER, ids=str)
def test_gradients_equal_those_of_the_dense_product(implementation, dtype, case, transposed, device):
    """What lies outside the matrix, and inert entries, have the gradient zero and spoil nobody else's."""
    implementation = cases.available(implementation, device, dtype)
    with cases.enable_x64(dtype):
        w = case.w(dtype)
        x, dy = case.x(dtype), case.dy(dtype)
        if transposed:
            w, x, dy = w.T, dy, x
        data, matrix = parts(w)
        dense = cases.dense(w)

        @jax.jit
        def gradients(x, data, dy):
            def product(x, data):
                return jbs.matmul(x, matrix(data), implementation=implementation, precision=HIGHEST)

            return jax.vjp(product, x, data)[1](dy)

        @jax.jit
        def dense_gradients(x, w, dy):
            return jax.vjp(lambda x, w: jnp.dot(x, w, precision=HIGHEST), x, w)[1](dy)

        dx, ddata = gradients(x, data, dy)
        dense_dx, dense_dw = dense_gradients(x, dense.astype(dtype), dy)
        cases.assert_exact(dx, cases.wide(dy) @ dense.T, dense_dx)
        flat_x, flat_dy = (cases.wide(array).reshape(-1, array.shape[-1]) for array in (x, dy))
        wanted = flat_x.T @ flat_dy

        def stored(dw):
            return cases.sampled(np.asarray(dw.T if transposed else dw), w.pattern)

        cases.assert_exact(ddata, stored(wanted), stored(dense_dw))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_float32_results_of_16_bit_inputs_have_16_bit_gradients(implementation, dtype, device):
    case = cases.BLOCKS[1]
    data, matrix = parts(case.w(dtype))
    x, dy = case.x(dtype), case.dy(dtype).astype(np.float32)

    def product(x, data):
        return jbs.matmul(x, matrix(data), preferred_element_type=jnp.float32, implementation=implementation)

    y, vjp = jax.vjp(product, x, data)
    assert y.dtype == jnp.float32
    dx, ddata = vjp(dy)
    assert dx.dtype == ddata.dtype == dtype
    wanted = cases.wide(dy) @ cases.dense(matrix(data)).T
    assert cases.relative_error(dx, wanted) < jnp.finfo(dtype).eps
    wanted = cases.sampled(cases.wide(x).T @ cases.wide(dy), case.pattern)
    assert cases.relative_error(ddata, wanted) < jnp.finfo(dtype).eps


def test_gradients_have_the_dtypes_of_mixed_inputs(implementation, device):
    case = cases.BLOCKS[0]
    data, matrix = parts(case.w("bfloat16"))

    def loss(x, data):
        return jbs.matmul(x, matrix(data), implementation=implementation).sum()

    dx, ddata = jax.grad(loss, argnums=(0, 1))(case.x("float32"), data)
    assert (dx.dtype, ddata.dtype) == (jnp.float32, jnp.bfloat16)


def test_gradient_of_a_matrix_is_a_matrix(device):
    case = cases.BLOCKS[1]
    w = finite(case, "float32")
    gradient = jax.grad(lambda w: (case.x() @ w).sum(), allow_int=True)(w)
    assert gradient.data.shape == w.data.shape
    assert all(leaf.dtype == jax.dtypes.float0 for leaf in gradient.pattern.indices)


def test_gradient_of_an_unused_product_is_zero(implementation, device):
    data, matrix = parts(finite(SMALL, "float32"))

    @jax.jit
    def both(x, data):
        return jbs.matmul(x, matrix(data), implementation=implementation), x**2

    dx, ddata = jax.grad(lambda x, data: both(x, data)[1].sum(), argnums=(0, 1))(SMALL.x(), data)
    np.testing.assert_allclose(dx, 2 * SMALL.x())
    assert not ddata.any()


def test_gradient_of_a_gradient_penalty(implementation, device):
    """Reverse over reverse: sddmm's own rules, against dense autodiff."""
    w = finite(SMALL, "float32")
    data, matrix = parts(w)

    def penalty(multiply, x, weights):
        dx = jax.grad(lambda x: jnp.tanh(multiply(x, weights)).sum())(x)
        return (dx**2).sum()

    def sparse(x, data):
        return jbs.matmul(x, matrix(data), implementation=implementation, precision=HIGHEST)

    got = jax.jit(jax.grad(penalty, argnums=(1, 2)), static_argnums=0)(sparse, SMALL.x(), data)
    dense = cases.dense(w).astype(np.float32)
    with jax.default_device(jax.devices("cpu")[0]):
        wanted = jax.grad(penalty, argnums=(1, 2))(jnp.dot, SMALL.x(), dense)
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1], cases.sampled(np.asarray(wanted[1]), w.pattern), rtol=1e-4, atol=1e-5)
