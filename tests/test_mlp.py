"""The fused feed-forward layer, as a function and as layers, against two products with an activation between them."""

import re

import cases
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

import jax_blocksparse as jbs
from jax_blocksparse import activations

K, HIDDEN, N = 61, 43, 50


def weights(dtype, block_size=16):
    w_in = cases.random_w((K, HIDDEN), block_size, density=0.6, dtype=dtype)
    w_out = cases.random_w((HIDDEN, N), block_size, density=0.6, dtype=dtype)
    return w_in, w_out, cases.normal(HIDDEN, dtype, seed=1), cases.normal(N, dtype, seed=2)


def fused(x, w_in, w_out, bias_in, bias_out, activation="gelu_tanh", **options):
    return jbs.mlp(x, w_in, w_out, bias_in=bias_in, bias_out=bias_out, activation=activation, **options)


def unfused(x, w_in, w_out, bias_in, bias_out, activation="gelu_tanh"):
    hidden = activations.value(activation, jbs.matmul(x, w_in) + bias_in)
    return jbs.matmul(hidden, w_out) + bias_out


@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_values_and_gradients_are_those_of_two_products(dtype, tolerance, activation, device):
    x, args = cases.normal((2, 70, K), dtype, seed=3), weights(dtype)
    ct = cases.normal((2, 70, N), dtype, seed=4)
    (y, gradient), (wanted, wanted_gradient) = (
        (lambda y, back: (y, back(ct)))(*jax.vjp(lambda *a, f=f: f(*a, activation=activation), x, *args))
        for f in (fused, unfused)
    )
    assert y.dtype == dtype
    assert cases.relative_error(y, cases.wide(np.asarray(wanted))) < tolerance
    leaves = zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient), strict=True)
    for got, want in ((got, want) for got, want in leaves if got.dtype != jax.dtypes.float0):
        assert got.dtype == want.dtype
        assert cases.relative_error(got, cases.wide(np.asarray(want))) < tolerance


def test_second_derivatives(device):
    with cases.enable_x64("float64"):
        w_in, w_out, *biases = weights("float64")
        x = cases.normal((3, K), "float64", seed=3)

        def product(x, data_in, data_out, *biases):
            matrices = (jbs.BlockSparseMatrix(data_in, w_in.pattern), jbs.BlockSparseMatrix(data_out, w_out.pattern))
            return fused(x, *matrices, *biases)

        check_grads(product, (x, w_in.data, w_out.data, *biases), order=2, atol=1e-4, rtol=1e-4)


def test_transposed_matrices_and_no_biases(device):
    w_in, w_out, *_ = weights("float32")
    x = cases.normal((5, N), "float32", seed=3)
    got = jbs.mlp(x, w_out.T, w_in.T, activation="relu")
    np.testing.assert_allclose(got, jax.nn.relu(x @ w_out.T) @ w_in.T, rtol=1e-5, atol=1e-5)


def test_vmap(device):
    args, x = weights("float32"), cases.normal((4, 5, K), "float32", seed=3)
    together = jax.vmap(fused, (0, None, None, None, None))(x, *args)
    np.testing.assert_allclose(together, fused(x, *args), rtol=1e-5, atol=1e-5)


def gradients(x, w_in, w_out, *biases):
    def loss(x, data_in, data_out, *biases):
        matrices = (jbs.BlockSparseMatrix(data_in, w_in.pattern), jbs.BlockSparseMatrix(data_out, w_out.pattern))
        return jnp.sin(fused(x, *matrices, *biases)).sum()

    return jax.grad(loss, argnums=(0, 1, 2, 3, 4))(x, w_in.data, w_out.data, *biases)


