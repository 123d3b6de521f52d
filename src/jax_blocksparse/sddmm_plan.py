"""Plans: the lists that tell the Hopper kernels of the blocks of x^T dy what to copy, multiply and store.

The kernels work on units: squares of features that are the pattern's blocks, or larger and hold several. The columns of
units are cut into strips, and the units of a strip, taken row by row, into tiles of about the same number or the same
work, at most what a CTA's registers hold; tiles of units of 64 may end in the strip after the one they begin in. A tile
needs some slabs of x and of dy: 64 neighbouring features (128 for units of 128). Everything here is static in size, so
that a plan can be made by NumPy on the host or by jax.numpy under jit.
"""

import math
from types import ModuleType

import jax
import numpy as np

from jax_blocksparse.arrays import changes, count_up_to, flatten, last_flagged, order_by, put_at, sum_at
from jax_blocksparse.geometry import is_live
from jax_blocksparse.sddmm_layout import SddmmLayout, SddmmPlan


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
      >>> layout = SddmmLayout(64, 128, block_size=16, nnz=3, unit=16, strip=64, target=2, split=1, whole_rows=False)
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
    order = xp.argsort(key, stable=True).astype(np.int32)
    key, rows, cols = key[order], rows[order], cols[order]
    live = key < strips * height * width
    strip = xp.minimum(key // (height * width), strips - 1)
    unit_row, unit_col = xp.where(live, rows // ratio, 0), key % width
    new_unit = live & changes(xp, key)
    number = xp.cumsum(new_unit) - 1

    # Tiles of a strip.
    x_slab = unit_row // per_slab
    new_slab = live & (changes(xp, strip) | changes(xp, x_slab))
    if layout.crosses_strips:
        new_tile = _even_tiles(xp, xp.zeros_like(strip), new_unit, new_unit & changes(xp, strip), layout)
    elif layout.whole_rows:
        new_tile = _even_tiles(xp, strip, new_unit, new_slab, layout)
    else:
        new_tile = _tiles_of_units(xp, strip, new_unit, layout)

    # A tile that needs too many slabs of x is cut.
    new_slab = new_slab | new_tile
    x_rank = xp.cumsum(new_slab)
    x_rank = x_rank - x_rank[last_flagged(xp, new_tile)]
    new_tile = new_tile | (new_slab & (x_rank % layout.max_x_slabs == 0))
    x_rank = x_rank % layout.max_x_slabs
    tile = xp.where(live, xp.cumsum(new_tile) - 1, layout.tiles)
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
    x_slabs = sum_at(xp, tile, new_slab, layout.tiles)
    dy_ranks = x_slabs[:, None] + xp.cumsum(exists, 1) - exists
    dy_rank = dy_ranks[xp.minimum(tile, layout.tiles - 1), in_tile]

    nowhere = layout.tiles * layout.max_slabs
    dy_places = xp.where(exists > 0, xp.arange(layout.tiles)[:, None] * layout.max_slabs + dy_ranks, nowhere)
    slabs = put_at(
        xp,
        xp.concatenate([tile * layout.max_slabs + x_rank, dy_places.ravel()]),
        xp.concatenate([x_slab, needed.ravel() - 1]),
        nowhere,
    )
    x_place, dy_place = x_rank * per_slab + unit_row % per_slab, dy_rank * per_slab + unit_col % per_slab
    slots = put_at(xp, xp.where(live, number, layout.max_units), x_place | dy_place << 16, layout.max_units)
    dy_set = (exists << xp.arange(layout.max_dy_slabs)).sum(1)
    counts, dy_set = (xp.pad(words, (0, 1)) for words in (x_slabs | exists.sum(1) << 8, dy_set))
    tiles = xp.stack([first, first_unit, counts | first_strip << 16, dy_set], -1)

    eights = layout.block_size // 8
    rows_left = xp.minimum(eights, layout.in_features // 8 - rows * eights)
    cols_left = xp.minimum(eights, layout.out_features // 8 - cols * eights)
    places = slot | rows % ratio << 8 | cols % ratio << 12 | rows_left << 16 | cols_left << 21
    plan = SddmmPlan(tiles, slabs, slots, order, xp.where(live, places, 0))
    return SddmmPlan(*(xp.reshape(a, shape).astype(np.int32) for a, shape in zip(plan, layout.shapes, strict=True)))


def _tiles_of_units(xp: ModuleType, strip: jax.Array, new_unit: jax.Array, layout: SddmmLayout) -> jax.Array:
    """Where tiles begin that all have as many units, as few as the target allows."""
    counts = sum_at(xp, strip, new_unit, layout.strips)
    sizes = xp.arange(1, layout.capacity + 1)
    fits = (-(-counts // sizes[:, None])).sum(1) <= layout.target
    size = xp.where(fits.any(), xp.argmax(fits) + 1, layout.capacity)
    size = xp.maximum(1, -(-counts // xp.maximum(1, -(-counts // size))))
    number = xp.cumsum(new_unit) - 1 - (xp.cumsum(counts) - counts)[strip]  # in the strip
    return new_unit & (changes(xp, strip) | changes(xp, number // size[strip]))


def _even_tiles(
    xp: ModuleType, strip: jax.Array, new_unit: jax.Array, new_slab: jax.Array, layout: SddmmLayout
) -> jax.Array:
    """Where tiles begin that end between rows of slabs, or pieces of long ones.

    Each takes pieces of its strip until the next one would make it larger than any may be, which is as small as the
    target allows. Size is units and `slab_cost` for each row that a tile has a piece of.

    Where tiles cross strips, all units count as one strip, and the real strips, columns of units, as the rows.
    """
    pieces, strips = layout.pieces, 1 if layout.crosses_strips else layout.strips
    most_slabs = layout.max_dy_slabs if layout.crosses_strips else layout.max_x_slabs
    number = xp.cumsum(new_unit)
    new_piece = new_unit & ((number - number[last_flagged(xp, new_slab)]) % layout.piece == 0)
    piece = xp.cumsum(new_piece) - 1
    of_piece = xp.where(piece < 0, pieces, piece)
    units, slabs = sum_at(xp, of_piece, new_unit, pieces), sum_at(xp, of_piece, new_slab, pieces)
    strip_of_piece = put_at(xp, xp.where(new_piece, piece, pieces), strip, pieces)
    pieces_of_strip = sum_at(xp, strip, new_piece, strips)
    ends_of_strips = xp.pad(xp.cumsum(pieces_of_strip), (1, 0))
    index = xp.arange(pieces)
    exists = index < ends_of_strips[-1]

    # Where the tile that begins with a piece ends at the latest.
    cost = units + layout.slab_cost * slabs
    last_cost, last_units, last_slab = xp.cumsum(cost), xp.cumsum(units), xp.cumsum(slabs)
    cost_before = last_cost - cost - layout.slab_cost * (1 - slabs)  # the slab of a row that began earlier counts again
    most_cost = layout.max_units + layout.slab_cost * pieces
    up_to_cost = count_up_to(xp, last_cost, most_cost + 1)
    up_to_units = count_up_to(xp, last_units, layout.max_units + 1)
    up_to_slab = count_up_to(xp, last_slab, pieces + 1)
    full = up_to_units[xp.minimum(last_units - units + layout.capacity, layout.max_units)]
    full = xp.minimum(full, up_to_slab[xp.minimum(last_slab + most_slabs - 1, pieces)])
    full = xp.minimum(full, ends_of_strips[1:][strip_of_piece])
    if layout.crosses_strips:  # half of the product warps have those of either column
        half, end_of_column = layout.capacity // 2, up_to_slab[last_slab]
        full = xp.minimum(full, end_of_column + xp.where(end_of_column - index > half, 0, half))

    def jumps(sizes: jax.Array, most: int) -> list[jax.Array]:
        """From each piece to where the tile that begins with it ends, and 2, 4, 8, ... tiles later, `most` at least.

        For rows of sizes, the same for all pieces or one for each; (rows, pieces + 1) each.
        """
        ends = xp.minimum(up_to_cost[xp.minimum(cost_before + sizes, most_cost)], full)
        ends = xp.where(exists, xp.maximum(ends, index + 1), pieces)
        tables = [xp.pad(ends, ((0, 0), (0, 1)), constant_values=pieces)]
        for _ in range(most.bit_length() - 1):
            tables.append(xp.take_along_axis(tables[-1], tables[-1], 1))
        return tables

    begin, end = ends_of_strips[:-1], ends_of_strips[1:]

    def count(sizes: jax.Array, most: int) -> jax.Array:
        """For rows of sizes the tiles of each strip, or more than `most` if there are more."""
        at = xp.tile(begin, (sizes.shape[0], 1))
        tiles = (at < end).astype(np.int32)
        tables = jumps(sizes, most)
        for i in reversed(range(len(tables))):
            ahead = xp.take_along_axis(tables[i], at, 1)
            tiles, at = tiles + xp.where(ahead < end, 1 << i, 0), xp.where(ahead < end, ahead, at)
        return tiles

    # The least size that the target allows, found to an eighth, then to a 64th.
    tries = xp.arange(8)
    size = least = xp.maximum(1, -(-last_cost[-1] // layout.target))
    fitting = xp.full_like(least, layout.max_size)
    for fraction in (8, 64):
        sizes = size + xp.maximum(1, least // fraction) * tries
        fits = count(sizes[:, None], layout.target).sum(1) <= layout.target
        first = xp.argmax(fits)
        fitting = xp.where(fits.any(), sizes[first], fitting)
        size = sizes[xp.where(fits.any(), xp.maximum(first - 1, 0), 7)]

    # For each strip the least that takes no more tiles.
    tiles = count(fitting[None, None], pieces)[0]
    cost_of_strip = xp.diff(xp.pad(last_cost, (1, 0))[ends_of_strips])
    least = xp.minimum(fitting, -(-cost_of_strip // xp.maximum(1, tiles)))
    sizes = least + -(-(fitting - least) * xp.arange(9)[:, None] // 8)
    fits = count(sizes[:, strip_of_piece], pieces) <= tiles
    size = xp.take_along_axis(sizes, xp.argmax(fits, 0)[None], 0)[0]

    # The first piece of each tile. Who goes on from a strip's last comes to those of the next.
    number, at = xp.arange(layout.tiles)[:, None], begin
    for i, table in enumerate(jumps(size[None, strip_of_piece], layout.tiles)):
        at = xp.where(number >> i & 1, table[0][at], at)
    begins = put_at(xp, at.ravel(), xp.ones_like(at.ravel()), pieces) > 0
    return new_piece & (begins & exists)[piece]


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
    return (places[:, None] * per_slab + xp.arange(per_slab)).ravel()


def make_flat_plan(rows: jax.Array, cols: jax.Array, layout: SddmmLayout, xp: ModuleType) -> jax.Array:
    """Makes the plan of a pattern as the one array that the kernels take: the lists one after the other."""
    return flatten(make_plan(rows, cols, layout, xp), xp)
