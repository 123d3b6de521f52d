"""BlockSparseDense does what nn.Dense does, and its pattern lives in a collection of its own."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import assert_exact
from cases import dense as densified
from flax import nnx, serialization
from flax.training.train_state import TrainState

from jax_blocksparse import BlockPattern, BlockSparseMatrix, patterns
from jax_blocksparse.linen import PATTERN_COLLECTION, PATTERN_NAME, BlockSparseDense

IN, OUT = 60, 90  # no multiples of the block size
KEY = jax.random.key(0)


def layer(features=OUT, **options):
    return BlockSparseDense(features, **({} if "pattern" in options else {"block_size": 16, "density": 0.5}) | options)


def x_of(*leading, features=IN, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal((*leading, features)).astype(jnp.dtype(dtype))


def pattern_of(variables):
    return variables[PATTERN_COLLECTION][PATTERN_NAME]


def matrix_of(variables):
    return BlockSparseMatrix(variables["params"]["kernel"], pattern_of(variables))


def assert_trees_equal(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_allclose(left, right, **{"rtol": 0} | tolerance)


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


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return layer()(nn.relu(layer(64)(x)))


class Step(nn.Module):
    """A layer as nn.scan wants it."""

    @nn.compact
    def __call__(self, x, _):
        return nn.relu(layer(64)(x)), None


class TestTransforms:
    def test_scan_over_layers_with_patterns_of_their_own(self):
        axes = {"params": 0, PATTERN_COLLECTION: 0}
        stack = nn.scan(Step, variable_axes=axes, split_rngs={"params": True}, length=3)()
        x = x_of(5, features=64)
        variables = stack.init(KEY, x, None)
        assert variables["params"]["BlockSparseDense_0"]["kernel"].shape == (3, 8, 16, 16)
        single = [jax.tree.map(lambda leaf, at=at: leaf[at], variables) for at in range(3)]
        masks = [each[PATTERN_COLLECTION]["BlockSparseDense_0"][PATTERN_NAME].mask() for each in single]
        assert not np.array_equal(masks[0], masks[1])

        def scanned(params):
            return jnp.sum(stack.apply(variables | {"params": params}, x, None)[0] ** 2)

        def unrolled(params):
            y = x
            for number, each in enumerate(single):
                own = {"params": jax.tree.map(lambda leaf, at=number: leaf[at], params)}
                y, _ = Step().apply(each | own, y, None)
            return jnp.sum(y**2)

        value, gradient = jax.value_and_grad(scanned)(variables["params"])
        wanted, wanted_gradient = jax.value_and_grad(unrolled)(variables["params"])
        np.testing.assert_allclose(value, wanted, rtol=1e-5)
        assert_trees_equal(gradient, wanted_gradient, rtol=1e-4, atol=1e-4)

    def test_vmap_over_experts(self):
        axes = {"params": 0, PATTERN_COLLECTION: 0}
        experts = nn.vmap(BlockSparseDense, in_axes=0, variable_axes=axes, split_rngs={"params": True}, axis_size=3)
        module, x = experts(OUT, block_size=16, density=0.5), x_of(3, 5)
        y, variables = module.init_with_output(KEY, x)
        for number in range(3):
            own = jax.tree.map(lambda leaf, at=number: leaf[at], variables)
            np.testing.assert_allclose(y[number], x[number] @ densified(matrix_of(own)), atol=1e-5)

    def test_one_pattern_for_all_experts(self):
        pattern = patterns.banded((IN, OUT), 16, density=0.5)
        experts = nn.vmap(
            BlockSparseDense,
            in_axes=0,
            variable_axes={"params": 0, PATTERN_COLLECTION: None},
            split_rngs={"params": True},
            axis_size=3,
        )
        x = x_of(3, 5)
        y, variables = experts(OUT, pattern=pattern).init_with_output(KEY, x)
        assert pattern_of(variables).rows.shape == (pattern.nnz,)
        for number in range(3):
            w = BlockSparseMatrix(variables["params"]["kernel"][number], pattern)
            np.testing.assert_allclose(y[number], x[number] @ densified(w), atol=1e-5)

    def test_remat(self):
        x = x_of(5)
        variables = layer().init(KEY, x)

        def gradient(module):
            return jax.grad(lambda params: jnp.sum(module.apply(variables | {"params": params}, x) ** 2))(
                variables["params"]
            )

        rematerialised = nn.remat(BlockSparseDense)(OUT, block_size=16, density=0.5)
        assert_trees_equal(rematerialised.init(KEY, x), variables, rtol=2e-5)
        assert_trees_equal(gradient(rematerialised), gradient(layer()), rtol=1e-5, atol=1e-5)

    def test_tabulate(self):
        table = layer().tabulate(KEY, x_of(2), console_kwargs={"width": 200})
        assert "BlockSparseDense" in table
        assert "block_size: 16" in table

    def test_as_an_nnx_module(self):
        x = x_of(3)
        bridged = nnx.bridge.ToNNX(layer(), rngs=nnx.Rngs(0)).lazy_init(x)
        w = BlockSparseMatrix(bridged.kernel[...], bridged.kernel_pattern.get_value())
        np.testing.assert_allclose(bridged(x), x @ densified(w) + np.asarray(bridged.bias[...]), atol=1e-5)
        gradient = nnx.grad(lambda model: jnp.sum(model(x)))(bridged)
        assert set(gradient) == {"kernel", "bias"}


class TestTraining:
    def test_loss_goes_down_and_pattern_stays(self):
        net, x, target = Net(), x_of(32), x_of(32, features=OUT, seed=1)
        variables = net.init(KEY, x)
        sparsity = variables[PATTERN_COLLECTION]
        state = TrainState.create(apply_fn=net.apply, params=variables["params"], tx=optax.adamw(1e-2))
        integers = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.dtype == jnp.int32 and leaf.ndim]
        assert integers == []

        @jax.jit
        def step(state, sparsity):
            def loss(params):
                y = state.apply_fn({"params": params, PATTERN_COLLECTION: sparsity}, x)
                return jnp.mean((y - target) ** 2)

            value, gradient = jax.value_and_grad(loss)(state.params)
            return state.apply_gradients(grads=gradient), value

        losses = []
        for _ in range(60):
            state, value = step(state, sparsity)
            losses.append(float(value))
        assert losses[-1] < 0.5 * losses[0]


class TestSerialization:
    def test_bytes_and_back(self):
        ours, x = layer(), x_of(2)
        mine, other = (ours.init(jax.random.key(seed), x) for seed in (0, 1))
        restored = serialization.from_bytes(other, serialization.to_bytes(mine))
        assert_trees_equal(restored, mine)
        np.testing.assert_array_equal(ours.apply(restored, x), ours.apply(mine, x))

    @pytest.mark.parametrize("change", [{"block_size": 8}, {"features": 96}], ids=str)
    def test_another_block_size_or_shape_is_refused(self, change):
        stored = serialization.to_bytes(layer().init(KEY, x_of(2)))
        message = (
            r"the state holds BlockPattern\(60x90, block_size=16.*another shape or block size than BlockPattern\(60x"
        )
        with pytest.raises(ValueError, match=message):
            serialization.from_bytes(layer(**change).init(KEY, x_of(2)), stored)

    def test_another_input_size_is_refused(self):
        stored = serialization.to_bytes(layer().init(KEY, x_of(2)))
        with pytest.raises(ValueError, match=r"60x90.*another shape or block size than BlockPattern\(64x90"):
            serialization.from_bytes(layer().init(KEY, x_of(2, features=64)), stored)

    def test_state_dict_is_plain(self):
        variables = layer().init(KEY, x_of(2))
        stored = serialization.to_state_dict(variables)[PATTERN_COLLECTION][PATTERN_NAME]
        assert {name: stored[name] for name in ("in_features", "out_features", "block_size")} == {
            "in_features": 60,
            "out_features": 90,
            "block_size": 16,
        }
        np.testing.assert_array_equal(stored["rows"], pattern_of(variables).rows)

    def test_orbax(self, tmp_path):
        ours, x = layer(), x_of(2)
        mine, other = (ours.init(jax.random.key(seed), x) for seed in (0, 1))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "variables", mine)
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(tmp_path / "variables", other)
        assert_trees_equal(restored, mine)
        np.testing.assert_array_equal(ours.apply(restored, x), ours.apply(mine, x))
