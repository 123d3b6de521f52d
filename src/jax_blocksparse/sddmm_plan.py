"""Plans: the lists that tell the Hopper kernels of the blocks of x^T dy what to copy, multiply and store.

The kernels work on units: squares of features that are the pattern's blocks, or larger and hold several. The columns of
units are cut into strips, and the units of a strip, taken row by row, into tiles of about the same work, at most what a
CTA's registers hold (`tiling.py`); tiles of units of 64 may end in the strip after the one they begin in. A tile needs
some slabs of x and of dy: 64 neighbouring features (128 for units of 128). Everything here is static in size, so that a
plan can be made by NumPy on the host or by jax.numpy under jit. Remainders by powers of two are masks: NumPy takes
16 times as long to divide.
"""

import math
from types import ModuleType

import jax
import numpy as np

from jax_blocksparse.arrays import changes, count_at, count_up_to, flatten, last_flagged, order_by, order_of, put_at
from jax_blocksparse.geometry import is_live
from jax_blocksparse.sddmm_layout import SddmmLayout, SddmmPlan
from jax_blocksparse.tiling import even_tiles


def make_plan(rows: jax.Array, cols: jax.Array, layout: SddmmLayout, xp: ModuleType) -> SddmmPlan:
    """Makes the plan of a pattern.

    Args:
      rows: (nnz,) int32, block rows; blocks with a row or a column outside the grid are inert.
      cols: (nnz,) int32, block columns.
      layout: what is static about it.
      xp: `numpy` or `jax.numpy`.

    Returns:
      The plan.

    Example:
      >>> import numpy as np
      >>> layout = SddmmLayout(64, 128, block_size=16, nnz=3, unit=16, strip=64, target=2, split=1)
      >>> plan = make_plan(np.array([3, 0, 2]), np.array([1, 7, 0]), layout, np)
      >>> plan.order.tolist(), plan.tiles.tolist()
      ([2, 0, 1], [[0, 0, 257, 1], [2, 2, 65793, 1], [3, 3, 0, 0]])
    """
    unit, ratio, strips, per_slab = layout.unit, layout.ratio, layout.strips, layout.slab // layout.unit
    width, height = layout.strip // unit, layout.slab_rows * per_slab  # of a strip, in units

    # Units by strip, row and column; blocks of the same unit are neighbours.
    live = is_live(rows, cols, layout.grid)
    unit_row, unit_col = rows // ratio, cols // ratio
    place = unit_col // width * height + unit_row
    if layout.sorts_rows:
        place = _sorted_rows(xp, live, unit_row, unit_col, layout)[xp.where(live, place, 0)]
    key = xp.where(live, place * width + unit_col % width, strips * height * width)
    order = order_of(xp, key).astype(np.int32)
    key, rows, cols = key[order], rows[order], cols[order]
    live = key < strips * height * width
    strip = xp.minimum(key // (height * width), strips - 1)
    unit_row, unit_col = xp.where(live, rows // ratio, 0), key % width
    new_unit = live & changes(xp, key)
    number = xp.cumsum(new_unit, dtype=np.int32) - 1

    x_slab = unit_row // per_slab
    new_slab = live & (changes(xp, strip) | changes(xp, x_slab))
    if layout.crosses_strips:
        new_tile = even_tiles(xp, xp.zeros_like(strip), new_unit, new_unit & changes(xp, strip), layout)
    else:
        new_tile = even_tiles(xp, strip, new_unit, new_slab, layout)
    new_slab = new_slab | new_tile
    x_rank = xp.cumsum(new_slab, dtype=np.int32)
    x_rank = x_rank - x_rank[last_flagged(xp, new_tile)]
    tile = xp.where(live, xp.cumsum(new_tile, dtype=np.int32) - 1, layout.tiles)
    slot = number - number[last_flagged(xp, new_tile)]

    first = xp.pad(count_up_to(xp, tile, layout.tiles), (1, 0))
    first_unit = xp.concatenate([xp.zeros(1, number.dtype), xp.cumsum(new_unit)])[first]
    first_strip = xp.concatenate([strip, xp.zeros(1, strip.dtype)])[first]

    # Slabs of dy, in the order of features: their numbers and one, or 0 for those that are not needed.
    dy_slab = strip * (layout.strip // layout.slab) + unit_col // per_slab
    in_tile = unit_col // per_slab
    if layout.crosses_strips:
        strips_up_to = xp.cumsum(changes(xp, strip))
        in_tile = xp.minimum(strips_up_to - strips_up_to[last_flagged(xp, new_tile)], layout.max_dy_slabs - 1)
    shape = layout.tiles, layout.max_dy_slabs
    needed = put_at(xp, tile * shape[1] + in_tile, dy_slab + 1, math.prod(shape)).reshape(shape)
    if layout.paired and not layout.crosses_strips:  # both tiles of a pair get what either needs
        other = xp.minimum(xp.arange(layout.tiles) ^ 1, layout.tiles - 1)
        alike = (first_strip[:-1] == first_strip[other]) & (needed > 0).any(1)
        needed = xp.maximum(needed, xp.where(alike[:, None], needed[other], 0))
    exists = (needed > 0).astype(np.int32)
    x_slabs = count_at(xp, xp.where(new_slab, tile, layout.tiles), layout.tiles)
    dy_ranks = x_slabs[:, None] + xp.cumsum(exists, 1, dtype=np.int32) - exists
    dy_rank = dy_ranks[xp.minimum(tile, layout.tiles - 1), in_tile]

    nowhere = layout.tiles * layout.max_slabs
    dy_places = xp.where(exists > 0, xp.arange(layout.tiles)[:, None] * layout.max_slabs + dy_ranks, nowhere)
    slabs = put_at(
        xp,
        xp.concatenate([tile * layout.max_slabs + x_rank, dy_places.ravel()]),
        xp.concatenate([x_slab, needed.ravel() - 1]),
        nowhere,
    )
    x_place = x_rank * per_slab + (unit_row & per_slab - 1)
    dy_place = dy_rank * per_slab + (unit_col & per_slab - 1)
    slots = put_at(xp, xp.where(live, number, layout.max_units), x_place | dy_place << 16, layout.max_units)
    dy_set = (exists << xp.arange(layout.max_dy_slabs)).sum(1)
    counts, dy_set = (xp.pad(words, (0, 1)) for words in (x_slabs | exists.sum(1) << 8, dy_set))
    tiles = xp.stack([first, first_unit, counts | first_strip << 16, dy_set], -1)

    eights = layout.block_size // 8
    rows_left = xp.minimum(eights, layout.in_features // 8 - rows * eights)
    cols_left = xp.minimum(eights, layout.out_features // 8 - cols * eights)
    places = slot | (rows & ratio - 1) << 8 | (cols & ratio - 1) << 12 | rows_left << 16 | cols_left << 21
    plan = SddmmPlan(tiles, slabs, slots, order, xp.where(live, places, 0))
    return SddmmPlan(*(xp.reshape(a, shape).astype(np.int32) for a, shape in zip(plan, layout.shapes, strict=True)))


def _sorted_rows(
    xp: ModuleType, live: jax.Array, unit_row: jax.Array, unit_col: jax.Array, layout: SddmmLayout
) -> jax.Array:
    """For each row of units of each strip, its place when a strip's rows of slabs follow each other as in a Gray code.

    In it, sets that follow each other, here of the slabs of dy that a row needs, have most members in common.
    """
    per_slab, rows = layout.slab // layout.unit, layout.slab_rows
    slabs_of_strip = layout.strip // layout.slab
    dy_slab = unit_col // per_slab
    cell = (dy_slab // slabs_of_strip * rows + unit_row // per_slab) * slabs_of_strip + dy_slab % slabs_of_strip
    cells = layout.strips * rows * slabs_of_strip
    needed = put_at(xp, xp.where(live, cell, cells), xp.ones_like(cell), cells).reshape(-1, slabs_of_strip)
    code = (needed << xp.arange(slabs_of_strip)).sum(1)
    for shift in (1, 2, 4, 8, 16):  # which number has this Gray code
        code = code ^ code >> shift
    order = order_by(xp, xp.arange(layout.strips * rows) // rows, code, 1 << slabs_of_strip)
    places = put_at(xp, order, xp.arange(order.size), order.size)
    return (places[:, None] * per_slab + xp.arange(per_slab)).ravel().astype(np.int32)


def make_flat_plan(rows: jax.Array, cols: jax.Array, layout: SddmmLayout, xp: ModuleType) -> jax.Array:
    """Makes the plan of a pattern as the one array that the kernels take: the lists one after the other."""
    return flatten(make_plan(rows, cols, layout, xp), xp)
