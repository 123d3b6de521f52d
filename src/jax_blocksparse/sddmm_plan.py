"""Plans: the lists that tell the Hopper kernels of the blocks of x^T dy what to copy, multiply and store.

The kernels work on units: squares of features that are the pattern's blocks, or larger and hold several. The columns of
units are cut into strips, and the units of a strip, taken row by row, into tiles of about the same number, which is at
most what a CTA's registers hold. A tile needs some slabs of x and of dy: 64 neighbouring features (128 for units of
128). Everything here is static in size, so that a plan can be made by NumPy on the host or by jax.numpy under jit.
"""

import dataclasses
import math
from types import ModuleType
from typing import NamedTuple

import jax
import numpy as np

from jax_blocksparse.geometry import block_grid, is_live
from jax_blocksparse.plan import flatten, sum_at

CAPACITY = {16: 160, 32: 40, 64: 12, 128: 3}
"""By unit: the number that a tile can have. As in sddmm.h."""
MAX_SLABS = {16: 28, 32: 28, 64: 13, 128: 4}
"""By unit: the number of slabs that a tile can need. As in sddmm.h."""
_SLAB_COST = {16: 7, 32: 3, 64: 1, 128: 1}
"""By unit: how many units take as long to multiply as it takes to copy a slab, about."""


