"""Plans of sampled products, read the way the kernels read them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_blocksparse import patterns
from jax_blocksparse.arrays import flat_size
from jax_blocksparse.sddmm_layout import MAX_SLABS, SddmmLayout, choose_layout
from jax_blocksparse.sddmm_plan import make_flat_plan, make_plan

SHAPES = [(8, 8), (200, 136), (256, 512), (328, 776), (640, 1000)]
UNITS = [(8, 16), (8, 128), (16, 16), (16, 128), (32, 32), (32, 64), (32, 128), (64, 64), (128, 128)]


def make_case(block, unit, shape, density, strip=256, target=3, seed=0):
    rng = np.random.default_rng(seed)
    grid = [-(-features // block) for features in shape]
    rows, cols = np.nonzero(rng.random(grid) < density)
    inert = [(-1, 0), (0, -3), (grid[0], 0), (0, grid[1]), (2**20, 2**20)]
    rows, cols = np.concatenate([np.stack([rows, cols]), np.array(inert).T], axis=1)
    shuffle = rng.permutation(rows.size)
    strip = unit if unit >= 64 else strip
    layout = SddmmLayout(*shape, block, rows.size, unit, strip, target, 1)
    return rows[shuffle].astype(np.int32), cols[shuffle].astype(np.int32), layout


def read(plan, layout):
    """(block row, block column, id) of every block that is stored, checking what the kernels rely on."""
    b, per_slab = layout.block_size, layout.slab // layout.unit
    found = []
    for tile, (first, first_unit, counts, dy_set) in enumerate(plan.tiles[:-1]):
        x_slabs, dy_slabs, strip = counts & 255, counts >> 8 & 255, counts >> 16
        last, last_unit = plan.tiles[tile + 1, :2]
        units = last_unit - first_unit
        if units == 0:
            assert first == last
            continue
        assert 1 <= units <= layout.capacity
        assert 1 <= x_slabs <= layout.max_x_slabs
        assert 1 <= dy_slabs <= layout.max_slabs - x_slabs
        slabs = plan.slabs[tile]
        x_of_units, dy_of_units = (plan.slots[first_unit:last_unit] >> shift & 0xFFFF for shift in (0, 16))
        if layout.unit >= 64:  # the kernels do not look for the slabs of each unit
            assert units == x_slabs
            assert x_of_units.tolist() == list(range(units))
            assert slabs[x_slabs] == strip
            assert dy_slabs == 1 or layout.unit == 64
            assert dy_slabs == 1 or slabs[x_slabs] < slabs[x_slabs + 1]
            of_column = [int((dy_of_units == x_slabs + column).sum()) for column in range(dy_slabs)]
            assert dy_of_units.tolist() == np.repeat(x_slabs + np.arange(dy_slabs), of_column).tolist()
            assert min(of_column) > 0
            assert dy_slabs == 1 or max(of_column) <= layout.capacity // 2
        else:
            assert len(set(slabs[:x_slabs])) == x_slabs
            in_strip = [place for place in range(layout.strip // layout.slab) if dy_set >> place & 1]
            first_slab = strip * (layout.strip // layout.slab)
            assert slabs[x_slabs : x_slabs + dy_slabs].tolist() == [first_slab + place for place in in_strip]
        stored = set()
        for position in range(first, last):
            place = plan.places[position]
            slot, in_row, in_col = place & 255, place >> 8 & 15, place >> 12 & 15
            assert slot < units
            stored.add(slot)
            x, dy = plan.slots[first_unit + slot] & 0xFFFF, plan.slots[first_unit + slot] >> 16
            assert x < x_slabs * per_slab <= dy < (x_slabs + dy_slabs) * per_slab
            row = (slabs[x // per_slab] * per_slab + x % per_slab) * layout.ratio + in_row
            col = (slabs[dy // per_slab] * per_slab + dy % per_slab) * layout.ratio + in_col
            assert (place >> 16 & 31) * 8 == min(b, layout.in_features - row * b)
            assert (place >> 21) * 8 == min(b, layout.out_features - col * b)
            found.append((row, col, plan.order[position]))
        assert stored == set(range(units))
    return found


def expected(rows, cols, layout):
    return sorted(
        (row, col, z)
        for z, (row, col) in enumerate(zip(rows, cols, strict=True))
        if 0 <= row < layout.grid[0] and 0 <= col < layout.grid[1]
    )


@pytest.mark.parametrize("density", [0.03, 0.4, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("block", "unit"), UNITS)
def test_plan_names_every_block_once(block, unit, shape, density):
    rows, cols, layout = make_case(block, unit, shape, density)
    plan = make_plan(rows, cols, layout, np)
    assert sorted(read(plan, layout)) == expected(rows, cols, layout)


@pytest.mark.parametrize(("block", "unit"), UNITS)
def test_numpy_and_jit_agree(block, unit):
    rows, cols, layout = make_case(block, unit, (328, 776), 0.3)
    on_host = make_plan(rows, cols, layout, np)
    traced = jax.jit(lambda r, c: make_plan(r, c, layout, jnp))(rows, cols)
    for host, device in zip(on_host, traced, strict=True):
        np.testing.assert_array_equal(host, device)
        assert host.dtype == device.dtype == np.int32


def test_flat_plan_has_the_size_that_its_layout_says():
    rows, cols, layout = make_case(16, 16, (328, 776), 0.3)
    assert make_flat_plan(rows, cols, layout, np).shape == (flat_size(layout),)


def test_order_is_a_permutation_with_inert_blocks_last():
    rows, cols, layout = make_case(16, 16, (200, 136), 0.3)
    plan = make_plan(rows, cols, layout, np)
    np.testing.assert_array_equal(np.sort(plan.order), np.arange(rows.size))
    live = plan.tiles[-1, 0]
    assert live == rows.size - 5
    assert set(plan.order[live:]) == set(np.flatnonzero((rows < 0) | (cols < 0) | (rows > 12) | (cols > 8)))


def units_and_slabs(plan):
    """The numbers of units and of slabs of the tiles that have any."""
    units, slabs = np.diff(plan.tiles[:, 1]), (plan.tiles[:-1, 2] & 255) + (plan.tiles[:-1, 2] >> 8 & 255)
    return units[units > 0], slabs[units > 0]


def test_tiles_are_even():
    rows, cols, layout = make_case(16, 16, (4096, 1024), 0.2, strip=512, target=32)
    units, slabs = units_and_slabs(make_plan(rows, cols, layout, np))
    assert 30 <= units.size <= 32
    assert units.max() <= 1.1 * units.mean()
    assert slabs.max() <= 1.1 * slabs.mean()


def test_as_many_tiles_as_the_target_says_are_used():
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.permutation(256)[:13] for _ in range(256)]).astype(np.int32)
    layout = SddmmLayout(4096, 4096, 16, rows.size, 16, 832, target=30, split=4)
    units, _ = units_and_slabs(make_plan(rows, np.repeat(np.arange(256, dtype=np.int32), 13), layout, np))
    assert units.size == 30
    assert units.max() <= 1.1 * units.mean()


@pytest.mark.parametrize(("block", "split"), [(16, 2), (32, 3), (64, 2)])
@pytest.mark.parametrize("kind", ["skewed", "banded"])
def test_tiles_of_uneven_patterns_are_as_few_as_those_of_even_ones(block, split, kind):
    shape, target = (4096, 4096), 132 // split - 5 * (split == 3)
    make = {"skewed": functools.partial(patterns.barabasi_albert, seed=0), "banded": patterns.banded}[kind]
    pattern = make(shape, block, density=0.1)
    rows, cols = np.asarray(pattern.rows), np.asarray(pattern.cols)
    strip = {16: 512, 32: 832, 64: 64}[block]
    layout = SddmmLayout(*shape, block, rows.size, block, strip, target, split)
    plan = make_plan(rows, cols, layout, np)
    assert units_and_slabs(plan)[0].size <= target
    assert sorted(read(plan, layout)) == expected(rows, cols, layout)


@pytest.mark.parametrize("kind", ["random", "skewed", "banded"])
def test_tiles_have_no_more_than_full_work_for_the_warps_and_three_stages(kind):
    make = {"random": patterns.random, "skewed": patterns.barabasi_albert, "banded": patterns.banded}[kind]
    pattern = make((4096, 4096), 32, density=0.25)
    layout = SddmmLayout(4096, 4096, 32, pattern.nnz, 32, 512, target=132, split=1)
    units, slabs = units_and_slabs(make_plan(np.asarray(pattern.rows), np.asarray(pattern.cols), layout, np))
    assert units.size <= 132
    assert units.max() == 32
    assert slabs.max() <= 18


def test_tiles_have_room_for_three_stages_if_that_takes_no_more_of_them():
    pattern = patterns.barabasi_albert((4096, 4096), 32, density=0.1)
    layout = SddmmLayout(4096, 4096, 32, pattern.nnz, 32, 704, target=60, split=2)
    units, slabs = units_and_slabs(make_plan(np.asarray(pattern.rows), np.asarray(pattern.cols), layout, np))
    assert units.size <= 60
    assert layout.limits[0][0] < units.max() <= layout.capacity
    assert slabs.max() == 18


def test_tiles_have_more_units_where_too_few_tiles_would_be_left():
    rows, cols = (each.ravel().astype(np.int32) for each in np.indices((33, 16)))  # in tiles of 32, one too many
    layout = SddmmLayout(33 * 32, 16 * 32, 32, rows.size, 32, 512, target=16, split=1)
    assert layout.limits[0][0] == 40
    pattern = rows, cols, dataclasses.replace(layout, target=17)
    assert pattern[2].limits[0][0] == 32
    units, _ = units_and_slabs(make_plan(*pattern, np))
    assert (units.size, units.max()) == (17, 32)
    units, _ = units_and_slabs(make_plan(rows, cols, layout, np))
    assert units.size <= 16
    assert units.max() > 32


def test_strips_have_an_even_number_of_tiles_where_these_are_in_pairs():
    pattern = patterns.random((4096, 4096), 32, density=0.25)
    layout = SddmmLayout(4096, 4096, 32, pattern.nnz, 32, 512, target=132, split=1)
    assert layout.paired
    plan = make_plan(np.asarray(pattern.rows), np.asarray(pattern.cols), layout, np)
    strips = plan.tiles[:-1, 2][np.diff(plan.tiles[:, 1]) > 0] >> 16
    assert (np.bincount(strips) % 2 == 0).all()


@pytest.mark.parametrize("target", [4, 5, 7, 20])
@pytest.mark.parametrize("lengths", [(7, 7, 7, 7), (13, 1, 1, 6, 6, 1), (1, 0, 1, 0, 0, 1), (6, 7, 8, 5, 0, 3, 24)])
def test_tiles_of_large_blocks_end_in_the_next_column_if_need_be(lengths, target):
    rows = np.concatenate([np.arange(length) for length in lengths] + [[-1, 3]]).astype(np.int32)
    cols = np.concatenate([np.repeat(np.arange(len(lengths)), lengths), [0, 99]]).astype(np.int32)
    layout = SddmmLayout(64 * 24, 64 * 8, 64, rows.size, 64, 64, target, split=1)
    plan = make_plan(rows, cols, layout, np)
    assert sorted(read(plan, layout)) == expected(rows, cols, layout)
    units, slabs = units_and_slabs(plan)
    assert units.size <= max(target, sum(-(-length // 12) for length in lengths))
    if target == 4 and lengths == (7, 7, 7, 7):  # one column each, since a second one would cost a slab more
        assert slabs.tolist() == [8] * 4


@pytest.mark.parametrize("units", [1, 160, 161, 400])
def test_long_rows_are_cut(units):
    rows, cols = np.zeros(units, np.int32), np.arange(units, dtype=np.int32)
    layout = SddmmLayout(16, 16 * 400, 16, units, 16, 27 * 64, target=1, split=1)
    plan = make_plan(rows, cols, layout, np)
    assert units_and_slabs(plan)[0].max() <= min(units, 27 * 4)
    assert sorted(read(plan, layout)) == expected(rows, cols, layout)


@pytest.mark.parametrize("seed", range(8))
def test_tiles_have_room_in_their_lists(seed):
    rng = np.random.default_rng(seed)
    block = int(rng.choice([16, 32, 64]))
    grid = rng.integers(1, 60, 2)
    rows, cols = np.nonzero(rng.random(grid) < np.outer(rng.random(grid[0]) ** 4, rng.random(grid[1]) ** 3) * 4)
    shape = [int(size) * block for size in grid]
    strip, target = 64 * int(rng.integers(1, 10)) if block < 64 else 64, int(rng.integers(1, 100))
    layout = SddmmLayout(*shape, block, rows.size, block, strip, target, 1)
    plan = make_plan(rows.astype(np.int32), cols.astype(np.int32), layout, np)
    assert units_and_slabs(plan)[0].size <= layout.tiles
    assert sorted(read(plan, layout)) == expected(rows, cols, layout)


@pytest.mark.parametrize("block", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("density", [0.001, 0.05, 0.5, 1.0])
def test_chosen_layout_is_bounded_by_the_number_of_blocks(block, density):
    nnz = max(1, round(4096 * 1024 * density / block**2))
    layout = choose_layout(4096, 1024, block, nnz)
    assert layout.unit % block == 0
    assert layout.unit < 64 or layout.strip == layout.unit
    assert flat_size(layout) <= 64 * nnz + 40 * layout.strips


def test_few_blocks_of_32_are_computed_in_units_of_64():
    shape = 4096, 4096
    for density, unit in ((0.02, 64), (0.05, 32), (0.25, 32), (1.0, 128)):
        assert choose_layout(*shape, 32, round(4096**2 * density / 32**2)).unit == unit


def test_a_layout_is_for_no_fewer_tiles_than_columns_can_share():
    # Each has eight blocks, more than the half of a tile that one of two columns can have.
    layout = choose_layout(2048, 2048, 64, 8 * 32)
    assert (layout.unit, layout.target) == (64, 66)


@pytest.mark.parametrize("shape", [(8, 8), (136, 8), (8, 4104)])
def test_there_is_a_layout_for_any_shape(shape):
    for nnz in (0, 1, 1000):
        assert choose_layout(*shape, 8, nnz).tiles >= 0


def test_tile_that_needs_too_many_slabs_is_cut():
    rows = np.arange(160, dtype=np.int32) * 4  # one block in each slab of x, all in one column
    layout = SddmmLayout(160 * 64, 64, 16, 160, 16, 64, target=1, split=1)
    plan = make_plan(rows, np.zeros(160, np.int32), layout, np)
    assert np.diff(plan.tiles[:, 1])[:6].tolist() == [27, 27, 27, 27, 27, 25]
    assert sorted(read(plan, layout)) == expected(rows, np.zeros(160, np.int32), layout)


@pytest.mark.parametrize("most", [1, 2, 5, 9])
def test_there_are_tiles_enough_for_strips_just_too_long(most):
    width, strips = MAX_SLABS[16] - most, 12  # of a strip that leaves a tile room for so many slabs of x
    rows = np.tile(np.arange(most + 1, dtype=np.int32) * 4, strips)  # one block in each slab, one slab too many
    cols = np.repeat(np.arange(strips, dtype=np.int32) * width * 4, most + 1)
    shape = (most + 1) * 64, strips * width * 64
    layout = SddmmLayout(*shape, 16, rows.size, 16, width * 64, target=1, split=1)
    plan = make_plan(rows, cols, layout, np)
    assert sorted(read(plan, layout)) == expected(rows, cols, layout)
    assert units_and_slabs(plan)[0].size == 2 * strips


def test_blocks_at_the_same_place_are_both_stored():
    rows, cols = np.array([1, 0, 1], np.int32), np.array([2, 0, 2], np.int32)
    layout = SddmmLayout(64, 64, 16, 3, 16, 64, target=1, split=1)
    plan = make_plan(rows, cols, layout, np)
    assert sorted(read(plan, layout)) == expected(rows, cols, layout)


@pytest.mark.parametrize("unit", [16, 128])
def test_pattern_without_blocks_has_tiles_without_units(unit):
    none = np.zeros(0, np.int32)
    layout = SddmmLayout(256, 300, 16, 0, unit, 128, target=4, split=1)
    plan = make_plan(none, none, layout, np)
    assert not plan.tiles.any()
    assert plan.slots.size == plan.order.size == 0
