"""How the units of a sampled product are dealt out to tiles.

A tile takes units in order until the next one would make it larger than tiles may be. All tiles are worked on at a
time, so the largest decides: they may be as large as it takes for the target number of tiles to be enough, and no
larger. Size is the number of units and, for each row of slabs that a tile has a part of, what copying a slab costs.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import jax
import numpy as np

from jax_blocksparse.arrays import count_at, count_up_to, put_at
from jax_blocksparse.sddmm_layout import SddmmLayout


class _Units(NamedTuple):
    """The units in order, those of a strip together, and what limits a tile that begins with one.

    Attributes:
      strip: (max_units,) of each unit.
      begin: (strips,) the first unit of each strip.
      end: (strips,) the one behind its last.
      size_before: (max_units,) the size of all units before, less that of the slab of a row that has begun there.
      up_to_size: for each size, the number of units that together are no larger.
    """

    strip: jax.Array
    begin: jax.Array
    end: jax.Array
    size_before: jax.Array
    up_to_size: jax.Array


def even_tiles(
    xp: ModuleType, strip: jax.Array, new_unit: jax.Array, new_slab: jax.Array, layout: SddmmLayout
) -> jax.Array:
    """Where tiles begin.

    Args:
      xp: `numpy` or `jax.numpy`.
      strip: (nnz,) of each block, in the order in which tiles take them; their strips are in order, too.
      new_unit: (nnz,) whether a unit begins with the block.
      new_slab: (nnz,) whether a row of slabs does. Where tiles cross strips, all units count as one strip, and the real
        strips, columns of units, as the rows.
      layout: what is static about the plan.

    Returns:
      (nnz,) whether a tile begins with the block.
    """
    count, strips = max(1, layout.max_units), 1 if layout.crosses_strips else layout.strips
    slab_cost, smallest, largest = layout.slab_cost, 1 + layout.slab_cost, layout.max_size
    number, index = xp.cumsum(new_unit, dtype=np.int32) - 1, xp.arange(count, dtype=np.int32)
    place = xp.where(new_unit, number, count)
    strip_of_unit = put_at(xp, place, strip, count)
    slabs = xp.cumsum(put_at(xp, place, new_slab, count), dtype=np.int32)
    end = xp.cumsum(count_at(xp, xp.where(new_unit, strip, strips), strips), dtype=np.int32)
    most_slabs = min(count, layout.strips * (1 if layout.crosses_strips else layout.slab_rows))
    sizes = count + slab_cost * most_slabs + largest + 1
    units = _Units(
        strip=strip_of_unit,
        begin=xp.pad(end, (1, 0))[:-1],
        end=end,
        size_before=index + slab_cost * (slabs - 1),
        up_to_size=count_up_to(xp, xp.where(index < end[-1], index + 1 + slab_cost * slabs, sizes), sizes),
    )

    up_to_slab = count_up_to(xp, slabs, count + 1)

    def ends_of(limits: jax.Array) -> jax.Array:
        """Where the tile that begins with a unit ends at the latest, for rows of the most units and slabs of one."""
        ends = xp.minimum(index + limits[:, :1], up_to_slab[xp.minimum(slabs - 1 + limits[:, 1:], count)])
        ends = xp.minimum(ends, end[strip_of_unit])
        if layout.crosses_strips:  # half of the product warps have those of either column
            half, end_of_column = layout.capacity // 2, up_to_slab[slabs]
            ends = xp.minimum(ends, end_of_column + xp.where(end_of_column - index > half, 0, half))
        return ends

    def count_tiles(sizes: jax.Array, ends: jax.Array, to: int | jax.Array = 1) -> jax.Array:
        """The tiles of each strip for rows of sizes, in multiples of a number."""
        return -(-_count_tiles(xp, units, sizes, ends, layout.tiles) // to) * to

    def first_enough(tiles: Callable[[jax.Array], jax.Array], rows: jax.Array) -> jax.Array:
        """The number of the first of some rows with which the target is enough, or how many rows there are."""
        if xp is np:
            enough = (tiles(rows[i : i + 1]).sum() <= layout.target for i in range(len(rows)))
            return next((i for i, found in enumerate(enough) if found), len(rows))
        enough = tiles(rows).sum(1) <= layout.target
        return xp.where(enough.any(), xp.argmax(enough), len(rows))

    # The strictest limits with which the target is enough, else the last; and whether it is for even numbers of tiles.
    limits = xp.asarray(layout.limits, np.int32)
    any_size = xp.full((len(limits), 1), largest, np.int32)
    best = first_enough(lambda limits: count_tiles(any_size[: len(limits)], ends_of(limits)), limits)
    ends = ends_of(limits[xp.minimum(best, len(limits) - 1)][None])
    together = 1
    if layout.pairs_in_strips:
        together = xp.where(count_tiles(any_size[:1], ends, 2).sum() <= layout.target, 2, 1)

    # The least size that the target allows, found to a quarter, a sixteenth, a 64th.
    size = least = xp.maximum(smallest, -(-(end[-1] + slab_cost * slabs[-1]) // layout.target))
    fitting = xp.full_like(least, largest)
    for fraction in (4, 16, 64):
        sizes = xp.minimum(size + xp.maximum(1, least // fraction) * xp.arange(4), largest)
        first = first_enough(lambda sizes: count_tiles(sizes, ends, together), sizes[:, None])
        fitting = xp.where(first < 4, sizes[xp.minimum(first, 3)], fitting)
        size = sizes[xp.maximum(first - 1, 0)]

    # For each strip the least that takes no more tiles.
    tiles = count_tiles(fitting[None, None], ends, together)
    size_of_strip = end - units.begin + slab_cost * xp.diff(xp.pad(slabs, (1, 0))[xp.pad(end, (1, 0))])
    least = xp.clip(-(-size_of_strip // xp.maximum(1, tiles[0])), smallest, fitting)
    sizes = least + -(-(fitting - least) * xp.arange(4)[:, None] // 3)
    fits = xp.pad(count_tiles(sizes[:3], ends) <= tiles, ((0, 1), (0, 0)), constant_values=True)
    sizes = xp.take_along_axis(sizes, xp.argmax(fits, 0)[None], 0)
    return new_unit & _begin_tiles(xp, units, sizes, ends, layout.tiles)[number]


def _count_tiles(xp: ModuleType, units: _Units, sizes: jax.Array, ends: jax.Array, most: int) -> jax.Array:
    """Counts the tiles of each strip if they are no larger than such sizes.

    Args:
      xp: `numpy` or `jax.numpy`.
      units: the units.
      sizes: (rows, strips) or (rows, 1).
      ends: (rows, max_units) or (1, max_units), where the tile that begins with a unit ends at the latest.
      most: if a strip has more tiles, any number above this may be returned.

    Returns:
      (rows, strips) the numbers of tiles.
    """
    shape = len(sizes), len(units.begin)
    sizes = xp.broadcast_to(sizes, shape)
    if xp is np:
        ends = np.broadcast_to(ends, (shape[0], ends.shape[1]))
        tiles = [len(first) for row in zip(sizes, ends, strict=True) for first in _walk(units, *row)]
        return np.array(tiles, np.int32).reshape(shape)
    at = xp.tile(units.begin, (shape[0], 1))
    tiles = (at < units.end).astype(np.int32)
    tables = _jumps(xp, units, sizes, ends, most)
    for i in reversed(range(len(tables))):
        ahead = xp.take_along_axis(tables[i], at, 1)
        is_tile = ahead < units.end
        tiles, at = tiles + xp.where(is_tile, 1 << i, 0), xp.where(is_tile, ahead, at)
    return tiles


def _begin_tiles(xp: ModuleType, units: _Units, sizes: jax.Array, ends: jax.Array, most: int) -> jax.Array:
    """Whether a tile begins with a unit, if there are at most so many tiles. Sizes and ends are one row."""
    count = ends.shape[1]
    if xp is np:
        first = np.array([unit for strip in _walk(units, sizes[0], ends[0]) for unit in strip], np.int32)
        return put_at(np, first, np.ones_like(first), count) > 0
    number, at = xp.arange(most)[:, None], units.begin
    for i, table in enumerate(_jumps(xp, units, sizes, ends, most)):
        at = xp.where(number >> i & 1, table[0][at], at)  # beyond a strip's last come those of the next
    return (put_at(xp, at.ravel(), xp.ones_like(at.ravel()), count) > 0) & (xp.arange(count) < units.end[-1])


def _walk(units: _Units, sizes: np.ndarray, ends: np.ndarray) -> list[list[int]]:
    """The first unit of each tile of each strip. On the host, one step after the other is fastest."""
    size_before, up_to_size, ends = memoryview(units.size_before), memoryview(units.up_to_size), memoryview(ends)
    strips = []
    for at, end, size in zip(units.begin.tolist(), units.end.tolist(), sizes.tolist(), strict=True):
        first = []
        while at < end:
            first.append(at)
            by_size, at = up_to_size[size_before[at] + size], ends[at]
            if by_size < at:
                at = by_size
        strips.append(first)
    return strips


def _jumps(xp: ModuleType, units: _Units, sizes: jax.Array, ends: jax.Array, most: int) -> list[jax.Array]:
    """Tables from each unit to where its tile ends, and 2, 4, 8, ... tiles later, up to `most` at least.

    On a device, where each step takes longer than looking up all of a table. (rows, max_units + 1) each.
    """
    count = ends.shape[1]
    ends = xp.minimum(units.up_to_size[units.size_before + sizes[:, units.strip]], ends)
    ends = xp.where(xp.arange(count) < units.end[-1], ends, count)
    tables = [xp.pad(ends, ((0, 0), (0, 1)), constant_values=count)]
    for _ in range(most.bit_length() - 1):
        tables.append(xp.take_along_axis(tables[-1], tables[-1], 1))
    return tables
