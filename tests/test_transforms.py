"""The rest of JAX's transformations: jit, jvp, linearize, hessian, remat, control flow, export."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_blocksparse as jbs

HIGHEST = jax.lax.Precision.HIGHEST
SHAPE = (24, 24)
LAYERS = 4
X = cases.normal((5, 24), "float32", seed=1)
DIRECTION = cases.normal((5, 24), "float32", seed=2)
DATA = cases.normal((LAYERS, 6, 8, 8), "float32", seed=3) / 8
PATTERNS = [jbs.patterns.random(SHAPE, 8, density=0.67, seed=seed) for seed in range(LAYERS)]
DENSE = [
    cases.dense(jbs.BlockSparseMatrix(data, pattern)).astype(np.float32)
    for data, pattern in zip(DATA, PATTERNS, strict=True)
]


@pytest.fixture
def matmul(implementation, device):
    """(x, data, pattern) to x @ w."""

    def product(x, data, pattern):
        w = jbs.BlockSparseMatrix(data, pattern)
        return jbs.matmul(x, w, implementation=implementation, precision=HIGHEST)

    return product


def dense_matmul(x, w):
    return jnp.dot(x, w, precision=HIGHEST)


def assert_close(got, wanted, tolerance=1e-5):
    assert cases.relative_error(got, cases.wide(np.asarray(wanted))) < tolerance


def test_jit_takes_matrices_and_patterns(device):
    w = jbs.BlockSparseMatrix(DATA[0], PATTERNS[0])
    assert_close(jax.jit(lambda x, w: x @ w)(X, w), X @ DENSE[0])
    assert_close(jax.jit(lambda x, w: w @ x, donate_argnums=0)(jnp.asarray(X.T), w), DENSE[0] @ X.T)
    returned = jax.jit(lambda w: w.T * 2)(w)
    assert isinstance(returned, jbs.BlockSparseMatrix)
    assert_close(X @ returned, X @ (2 * DENSE[0].T))


def test_jvp(matmul):
    data_dot = DATA[1]
    y, y_dot = jax.jvp(lambda x, data: matmul(x, data, PATTERNS[0]), (X, DATA[0]), (DIRECTION, data_dot))
    dense_dot = cases.dense(jbs.BlockSparseMatrix(data_dot, PATTERNS[0]))
    assert_close(y, X @ DENSE[0])
    assert_close(y_dot, DIRECTION @ DENSE[0] + X @ dense_dot)


def test_jvp_along_a_matrix(device):
    """The tangents of index arrays are float0."""
    w = jbs.BlockSparseMatrix(jnp.asarray(DATA[0]), PATTERNS[0])
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), PATTERNS[0])
    _, y_dot = jax.jvp(lambda w: X @ w, (w,), (jbs.BlockSparseMatrix(jnp.asarray(DATA[1]), nothing),))
    assert_close(y_dot, X @ cases.dense(jbs.BlockSparseMatrix(DATA[1], PATTERNS[0])))


def test_derivative_in_nothing_but_indices_is_zero(matmul):
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), PATTERNS[0])
    _, y_dot = jax.jvp(lambda pattern: matmul(X, DATA[0], pattern), (PATTERNS[0],), (nothing,))
    assert y_dot.shape == X.shape
    assert not y_dot.any()


def test_linearize_and_linear_transpose(matmul):
    y, linear = jax.linearize(lambda x: jnp.sin(matmul(x, DATA[0], PATTERNS[0])), X)
    assert_close(linear(DIRECTION), np.cos(X @ DENSE[0]) * (DIRECTION @ DENSE[0]))
    (dx,) = jax.linear_transpose(lambda x: matmul(x, DATA[0], PATTERNS[0]), X)(y)
    assert_close(dx, np.asarray(y) @ DENSE[0].T)


def test_hessian(matmul):
    """Forward over reverse, in both operands at once."""
    x, data = X[:2, :8], jnp.asarray(DATA[0, :2])
    pattern = jbs.BlockPattern.from_coordinates([0, 0], [1, 0], shape=(8, 16), block_size=8)

    def sparse(x, data):
        return jnp.sin(matmul(x, data, pattern)).sum()

    def dense(x, data):
        return jnp.sin(dense_matmul(x, jnp.concatenate([data[1], data[0]], axis=1))).sum()

    got = jax.jit(jax.hessian(sparse, argnums=(0, 1)))(x, data)
    wanted = jax.jit(jax.hessian(dense, argnums=(0, 1)))(x, data)
    jax.tree.map(assert_close, got, wanted)


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable], ids=["nothing", "dots"])
def test_remat(matmul, policy):
    def loss(x, data):
        return jnp.tanh(matmul(jnp.tanh(matmul(x, data, PATTERNS[0])), data, PATTERNS[1])).sum()

    got = jax.jit(jax.grad(jax.checkpoint(loss, policy=policy), argnums=(0, 1)))(X, DATA[0])
    wanted = jax.jit(jax.grad(loss, argnums=(0, 1)))(X, DATA[0])
    for each, other in zip(got, wanted, strict=True):
        assert_close(each, other, 1e-6)


def test_scan_over_stacked_layers(matmul):
    """One program for all layers, although each has its own pattern."""
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *PATTERNS)

    def sparse(x, data):
        return jax.lax.scan(lambda h, layer: (jnp.tanh(matmul(h, *layer)), None), x, (data, stacked))[0].sum()

    def dense(x, weights):
        for w in weights:
            x = jnp.tanh(dense_matmul(x, w))
        return x.sum()

    value, (dx, ddata) = jax.jit(jax.value_and_grad(sparse, argnums=(0, 1)))(X, DATA)
    wanted, (wanted_dx, wanted_dw) = jax.value_and_grad(dense, argnums=(0, 1))(X, DENSE)
    assert_close(value, wanted)
    assert_close(dx, wanted_dx)
    assert_close(ddata, np.stack([cases.sampled(np.asarray(dw), p) for dw, p in zip(wanted_dw, PATTERNS, strict=True)]))


def test_while_loop(matmul):
    def body(state):
        step, x = state
        return step + 1, jnp.tanh(matmul(x, DATA[0], PATTERNS[0]))

    _, got = jax.jit(lambda x: jax.lax.while_loop(lambda state: state[0] < 3, body, (0, x)))(X)
    wanted = X
    for _ in range(3):
        wanted = np.tanh(wanted @ DENSE[0])
    assert_close(got, wanted)


def test_cond(matmul):
    """Both branches hold a custom call; the derivative goes through the one taken."""

    def loss(x, first):
        branches = [lambda x: matmul(x, DATA[1], PATTERNS[1]), lambda x: matmul(x, DATA[0], PATTERNS[0])]
        return jax.lax.cond(first, branches[1], branches[0], x).sum()

    dx = jax.jit(jax.grad(loss))(X, True)
    assert_close(dx, np.ones_like(X) @ DENSE[0].T)


def test_pattern_can_be_made_under_jit(matmul):
    @jax.jit
    def product(rows, cols):
        pattern = jbs.BlockPattern.from_coordinates(rows, cols, shape=SHAPE, block_size=8)
        return matmul(X, DATA[0], pattern)

    assert_close(product(PATTERNS[0].rows, PATTERNS[0].cols), X @ DENSE[0])


@pytest.fixture
def compilations():
    """A list that grows by one whenever XLA compiles something."""
    compiled = []

    def listener(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listener)
    yield compiled
    jax.monitoring.unregister_event_duration_listener(listener)


def test_another_pattern_of_the_same_size_compiles_nothing(matmul, compilations):
    traces = []

    @jax.jit
    def step(x, data, pattern):
        traces.append(pattern)
        loss = lambda data: (matmul(x, data, pattern) ** 2).sum()  # noqa: E731
        return data - 0.1 * jax.grad(loss)(data)

    first = step(X, DATA[0], PATTERNS[0])
    assert len(traces) == 1
    assert compilations
    compilations.clear()
    for pattern in PATTERNS[1:]:
        assert cases.relative_error(step(X, DATA[0], pattern), np.asarray(first, np.float64)) > 1e-3
    assert len(traces) == 1
    assert not compilations


def test_export(device):
    """For both platforms at once: serialised, restored and called, with its gradient."""

    def product(x, data, rows, cols):
        pattern = jbs.BlockPattern.from_coordinates(rows, cols, shape=SHAPE, block_size=8)
        return jbs.matmul(x, jbs.BlockSparseMatrix(data, pattern), precision=HIGHEST)

    args = (X, DATA[0], np.asarray(PATTERNS[0].rows), np.asarray(PATTERNS[0].cols))
    export = jax.export.export(jax.jit(product), platforms=("cpu", "cuda"), disabled_checks=jbs.DISABLED_EXPORT_CHECKS)(
        *args
    )
    assert "@jax_blocksparse.matmul.v1" in export.mlir_module()
    restored = jax.export.deserialize(export.serialize(vjp_order=1))
    assert_close(restored.call(*args), X @ DENSE[0])
    dx = jax.grad(lambda x: restored.call(x, *args[1:]).sum())(X)
    assert_close(dx, np.ones_like(X) @ DENSE[0].T)


@pytest.mark.parametrize(("dtype", "block_size"), [("float32", 8), ("bfloat16", 16), ("bfloat16", 64)])
def test_export_for_any_batch(implementation, device, dtype, block_size):
    """Leading dimensions may stay symbols until the program is called."""
    w = cases.random_w((64, 192), block_size, density=0.5, dtype=dtype)
    product = jax.jit(lambda x: jbs.matmul(x, w, implementation=implementation, precision=HIGHEST))
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, length, 64"), dtype)
    platform = "cuda" if device.platform == "gpu" else device.platform
    checks = jbs.DISABLED_EXPORT_CHECKS
    export = jax.export.export(product, platforms=(platform,), disabled_checks=checks)(x)
    restored = jax.export.deserialize(export.serialize())
    for leading in ((1, 5), (3, 2), (3, 40), (7, 45)):
        x = cases.normal((*leading, 64), dtype, seed=4)
        assert_close(restored.call(x), cases.wide(x) @ cases.dense(w), 1e-5 if dtype == "float32" else 6e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_for_cuda_and_any_batch_needs_no_gpu(dtype):
    w = cases.random_w((64, 192), 16, density=0.5, dtype=dtype)
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, length, 64"), dtype)
    loss = jax.jit(jax.grad(lambda x, w: (jbs.mlp(x, w, w.T, activation="relu") ** 2).sum()))
    export = jax.export.export(loss, platforms=("cuda",), disabled_checks=jbs.DISABLED_EXPORT_CHECKS)(x, w)
    assert ("@jax_blocksparse.matmul.v1" in export.mlir_module()) == bool(jbs.has_cuda())


def test_export_without_our_checks_disabled_names_the_custom_call():
    w = jbs.BlockSparseMatrix(DATA[0], PATTERNS[0])
    with pytest.raises(ValueError, match=r"jax_blocksparse\.matmul\.v1"):
        jax.export.export(jax.jit(lambda x: x @ w), platforms=("cpu",))(X)
