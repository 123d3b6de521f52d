"""Several devices: data parallelism by shard_map, and jit with sharded operands."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_blocksparse as jbs
from jax_blocksparse.primitives import matmul_p

CASE = cases.Case("sharded", (40, 29), 8, rows=(0, 1, 4, 2, 3, 0, 2, 4), cols=(1, 0, 2, 3, 1, 2, 0, 3), leading=(4, 8))
X = CASE.x()
W = jbs.BlockSparseMatrix(np.nan_to_num(CASE.w().data), jax.tree.map(np.asarray, CASE.pattern))
DENSE = cases.dense(W)
Y = cases.wide(X) @ DENSE
# Of sum(sin(x @ w)), in x and in the blocks of w.
DX = np.cos(Y) @ DENSE.T
DDATA = cases.sampled(np.einsum("stk,stn->kn", cases.wide(X), np.cos(Y)), CASE.pattern)


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=str)
def axis_type(request):
    return request.param


@pytest.fixture
def mesh(devices, axis_type):
    """One axis of up to four devices; a single GPU makes a mesh, too."""
    mesh = jax.make_mesh((len(devices),), ("batch",), axis_types=(axis_type,), devices=devices)
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture
def square_mesh(devices, axis_type):
    """Two axes, of two devices each where there are four."""
    count = len(devices) // 2 or 1
    shape = (len(devices) // count, count)
    mesh = jax.make_mesh(shape, ("batch", "sequence"), axis_types=(axis_type,) * 2, devices=devices)
    with jax.set_mesh(mesh):
        yield mesh


def put(mesh, tree, spec=None):
    """The arrays of a tree on the devices of a mesh: copied to each of them, or cut up."""
    spec = spec or P()
    return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec)), tree)


def loss_of(implementation):
    def loss(x, data, pattern):
        w = jbs.BlockSparseMatrix(data, pattern)
        return jnp.sin(jbs.matmul(x, w, implementation=implementation, precision="highest")).sum()

    return loss


def check_gradients(gradients):
    dx, ddata = gradients
    assert cases.relative_error(dx, DX) < 1e-5
    assert cases.relative_error(ddata, DDATA) < 1e-5


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
def test_shard_map_sums_the_gradients_of_replicated_weights(mesh, implementation, check_vma):
    """The trap: a primitive that forgets over which axes its operands vary gives the gradient of one device's part."""
    loss = loss_of(implementation)

    def total(x, data, pattern):
        return jax.lax.psum(loss(x, data, pattern), "batch")

    parallel = jax.shard_map(total, mesh=mesh, in_specs=(P("batch"), P(), P()), out_specs=P(), check_vma=check_vma)
    args = put(mesh, X, P("batch")), put(mesh, W.data), put(mesh, W.pattern)
    check_gradients(jax.jit(jax.grad(parallel, argnums=(0, 1)))(*args))


def test_shard_map_with_the_gradient_inside(mesh, implementation):
    """As training loops write it; the weights' gradient arrives summed over the devices."""
    gradient = jax.grad(loss_of(implementation), argnums=(0, 1))
    parallel = jax.shard_map(gradient, mesh=mesh, in_specs=(P("batch"), P(), P()), out_specs=(P("batch"), P()))
    check_gradients(jax.jit(parallel)(put(mesh, X, P("batch")), put(mesh, W.data), put(mesh, W.pattern)))


def test_shard_map_needs_no_communication_forward(mesh):
    parallel = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("batch"), P()), out_specs=P("batch"))
    args = put(mesh, X, P("batch")), put(mesh, W)
    assert cases.relative_error(parallel(*args), Y) < 1e-6
    assert "all-gather" not in jax.jit(parallel).lower(*args).compile().as_text()


def test_shard_map_of_sddmm(mesh, implementation):
    def blocks(x, dy, pattern):
        part = jbs.sddmm(x, dy, pattern, implementation=implementation, precision="highest")
        return jax.lax.psum(part, "batch")

    parallel = jax.shard_map(blocks, mesh=mesh, in_specs=(P("batch"), P("batch"), P()), out_specs=P())
    dy = CASE.dy()
    got = jax.jit(parallel)(put(mesh, X, P("batch")), put(mesh, dy, P("batch")), put(mesh, W.pattern))
    wanted = np.einsum("stk,stn->kn", cases.wide(X), cases.wide(dy))
    assert cases.relative_error(got, cases.sampled(wanted, CASE.pattern)) < 1e-5


