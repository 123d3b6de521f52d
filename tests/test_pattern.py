"""BlockPattern against its definition, spelled out with Python's sorted()."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_blocksparse import BLOCK_SIZES, BlockPattern, plan_layout, sddmm_layout, sddmm_plan
from jax_blocksparse import plan as plan_module

DERIVED = ("col_ptr", "col_order", "row_ptr", "row_order")


def walk(outer, inner, size, live):
    """(ptr, order) by the definition: live ids by (outer, inner), then the inert ones."""
    ids = range(len(outer))
    order = sorted((z for z in ids if live[z]), key=lambda z: (outer[z], inner[z])) + [z for z in ids if not live[z]]
    ptr = [sum(live[z] and outer[z] < block for z in ids) for block in range(size + 1)]
    return ptr, order


def expected_orders(rows, cols, grid):
    live = [0 <= row < grid[0] and 0 <= col < grid[1] for row, col in zip(rows, cols, strict=True)]
    return dict(zip(DERIVED, (*walk(cols, rows, grid[1], live), *walk(rows, cols, grid[0], live)), strict=True))


def assert_valid(pattern):
    rows, cols = np.asarray(pattern.rows), np.asarray(pattern.cols)
    for name, wanted in expected_orders(rows, cols, pattern.grid).items():
        leaf = getattr(pattern, name)
        assert leaf.dtype == jnp.int32
        np.testing.assert_array_equal(leaf, np.array(wanted, np.int32), err_msg=name)
    for plan, module, choose_layout, shape, inner, outer in (
        (pattern.y_plan, plan_module, plan_layout.choose_layout, pattern.shape, rows, cols),
        (pattern.dx_plan, plan_module, plan_layout.choose_layout, pattern.shape[::-1], cols, rows),
        (pattern.dw_plan, sddmm_plan, sddmm_layout.choose_layout, pattern.shape, rows, cols),
    ):
        layout = choose_layout(*shape, pattern.block_size, pattern.nnz)
        np.testing.assert_array_equal(plan, module.make_flat_plan(inner, outer, layout, np))
    for index in pattern.indices:
        assert isinstance(index, jax.Array)
        assert index.dtype == jnp.int32


def assert_same(a, b):
    assert (a.shape, a.block_size) == (b.shape, b.block_size)
    for left, right in zip(a.indices, b.indices, strict=True):
        np.testing.assert_array_equal(left, right)


@st.composite
def coordinates(draw):
    """Distinct blocks in any order with inert entries among them, a shape and a block size."""
    grid = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    block_size = draw(st.sampled_from(BLOCK_SIZES))
    shape = tuple(size * block_size - draw(st.integers(0, block_size - 1)) for size in grid)
    everywhere = [(row, col) for row in range(grid[0]) for col in range(grid[1])]
    live = draw(st.lists(st.sampled_from(everywhere), unique=True))
    inert = [(grid[0], draw(st.integers(-9, 9))) for _ in range(draw(st.integers(0, 3)))]
    blocks = draw(st.permutations(live + inert))
    rows, cols = np.array(blocks, int).reshape(-1, 2).T
    return rows, cols, shape, block_size


@settings(max_examples=60)
@given(coordinates())
def test_orders_follow_the_definition(arguments):
    rows, cols, shape, block_size = arguments
    pattern = BlockPattern.from_coordinates(rows, cols, shape=shape, block_size=block_size)
    np.testing.assert_array_equal(pattern.rows, rows)
    np.testing.assert_array_equal(pattern.cols, cols)
    assert_valid(pattern)
    assert_valid(pattern.T)


@settings(max_examples=15)
@given(coordinates())
def test_orders_are_the_same_under_jit(arguments):
    rows, cols, shape, block_size = arguments

    @jax.jit
    def make(rows, cols):
        return BlockPattern.from_coordinates(rows, cols, shape=shape, block_size=block_size)

    assert_same(make(rows, cols), BlockPattern.from_coordinates(rows, cols, shape=shape, block_size=block_size))


@settings(max_examples=40)
@given(coordinates())
def test_mask_and_back(arguments):
    rows, cols, shape, block_size = arguments
    pattern = BlockPattern.from_coordinates(rows, cols, shape=shape, block_size=block_size)
    mask = np.zeros(pattern.grid, bool)
    for row, col in zip(rows, cols, strict=True):
        if row < pattern.grid[0]:
            mask[row, col] = True
    np.testing.assert_array_equal(pattern.mask(), mask)
    np.testing.assert_array_equal(pattern.T.mask(), mask.T)
    again = BlockPattern.from_mask(mask, shape=shape, block_size=block_size)
    np.testing.assert_array_equal(again.mask(), mask)
    assert again.nnz == mask.sum()
    np.testing.assert_array_equal(again.col_order, np.arange(again.nnz))


def test_a_small_pattern_in_full():
    pattern = BlockPattern.from_coordinates([1, 0, 2, 1], [2, 0, 9, 0], shape=(30, 48), block_size=16)
    assert pattern.grid == (2, 3)
    assert pattern.nnz == 4
    assert pattern.density == 4 / 6
    assert [index.tolist() for index in pattern.indices[:6]] == [
        [1, 0, 2, 1],
        [2, 0, 9, 0],
        [0, 2, 2, 3],
        [1, 3, 0, 2],
        [0, 1, 3],
        [1, 3, 0, 2],
    ]
    assert pattern.mask().tolist() == [[True, False, False], [True, False, True]]


def test_transpose_swaps_names():
    pattern = BlockPattern.from_coordinates([1, 0], [2, 0], shape=(30, 48), block_size=16)
    assert pattern.T.shape == (48, 30)
    assert pattern.T.grid == (3, 2)
    assert pattern.T.rows is pattern.cols
    assert pattern.T.col_order is pattern.row_order
    assert_valid(pattern.T)
    assert_same(pattern.T.T, pattern)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), pattern)
    assert_same(jax.tree.map(lambda leaf: leaf[1], stacked.T), pattern.T)


@pytest.mark.parametrize("traced", [False, True])
def test_capacity_adds_inert_entries(traced):
    def make(rows, cols):
        return BlockPattern.from_coordinates(rows, cols, shape=(32, 48), block_size=16, capacity=5)

    pattern = (jax.jit(make) if traced else make)(jnp.array([1, 0]), jnp.array([2, 1]))
    assert pattern.nnz == 5
    assert pattern.rows.tolist() == [1, 0, 2, 2, 2]
    assert pattern.cols.tolist() == [2, 1, 3, 3, 3]
    assert pattern.mask().sum() == 2
    assert_valid(pattern)
    exact = BlockPattern.from_mask(np.eye(2, dtype=bool), block_size=8, capacity=2)
    assert exact.nnz == 2


def test_empty_pattern():
    pattern = BlockPattern.from_coordinates([], [], shape=(32, 48), block_size=16)
    assert (pattern.nnz, pattern.density) == (0, 0.0)
    assert_valid(pattern)
    assert not pattern.mask().any()


def test_from_mask_takes_the_whole_grid_or_a_shape():
    mask = np.array([[0, 1, 1], [1, 0, 0]])
    assert BlockPattern.from_mask(mask, block_size=8).shape == (16, 24)
    assert BlockPattern.from_mask(mask, block_size=8, shape=(9, 17)).shape == (9, 17)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "uint64"])
def test_any_integer_dtype(dtype):
    pattern = BlockPattern.from_coordinates(
        np.array([1, 0], dtype), np.array([0, 1], dtype), shape=(16, 16), block_size=8
    )
    assert_valid(pattern)


def test_pytree_round_trip():
    pattern = BlockPattern.from_coordinates([1, 0], [2, 0], shape=(30, 48), block_size=16)
    leaves, treedef = jax.tree.flatten(pattern)
    assert len(leaves) == 9
    assert_same(jax.tree.unflatten(treedef, leaves), pattern)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(pattern)]
    assert paths == [
        ".rows",
        ".cols",
        ".col_ptr",
        ".col_order",
        ".row_ptr",
        ".row_order",
        ".y_plan",
        ".dx_plan",
        ".dw_plan",
    ]
    # Shape and block size are part of the tree's structure: programs compiled for one are not run for another.
    other = BlockPattern.from_coordinates([1, 0], [2, 0], shape=(31, 48), block_size=16)
    assert jax.tree.structure(other) != treedef
    assert_same(jax.jit(lambda p: p.T)(pattern), pattern.T)


def test_patterns_stack_and_scan():
    patterns = [BlockPattern.from_coordinates([row, 0], [2, 1], shape=(32, 48), block_size=16) for row in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *patterns)
    assert stacked.nnz == 2
    _, rows = jax.lax.scan(lambda carry, pattern: (carry, pattern.rows), None, stacked)
    np.testing.assert_array_equal(rows, [[0, 0], [1, 0]])


def test_repr():
    pattern = BlockPattern.from_coordinates([1, 0], [2, 0], shape=(30, 48), block_size=16)
    assert repr(pattern) == "BlockPattern(30x48, block_size=16, nnz=2, density=0.333)"
    assert repr(jax.eval_shape(lambda: pattern)) == repr(pattern)
    shapes = repr(jax.tree.map(jnp.shape, pattern))
    indices = "((2,), (2,), (4,), (2,), (3,), (2,), (32,), (32,), (80,))"
    assert shapes == f"BlockPattern(30x48, block_size=16, indices={indices})"
    seen = []
    jax.jit(lambda p: seen.append(repr(p)))(pattern)
    assert seen == [repr(pattern)]


def test_concrete_positions_stay_concrete_under_jit():
    @jax.jit
    def number_of_blocks():
        return BlockPattern.from_coordinates([1, 0], [2, 0], shape=(30, 48), block_size=16).mask().sum()

    assert number_of_blocks() == 2


GOOD = {"rows": [0, 1], "cols": [1, 0], "shape": (16, 24), "block_size": 8}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"shape": (16,)}, ValueError, r"shape must be two integers \(in_features, out_features\), got \(16,\)"),
        ({"shape": 16}, ValueError, r"shape must be two integers .*, got 16"),
        ({"shape": (16, 24.0)}, ValueError, r"shape must be two integers .*, got \(16, 24.0\)"),
        ({"shape": (16, 0)}, ValueError, r"shape must have positive sizes, got \(16, 0\)"),
        ({"block_size": 12}, ValueError, r"block_size must be one of \(8, 16, 32, 64, 128\), got 12"),
        ({"block_size": None}, ValueError, r"block_size must be one of .*, got None"),
        ({"rows": [0.0, 1.0]}, TypeError, "rows must hold integers, got dtype float64"),
        ({"cols": [True, False]}, TypeError, "cols must hold integers, got dtype bool"),
        ({"rows": [0]}, ValueError, r"rows and cols must be one-dimensional and equally long, got \(1,\), \(2,\)"),
        ({"rows": [[0], [1]], "cols": [[1], [0]]}, ValueError, r"must be one-dimensional .*, got \(2, 1\), \(2, 1\)"),
        ({"rows": 0, "cols": 0}, ValueError, r"must be one-dimensional and equally long, got \(\), \(\)"),
        ({"rows": [0, 3]}, ValueError, r"block 1 is at \(rows, cols\) = \(3, 0\), outside the grid of 2 x 3 blocks"),
        ({"rows": [-1, 1]}, ValueError, r"block 0 is at \(rows, cols\) = \(-1, 1\), outside the grid of 2 x 3"),
        ({"cols": [1, 3]}, ValueError, r"block 1 is at \(rows, cols\) = \(1, 3\), outside the grid of 2 x 3 blocks"),
        ({"rows": [0, 2**32]}, ValueError, r"block 1 is at \(rows, cols\) = \(4294967296, 0\), outside"),
        ({"rows": [1, 1], "cols": [2, 2]}, ValueError, r"the block at \(rows, cols\) = \(1, 2\) is given 2 times"),
        ({"capacity": 1}, ValueError, "capacity must be at least the number of blocks 2, got 1"),
        ({"capacity": 2.5}, ValueError, "capacity must be an integer or None, got 2.5"),
    ],
)
def test_errors_name_what_is_wrong(change, error, message):
    with pytest.raises(error, match=message):
        BlockPattern.from_coordinates(**GOOD | change)


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (np.ones((2, 2, 2)), {"block_size": 8}, r"mask must have two dimensions, got shape \(2, 2, 2\)"),
        (np.ones(3), {"block_size": 8}, r"mask must have two dimensions, got shape \(3,\)"),
        (
            np.ones((2, 2)),
            {"block_size": 8, "shape": (16, 17)},
            r"mask must have shape \(2, 3\) for a matrix of shape \(16, 17\) in blocks of 8, got \(2, 2\)",
        ),
        (np.ones((2, 2)), {"block_size": 9}, "block_size must be one of .*, got 9"),
        (np.ones((2, 2)), {"block_size": None}, "block_size must be one of .*, got None"),
        (np.ones((0, 2)), {"block_size": 8}, r"shape must have positive sizes, got \(0, 16\)"),
        (np.ones((2, 2)), {"block_size": 8, "capacity": 3}, "capacity must be at least the number of blocks 4, got 3"),
    ],
)
def test_errors_of_from_mask(mask, options, message):
    with pytest.raises(ValueError, match=message):
        BlockPattern.from_mask(mask, **options)


def test_masks_are_host_data():
    pattern = BlockPattern.from_coordinates(**GOOD)
    with pytest.raises(jax.errors.TracerArrayConversionError):
        jax.jit(lambda mask: BlockPattern.from_mask(mask, block_size=8))(jnp.ones((2, 2)))
    with pytest.raises(jax.errors.TracerArrayConversionError):
        jax.jit(lambda p: p.mask())(pattern)


def test_patterns_are_immutable():
    pattern = BlockPattern.from_coordinates(**GOOD)
    with pytest.raises(AttributeError):
        pattern.rows = pattern.cols
