"""The generators: how many blocks, where they may be, and that the same arguments give the same pattern."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_blocksparse import BlockPattern, patterns

BALANCED_42 = ["110110", "000001", "011011", "100110", "111100", "001001"]
BERNOULLI_42 = ["110110", "000001", "001111", "000110", "110100", "000001"]

GRIDS = [(8, 8), (16, 16), (5, 5), (12, 7), (3, 11), (16, 4), (4, 64), (1, 6), (6, 1), (1, 1)]
DENSITIES = [0.05, 0.25, 0.5, 0.77, 1.0]
GENERATORS = [
    patterns.random,
    patterns.barabasi_albert,
    patterns.banded,
    patterns.block_diagonal,
    patterns.butterfly,
]


def shape_of(grid, ragged=True):
    """A matrix covered by `grid` blocks of 8."""
    return grid[0] * 8 - 3 * ragged, grid[1] * 8 - 5 * ragged


def masks_equal(a, b):
    return a.shape == b.shape and a.block_size == b.block_size and np.array_equal(a.mask(), b.mask())


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("generator", [patterns.random, patterns.banded])
def test_every_column_has_the_same_number_of_blocks(generator, grid, density):
    pattern = generator(shape_of(grid), 8, density=density)
    assert pattern.grid == grid
    assert set(pattern.mask().sum(axis=0)) == {max(1, round(density * grid[0]))}
    assert pattern.mask().sum() == pattern.nnz
    np.testing.assert_array_equal(pattern.col_order, np.arange(pattern.nnz))


def test_random_follows_from_the_seed():
    def make(seed):
        return patterns.random((128, 256), 16, density=0.5, seed=seed)

    assert masks_equal(make(3), make(3))
    assert not masks_equal(make(3), make(4))
    assert masks_equal(make(3), make(np.int32(3)))
    assert masks_equal(make(3), make(jax.random.key(3)))
    assert masks_equal(make(3), make(jax.random.PRNGKey(3)))
    assert masks_equal(patterns.random((128, 256), 16, density=0.5), make(0))


def test_random_stays_what_it_is():
    # A pattern is part of an experiment: if this fails, old experiments cannot be repeated.
    balanced = patterns.random((48, 48), 8, density=0.5, seed=42)
    assert ["".join(map(str, row)) for row in balanced.mask().astype(int)] == BALANCED_42
    bernoulli = patterns.random((48, 48), 8, density=0.5, seed=42, distribution="bernoulli")
    assert ["".join(map(str, row)) for row in bernoulli.mask().astype(int)] == BERNOULLI_42


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("grid", GRIDS)
def test_barabasi_albert_keeps_the_density(grid, density):
    mask = patterns.barabasi_albert(shape_of(grid), 8, density=density).mask()
    assert mask.shape == grid
    assert mask.any(axis=0).all()
    assert mask.any(axis=1).all()
    # Every newcomer brings at least one block.
    assert mask.sum() == pytest.approx(density * mask.size, abs=sum(grid))
    assert density < 1 or mask.all()


def test_barabasi_albert_has_hubs():
    mask = patterns.barabasi_albert((2048, 4096), 16, density=0.1).mask()
    assert mask.mean() == pytest.approx(0.1, rel=0.01)
    for counts in (mask.sum(axis=0), mask.sum(axis=1)):
        assert counts.max() > 4 * np.median(counts)
        assert counts.min() > 0.4 * np.median(counts)
        # The hubs are the oldest.
        assert counts[: len(counts) // 10].mean() > 2 * counts.mean()


def test_barabasi_albert_follows_from_the_seed():
    def make(seed):
        return patterns.barabasi_albert((128, 256), 16, density=0.3, seed=seed)

    assert masks_equal(make(3), make(jax.random.key(3)))
    assert not masks_equal(make(3), make(4))


def test_random_is_the_same_under_jit_and_vmap():
    def make(key):
        return patterns.random((125, 77), 8, density=0.3, seed=key)

    keys = jax.random.split(jax.random.key(5), 3)
    eager = [make(key) for key in keys]
    assert not masks_equal(eager[0], eager[1])
    assert masks_equal(jax.jit(make)(keys[0]), eager[0])
    stacked = jax.vmap(make)(keys)
    for number, pattern in enumerate(eager):
        for one, whole in zip(pattern.indices, stacked.indices, strict=True):
            np.testing.assert_array_equal(whole[number], one)


def test_random_with_an_integer_seed_is_known_under_jit():
    @jax.jit
    def blocks_seen():
        return patterns.random((64, 64), 8, density=0.3, seed=1).mask().sum()

    assert blocks_seen() == patterns.random((64, 64), 8, density=0.3, seed=1).nnz


def test_every_place_is_as_likely_as_any_other():
    draws, grid, density = 2000, (8, 4), 0.25

    def indices(key):
        pattern = patterns.random(shape_of(grid), 8, density=density, seed=key)
        return pattern.rows, pattern.cols

    rows, cols = jax.jit(jax.vmap(indices))(jax.random.split(jax.random.key(0), draws))
    counts = np.zeros(grid)
    np.add.at(counts, (np.asarray(rows), np.asarray(cols)), 1)
    deviation = np.sqrt(density * (1 - density) / draws)
    assert np.all(np.abs(counts / draws - density) < 5 * deviation)
    # Columns are drawn apart: two columns agree in a place as often as chance has it.
    kept = np.zeros((draws, *grid), bool)
    kept[np.arange(draws)[:, None], rows, cols] = True
    both = (kept[:, :, 0] & kept[:, :, 1]).mean()
    assert abs(both - density**2) < 5 * np.sqrt(density**2 / draws / grid[0])


@pytest.mark.parametrize("density", [0.02, 0.3, 0.9])
def test_bernoulli_keeps_blocks_independently(density):
    size = 200
    mask = patterns.random((size * 8, size * 8), 8, density=density, distribution="bernoulli", seed=1).mask()
    variance = density * (1 - density)
    assert abs(mask.mean() - density) < 5 * np.sqrt(variance / size**2)
    for axis in (0, 1):
        counts = mask.sum(axis=axis)
        assert np.var(counts) == pytest.approx(size * variance, rel=0.5)  # balanced columns would have none
    neighbours = (mask[1:] & mask[:-1]).mean()
    assert abs(neighbours - density**2) < 5 * np.sqrt(density**2 / size**2)


def test_bernoulli_extremes():
    full = patterns.random((80, 48), 8, density=1.0, distribution="bernoulli")
    assert full.density == 1
    thin = patterns.random((80, 800), 8, density=0.05, distribution="bernoulli")
    assert (thin.mask().sum(axis=0) == 0).any()  # allowed: outputs with no input
    nothing = patterns.random((8, 8), 8, density=1e-9, distribution="bernoulli")
    assert nothing.nnz == 0


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("grid", GRIDS)
def test_band_is_connected_and_follows_the_diagonal(grid, density):
    mask = patterns.banded(shape_of(grid), 8, density=density).mask()
    width = mask.sum(axis=0)[0]
    first = mask.argmax(axis=0)
    assert np.all(np.diff(first) >= 0)
    for column, top in enumerate(first):
        assert mask[top : top + width, column].all()
        diagonal = (column + 0.5) / grid[1] * grid[0]
        wanted = np.clip(diagonal - width / 2, 0, grid[0] - width)
        assert abs(top - wanted) <= 0.5


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("grid", GRIDS)
def test_block_diagonal_makes_independent_groups(grid, density):
    mask = patterns.block_diagonal(shape_of(grid), 8, density=density).mask()
    groups = min(round(1 / density), *grid)
    squares = {
        (tuple(np.flatnonzero(mask[:, column])), tuple(np.flatnonzero(mask[row]))) for row, column in np.argwhere(mask)
    }
    assert len(squares) == groups
    for square in squares:
        assert all(set(np.diff(side)) <= {1} for side in square)
    heights, widths = ([len(square[axis]) for square in squares] for axis in (0, 1))
    assert sum(heights) == grid[0]
    assert sum(widths) == grid[1]
    assert max(heights) - min(heights) <= 1
    assert max(widths) - min(widths) <= 1
    if all(size % groups == 0 for size in grid):
        assert mask.mean() == 1 / groups


def strides(mask):
    """For a square power of two: which index differences (as exclusive or) have blocks."""
    rows, cols = np.nonzero(mask)
    return set(rows ^ cols)


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 4, 5])
def test_butterfly_of_a_power_of_two(bits):
    size = 2**bits
    mask = patterns.butterfly((size * 8, size * 8), 8).mask()
    assert strides(mask) == {0, *(2**bit for bit in range(bits))}
    assert set(mask.sum(axis=0)) == set(mask.sum(axis=1)) == {bits + 1}
    np.testing.assert_array_equal(mask, mask.T)


@pytest.mark.parametrize("grid", GRIDS)
def test_butterfly_connects_everything_in_logarithmic_depth(grid):
    mask = patterns.butterfly(shape_of(grid), 8).mask()
    layers = max(1, (max(grid) - 1).bit_length())
    reached = np.eye(grid[0], dtype=int)
    for layer in range(layers):
        reached = np.minimum(reached @ (mask if layer % 2 == 0 else mask.T).astype(int), 1)
    assert reached.all()
    assert mask.sum() <= (layers + 1) * 2**layers


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("grid", [(16, 16), (13, 13), (12, 32), (64, 5)])
def test_butterfly_keeps_under_its_density(grid, density):
    pattern = patterns.butterfly(shape_of(grid), 8, density=density)
    least = patterns.butterfly(shape_of(grid), 8, density=1e-6)  # the diagonal and one stride
    full = patterns.butterfly(shape_of(grid), 8)
    assert pattern.density <= max(density, least.density)
    assert np.all(least.mask() <= pattern.mask())
    assert np.all(pattern.mask() <= full.mask())


def test_butterfly_takes_the_longest_strides_first():
    def taken(density):
        return strides(patterns.butterfly((128, 128), 8, density=density).mask())

    assert [taken(wanted / 16) for wanted in (1, 2, 3, 4, 5)] == [
        {0, 8},
        {0, 8},
        {0, 8, 4},
        {0, 8, 4, 2},
        {0, 8, 4, 2, 1},
    ]
    assert taken(3.9 / 16) == taken(3 / 16)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("generator", GENERATORS)
def test_generators_make_valid_patterns(generator, grid):
    pattern = generator(shape_of(grid), 8, density=0.4)
    assert isinstance(pattern, BlockPattern)
    assert (pattern.shape, pattern.block_size, pattern.grid) == (shape_of(grid), 8, grid)
    assert (pattern.mask().sum(axis=0) > 0).all()
    assert masks_equal(pattern, generator(shape_of(grid), 8, density=0.4))


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (64,)}, r"shape must be two integers \(in_features, out_features\), got \(64,\)"),
        ({"shape": (64, -1)}, r"shape must have positive sizes, got \(64, -1\)"),
        ({"block_size": 7}, "block_size must be one of .*, got 7"),
        ({"density": 0}, r"density must be a number in \(0, 1\], got 0"),
        ({"density": 1.01}, r"density must be a number in \(0, 1\], got 1.01"),
        ({"density": float("nan")}, r"density must be a number in \(0, 1\], got nan"),
        ({"density": None}, r"density must be a number in \(0, 1\], got None"),
        ({"density": "half"}, r"density must be a number in \(0, 1\], got 'half'"),
    ],
)
def test_errors_name_what_is_wrong(generator, change, message):
    with pytest.raises(ValueError, match=message):
        generator(**{"shape": (64, 64), "block_size": 8, "density": 0.5} | change)


@pytest.mark.parametrize("density", [1, np.float32(0.5), np.int64(1)])
def test_any_real_number_is_a_density(density):
    assert patterns.random((64, 64), 8, density=density).density == density


def test_errors_of_random():
    with pytest.raises(ValueError, match="distribution must be 'balanced' or 'bernoulli', got 'normal'"):
        patterns.random((64, 64), 8, density=0.5, distribution="normal")
    for seed in (1.5, None, "1", np.zeros(2, np.uint32), jnp.int32(1)):
        with pytest.raises(TypeError, match="seed must be an integer or a JAX random key, got "):
            patterns.random((64, 64), 8, density=0.5, seed=seed)

    def bernoulli(key):
        return patterns.random((64, 64), 8, density=0.5, distribution="bernoulli", seed=key)

    assert bernoulli(jax.random.key(0)).nnz
    with pytest.raises(ValueError, match="seed must not be traced for distribution='bernoulli'"):
        jax.jit(bernoulli)(jax.random.key(0))