@dataclasses.dataclass(frozen=True)
class SddmmLayout:
    """What is static about a plan.

    Attributes:
      in_features: features of x.
      out_features: features of dy.
      block_size: one of `jax_blocksparse.BLOCK_SIZES`.
      nnz: number of blocks.
      unit: features of a unit's side, 16 to 128; a multiple of the block size.
      strip: features of dy in a strip, a multiple of `slab`; for units of 64 and 128 the kernels want one slab.
      target: the number of tiles aimed at.
      split: the number of CTAs that share a tile, each taking its part of the tokens: 1, 2 or 4.
      whole_rows: whether tiles end between rows of slabs, so that they need the fewest slabs, and are even in units and
        slabs together; else they all have as many units.
    """

    in_features: int
    out_features: int
    block_size: int
    nnz: int
    unit: int
    strip: int
    target: int
    split: int
    whole_rows: bool

    @property
    def ratio(self) -> int:
        """Blocks along a unit's side."""
        return self.unit // self.block_size

    @property
    def slab(self) -> int:
        """Features of a slab."""
        return max(64, self.unit)

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns."""
        return block_grid((self.in_features, self.out_features), self.block_size)

    @property
    def units(self) -> tuple[int, int]:
        """Rows and columns of units."""
        return -(-self.in_features // self.unit), -(-self.out_features // self.unit)

    @property
    def strips(self) -> int:
        """Strips of columns."""
        return -(-self.out_features // self.strip)

    @property
    def capacity(self) -> int:
        """The most units a tile may have."""
        return CAPACITY[self.unit]

    @property
    def max_slabs(self) -> int:
        """The most slabs a tile may need."""
        return MAX_SLABS[self.unit]

    @property
    def max_x_slabs(self) -> int:
        """The most slabs of x a tile may need."""
        return self.max_slabs - self.strip // self.slab

    @property
    def max_units(self) -> int:
        """As many units as any pattern can have."""
        return min(self.nnz, math.prod(self.units))

    @property
    def slab_rows(self) -> int:
        """Slabs of all of x."""
        return -(-self.in_features // self.slab)

    @property
    def row_cost(self) -> int:
        """What a row of slabs adds to the size of a tile besides its units."""
        return _SLAB_COST[self.unit] if self.whole_rows else 0

    @property
    def max_size(self) -> int:
        """The size beyond which no tile fits."""
        return self.capacity + self.row_cost * self.max_slabs

    @property
    def tiles(self) -> int:
        """As many tiles as any pattern can take."""
        units = self.max_units
        rows = min(units, self.strips * self.slab_rows)
        tiles = min(units, max(self.target, (units + rows * self.row_cost) // self.max_size + self.strips))
        if self.whole_rows:  # tiles are cut where they get too many units
            tiles += units // self.capacity
        if self.max_x_slabs < self.capacity:  # or need too many slabs
            tiles += (rows + tiles) // self.max_x_slabs
        return tiles

    @property
    def shapes(self) -> "SddmmPlan":
        """The shapes of the lists."""
        return SddmmPlan(
            tiles=(self.tiles + 1, 4),
            slabs=(self.tiles, self.max_slabs),
            slots=(self.max_units,),
            order=(self.nnz,),
            places=(self.nnz,),
        )


class SddmmPlan(NamedTuple):
    """The lists, all int32.

    Attributes:
      tiles: (tiles + 1, 4); per tile its first position in `order`, its first in `slots`, its numbers of slabs of x
        (bits 0 to 7) and of dy (8 to 15) and its strip (16 up), and the slabs of dy as a set of bits. Where a tile
        ends, the next one begins; the last entry is the end of the last tile.
      slabs: (tiles, max_slabs), numbers of slabs, those of x first.
      slots: (max_units,); per unit, those of a tile together and in rows of units: bits 0 to 15 and 16 to 31 say where
        its x and its dy lie in the tile's slabs, in units (position in `slabs` * units of a slab + unit in the slab).
        For units of 64 and 128 that is where the unit is in its tile, and behind the last: the kernels know.
      order: (nnz,) block ids, those of a tile together, inert ones last.
      places: (nnz,) for each block of `order`, where it is in its tile. Bits 0 to 7: which of the units; 8 to 11 and 12
        to 15: row and column of blocks in the unit; 16 to 20 and 21 to 25: rows and columns that exist, in eights.
    """

    tiles: jax.Array
    slabs: jax.Array
    slots: jax.Array
    order: jax.Array
    places: jax.Array


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
    width, height = layout.strip // unit, layout.units[0]  # of a strip, in units
    position = xp.arange(rows.shape[0], dtype=np.int32)

    # Units by strip, row and column; blocks of the same unit are neighbours.
    live = is_live(rows, cols, layout.grid)
    unit_row, unit_col = rows // ratio, cols // ratio
    key = xp.where(live, (unit_col // width * height + unit_row) * width + unit_col % width, strips * height * width)
    order = xp.argsort(key, stable=True).astype(np.int32)
    key, rows, cols = key[order], rows[order], cols[order]
    live = key < strips * height * width
    strip = xp.minimum(key // (height * width), strips - 1)
    unit_row, unit_col = key // width % height, key % width
    new_unit = live & _changes(xp, key)
    number = xp.cumsum(new_unit) - 1

    # Tiles of a strip: as even as possible, and as small as the target allows.
    before = xp.searchsorted(key, xp.arange(strips + 1) * (height * width))
    before = xp.concatenate([xp.zeros(1, number.dtype), number + 1])[before]
    x_slab = unit_row // per_slab
    new_slab = live & (_changes(xp, strip) | _changes(xp, x_slab))
    rows_of_strip = sum_at(xp, strip, new_slab, strips)
    counts = before[1:] - before[:-1] + layout.row_cost * rows_of_strip
    sizes = xp.arange(1, layout.max_size + 1)
    fits = (-(-counts // sizes[:, None])).sum(1) <= layout.target
    size = xp.where(fits.any(), xp.argmax(fits) + 1, layout.max_size)
    size = xp.maximum(1, -(-counts // xp.maximum(1, -(-counts // size))))
    row = xp.maximum(0, xp.cumsum(new_slab) - 1)
    row_in_strip = row - (xp.cumsum(rows_of_strip) - rows_of_strip)[strip]
    place = 2 * (number - before[strip] + layout.row_cost * row_in_strip)
    if layout.whole_rows:  # the middle of the row decides
        units_of_row = sum_at(xp, row, new_unit, layout.nnz)
        place = place[_last(xp, new_slab, position)] + units_of_row[row] + layout.row_cost
    new_tile = live & (_changes(xp, strip) | _changes(xp, place // (2 * size[strip])))

    # A tile with too many units, or that needs too many slabs of x, is cut.
    slot = number - number[_last(xp, new_tile, position)]
    new_tile = new_tile | (new_unit & (slot % layout.capacity == 0))
    new_slab = new_slab | new_tile
    x_rank = xp.cumsum(new_slab)
    x_rank = x_rank - x_rank[_last(xp, new_tile, position)]
    new_tile = new_tile | (new_slab & (x_rank % layout.max_x_slabs == 0))
    x_rank = x_rank % layout.max_x_slabs
    tile = xp.where(live, xp.cumsum(new_tile) - 1, layout.tiles)
    slot = number - number[_last(xp, new_tile, position)]

    # Slabs of dy, in the order of features.
    slabs_of_strip = layout.strip // layout.slab
    dy_slab = unit_col // per_slab
    used = _put(xp, tile * slabs_of_strip + dy_slab, xp.ones_like(tile), layout.tiles * slabs_of_strip)
    used = used.reshape(layout.tiles, slabs_of_strip)
    x_slabs = sum_at(xp, tile, new_slab, layout.tiles)
    dy_rank = (x_slabs[:, None] + xp.cumsum(used, 1) - used).ravel()
    dy_rank = dy_rank[xp.minimum(tile, layout.tiles - 1) * slabs_of_strip + dy_slab]

    slabs = _put(
        xp,
        xp.concatenate([tile * layout.max_slabs + x_rank, tile * layout.max_slabs + dy_rank]),
        xp.concatenate([x_slab, strip * slabs_of_strip + dy_slab]),
        layout.tiles * layout.max_slabs,
    )
    x_place, dy_place = x_rank * per_slab + unit_row % per_slab, dy_rank * per_slab + unit_col % per_slab
    slots = _put(xp, xp.where(live, number, layout.max_units), x_place | dy_place << 16, layout.max_units)
    first = xp.searchsorted(tile, xp.arange(layout.tiles + 1))
    first_unit = xp.concatenate([xp.zeros(1, number.dtype), xp.cumsum(new_unit)])[first]
    first_strip = xp.concatenate([strip, xp.zeros(1, strip.dtype)])[first]
    x_slabs, dy_slabs = (xp.pad(count, (0, 1)) for count in (x_slabs, used.sum(1)))
    dy_set = xp.pad((used << xp.arange(slabs_of_strip)).sum(1), (0, 1))
    tiles = xp.stack([first, first_unit, x_slabs | dy_slabs << 8 | first_strip << 16, dy_set], -1)

    eights = layout.block_size // 8
    rows_left = xp.minimum(eights, layout.in_features // 8 - rows * eights)
    cols_left = xp.minimum(eights, layout.out_features // 8 - cols * eights)
    places = slot | rows % ratio << 8 | cols % ratio << 12 | rows_left << 16 | cols_left << 21
    plan = SddmmPlan(tiles, slabs, slots, order, xp.where(live, places, 0))
    return SddmmPlan(*(xp.reshape(a, shape).astype(np.int32) for a, shape in zip(plan, layout.shapes, strict=True)))


def make_flat_plan(rows: jax.Array, cols: jax.Array, layout: SddmmLayout, xp: ModuleType) -> jax.Array:
    """Makes the plan of a pattern as the one array that the kernels take: the lists one after the other."""
    return flatten(make_plan(rows, cols, layout, xp), xp)


def _changes(xp: ModuleType, values: jax.Array) -> jax.Array:
    """Where a value differs from the one before; true at the front."""
    return xp.concatenate([xp.ones(min(1, values.shape[0]), bool), values[1:] != values[:-1]])


def _last(xp: ModuleType, flags: jax.Array, position: jax.Array) -> jax.Array:
    """For each position, the last flagged one up to it, or 0."""
    flagged = xp.where(flags, position, 0)
    return np.maximum.accumulate(flagged) if xp is np else jax.lax.cummax(flagged)


def _put(xp: ModuleType, index: jax.Array, values: jax.Array, size: int) -> jax.Array:
    """Puts values into an array of `size` zeros; an index beyond stands for nowhere."""
    if xp is np:
        result = np.zeros(size + 1, np.int32)
        result[np.minimum(index, size)] = values
        return result[:size]
    return xp.zeros(size, np.int32).at[index].set(values.astype(np.int32), mode="drop")
