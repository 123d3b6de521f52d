"""BlockSparseLinear does what nnx.Linear does, and its pattern is state that nothing trains."""

import ast
import inspect
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import assert_exact
from cases import dense as densified
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from jax_blocksparse import BlockPattern, BlockSparseMatrix, patterns
from jax_blocksparse.nnx import BlockSparseLinear, Pattern

IN, OUT = 60, 90  # no multiples of the block size
FULL = {"block_size": 16, "density": 1.0}
HALF = {"block_size": 16, "density": 0.5}


def layer(seed=0, in_features=IN, out_features=OUT, **options):
    options = options if "pattern" in options else HALF | options
    return BlockSparseLinear(in_features, out_features, rngs=nnx.Rngs(seed), **options)


def twins(**options):
    """The dense layer and the block-sparse one with every block, made with the same keys."""
    return tuple(
        make(IN, OUT, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0), **options | kind)
        for make, kind in ((nnx.Linear, {}), (BlockSparseLinear, FULL))
    )


def x_of(*leading, features=IN, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal((*leading, features)).astype(jnp.dtype(dtype))


def float64(*arrays):
    return (np.asarray(array, np.float64) for array in arrays)


def mask(of):
    return of.pattern.get_value().mask()


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


class TestConversion:
    def linear(self, **options):
        return nnx.Linear(IN, OUT, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0), **options)

    def test_there_and_back(self):
        linear = self.linear(dtype=jnp.bfloat16, precision="highest")
        ours = BlockSparseLinear.from_linear(linear, block_size=16, density=1.0)
        back = ours.to_linear()
        np.testing.assert_array_equal(back.kernel[...], linear.kernel[...])
        np.testing.assert_array_equal(back.bias[...], linear.bias[...])
        for name in ("in_features", "out_features", "use_bias", "dtype", "param_dtype", "precision", "promote_dtype"):
            assert getattr(back, name) == getattr(ours, name) == getattr(linear, name)

    def test_keeps_the_largest_blocks(self):
        linear = self.linear()
        ours = BlockSparseLinear.from_linear(linear, block_size=16, density=0.5)
        pruned = BlockSparseMatrix.fromdense(linear.kernel[...], block_size=16, density=0.5)
        np.testing.assert_array_equal(ours.matrix.todense(), pruned.todense())
        np.testing.assert_array_equal(ours.bias[...], linear.bias[...])
        np.testing.assert_allclose(ours(x_of(3)), ours.to_linear()(x_of(3)), atol=1e-2)  # TF32 on a GPU

    def test_pattern_says_what_to_keep(self):
        pattern = patterns.butterfly((IN, OUT), 16)
        ours = BlockSparseLinear.from_linear(self.linear(use_bias=False), pattern=pattern)
        assert ours.pattern.get_value().rows is pattern.rows
        assert ours.bias is None
        kept = np.repeat(np.repeat(pattern.mask(), 16, axis=0), 16, axis=1)[:IN, :OUT]
        np.testing.assert_array_equal(ours.to_linear().kernel[...], self.linear().kernel[...] * kept)
        assert ours.to_linear().bias is None

    def test_parameter_dtype_stays(self):
        linear = self.linear(param_dtype=jnp.bfloat16)
        ours = BlockSparseLinear.from_linear(linear, block_size=16, density=0.5)
        assert ours.kernel.dtype == ours.to_linear().kernel.dtype == jnp.bfloat16

    def test_errors(self):
        with pytest.raises(ValueError, match=r"dot_general must be jax\.lax\.dot_general"):
            BlockSparseLinear.from_linear(self.linear(dot_general=lambda *a, **k: 0), block_size=16, density=0.5)
        with pytest.raises(ValueError, match="fromdense needs block_size or pattern"):
            BlockSparseLinear.from_linear(self.linear(), density=0.5)


class Net(nnx.Module):
    def __init__(self, rngs, width=64):
        self.inner = BlockSparseLinear(IN, width, rngs=rngs, **HALF)
        self.outer = BlockSparseLinear(width, OUT, rngs=rngs, **HALF)

    def __call__(self, x):
        return self.outer(nnx.relu(self.inner(x)))


