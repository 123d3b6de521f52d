"""Plans: the lists that tell the Hopper kernels of y = x W what to copy and what to multiply, step by step.

Output features are cut into groups of 64, input features into chunks of 64. A tile is two or four groups that meet much
the same input features. A step is a chunk in which a tile has blocks, with as many of them as a stage of shared memory
holds; for blocks of 16 and 32, where it has blocks in one half of a chunk only, two such halves. A tile's steps follow
each other. Everything is static in size, so that a plan can be made by NumPy on the host or by jax.numpy under jit. For
x W^T, make the plan of the transposed pattern. Remainders by powers of two are masks: NumPy takes 16 times as long to
divide.
"""

import functools
import operator
from types import ModuleType

import jax
import numpy as np

from jax_blocksparse.arrays import count_at, flatten, last_flagged, order_by, put_at, sum_at
from jax_blocksparse.geometry import is_live
from jax_blocksparse.grouping import Arrangement, arrange
from jax_blocksparse.plan_layout import CHUNK, GROUP, HALF, PANEL, Plan, PlanLayout

_DEPTH = 16  # input features of one product


def make_flat_plan(rows: jax.Array, cols: jax.Array, layout: PlanLayout, xp: ModuleType) -> jax.Array:
    """Makes the plan of a pattern as the one array that the kernels take.

    Args:
      rows: as in `make_plan`.
      cols: as in `make_plan`.
      layout: as in `make_plan`.
      xp: as in `make_plan`.

    Returns:
      (flat_size(layout),) int32, the lists of a `Plan` one after the other, each padded to a multiple of 16 bytes.
    """
    return flatten(make_plan(rows, cols, layout, xp), xp)


def make_plan(rows: jax.Array, cols: jax.Array, layout: PlanLayout, xp: ModuleType) -> Plan:
    """Makes the plan of a pattern.

    Args:
      rows: (nnz,) int32, block rows; blocks with a row or a column outside the grid are inert.
      cols: (nnz,) int32, block columns.
      layout: what is static about it.
      xp: `numpy` or `jax.numpy`.

    Returns:
      The plan. Where two blocks are at the same place, it is meaningless, but safe.

    Example:
      >>> import numpy as np
      >>> layout = PlanLayout(128, 256, block_size=32, nnz=3, tile_features=256, capacity=16)
      >>> plan = make_plan(np.array([3, 0, 2]), np.array([1, 7, 0]), layout, np)
      >>> plan.order.tolist(), plan.steps.tolist()
      ([1, 2, 0], [[0, 0, 1, -1], [2, 1, 2, 3]])
    """
    live = is_live(rows, cols, layout.grid)
    make = _make_packed if layout.packs else _make_by_id
    plan = Plan(*make(rows, cols, live, layout, xp))
    return Plan(*(xp.reshape(array, shape).astype(np.int32) for array, shape in zip(plan, layout.shapes, strict=True)))


