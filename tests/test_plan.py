"""Plans, read the way the kernels read them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_blocksparse.plan import make_plan
from jax_blocksparse.plan_layout import (
    CHUNK,
    HALF,
    PANEL,
    PlanLayout,
    choose_capacity,
    choose_layout,
    full_capacity,
)

SHAPES = [(8, 8), (200, 136), (256, 512), (328, 776), (640, 1000)]
CASES = [
    (block, shape, tile)
    for block in (8, 16, 32, 64, 128)
    for shape in SHAPES
    for tile in ((128, 256) if block < CHUNK else (128,))
]


def make_case(block, shape, tile, density, capacity=None, seed=0):
    rng = np.random.default_rng(seed)
    grid = -(-shape[0] // block), -(-shape[1] // block)
    rows, cols = np.nonzero(rng.random(grid) < density)
    inert = [(-1, 0), (0, -3), (grid[0], 0), (0, grid[1]), (2**20, 2**20)]
    rows, cols = np.concatenate([np.stack([rows, cols]), np.array(inert).T], axis=1)
    shuffle = rng.permutation(rows.size)
    capacity = capacity or (choose_capacity(block, tile, density) if block < CHUNK else 1)
    layout = PlanLayout(*shape, block, rows.size, tile, capacity)
    return rows[shuffle].astype(np.int32), cols[shuffle].astype(np.int32), layout


def read_tiles(plan, layout):
    """(panels, first step, steps) of every tile, checking that each panel is one tile's."""
    words = plan.tiles[:, : layout.groups]
    panels = np.stack([words & 0xFFFF, words >> 16 & 0xFFFF], -1).reshape(layout.tiles, -1)
    np.testing.assert_array_equal(np.sort(panels.ravel()), np.arange(panels.size))
    if layout.block_size != 16:
        np.testing.assert_array_equal(panels[:, ::2] % 2, 0)
        np.testing.assert_array_equal(panels[:, ::2] + 1, panels[:, 1::2])
    return np.concatenate([panels, plan.tiles[:, 4:6]], -1)