@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, None), (0, 0, 0)], ids=str)
def test_vmap_of_gradients(axes, device):
    """A gradient for each example; biases are the operands whose gradients sum over rows."""
    w_in, w_out, *biases = weights("float32")
    operands = [cases.normal((4, 5, K), "float32", seed=3), *(np.stack([bias] * 4) for bias in biases)]
    operands = [each if axis == 0 else each[0] for each, axis in zip(operands, axes, strict=True)]
    got = jax.vmap(lambda x, *biases: gradients(x, w_in, w_out, *biases), axes)(*operands)
    for i in range(4):
        x, *biases = (each[i] if axis == 0 else each for each, axis in zip(operands, axes, strict=True))
        for one, wanted in zip(got, gradients(x, w_in, w_out, *biases), strict=True):
            np.testing.assert_allclose(one[i], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_gradients_of_sharded_rows(axis_type, devices):
    x, args = cases.normal((4, 5, K), "float32", seed=3), weights("float32")
    wanted = gradients(x, *args)
    mesh = jax.make_mesh((len(devices),), ("batch",), axis_types=(axis_type,), devices=devices)
    with jax.set_mesh(mesh):
        rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch")))
        whole = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), NamedSharding(mesh, PartitionSpec())), args)
        for got, want in zip(jax.jit(gradients)(rows, *whole), wanted, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_products_of_a_training_step(device):
    """Two forward, two for dx, two for dW; the hidden layer's gradient is no product of its own."""
    args, x = weights("float32"), cases.normal((5, K), "float32", seed=3)
    step = jax.jit(jax.value_and_grad(lambda *args: fused(*args).sum(), argnums=(0, 1, 2, 3, 4), allow_int=True))
    calls = re.findall(r'custom_call_target="jax_blocksparse\.(\w+)', step.lower(x, *args).compile().as_text())
    assert sorted(calls) == ["matmul"] * 4 + ["sddmm"] * 2


class TestNnx:
    def test_computes_what_its_layers_do(self, device):
        layer = jbs.nnx.BlockSparseMLP(K, 96, density=0.5, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
        x = cases.normal((4, K), "float32", seed=3)
        np.testing.assert_allclose(layer(x), layer.down(nnx.gelu(layer.up(x))), rtol=1e-4, atol=1e-5)

    def test_dtype_and_no_bias(self):
        layer = jbs.nnx.BlockSparseMLP(
            K, 96, N, density=0.5, use_bias=False, dtype=jnp.bfloat16, activation="silu", rngs=nnx.Rngs(0)
        )
        y = layer(cases.normal((4, K), "float32", seed=3))
        assert (y.dtype, y.shape) == (jnp.bfloat16, (4, N))
        assert layer.up.bias is None

    def test_patterns(self):
        patterns = jbs.patterns.random((K, 96), 8, density=0.5), jbs.patterns.random((96, K), 16, density=0.2)
        layer = jbs.nnx.BlockSparseMLP(K, 96, up_pattern=patterns[0], down_pattern=patterns[1], rngs=nnx.Rngs(0))
        assert (layer.up.block_size, layer.down.block_size) == (8, 16)

    def test_gradient_is_of_parameters_only(self):
        layer = jbs.nnx.BlockSparseMLP(K, 96, density=0.5, rngs=nnx.Rngs(0))
        gradient = nnx.grad(lambda layer: layer(jnp.ones((2, K))).sum())(layer)
        assert {type(leaf) for _, leaf in nnx.to_flat_state(gradient)} == {nnx.Param}

    def test_unknown_activation(self):
        with pytest.raises(ValueError, match="activation must be None or one of relu"):
            jbs.nnx.BlockSparseMLP(K, 96, density=0.5, activation="tanh", rngs=nnx.Rngs(0))


class TestLinen:
    def test_computes_what_its_layers_do(self, device):
        layer = jbs.linen.BlockSparseMLP(96, N, density=0.5, bias_init=nn.initializers.normal())
        x = cases.normal((4, K), "float32", seed=3)
        y, variables = layer.init_with_output(jax.random.key(0), x)

        def part(name, features, x):
            own = {collection: tree[name] for collection, tree in variables.items()}
            return jbs.linen.BlockSparseDense(features, density=0.5).apply(own, x)

        np.testing.assert_allclose(y, part("down", N, nn.gelu(part("up", 96, x))), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(y, layer.apply(variables, x))

    def test_features_are_those_of_the_input(self):
        layer = jbs.linen.BlockSparseMLP(96, density=0.5, dtype=jnp.bfloat16, use_bias=False)
        y, variables = layer.init_with_output(jax.random.key(0), cases.normal((4, K), "float32", seed=3))
        assert (y.dtype, y.shape) == (jnp.bfloat16, (4, K))
        assert set(variables["params"]["up"]) == {"kernel"}


def test_sizes_must_fit():
    w_in, w_out, *_ = weights("float32")
    with pytest.raises(ValueError, match=r"w_out must have 43 rows \(w_in has shape \(61, 43\)\), got \(61, 43\)"):
        jbs.mlp(jnp.ones((2, K)), w_in, w_in)
    with pytest.raises(ValueError, match=r"bias_out must have shape \(50,\) \(w_out has shape \(43, 50\)\), got"):
        jbs.mlp(jnp.ones((2, K)), w_in, w_out, bias_out=jnp.ones(43))
    with pytest.raises(TypeError, match="w_out must be a BlockSparseMatrix, got"):
        jbs.mlp(jnp.ones((2, K)), w_in, jnp.ones((43, 50)))
