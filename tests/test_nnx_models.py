"""BlockSparseLinear in models: converted, trained, transformed, and saved."""

import ast
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import dense as densified
from flax import nnx
from nnx_cases import HALF, IN, OUT, layer, mask, x_of

from jax_blocksparse import BlockPattern, BlockSparseMatrix, patterns
from jax_blocksparse.nnx import BlockSparseLinear, Pattern


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
import pathlib, re
from test_nnx_models import TestCheckpoints, layer
for change in {changes}:
    try:
        TestCheckpoints().restore(lambda: layer(**change), pathlib.Path({str(tmp_path)!r}))
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