def read_groups(plan, layout):
    """The same with groups instead of panels."""
    tiles = read_tiles(plan, layout)
    return np.concatenate([tiles[:, :-2:2] // 2, tiles[:, -2:]], -1)


def read_packed(plan, layout):
    """(block row, block column, id) of every block that some product takes, checking what the kernel relies on."""
    b, width = layout.block_size, layout.slice_features
    in_slice = width // b
    found = []
    for *panels, first_step, steps in read_tiles(plan, layout):
        for step in range(first_step, first_step + steps):
            *halves, first, blocks = plan.steps[step][[0, 3, 1, 2]]
            together = halves[0] % 2 == 0 and halves[1] == halves[0] + 1
            assert 1 <= blocks <= layout.capacity
            seen = 0
            for slice_ in range(layout.slices):
                word = plan.masks[slice_, step]
                assert word >> 20 & 255 == seen
                assert word >> 28 == (not together)
                for bit in range(16):
                    if not word >> bit & 1:
                        continue
                    row_in_step = bit // in_slice
                    half, inside = divmod(row_in_step * b, HALF)
                    assert halves[half] >= 0
                    row = (halves[half] * HALF + inside) // b
                    depths = {k // 16 for k in range(row_in_step * b, row_in_step * b + b)}
                    assert all(word >> (16 + depth) & 1 for depth in depths)
                    feature = panels[slice_ * width // PANEL] * PANEL + slice_ * width % PANEL
                    col = feature // b + bit % in_slice
                    found.append((row, col, plan.order[first + seen]))
                    seen += 1
            assert seen == blocks
            for group in range(layout.tile_features // 64):
                words = plan.masks[group * 64 // width : (group + 1) * 64 // width, step]
                assert len({word >> 16 & 15 for word in words}) == 1
                if words[0] >> 16 & 15:
                    assert any(word & 0xFFFF for word in words)
    return found


def read_by_id(plan, layout):
    """(64-row, 64-column, id) of every piece that some product takes."""
    return [
        (chunk, groups[group], ids[group])
        for *groups, first, steps in read_groups(plan, layout)
        for chunk, *ids, _ in plan.steps[first : first + steps]
        for group in range(2)
        if ids[group] >= 0
    ]


def expected(rows, cols, layout):
    grid, pieces = layout.grid, max(1, layout.block_size // CHUNK)
    return sorted(
        (row * pieces + i, col * pieces + j, z)
        for z, (row, col) in enumerate(zip(rows, cols, strict=True))
        if 0 <= row < grid[0] and 0 <= col < grid[1]
        for i in range(pieces)
        for j in range(pieces)
        if pieces == 1 or row * pieces + i < layout.chunks
    )


@pytest.mark.parametrize("density", [0.03, 0.4, 1.0])
@pytest.mark.parametrize(("block", "shape", "tile"), CASES)
def test_plan_names_every_block_once(block, shape, tile, density):
    rows, cols, layout = make_case(block, shape, tile, density)
    plan = make_plan(rows, cols, layout, np)
    read = read_packed if layout.packs else read_by_id
    assert sorted(read(plan, layout)) == expected(rows, cols, layout)


@pytest.mark.parametrize(("block", "capacity"), [(8, 16), (8, 24), (16, 4), (16, 7), (32, 2), (32, 3)])
def test_chunk_beyond_capacity_takes_several_steps(block, capacity):
    rows, cols, layout = make_case(block, (328, 776), 256, 0.9, capacity)
    plan = make_plan(rows, cols, layout, np)
    assert plan.tiles[:, 5].max() > layout.chunks
    assert sorted(read_packed(plan, layout)) == expected(rows, cols, layout)


@pytest.mark.parametrize("block", [8, 16, 32, 64, 128])
def test_numpy_and_jit_agree(block):
    rows, cols, layout = make_case(block, (328, 776), 128, 0.3)
    on_host = make_plan(rows, cols, layout, np)
    traced = jax.jit(lambda r, c: make_plan(r, c, layout, jnp))(rows, cols)
    for host, device in zip(on_host, traced, strict=True):
        np.testing.assert_array_equal(host, device)
        assert host.dtype == device.dtype == np.int32


def test_order_is_a_permutation_with_inert_blocks_last():
    rows, cols, layout = make_case(16, (200, 136), 128, 0.3)
    plan = make_plan(rows, cols, layout, np)
    np.testing.assert_array_equal(np.sort(plan.order), np.arange(rows.size))
    live = rows.size - 5
    assert ((rows[plan.order[:live]] >= 0) & (rows[plan.order[:live]] < layout.grid[0])).all()


def test_tiles_with_most_work_come_first():
    rows = np.array([0, 0, 1, 0, 1, 2], np.int32)
    cols = np.array([0, 8, 8, 16, 16, 16], np.int32)
    rows, cols = (np.repeat(each, 4) for each in (rows + cols, cols))
    cols += np.tile(np.arange(4) * 2, 6)  # the same in each group of a tile
    layout = PlanLayout(1024, 768, 32, 24, 256, 16)
    tiles = read_groups(make_plan(rows, cols, layout, np), layout)
    assert tiles.tolist() == [[8, 9, 10, 11, 2, 2], [4, 5, 6, 7, 1, 1], [0, 1, 2, 3, 0, 1]]


def test_panels_that_meet_the_same_rows_share_a_group():
    panels = [0, 9, 3, 14, 5, 7, 12, 2]  # in pairs, and each two pairs in the same chunk
    rows = np.repeat(np.arange(4), 2) * 2 + np.repeat([0, 1], 4)
    layout = PlanLayout(192, 512, 16, 8, 256, 16)
    plan = make_plan(rows.astype(np.int32), np.array(panels, np.int32) * 2, layout, np)
    groups = {
        frozenset(pair)
        for *tile, _, _ in read_tiles(plan, layout).tolist()
        for pair in zip(tile[::2], tile[1::2], strict=True)
    }
    assert groups > {frozenset(pair) for pair in ((0, 9), (3, 14), (5, 7), (12, 2))}


def test_groups_that_meet_the_same_chunks_share_a_tile():
    rows = np.array([0, 0, 1, 2, 2, 3, 3, 3], np.int32)
    cols = np.array([0, 3, 1, 2, 4, 2, 4, 5], np.int32)
    layout = PlanLayout(256, 384, 64, 8, 128, 1)
    tiles = read_groups(make_plan(rows, cols, layout, np), layout)
    assert tiles.tolist() == [[2, 4, 3, 2], [1, 5, 1, 2], [0, 3, 0, 1]]


@pytest.mark.parametrize("block", [16, 64, 128])
def test_tiles_along_a_band_meet_the_same_chunks_together(block):
    side = 2048 // block
    rows, cols = np.nonzero(abs(np.subtract.outer(np.arange(side), np.arange(side))) * block < 192)
    layout = choose_layout(2048, 2048, block, rows.size)
    plan = make_plan(rows.astype(np.int32), cols.astype(np.int32), layout, np)
    for *_, first, steps in read_tiles(plan, layout):
        chunks = plan.steps[first : first + steps, 0] // (2 if layout.packs else 1)
        met = list(dict.fromkeys(chunks))  # a chunk may take several steps
        assert [chunk % len(met) for chunk in met] == list(range(len(met)))


def test_halves_of_chunks_whose_other_half_a_tile_does_not_meet_share_steps():
    rows = np.array([0, 1, 3, 4, 6, 9, 10], np.int32)  # halves of chunks, of which 0 and 1 are one chunk
    layout = PlanLayout(512, 256, 32, rows.size, 256, 16)
    plan = make_plan(rows, np.zeros_like(rows), layout, np)
    assert plan.tiles[0, 5] == 4
    assert plan.steps[:4, [0, 3]].tolist() == [[0, 1], [3, 4], [6, 9], [10, -1]]
    assert (plan.masks[0, :4] >> 28).tolist() == [0, 1, 1, 1]


def test_chunks_far_apart_are_met_in_order():
    rows, cols, layout = make_case(64, (2048, 1024), 128, 0.1)
    plan = make_plan(rows, cols, layout, np)
    for *_, first, steps in read_tiles(plan, layout):
        chunks = plan.steps[first : first + steps, 0]
        assert 2 * steps > np.ptp(chunks) + 1 or (np.diff(chunks) > 0).all()


def test_of_many_groups_those_not_far_apart_share_a_tile():
    rows, cols = np.array([0, 0, 1, 1], np.int32), np.array([3, 190, 100, 1500], np.int32)
    layout = PlanLayout(128, 64 * 2048, 64, 4, 128, 1)
    tiles = read_groups(make_plan(rows, cols, layout, np), layout)
    assert [3, 190] in tiles[:, :2].tolist()
    assert [100, 1500] not in tiles[:, :2].tolist()


@pytest.mark.parametrize("density", [0.05, 0.2])
def test_arranging_groups_saves_steps(density):
    rows, cols = np.nonzero(np.random.default_rng(0).random((64, 64)) < density)
    layout = choose_layout(4096, 4096, 64, rows.size)
    in_order = np.unique(rows * 32 + cols // 2).size
    assert make_plan(rows, cols, layout, np).tiles[:, 5].sum() < 0.93 * in_order


@pytest.mark.parametrize("block", [8, 64])
def test_pattern_without_blocks_has_tiles_without_steps(block):
    layout = PlanLayout(256, 300, block, 0, 128, 128)
    tiles = read_groups(make_plan(np.zeros(0, np.int32), np.zeros(0, np.int32), layout, np), layout)
    assert tiles.tolist() == [[0, 1, 0, 0], [2, 3, 0, 0], [4, 5, 0, 0]]


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("block", [8, 16, 32])
def test_capacity_is_enough_for_a_full_slice_and_no_more_than_a_full_chunk(block, density):
    capacity = choose_capacity(block, 256, density)
    assert max(16, block) * CHUNK // block**2 <= capacity <= full_capacity(block, 256)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [8, 16, 32, 64, 128])
def test_chosen_layout_has_room_for_every_step(block, shape):
    """Blocks of one chunk each, and chunks filled to the brim: the two ways to get many steps."""
    grid = -(-shape[0] // block), -(-shape[1] // block)
    for rows, cols in (np.nonzero(np.ones(grid)), (np.arange(grid[0]), np.zeros(grid[0], int))):
        layout = choose_layout(*shape, block, rows.size)
        plan = make_plan(rows.astype(np.int32), cols.astype(np.int32), layout, np)
        read = read_packed if layout.packs else read_by_id
        assert sorted(read(plan, layout)) == expected(rows, cols, layout)
