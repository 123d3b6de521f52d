"""BlockSparseDense does what nn.Dense does, and its pattern lives in a collection of its own."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_exact
from cases import dense as densified
from linen_cases import IN, KEY, OUT, assert_trees_equal, layer, matrix_of, pattern_of, x_of

from jax_blocksparse import BlockPattern, BlockSparseMatrix, patterns
from jax_blocksparse.linen import PATTERN_COLLECTION, PATTERN_NAME, BlockSparseDense


class TestLikeDense:
    def test_fields_are_a_superset(self):
        dense, ours = (
            {field.name: field for field in dataclasses.fields(each)} for each in (nn.Dense, BlockSparseDense)
        )
        extra = {"block_size", "density", "pattern", "implementation"}
        assert [name for name in dense if name not in ("parent", "name")] == [
            name for name in ours if name not in {*extra, "parent", "name"}
        ]
        for name, field in dense.items():
            if name not in ("kernel_init", "bias_init"):
                assert ours[name].default == field.default

    def test_equals_dense_at_density_1(self):
        options = {"bias_init": nn.initializers.normal(), "precision": "highest"}
        dense, ours = nn.Dense(OUT, **options), layer(density=1.0, **options)
        x, dy = x_of(7), x_of(7, features=OUT, seed=1)
        dense_variables, variables = dense.init(KEY, x), ours.init(KEY, x)
        kernel, bias = dense_variables["params"]["kernel"], dense_variables["params"]["bias"]
        np.testing.assert_array_equal(matrix_of(variables).todense(), kernel)
        np.testing.assert_array_equal(variables["params"]["bias"], bias)
        results = []
        for module, all_variables in ((dense, dense_variables), (ours, variables)):

            def loss(params, x, module=module, variables=all_variables):
                y = module.apply(variables | {"params": params}, x)
                return jnp.sum(y * dy), y

            (params, dx), y = jax.grad(loss, argnums=(0, 1), has_aux=True)(all_variables["params"], x)
            results.append({"y": y, "dx": dx} | params)
        results[1]["kernel"] = BlockSparseMatrix(results[1]["kernel"], pattern_of(variables)).todense()
        x64, dy64, kernel, bias = (np.asarray(array, np.float64) for array in (x, dy, kernel, bias))
        wanted = {"y": x64 @ kernel + bias, "dx": dy64 @ kernel.T, "kernel": x64.T @ dy64, "bias": dy64.sum(0)}
        for name, value in wanted.items():
            assert_exact(results[1][name], value, results[0][name])

    @pytest.mark.parametrize("use_bias", [True, False])
    def test_sparse_layer_computes_its_matrix(self, use_bias):
        ours, x = layer(use_bias=use_bias, bias_init=nn.initializers.normal()), x_of(5)
        y, variables = ours.init_with_output(KEY, x)
        wanted = x.astype(np.float64) @ densified(matrix_of(variables))
        wanted += np.asarray(variables["params"]["bias"]) if use_bias else 0
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
        assert set(variables["params"]) == ({"kernel", "bias"} if use_bias else {"kernel"})

    def test_constant_initialisers(self):
        ours = layer(density=1.0, kernel_init=nn.initializers.ones, bias_init=nn.initializers.ones)
        y, _ = ours.init_with_output(KEY, np.ones((1, IN)))
        np.testing.assert_array_equal(y, np.full((1, OUT), IN + 1))

    @pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3), (2, 0, 3)])
    def test_leading_dimensions(self, leading):
        ours, x = layer(), x_of(*leading)
        y, variables = ours.init_with_output(KEY, x)
        assert y.shape == (*leading, OUT)
        np.testing.assert_allclose(y.reshape(-1, OUT), ours.apply(variables, x.reshape(-1, IN)), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("features", [IN - 1, IN + 1, 64, 1])
    def test_wrong_input_size(self, features):
        variables = layer().init(KEY, x_of(2))
        with pytest.raises(
            ValueError, match=rf"\(in_features, out_features\) = \({features}, 90\), got BlockPattern\(60x90"
        ):
            layer().apply(variables, x_of(2, features=features))

    @pytest.mark.parametrize("param_dtype", ["float32", "bfloat16", "float16", "float64"])
    @pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16", "float64"])
    def test_dtypes_are_those_of_dense(self, dtype, param_dtype):
        def results(module):
            def call(x):
                y, variables = module.init_with_output(KEY, x)
                return y, variables["params"]["kernel"], variables["params"]["bias"]

            return [
                [result.dtype for result in jax.eval_shape(call, jnp.ones((2, IN), x_dtype))]
                for x_dtype in ("float32", "bfloat16", "float16", "float64", "int32", "bool")
            ]

        with jax.enable_x64(True):
            options = {"dtype": dtype, "param_dtype": param_dtype}
            assert results(layer(**options)) == results(nn.Dense(OUT, **options))

    def test_computes_in_bfloat16_with_float32_parameters(self):
        ours, x = layer(dtype=jnp.bfloat16), x_of(8)
        y, variables = ours.init_with_output(KEY, x)
        assert y.dtype == jnp.bfloat16
        gradient = jax.grad(lambda params: jnp.sum(ours.apply(variables | {"params": params}, x)))(variables["params"])
        assert {leaf.dtype.name for leaf in jax.tree.leaves((gradient, variables["params"]))} == {"float32"}

    def test_promote_dtype_is_used(self):
        def promote(*arrays, dtype):
            return tuple(array.astype(jnp.float16) for array in arrays)

        y, _ = layer(promote_dtype=promote).init_with_output(KEY, x_of(2))
        assert y.dtype == jnp.float16

    def test_precision_and_implementation_reach_the_product(self):
        variables = layer().init(KEY, x_of(2))
        with pytest.raises(ValueError, match="precision must be"):
            layer(precision="exact").apply(variables, x_of(2))
        with pytest.raises(ValueError, match="implementation must be None, 'native' or 'xla', got 'cuda'"):
            layer(implementation="cuda").apply(variables, x_of(2))

    def test_draws_the_same_keys(self):
        class Pair(nn.Module):
            first: nn.Module

            @nn.compact
            def __call__(self, x):
                return nn.Dense(3, name="second")(self.first(x))

        dense, ours = (
            Pair(first).init({"params": KEY}, x_of(2))["params"]
            for first in (nn.Dense(OUT, bias_init=nn.initializers.normal()), layer(bias_init=nn.initializers.normal()))
        )
        assert_trees_equal(dense["second"], ours["second"])
        np.testing.assert_array_equal(dense["first"]["bias"], ours["first"]["bias"])


class TestVariables:
    def test_collections(self):
        variables = layer().init(KEY, x_of(2))
        assert set(variables) == {"params", PATTERN_COLLECTION}
        assert isinstance(pattern_of(variables), BlockPattern)
        assert jax.tree.map(jnp.shape, variables["params"]) == {"kernel": (12, 16, 16), "bias": (OUT,)}

    def test_pattern_follows_from_the_key(self):
        masks = [pattern_of(layer().init(jax.random.key(seed), x_of(2))).mask() for seed in (0, 0, 1)]
        np.testing.assert_array_equal(masks[0], masks[1])
        assert not np.array_equal(masks[0], masks[2])

    @pytest.mark.parametrize("options", [{}, {"density": 1.0}, {"pattern": (IN, OUT)}], ids=str)
    def test_init_under_jit_is_the_same(self, options):
        if "pattern" in options:
            options = {"pattern": patterns.butterfly(options["pattern"], 16)}
        init = layer(**options).init
        assert_trees_equal(jax.jit(init)(KEY, x_of(2)), init(KEY, x_of(2)), rtol=2e-5)
        shapes = jax.eval_shape(init, KEY, x_of(2))
        assert jax.tree.structure(shapes) == jax.tree.structure(init(KEY, x_of(2)))

    def test_block_size_default(self):
        assert pattern_of(layer(block_size=None).init(KEY, x_of(2))).block_size == 32
        given = layer(pattern=patterns.banded((IN, OUT), 8, density=0.5))
        assert pattern_of(given.init(KEY, x_of(2))).block_size == 8

    def test_variables_decide_where_blocks_are(self):
        ours, x = layer(), x_of(2)
        mine, other = (ours.init(jax.random.key(seed), x) for seed in (0, 1))
        mixed = {"params": mine["params"], PATTERN_COLLECTION: other[PATTERN_COLLECTION]}
        np.testing.assert_allclose(ours.apply(mixed, x), x @ densified(matrix_of(mixed)), atol=1e-5)

    def test_another_pattern_compiles_nothing(self):
        ours, x, traced = layer(), x_of(2), []

        @jax.jit
        def apply(variables, x):
            traced.append(True)
            return ours.apply(variables, x)

        for seed in (0, 1):
            variables = ours.init(jax.random.key(seed), x)
            np.testing.assert_allclose(apply(variables, x), x @ densified(matrix_of(variables)), atol=1e-5)
        assert len(traced) == 1

    @pytest.mark.parametrize("mutable", [False, True, [PATTERN_COLLECTION], ["params", "batch_stats"]])
    def test_mutable(self, mutable):
        ours, x = layer(), x_of(2)
        variables = ours.init(KEY, x)
        result = ours.apply(variables, x, mutable=mutable)
        if mutable is False:
            np.testing.assert_array_equal(result, ours.apply(variables, x))
            return
        y, updated = result
        np.testing.assert_array_equal(y, ours.apply(variables, x))
        wanted = variables if mutable is True else {name: variables[name] for name in mutable if name in variables}
        assert_trees_equal(updated, wanted)

    def test_missing_collection(self):
        ours, x = layer(name="up"), x_of(2)
        params = ours.init(KEY, x)["params"]
        message = "hold no collection 'sparsity' for up: pass what init returned, params and sparsity"
        for rest in ({}, {PATTERN_COLLECTION: {}}):
            with pytest.raises(ValueError, match=message):
                ours.apply({"params": params} | rest, x)

    def test_stored_pattern_must_fit_the_layer(self):
        variables = layer().init(KEY, x_of(2))
        with pytest.raises(ValueError, match="block_size must be that of the pattern, 16, or left out, got 32"):
            layer(block_size=32).apply(variables, x_of(2))
        raw = {"params": variables["params"], PATTERN_COLLECTION: {PATTERN_NAME: {"rows": np.zeros(12)}}}
        with pytest.raises(TypeError, match="the variable kernel_pattern must be a BlockPattern, got dict"):
            layer().apply(raw, x_of(2))

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"density": None}, ValueError, "give either density or pattern, got density=None and pattern=None"),
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
            ({"pattern": (IN, OUT), "density": 0.5}, ValueError, "give either density or pattern, got density=0.5 and"),
            ({"pattern": "full"}, TypeError, "pattern must be a BlockPattern, got str"),
            ({"density": 0}, ValueError, r"density must be a number in \(0, 1\], got 0"),
            ({"density": 0.5, "block_size": 7}, ValueError, "block_size must be one of .*, got 7"),
            ({"density": 0.5, "dot_general": jnp.dot}, ValueError, "dot_general and dot_general_cls must be None"),
            ({"density": 0.5, "dot_general_cls": jnp.dot}, ValueError, "dot_general and dot_general_cls must be None"),
        ],
    )
    def test_errors(self, change, error, message):
        if isinstance(change.get("pattern"), tuple):
            change = change | {"pattern": patterns.banded(change["pattern"], 16, density=0.5)}
        with pytest.raises(error, match=message):
            BlockSparseDense(OUT, **change).init(KEY, x_of(2))
