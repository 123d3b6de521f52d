"""Bias and activation inside a product, and the product whose result is scaled, against NumPy and plain JAX."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.test_util import check_grads

import jax_blocksparse as jbs
from jax_blocksparse import activations
from jax_blocksparse.epilogues import matmul_scaled_p, scaled_matmul_p
from jax_blocksparse.primitives import bind

HIGHEST = jax.lax.Precision.HIGHEST
CASE, TILED = cases.BLOCKS[1], cases.TILES[2]

BY_NUMPY = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu_exact": lambda x: x * scipy.special.ndtr(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x * scipy.special.expit(x),
}


def bias_of(case, dtype="float32", *, transposed=False):
    return cases.normal(case.shape[:1] if transposed else case.shape[1:], dtype, seed=5)


@pytest.mark.parametrize("case", [CASE, cases.TINY[1], *cases.TILES], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
def test_equals_numpy(activation, dtype, case, device):
    x, w, bias = case.x(dtype), case.w(dtype), bias_of(case, dtype)
    got = jbs.matmul(x, w, bias=bias, activation=activation, precision=HIGHEST)
    wanted = BY_NUMPY[activation](cases.wide(x) @ cases.dense(w) + cases.wide(bias))
    dense = jnp.dot(x, cases.dense(w).astype(dtype), precision=HIGHEST) + bias
    cases.assert_exact(got, wanted, activations.value(activation, dense))


@pytest.mark.parametrize("case", cases.MANY_TILES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu_tanh"])
def test_many_tiles(activation, case, device):
    """The result, and the slope by way of the gradient."""
    x, w, bias = case.x("bfloat16"), case.w("bfloat16"), bias_of(case, "bfloat16")
    got, pull_back = jax.vjp(functools.partial(jbs.matmul, w=w, bias=bias, activation=activation), jnp.asarray(x))
    before = cases.wide(x) @ cases.dense(w) + cases.wide(bias)
    assert cases.relative_error(got, BY_NUMPY[activation](before)) < 6e-3
    slope = jax.vmap(jax.grad(functools.partial(activations.value, activation)))(jnp.asarray(before.ravel(), "float32"))
    wanted = (cases.wide(got) * cases.wide(slope).reshape(before.shape)) @ cases.dense(w).T
    assert cases.relative_error(pull_back(got)[0], wanted) < 2e-2


@pytest.mark.parametrize("implementation", ["native", "xla"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_transposed_without_bias_in_float32(implementation, activation, device):
    x, w = TILED.dy("bfloat16"), TILED.w("bfloat16").T
    got = jbs.matmul(x, w, activation=activation, preferred_element_type="float32", implementation=implementation)
    wanted = BY_NUMPY[activation](cases.wide(x) @ cases.dense(w))
    assert got.dtype == jnp.float32
    assert cases.relative_error(got, wanted) < 1e-5


@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
def test_slopes_are_derivatives(activation, device):
    """The kernels compute them by formulas of their own."""
    x, w, bias = CASE.x(), CASE.w(), jnp.asarray(bias_of(CASE))
    w = jbs.BlockSparseMatrix(jnp.nan_to_num(w.data), w.pattern)

    def fused(x, data, bias):
        return jbs.matmul(x, jbs.BlockSparseMatrix(data, w.pattern), bias=bias, activation=activation)

    def plain(x, data, bias):
        w_dense = jbs.BlockSparseMatrix(data, w.pattern).todense()
        return activations.value(activation, jnp.dot(x, w_dense, precision=HIGHEST) + bias)

    ct = cases.normal(plain(x, w.data, bias).shape, "float32", seed=6)
    for got, wanted in zip(*(jax.vjp(f, x, w.data, bias)[1](ct) for f in (fused, plain)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", ["native", "xla"])
@pytest.mark.parametrize("activation", [None, "gelu_exact", "gelu_tanh", "silu"])
def test_second_derivatives(activation, implementation, device):
    implementation = cases.available(implementation, device, "float64")
    with cases.enable_x64("float64"):
        x, w, bias = CASE.x("float64")[:3], CASE.w("float64"), bias_of(CASE, "float64")

        def product(x, data, bias):
            w_of = jbs.BlockSparseMatrix(data, w.pattern)
            return jbs.matmul(x, w_of, bias=bias, activation=activation, implementation=implementation)

        check_grads(product, (x, jnp.nan_to_num(w.data), bias), order=2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("transpose", [False, True], ids=["w", "wT"])
class TestSecondDerivativesOfScaledProducts:
    @staticmethod
    def operands(transpose, scale_as):
        """Rows as many as x or the result has, indices, parameters, and W in a wide dtype."""
        w, shape = CASE.w("float64"), CASE.shape[::-1] if transpose else CASE.shape
        x = (CASE.dy if transpose else CASE.x)("float64")[None, :3]
        scale = cases.normal((1, 3, shape[scale_as]), "float64", seed=7)
        indices = [index[None] for index in w.pattern.indices]
        params = {"transpose": transpose, "shape": CASE.shape, "out_dtype": "float64"}
        params |= {"precision": None, "implementation": None}
        return (
            (x, scale, jnp.nan_to_num(w.data)[None]),
            indices,
            params,
            cases.dense(w).T if transpose else cases.dense(w),
        )

    def test_of_the_result(self, transpose, device):
        with cases.enable_x64("float64"):
            (x, scale, data), indices, params, matrix = self.operands(transpose, 1)
            product = lambda *args: bind(scaled_matmul_p, *args, *indices, **params)  # noqa: E731
            plain = cases.wide(x) @ matrix * scale
            for got, wanted in zip(product(x, scale, data), (plain, plain.sum(1)), strict=True):
                np.testing.assert_allclose(got, wanted.astype(float), rtol=1e-12, atol=1e-12)
            check_grads(product, (x, scale, data), order=2, atol=1e-5, rtol=1e-5)

    def test_of_the_input(self, transpose, device):
        with cases.enable_x64("float64"):
            (x, scale, data), indices, params, matrix = self.operands(transpose, 0)
            bias = cases.normal((1, x.shape[2]), "float64", seed=9)
            product = lambda *args: bind(matmul_scaled_p, *args, *indices, **params)  # noqa: E731
            plain = ((cases.wide(x) + bias) * scale) @ matrix
            np.testing.assert_allclose(product(x, bias, scale, data), plain.astype(float), rtol=1e-12, atol=1e-12)
            check_grads(product, (x, bias, scale, data), order=2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", [CASE, *cases.TILES, *cases.MANY_TILES[:2], *cases.MANY_TILES[-2:]], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_scaled_result(dtype, case, device):
    x, w = case.x(dtype).reshape(1, -1, case.shape[0]), case.w(dtype)
    scale = cases.normal((1, x.shape[1], case.shape[1]), dtype, seed=8)
    params = {"transpose": False, "shape": case.shape, "out_dtype": dtype, "precision": HIGHEST}
    indices = (index[None] for index in w.pattern.indices)
    got, sums = bind(scaled_matmul_p, x, scale, w.data[None], *indices, **params, implementation="native")
    wanted = cases.wide(x) @ cases.dense(w) * cases.wide(scale)
    dense = jnp.dot(x, cases.dense(w).astype(dtype), precision=HIGHEST) * scale
    cases.assert_exact(got, wanted, dense)
    cases.assert_exact(sums, wanted.sum(1), dense.astype(jnp.float32).sum(1))


@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0), (1, 0, None)], ids=str)
def test_vmap(axes, device):
    x, data, bias = CASE.x(), jnp.nan_to_num(CASE.w().data), bias_of(CASE)
    operands = [
        each if axis is None else np.stack([each, 2 * each, -each], axis)
        for each, axis in zip((x, data, bias), axes, strict=True)
    ]

    def product(x, data, bias):
        return jbs.matmul(x, jbs.BlockSparseMatrix(data, CASE.pattern), bias=bias, activation="silu")

    got = jax.vmap(product, axes)(*operands)
    slopes = jax.vmap(jax.grad(lambda *args: product(*args).sum(), argnums=(0, 1, 2)), axes)(*operands)
    for i in range(3):
        taken = [np.take(a, i, axis) if axis is not None else a for a, axis in zip(operands, axes, strict=True)]
        np.testing.assert_allclose(got[i], product(*taken), rtol=1e-5, atol=1e-5)
        wanted = jax.grad(lambda *args: product(*args).sum(), argnums=(0, 1, 2))(*taken)
        for slope, want in zip(slopes, wanted, strict=True):
            np.testing.assert_allclose(slope[i], want, rtol=1e-4, atol=1e-4)


def test_first_order_gradient_makes_no_product_twice(device):
    """One forward product with its slope, and the two of the backward pass."""
    w, bias = CASE.w(), bias_of(CASE)

    def loss(x, data):
        return jbs.matmul(x, jbs.BlockSparseMatrix(data, w.pattern), bias=bias, activation="gelu_tanh").sum()

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(CASE.x(), w.data).compile().as_text()
    assert text.count('custom_call_target="jax_blocksparse.matmul.v1"') == 2
    assert text.count('custom_call_target="jax_blocksparse.sddmm.v1"') == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "gelu"}, "activation must be None or one of relu, gelu_exact, gelu_tanh, silu, got 'gelu'"),
        ({"bias": np.zeros(3, np.float32)}, r"bias must have shape \(43,\) \(w has shape \(61, 43\)\), got \(3,\)"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        jbs.matmul(CASE.x(), CASE.w(), **options)


def test_bias_must_be_floats():
    with pytest.raises(TypeError, match="bias must have one of the dtypes"):
        jbs.matmul(CASE.x(), CASE.w(), bias=np.zeros(43, np.int32))


def test_names_of_activations_are_numbered_as_in_the_kernels():
    """Their order is that of `enum class Activation`."""
    assert activations.ACTIVATIONS == (None, "relu", "gelu_exact", "gelu_tanh", "silu")


def test_sums_of_the_bias_gradient_are_wide(device):
    """4,099 ones have no sum in bfloat16 if they are added one by one."""
    w = cases.random_w((16, 16), 16, density=1, dtype="bfloat16")
    f = functools.partial(jbs.matmul, jnp.zeros((4099, 16), jnp.bfloat16), w)
    got = jax.grad(lambda bias: f(bias=bias).astype(jnp.float32).sum())(jnp.zeros(16, jnp.float32))
    np.testing.assert_allclose(got, 4099, rtol=1e-6)
