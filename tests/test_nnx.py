"""BlockSparseLinear does what nnx.Linear does, and its pattern is state that nothing trains."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_exact
from cases import dense as densified
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from nnx_cases import HALF, IN, OUT, float64, layer, mask, twins, x_of

from jax_blocksparse import BlockSparseMatrix, patterns
from jax_blocksparse.nnx import BlockSparseLinear, Pattern


class TestLikeLinear:
    def test_signature_is_a_superset(self):
        dense = inspect.signature(nnx.Linear.__init__).parameters
        ours = inspect.signature(BlockSparseLinear.__init__).parameters
        extra = {"block_size", "density", "pattern", "implementation"}
        assert list(dense) == [name for name in ours if name not in extra]
        for name, parameter in dense.items():
            assert ours[name].kind == parameter.kind
            if name not in ("kernel_init", "bias_init"):
                assert ours[name].default == parameter.default
        assert inspect.signature(BlockSparseLinear.__call__).parameters.keys() == (
            inspect.signature(nnx.Linear.__call__).parameters.keys()
        )

    def test_attributes_are_a_superset(self):
        dense, ours = twins(dtype=jnp.bfloat16, precision="highest", preferred_element_type=jnp.float32)
        assert vars(dense).keys() - vars(ours).keys() == set()
        for name, value in vars(dense).items():
            if name not in ("kernel", "bias") and not name.startswith("_"):
                assert getattr(ours, name) == value, name
        assert isinstance(ours.kernel, nnx.Param)
        assert ours.kernel.shape == (24, 16, 16)

    @pytest.mark.parametrize("use_bias", [True, False])
    def test_draws_the_same_keys(self, use_bias):
        following = []
        for make, kind in ((nnx.Linear, {}), (BlockSparseLinear, HALF)):
            rngs = nnx.Rngs(params=0, dropout=1)
            ours = make(IN, OUT, use_bias=use_bias, bias_init=nnx.initializers.normal(), rngs=rngs, **kind)
            following.append((nnx.Linear(3, 4, rngs=rngs).kernel[...], ours.bias, int(rngs.dropout.count[...])))
        (dense, dense_bias, dense_count), (sparse, sparse_bias, sparse_count) = following
        np.testing.assert_array_equal(dense, sparse)
        assert dense_count == sparse_count == 0
        if use_bias:
            np.testing.assert_array_equal(dense_bias[...], sparse_bias[...])

    def test_equals_linear_at_density_1(self):
        dense, ours = twins(precision="highest")
        np.testing.assert_array_equal(ours.matrix.todense(), dense.kernel[...])
        np.testing.assert_array_equal(ours.bias[...], dense.bias[...])
        x, dy = x_of(7), x_of(7, features=OUT, seed=1)

        def loss(model, x):
            y = model(x)
            return jnp.sum(y * dy), y

        results = {}
        for name, model in (("dense", dense), ("ours", ours)):
            gradient = nnx.grad(loss, argnums=(0, 1), has_aux=True)
            (of_model, dx), y = gradient(model, x)
            kernel = of_model.kernel[...]
            if name == "ours":
                kernel = BlockSparseMatrix(kernel, ours.pattern.get_value()).todense()
            results[name] = {"y": y, "dx": dx, "kernel": kernel, "bias": of_model.bias[...]}
        x64, dy64, kernel, bias = float64(x, dy, dense.kernel[...], dense.bias[...])
        wanted = {"y": x64 @ kernel + bias, "dx": dy64 @ kernel.T, "kernel": x64.T @ dy64, "bias": dy64.sum(0)}
        for name, value in wanted.items():
            assert_exact(results["ours"][name], value, results["dense"][name])

    @pytest.mark.parametrize("use_bias", [True, False])
    def test_sparse_layer_computes_its_matrix(self, use_bias):
        ours = layer(use_bias=use_bias, bias_init=nnx.initializers.normal())
        x = x_of(5)
        wanted = x.astype(np.float64) @ densified(ours.matrix) + (np.asarray(ours.bias[...]) if use_bias else 0)
        np.testing.assert_allclose(ours(x), wanted, rtol=1e-5, atol=1e-5)

    def test_no_bias(self):
        ours = layer(use_bias=False, kernel_init=nnx.initializers.ones, density=1.0)
        assert ours.bias is None
        assert list(nnx.state(ours, nnx.Param)) == ["kernel"]
        np.testing.assert_array_equal(ours(np.ones((1, IN))), np.full((1, OUT), IN))

    def test_constant_initialisers(self):
        ours = layer(kernel_init=nnx.initializers.ones, bias_init=nnx.initializers.ones)
        fan_in = np.repeat(np.sum(densified(ours.matrix), axis=0)[None], 2, axis=0)
        np.testing.assert_array_equal(ours(np.ones((2, IN))), fan_in + 1)

    @pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3), (2, 1, 4), (2, 0, 3)])
    def test_leading_dimensions(self, leading):
        ours, x = layer(), x_of(*leading)
        y = ours(x)
        assert y.shape == (*leading, OUT)
        flat = ours(x.reshape(-1, IN))
        np.testing.assert_allclose(y.reshape(-1, OUT), flat, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("features", [IN - 1, IN + 1, 64])
    def test_wrong_input_size(self, features):
        with pytest.raises(ValueError, match=rf"x must have 60 features .*\(60, 90\).*got \(2, {features}\)"):
            layer()(x_of(2, features=features))

    @pytest.mark.parametrize("param_dtype", ["float32", "bfloat16", "float16", "float64"])
    @pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16", "float64"])
    def test_dtypes_are_those_of_linear(self, dtype, param_dtype):
        def results(make, **kind):
            def call(x):
                model = make(IN, OUT, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0), **kind)
                return model(x), model.kernel[...], model.bias[...]

            return [
                [result.dtype for result in jax.eval_shape(call, jnp.ones((2, IN), x_dtype))]
                for x_dtype in ("float32", "bfloat16", "float16", "float64", "int32", "bool")
            ]

        with jax.enable_x64(True):
            assert results(BlockSparseLinear, **HALF) == results(nnx.Linear)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_preferred_element_type_is_that_of_linear(self, dtype):
        dense, ours = twins(dtype=dtype, preferred_element_type=jnp.float32)
        x = x_of(2)
        assert ours(x).dtype == dense(x).dtype == jnp.float32

    def test_computes_in_bfloat16_with_float32_parameters(self):
        dense, ours = twins(dtype=jnp.bfloat16)
        x = x_of(8)
        y, gradient = nnx.value_and_grad(lambda model: jnp.sum(model(x).astype(jnp.float32) ** 2))(ours)
        assert ours(x).dtype == jnp.bfloat16
        assert {leaf.dtype.name for leaf in jax.tree.leaves(gradient)} == {"float32"}
        rounded, kernel = float64(x.astype(jnp.bfloat16), dense.kernel[...].astype(jnp.bfloat16))
        wanted = rounded @ kernel + np.asarray(dense.bias[...].astype(jnp.bfloat16), np.float64)
        assert_exact(ours(x), wanted, dense(x))
        assert np.isfinite(y)

    def test_promote_dtype_is_used(self):
        def promote(arrays, *, dtype):
            return tuple(array.astype(jnp.float16) for array in arrays)

        assert layer(promote_dtype=promote)(x_of(2)).dtype == jnp.float16

    def test_graph_does_not_depend_on_initialisers(self):
        zeros, ones = (
            nnx.graphdef(layer(kernel_init=init, bias_init=init))
            for init in (nnx.initializers.zeros, nnx.initializers.ones)
        )
        assert zeros == ones
        assert hash(zeros) == hash(ones)

    def test_precision_and_implementation_reach_the_product(self):
        with pytest.raises(ValueError, match="precision must be"):
            layer(precision="exact")(x_of(2))
        with pytest.raises(ValueError, match="implementation must be None, 'native' or 'xla', got 'cuda'"):
            layer(implementation="cuda")(x_of(2))
        np.testing.assert_allclose(
            layer(implementation="xla", precision="highest")(x_of(2)), layer()(x_of(2)), atol=1e-5
        )


class TestMaking:
    def test_pattern_follows_from_the_seed(self):
        assert np.array_equal(mask(layer(0)), mask(layer(0)))
        assert not np.array_equal(mask(layer(0)), mask(layer(1)))

    def test_layers_of_one_rngs_differ(self):
        rngs = nnx.Rngs(0)
        first, second = (BlockSparseLinear(IN, OUT, rngs=rngs, **HALF) for _ in range(2))
        assert not np.array_equal(mask(first), mask(second))

    def test_block_size_default(self):
        assert layer(block_size=None).block_size == 32
        given = BlockSparseLinear(IN, OUT, pattern=patterns.banded((IN, OUT), 8, density=0.5), rngs=nnx.Rngs(0))
        assert given.block_size == 8

    def test_given_pattern_is_used(self):
        pattern = patterns.butterfly((IN, OUT), 16)
        ours = layer(pattern=pattern, block_size=16)
        assert ours.pattern.get_value().rows is pattern.rows
        assert isinstance(ours.pattern, Pattern)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"density": None}, ValueError, "give either density or pattern, got density=None and pattern=None"),
            ({"density": 0.5, "pattern": (IN, OUT)}, ValueError, "give either density or pattern, got density=0.5 and"),
            (
                {"pattern": (64, OUT)},
                ValueError,
                r"pattern must have the shape .* = \(60, 90\), got BlockPattern\(64x90",
            ),
            (
                {"pattern": (IN, OUT), "block_size": 8},
                ValueError,
                "block_size must be that of the pattern, 16, .* got 8",
            ),
            ({"pattern": np.eye(4)}, TypeError, "pattern must be a BlockPattern, got ndarray"),
            ({"density": 2}, ValueError, r"density must be a number in \(0, 1\], got 2"),
            ({"density": 0.5, "block_size": 7}, ValueError, "block_size must be one of .*, got 7"),
            ({"density": 0.5, "block_size": 0}, ValueError, "block_size must be one of .*, got 0"),
            ({"density": 0.5, "in_features": 0}, ValueError, r"shape must have positive sizes, got \(0, 90\)"),
            ({"density": 0.5, "dot_general": jnp.dot}, ValueError, "dot_general must be jax.lax.dot_general"),
        ],
    )
    def test_errors(self, change, error, message):
        if isinstance(change.get("pattern"), tuple):
            change = change | {"pattern": patterns.banded(change["pattern"], 16, density=0.5)}
        with pytest.raises(error, match=message):
            BlockSparseLinear(**{"in_features": IN, "out_features": OUT, "rngs": nnx.Rngs(0)} | change)

    def test_metadata(self):
        ours = layer(kernel_metadata={"note": "sparse"}, bias_metadata={"note": "dense"})
        assert (ours.kernel.note, ours.bias.note) == ("sparse", "dense")

    def test_sharding(self, devices):
        mesh = jax.make_mesh((len(devices),), ("d",), axis_types=(AxisType.Explicit,), devices=devices)
        with jax.set_mesh(mesh):
            ours = layer(in_features=64, out_features=64, kernel_metadata={"out_sharding": ("d", None, None)})
            assert ours.kernel.sharding.spec == PartitionSpec("d", None, None)
            x = jax.device_put(x_of(8, features=64), PartitionSpec("d", None))
            assert jax.typeof(ours(x)).sharding.spec == PartitionSpec("d", None)
            across = ours(x, out_sharding=PartitionSpec(None, "d"))
            assert jax.typeof(across).sharding.spec == PartitionSpec(None, "d")
            np.testing.assert_allclose(across, np.asarray(x) @ densified(ours.matrix), atol=1e-5)

    def test_eval_shape(self):
        abstract = nnx.eval_shape(layer)
        assert abstract.kernel.shape == (12, 16, 16)
        assert repr(abstract.pattern.get_value()) == repr(layer().pattern.get_value())
