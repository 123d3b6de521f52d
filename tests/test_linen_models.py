"""BlockSparseDense in models: transformed, trained, and saved."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import dense as densified
from flax import nnx, serialization
from flax.training.train_state import TrainState
from linen_cases import IN, KEY, OUT, assert_trees_equal, layer, matrix_of, pattern_of, x_of

from jax_blocksparse import BlockSparseMatrix, patterns
from jax_blocksparse.linen import PATTERN_COLLECTION, PATTERN_NAME, BlockSparseDense


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