def test_shard_map_over_an_ensemble(mesh):
    """Each device has weights and a pattern of its own."""
    patterns = [jbs.patterns.random(CASE.shape, 8, density=0.4, seed=seed) for seed in range(4)]
    data = cases.normal((4, patterns[0].nnz, 8, 8), "float32", seed=6)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *patterns)
    members = jax.vmap(lambda data, pattern: X[0] @ jbs.BlockSparseMatrix(data, pattern))
    parallel = jax.shard_map(members, mesh=mesh, in_specs=P("batch"), out_specs=P("batch"))
    got = parallel(*put(mesh, (data, stacked), P("batch")))
    dense = [cases.dense(jbs.BlockSparseMatrix(*each)) for each in zip(data, patterns, strict=True)]
    assert cases.relative_error(got, cases.wide(X[0]) @ np.stack(dense)) < 1e-5


SPECS = [P(), P("batch"), P("batch", "sequence"), P(None, ("batch", "sequence")), P("sequence", None, "batch")]


@pytest.mark.parametrize(
    ("implementation", "spec"),
    [*(("native", spec) for spec in SPECS), *(("xla", spec) for spec in SPECS[2:4])],
    ids=str,
)
def test_jit_with_sharded_inputs(square_mesh, spec, implementation):
    """Any sharding gives right values; an explicit mesh has it in the type of the result."""
    loss = loss_of(implementation)
    args = put(square_mesh, X, spec), put(square_mesh, W.data), put(square_mesh, W.pattern)
    check_gradients(jax.jit(jax.grad(loss, argnums=(0, 1)))(*args))

    @jax.jit
    def product(x, data, pattern):
        return x @ jbs.BlockSparseMatrix(data, pattern)

    y = product(*args)
    assert cases.relative_error(y, Y) < 1e-6
    if AxisType.Explicit in square_mesh.axis_types:
        leading = (*spec, None, None)[:2]
        assert jax.typeof(y).sharding.spec == P(*leading, None)


def test_type_of_a_product_says_how_its_rows_are_sharded(mesh):
    x = put(mesh, X[0], P("batch"))
    jaxpr = jax.make_jaxpr(lambda x, w: x @ w)(x, put(mesh, W)).jaxpr
    (call,) = cases.equations(jaxpr, matmul_p)
    rows = "batch" if AxisType.Explicit in mesh.axis_types else None
    assert call.outvars[0].aval.sharding.spec == P(None, rows, None)


def test_jit_with_weights_cut_up_over_devices(mesh, implementation):
    """Parameters sharded to save memory: the gradient is sharded as they are, where the mesh makes that a type."""
    gradient = jax.jit(jax.grad(loss_of(implementation), argnums=(0, 1)))
    dx, ddata = gradient(put(mesh, X), put(mesh, W.data, P("batch")), put(mesh, W.pattern, P()))
    check_gradients((dx, ddata))
    if AxisType.Explicit in mesh.axis_types:
        assert jax.typeof(ddata).sharding.spec == P("batch", None, None)


def test_shard_map_over_one_of_two_axes(square_mesh, implementation):
    """The other axis stays with XLA, or in the types."""
    loss = loss_of(implementation)

    def total(x, data, pattern):
        return jax.lax.psum(loss(x, data, pattern), "batch")

    parallel = jax.shard_map(total, in_specs=(P("batch"), P(), P()), out_specs=P(), axis_names={"batch"})
    args = put(square_mesh, X, P("batch", "sequence")), put(square_mesh, W.data), put(square_mesh, W.pattern)
    check_gradients(jax.jit(jax.grad(parallel, argnums=(0, 1)))(*args))


@pytest.mark.parametrize("spec", [P("batch", "sequence"), P("sequence", None, "batch")], ids=str)
def test_vmap_with_sharded_inputs(square_mesh, spec):
    """The inner dimension becomes rows of one product, the outer one too."""
    over_both = jax.jit(jax.vmap(jax.vmap(lambda x, w: x @ w, (0, None)), (0, None)))
    y = over_both(put(square_mesh, X, spec), put(square_mesh, W))
    assert cases.relative_error(y, Y) < 1e-6


def test_vmap_over_sharded_weights(square_mesh):
    """Two nested batches of weights, sharded like their inputs."""
    data = cases.normal((4, 2, len(CASE.rows), 8, 8), "float32", seed=7)
    x = cases.normal((4, 2, 8, 40), "float32", seed=8)
    product = jax.vmap(jax.vmap(lambda x, data: x @ jbs.BlockSparseMatrix(data, CASE.pattern)))
    got = jax.jit(product)(*put(square_mesh, (x, data), P("batch", "sequence")))
    dense = [[cases.dense(jbs.BlockSparseMatrix(one, CASE.pattern)) for one in row] for row in data]
    assert cases.relative_error(got, cases.wide(x) @ np.array(dense)) < 1e-6