class TestTraining:
    def test_pattern_is_no_parameter(self):
        net = Net(nnx.Rngs(0))
        gradient = nnx.grad(lambda net: jnp.sum(net(x_of(3)) ** 2))(net)
        leaves = {nnx_path[0][-1] for nnx_path in nnx.to_flat_state(gradient)}
        assert leaves == {"kernel", "bias"}
        optimizer = nnx.Optimizer(net, optax.adamw(1e-3), wrt=nnx.Param)
        moments = [leaf for leaf in jax.tree.leaves(nnx.state(optimizer)) if leaf.ndim == 3]
        assert {leaf.shape for leaf in moments} == {net.inner.kernel.shape, net.outer.kernel.shape}
        integers = [leaf for leaf in jax.tree.leaves(nnx.state(optimizer)) if leaf.dtype == jnp.int32 and leaf.ndim]
        assert integers == []

    def test_loss_goes_down_and_pattern_stays(self):
        net = Net(nnx.Rngs(0))
        optimizer = nnx.Optimizer(net, optax.adamw(1e-2), wrt=nnx.Param)
        before = [mask(net.inner), mask(net.outer)]
        x, target = x_of(32), x_of(32, features=OUT, seed=1)

        @nnx.jit
        def step(net, optimizer):
            loss, gradient = nnx.value_and_grad(lambda net: jnp.mean((net(x) - target) ** 2))(net)
            optimizer.update(net, gradient)
            return loss

        losses = [float(step(net, optimizer)) for _ in range(60)]
        assert losses[-1] < 0.5 * losses[0]
        for was, now in zip(before, [mask(net.inner), mask(net.outer)], strict=True):
            np.testing.assert_array_equal(was, now)
        # The last block column has outputs 80 to 95, of which 90 and more do not exist: no gradient, nothing to train.
        last = np.asarray(net.outer.pattern.get_value().cols) == 5
        assert last.sum() == 2
        assert not np.asarray(net.outer.kernel[...])[last, :, 10:].any()

    def test_plain_jax_grad_needs_the_parameters_split_off(self):
        ours, x = layer(), x_of(3)
        with pytest.raises(TypeError, match="grad requires real- or complex-valued inputs"):
            jax.grad(lambda model: jnp.sum(model(x)))(ours)
        graph, parameters, rest = nnx.split(ours, nnx.Param, ...)
        gradient = jax.grad(lambda parameters: jnp.sum(nnx.merge(graph, parameters, rest)(x)))(parameters)
        np.testing.assert_array_equal(gradient["bias"][...], np.full(OUT, 3))

    def test_another_pattern_compiles_nothing(self):
        ours, x = layer(), x_of(3)
        traced = []

        @nnx.jit
        def loss_and_gradient(model, x):
            traced.append(True)
            return nnx.value_and_grad(lambda model: jnp.sum(model(x) ** 2))(model)

        loss_and_gradient(ours, x)
        ours.pattern.set_value(layer(1).pattern.get_value())
        loss, _ = loss_and_gradient(ours, x)
        assert len(traced) == 1
        wanted = x.astype(np.float64) @ densified(ours.matrix)
        np.testing.assert_allclose(loss, np.sum(wanted**2), rtol=1e-5)

    def test_pattern_of_another_size_is_refused(self):
        ours = layer()
        ours.pattern.set_value(layer(density=1.0).pattern.get_value())
        with pytest.raises(ValueError, match=r"w.data must have shape .* = \(24, 16, 16\), got \(12, 16, 16\)"):
            ours(x_of(2))