def _make_packed(
    rows: jax.Array, cols: jax.Array, live: jax.Array, layout: PlanLayout, xp: ModuleType
) -> tuple[jax.Array, ...]:
    b, tile_features, slices, size = layout.block_size, layout.tile_features, layout.slices, layout.max_steps
    in_slice, in_half = layout.slice_features // b, HALF // b  # block columns of a slice, block rows of a half
    cells = layout.tiles * layout.chunks
    stored, half = layout.stored_features, rows * b // HALF
    unit = xp.where(live, cols * b // stored, 0)  # a panel or a group
    # Panels should share a group if that makes the fewest products, of 16 input features.
    fine = HALF // _DEPTH if stored == PANEL else 1
    extents = layout.tiles, layout.tile_features // stored, layout.chunks, 2
    arranged = arrange(xp, unit, rows * b * fine // HALF, live, extents, fine=fine)
    tile = arranged.tile[unit]
    place = (tile * layout.chunks + arranged.turn_of(tile, half // 2)) * 2 + (half & 1)
    place, halves = _join_halves(xp, xp.where(live, place, cells * 2), arranged, layout)
    cell, side = place // 2, place & 1
    slice_ = (arranged.place[unit] * stored + (cols * b & stored - 1)) // layout.slice_features
    bit = (side * in_half + (rows & in_half - 1)) * in_slice + (cols & in_slice - 1)

    order = order_by(xp, cell, slice_ * 16 + bit, slices * 16)
    cell, slice_, bit = cell[order], slice_[order], bit[order]
    position = xp.arange(layout.nnz, dtype=np.int32)
    count = count_at(xp, cell, cells)
    first = xp.pad(xp.cumsum(count, dtype=np.int32) - count, (0, 1))
    rank = position - first[cell]
    opens_step = (rank % layout.capacity == 0) & (cell < cells)
    step = xp.where(cell < cells, xp.cumsum(opens_step, dtype=np.int32) - 1, size)

    opened = xp.where(opens_step, step, size)
    blocks = count_at(xp, step, size)
    cell, position = (put_at(xp, opened, value, size) for value in (cell, position))
    tile = cell // layout.chunks
    first, second = halves[cell, 0], halves[cell, 1]
    steps = xp.stack([first, position, blocks, second], -1)
    apart = (first % 2 != 0) | (second != first + 1)

    word = xp.where(step < size, step * slices + slice_, size * slices)
    words = sum_at(xp, word, (1 << bit) + (1 << 16), size * slices).reshape(size, slices)
    present, counts = words & 0xFFFF, words >> 16

    # The bytes to copy, with x as a tile of 2^15 sums has it.
    work = xp.where(blocks > 0, 2**15 // tile_features * CHUNK, 0) + blocks * b**2
    tiles = _sort_tiles(xp, xp.where(blocks > 0, tile, layout.tiles), work, arranged, layout)
    return tiles, steps, _masks(xp, present, counts, apart, layout).T, order


def _join_halves(
    xp: ModuleType, place: jax.Array, arranged: Arrangement, layout: PlanLayout
) -> tuple[jax.Array, jax.Array]:
    """Puts halves of chunks into steps.

    Args:
      xp: `numpy` or `jax.numpy`.
      place: of each block, which half of all tiles' chunks it is in, in the order of steps; beyond all for inert ones.
      arranged: the order of the chunks of each tile.
      layout: what is static.

    Returns:
      Of each block, twice its chunk-sized step and which half of that it is in; (steps, 2) the halves of each, or -1.
    """
    cells, sides = layout.tiles * layout.chunks, xp.arange(2)
    met = count_at(xp, place, cells * 2).reshape(-1, 2) > 0
    if not layout.joins_halves:
        met = xp.ones_like(met)
    is_alone = met.sum(-1) == 1
    rank = (xp.cumsum(is_alone.reshape(layout.tiles, -1), -1) - 1).ravel()  # among those of the tile
    joins = is_alone & (rank % 2 == 1)  # the one before
    here = xp.arange(cells)
    home = xp.where(joins, last_flagged(xp, is_alone & ~joins), here)
    side = xp.where(is_alone[:, None], rank[:, None] % 2, sides)
    new_place = (home[:, None] * 2 + side).ravel().astype(np.int32)
    number = arranged.chunk_at(here // layout.chunks, here % layout.chunks)[:, None] * 2 + sides
    halves = sum_at(xp, xp.where(met.ravel(), new_place, cells * 2), number.ravel() + 1, cells * 2).reshape(-1, 2) - 1
    return xp.pad(new_place, (0, 1), constant_values=cells * 2)[place], halves


def _masks(xp: ModuleType, present: jax.Array, counts: jax.Array, apart: jax.Array, layout: PlanLayout) -> jax.Array:
    """Makes a word for each step and slice.

    * bits 0 to 15: the blocks present, bit row * (block columns of a slice) + column
    * bits 16 to 19: for each 16 input features, whether the 64 features that the slice belongs to have any block there
    * bits 20 to 27: the position, among the blocks of the step, of the first one of the slice
    * bit 28: whether the step's halves are not those of one chunk
    """
    b = layout.block_size
    in_slice = layout.slice_features // b
    bits = max(1, _DEPTH // b) * in_slice  # that 16 input features take in a word
    in_group = GROUP // layout.slice_features
    anywhere = functools.reduce(operator.or_, (present[:, i::in_group] for i in range(in_group)))
    groups = xp.zeros_like(anywhere)
    for depth in range(CHUNK // _DEPTH):
        occupied = anywhere >> (depth * _DEPTH // b * in_slice) & ((1 << bits) - 1)
        groups = groups | (occupied != 0).astype(np.int32) << depth
    groups = xp.repeat(groups, in_group, axis=-1)
    return present | groups << 16 | (xp.cumsum(counts, -1, dtype=np.int32) - counts) << 20 | apart[:, None] << 28


def _make_by_id(
    rows: jax.Array, cols: jax.Array, live: jax.Array, layout: PlanLayout, xp: ModuleType
) -> tuple[jax.Array, ...]:
    pieces = layout.block_size // CHUNK  # that a block is cut into, each way
    part = xp.arange(pieces)
    chunk = rows[:, None, None] * pieces + part[:, None]
    group = cols[:, None, None] * pieces + part
    per_tile, cells, size = layout.groups, layout.tiles * layout.chunks, layout.max_steps
    live = live[:, None, None] & (chunk < layout.chunks)
    group = xp.where(live, group, 0)
    arranged = arrange(xp, group, chunk, live, (layout.tiles, per_tile, layout.chunks, 1), stays=pieces > 1)
    tile, place = arranged.tile[group], arranged.place[group]
    cell = tile * layout.chunks + arranged.turn_of(tile, chunk)
    place = xp.where(live, cell * per_tile + place, cells * per_tile)
    ids = xp.broadcast_to(xp.arange(layout.nnz)[:, None, None] + 1, place.shape)
    ids = sum_at(xp, place.ravel(), ids.ravel(), cells * per_tile).reshape(cells, per_tile) - 1

    present = (ids >= 0).sum(-1)
    cell = xp.argsort(present == 0, stable=True)[:size]  # those with blocks first
    ids, present = ids[cell], present[cell]
    tile = cell // layout.chunks
    chunk = arranged.chunk_at(tile, cell % layout.chunks)
    steps = xp.stack([chunk, ids[:, 0], ids[:, 1], xp.zeros_like(cell)], -1)
    work = xp.where(present > 0, 4 + present, 0)  # a piece of x is four times as large as one of W
    tiles = _sort_tiles(xp, xp.where(present > 0, tile, layout.tiles), work, arranged, layout)
    return tiles, steps, xp.zeros(0, np.int32), xp.zeros(0, np.int32)


def _sort_tiles(
    xp: ModuleType, tile: jax.Array, work: jax.Array, arranged: Arrangement, layout: PlanLayout
) -> jax.Array:
    """Makes the list of tiles of the tile and the work of each step, and of what each tile stores."""
    steps = count_at(xp, tile, layout.tiles)
    first = xp.cumsum(steps) - steps
    by_work = xp.argsort(-sum_at(xp, tile, work, layout.tiles), stable=True)
    stored = layout.stored_features // PANEL
    panels = (arranged.groups[:, :, None] * stored + xp.arange(stored)).reshape(layout.tiles, -1, GROUP // PANEL)
    words = panels[..., 0] | panels[..., 1] << 16
    words = xp.pad(words, ((0, 0), (0, 4 - layout.groups)))[by_work]
    return xp.pad(xp.column_stack([words, first[by_work], steps[by_work]]), ((0, 0), (0, 2)))
