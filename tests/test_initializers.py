"""The dense initialisers keep their meaning on blocks: outputs vary as those of a dense layer do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import inside
from jax.nn import initializers

from jax_blocksparse import BlockPattern, BlockSparseMatrix, patterns
from jax_blocksparse.initializers import init_blocks

KEY = jax.random.key(0)
DENSE = {
    "lecun_normal": initializers.lecun_normal(),
    "lecun_uniform": initializers.lecun_uniform(),
    "he_normal": initializers.he_normal(),
    "he_uniform": initializers.he_uniform(),
    "glorot_normal": initializers.glorot_normal(),
    "glorot_uniform": initializers.glorot_uniform(),
}


def dense_of(kernel_init, pattern, key=KEY):
    return np.asarray(BlockSparseMatrix(init_blocks(kernel_init, key, pattern), pattern).todense(), np.float64)


def fan_ins(pattern):
    """The number of inputs of each output, counted one by one."""
    ones = jnp.ones((pattern.nnz, pattern.block_size, pattern.block_size))
    return np.asarray(BlockSparseMatrix(ones, pattern).todense()).sum(axis=0).astype(int)


@pytest.mark.parametrize(
    ("name", "distribution"),
    [
        ("lecun_normal", "balanced"),
        ("he_uniform", "balanced"),
        ("lecun_normal", "bernoulli"),
    ],
)
def test_outputs_vary_as_those_of_a_dense_layer(name, distribution):
    shape = (1000, 1500)
    pattern = patterns.random(shape, 32, density=0.1, distribution=distribution)
    # For independent inputs of variance 1 an output's variance is the sum of the squares of its weights.
    dense = np.sum(np.asarray(DENSE[name](KEY, shape, jnp.float32), np.float64) ** 2, axis=0).mean()
    sparse = np.sum(dense_of(DENSE[name], pattern) ** 2, axis=0)
    assert sparse[fan_ins(pattern) > 0].mean() == pytest.approx(dense, rel=0.05)
    # Not only on average: outputs with few inputs vary as much as those with many.
    order = np.argsort(fan_ins(pattern), kind="stable")
    few, many = (sparse[order[fan_ins(pattern)[order] > 0][half]] for half in (slice(300), slice(-300, None)))
    assert few.mean() == pytest.approx(dense, rel=0.05)
    assert many.mean() == pytest.approx(dense, rel=0.05)


def test_outputs_of_real_inputs_vary_as_those_of_a_dense_layer():
    shape, kernel_init = (1000, 1500), DENSE["lecun_normal"]
    x = np.random.default_rng(0).standard_normal((200, shape[0]))
    dense = np.var(x @ np.asarray(kernel_init(KEY, shape, jnp.float32), np.float64))
    assert dense == pytest.approx(1, rel=0.05)
    sparse = x @ dense_of(kernel_init, patterns.random(shape, 32, density=0.1))
    assert np.var(sparse) == pytest.approx(dense, rel=0.05)


def test_glorot_sees_real_inputs_and_all_outputs():
    pattern = patterns.random((1024, 1536), 8, density=0.1)
    (fan_in,) = set(fan_ins(pattern))
    variance = np.sum(dense_of(DENSE["glorot_normal"], pattern) ** 2, axis=0).mean()
    assert variance == pytest.approx(2 * fan_in / (fan_in + 1536), rel=0.05)


@pytest.mark.parametrize(
    ("shape", "name"), [*(((60, 90), name) for name in DENSE), ((64, 96), "lecun_normal"), ((5, 3), "lecun_normal")]
)
def test_values_are_the_dense_ones_at_density_1(shape, name):
    wanted = DENSE[name](KEY, shape, jnp.float32)
    full = patterns.random(shape, 16, density=1.0)
    np.testing.assert_array_equal(dense_of(DENSE[name], full), wanted)
    # The storage order of blocks means nothing.
    order = np.random.default_rng(0).permutation(full.nnz)
    mixed = BlockPattern.from_coordinates(full.rows[order], full.cols[order], shape=shape, block_size=16)
    np.testing.assert_array_equal(dense_of(DENSE[name], mixed), wanted)


def uneven(shape, block_size):
    """Columns that are full, empty, and have two blocks, some with one in the last row."""
    k, n = (-(-size // block_size) for size in shape)
    mask = np.zeros((k, n), bool)
    mask[:, ::3] = True
    mask[:2, 1::3] = True
    mask[:, 4] = np.arange(k) >= k - 2
    return BlockPattern.from_mask(mask, shape=shape, block_size=block_size)


PATTERNS = {
    "balanced": patterns.random((60, 90), 8, density=0.5),
    "uneven": uneven((60, 90), 8),
    "inert": BlockPattern.from_coordinates([9, 1, 8, 7, 0], [0, 2, 0, 2, 11], shape=(65, 90), block_size=8, capacity=9),
    "empty": BlockPattern.from_coordinates([], [], shape=(65, 90), block_size=8),
    "only inert": BlockPattern.from_coordinates([], [], shape=(65, 90), block_size=8, capacity=2),
}


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
def test_zero_outside_the_matrix_and_nowhere_else(name, traced):
    pattern = PATTERNS[name]

    def init(pattern):
        return init_blocks(initializers.uniform(1.0), KEY, pattern)

    data = (jax.jit(init) if traced else init)(pattern)
    assert data.shape == (pattern.nnz, 8, 8)
    np.testing.assert_array_equal(np.asarray(data) != 0, inside(pattern))


@pytest.mark.parametrize("name", PATTERNS)
def test_no_two_values_are_the_same_draw(name):
    data = np.asarray(init_blocks(initializers.normal(), KEY, PATTERNS[name]))[inside(PATTERNS[name])]
    assert len(np.unique(data)) >= 0.99 * data.size


@pytest.mark.parametrize("traced", [False, True])
def test_initialisers_that_ignore_fan_in_keep_their_meaning(traced):
    pattern = uneven((250, 600), 32)

    def init(kernel_init):
        def call(pattern):
            return init_blocks(kernel_init, KEY, pattern)

        return np.asarray((jax.jit(call) if traced else call)(pattern))[inside(pattern)]

    assert set(init(initializers.constant(0.25))) == {0.25}
    assert set(init(initializers.ones)) == {1.0}
    assert init(initializers.normal(0.02)).std() == pytest.approx(0.02, rel=0.02)
    values = init(initializers.uniform(0.5))
    assert 0 <= values.min() < 1e-3
    assert 0.499 < values.max() < 0.5


def test_orthogonal_initialiser():
    tall = patterns.block_diagonal((128, 32), 8, density=0.5)
    w = dense_of(initializers.orthogonal(), tall)
    np.testing.assert_allclose(w.T @ w, np.eye(32), atol=1e-5)
    # With fewer inputs than outputs the rows are orthonormal instead, before blocks take their parts of them.
    wide = dense_of(initializers.orthogonal(), patterns.random((60, 90), 8, density=0.3))
    assert np.linalg.norm(wide, axis=0).max() < 1 + 1e-5


def test_columns_depend_on_nothing_but_their_own_fan_in():
    few = patterns.banded((64, 64), 8, density=0.5)
    changed = few.mask()
    changed[:, 5] = True
    more = BlockPattern.from_mask(changed, block_size=8)
    same = np.delete(np.arange(64), slice(40, 48))
    kernel_init = DENSE["lecun_normal"]
    np.testing.assert_array_equal(dense_of(kernel_init, few)[:, same], dense_of(kernel_init, more)[:, same])


@pytest.mark.parametrize(
    ("shape", "density", "kernel_init"),
    [
        ((64, 96), 0.3, DENSE["lecun_normal"]),
        ((60, 90), 0.3, DENSE["lecun_normal"]),
        ((60, 90), 1.0, DENSE["lecun_normal"]),
        ((5, 3), 0.3, DENSE["lecun_normal"]),
        ((60, 90), 0.3, initializers.orthogonal()),
    ],
)
def test_jit_gives_the_same_values_for_balanced_patterns(shape, density, kernel_init):

    def init(key):
        pattern = patterns.random(shape, 8, density=density, seed=key)
        return init_blocks(kernel_init, key, pattern)

    np.testing.assert_allclose(jax.jit(init)(KEY), init(KEY), rtol=2e-5, atol=1e-6)


def test_jit_gives_the_same_values_for_known_patterns():
    pattern = PATTERNS["uneven"]

    def init(key):
        return init_blocks(DENSE["he_normal"], key, pattern)

    np.testing.assert_allclose(jax.jit(init)(KEY), init(KEY), rtol=1e-5)


def test_uneven_patterns_that_are_not_known_get_the_mean_fan_in():
    pattern = uneven((256, 1500), 32)
    data = jax.jit(lambda pattern: init_blocks(DENSE["lecun_normal"], KEY, pattern))(pattern)
    variance = np.var(np.asarray(data)[inside(pattern)])
    assert variance == pytest.approx(1 / (32 * round(pattern.nnz / pattern.grid[1])), rel=0.05)


def test_vmap_over_keys():
    keys = jax.random.split(KEY, 3)
    pattern = PATTERNS["balanced"]

    def init(key):
        return init_blocks(DENSE["lecun_normal"], key, pattern)

    together = jax.vmap(init)(keys)
    for key, data in zip(keys, together, strict=True):
        np.testing.assert_allclose(data, init(key), rtol=1e-6)
    assert not np.array_equal(together[0], together[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype(dtype):
    data = init_blocks(DENSE["lecun_normal"], KEY, PATTERNS["balanced"], dtype)
    assert data.dtype == dtype
    assert data.astype(jnp.float32).std() > 0


def test_pattern_must_be_one():
    with pytest.raises(TypeError, match="pattern must be a BlockPattern, got ndarray"):
        init_blocks(DENSE["lecun_normal"], KEY, np.eye(3))