class TestTransforms:
    def test_jit(self):
        ours, x = layer(), x_of(3)
        for jit in (jax.jit, nnx.jit):
            np.testing.assert_allclose(jit(lambda model, x: model(x))(ours, x), ours(x), atol=1e-6)
        made = nnx.jit(lambda rngs: BlockSparseLinear(IN, OUT, rngs=rngs, **HALF))(nnx.Rngs(0))
        np.testing.assert_array_equal(mask(made), mask(ours))
        np.testing.assert_allclose(made.kernel[...], ours.kernel[...], rtol=1e-5)

    def test_split_and_merge(self):
        ours = layer()
        graph, parameters, pattern = nnx.split(ours, nnx.Param, Pattern)
        assert list(parameters) == ["bias", "kernel"]
        assert list(pattern) == ["pattern"]
        np.testing.assert_array_equal(nnx.merge(graph, parameters, pattern)(x_of(2)), ours(x_of(2)))

    def test_scan_over_layers_with_patterns_of_their_own(self):
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return BlockSparseLinear(64, 64, rngs=rngs, **HALF)

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def apply(model, x):
            return model(x)

        stack, x = make(nnx.Rngs(0).split(3)), x_of(5, features=64)
        assert stack.kernel.shape == (3, 8, 16, 16)
        assert stack.pattern.get_value().rows.shape == (3, 8)
        graph, state = nnx.split(stack)
        single = [nnx.merge(graph, jax.tree.map(lambda leaf, at=at: leaf[at], state)) for at in range(3)]
        assert not np.array_equal(mask(single[0]), mask(single[1]))

        def loss(stack):
            return jnp.sum(apply(stack, x) ** 2)

        def unrolled(models):
            y = x
            for model in models:
                y = model(y)
            return jnp.sum(y**2)

        value, gradient = nnx.value_and_grad(loss)(stack)
        assert set(gradient) == {"kernel", "bias"}
        wanted, gradients = nnx.value_and_grad(unrolled)(single)
        np.testing.assert_allclose(value, wanted, rtol=1e-5)
        for number in range(3):
            np.testing.assert_allclose(
                gradient["kernel"][...][number], gradients[number]["kernel"][...], rtol=1e-4, atol=1e-4
            )

    def test_remat(self):
        ours, x = layer(), x_of(3)

        def gradient(call):
            return nnx.grad(lambda model: jnp.sum(call(model, x) ** 2))(ours)["kernel"][...]

        rematerialised = gradient(nnx.remat(lambda model, x: model(x)))
        np.testing.assert_allclose(rematerialised, gradient(lambda model, x: model(x)), rtol=1e-5, atol=1e-5)

    def test_vmap_over_inputs(self):
        ours, x = layer(), x_of(4, 3)
        together = nnx.vmap(lambda model, x: model(x), in_axes=(None, 0))(ours, x)
        np.testing.assert_allclose(together, ours(x), atol=1e-6)


class TestCheckpoints:
    def save(self, model, folder):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "model", nnx.state(model))

    def restore(self, make, folder):
        """As documented by Flax: into the shapes of a model, which itself need not be made."""
        graph, abstract = nnx.split(nnx.eval_shape(make))
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), abstract)
        with ocp.StandardCheckpointer() as checkpointer:
            return nnx.merge(graph, checkpointer.restore(folder / "model", abstract))

    def test_save_and_restore(self, tmp_path):
        ours = layer(0)
        self.save(ours, tmp_path)
        restored = self.restore(lambda: layer(0), tmp_path)
        for was, now in zip(jax.tree.leaves(nnx.state(ours)), jax.tree.leaves(nnx.state(restored)), strict=True):
            np.testing.assert_array_equal(was, now)
            assert was.dtype == now.dtype

    def test_restores_the_pattern_that_was_saved(self, tmp_path):
        ours = layer(0)
        self.save(ours, tmp_path)
        restored = self.restore(lambda: layer(1), tmp_path)
        assert not np.array_equal(mask(layer(1)), mask(ours))
        np.testing.assert_array_equal(mask(restored), mask(ours))
        np.testing.assert_array_equal(restored(x_of(4)), ours(x_of(4)))
        assert isinstance(restored.pattern.get_value(), BlockPattern)

    def test_another_block_size_or_shape_is_refused(self, tmp_path):
        """In a process of its own: after a refusal Orbax drops its other reads, at any later time and noisily."""
        changes = [
            {"block_size": 8},
            {"block_size": 32},
            {"density": 0.25},
            {"out_features": 96},
            {"in_features": 90, "out_features": 60},
        ]
        self.save(layer(), tmp_path)
        program = f"""
import pathlib, re, test_nnx
for change in {changes}:
    try:
        test_nnx.TestCheckpoints().restore(lambda: test_nnx.layer(**change), pathlib.Path({str(tmp_path)!r}))
        print("restored")
    except ValueError as error:
        message = "Requested shape: (.*) is not compatible with the stored shape: ([(].*?[)])"
        print(*re.search(message, str(error)).groups(), sep=";")
"""
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=pathlib.Path(__file__).parent, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        for change, line in zip(changes, done.stdout.splitlines(), strict=True):
            # Orbax reads all arrays at once and names the first that does not fit.
            asked, stored = (jax.tree.leaves(nnx.state(each)) for each in (layer(**change), layer()))
            pairs = {(each.shape, other.shape) for each, other in zip(asked, stored, strict=True)}
            assert tuple(ast.literal_eval(shape) for shape in line.split(";")) in {
                pair for pair in pairs if pair[0] != pair[1]
            }
