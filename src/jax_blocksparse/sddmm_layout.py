"""What is static about the plan of a sampled product: sizes, how it is cut into tiles, and how to choose that."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax

from jax_blocksparse.geometry import block_grid

CAPACITY = {16: 160, 32: 48, 64: 12, 128: 3}
"""By unit: the number that a tile can have. As in sddmm.h."""
MAX_SLABS = {16: 28, 32: 28, 64: 14, 128: 4}
"""By unit: the number of slabs that a tile can need. As in sddmm.h."""
_WARPS = 8
"""That multiply the units of a tile. As in sddmm_common.cuh."""
_FEW_SLABS = 18
"""Of small units: the slabs of which three stages fit into shared memory."""
_SLAB_COST = {16: 4, 32: 3, 64: 1, 128: 1}
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
      split: the number of CTAs that share a tile, each taking its part of the tokens: 1 to 5.
    """

    in_features: int
    out_features: int
    block_size: int
    nnz: int
    unit: int
    strip: int
    target: int
    split: int

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
    def crosses_strips(self) -> bool:
        """Whether a tile may have units of two strips that follow each other."""
        return self.unit == 64

    @property
    def max_dy_slabs(self) -> int:
        """The most slabs of dy a tile may need."""
        return self.strip // self.slab * (2 if self.crosses_strips else 1)

    @property
    def max_x_slabs(self) -> int:
        """The most slabs of x a tile may need."""
        return self.max_slabs - self.max_dy_slabs

    @property
    def max_units(self) -> int:
        """As many units as any pattern can have."""
        return min(self.nnz, math.prod(self.units))

    @property
    def paired(self) -> bool:
        """Whether two tiles that follow each other share slabs of dy. As in sddmm_common.cuh."""
        if self.split == 1:
            return self.max_units > _LEAST_FOR_PAIRS
        sparse = 8 * self.max_units <= math.prod(self.units)
        in_one_wave = self.max_units <= _PAIRED_AT_ONCE.get(self.split, 0) * self.capacity
        return self.unit < 64 and sparse and in_one_wave and self.max_units > _LEAST_IF_SHARED

    @property
    def slab_rows(self) -> int:
        """Slabs of all of x."""
        return -(-self.in_features // self.slab)

    @property
    def limits(self) -> tuple[tuple[int, int], ...]:
        """What tiles may have at most, units and slabs of what they are taken by, the rows of slabs.

        Where the target allows, of small units no more than make full work for all warps, and slabs that leave room for
        three stages.
        """
        if self.crosses_strips:
            return ((self.capacity, self.max_dy_slabs),)
        if self.unit >= 64:
            return ((self.capacity, self.max_x_slabs),)
        even = min(self.capacity, -(-self.max_units // (_WARPS * self.target)) * _WARPS)
        few = max(1, _FEW_SLABS - self.max_dy_slabs)
        return (even, few), (self.capacity, few), (self.capacity, self.max_x_slabs)

    @property
    def pairs_in_strips(self) -> bool:
        """Whether a strip should have an even number of tiles, of which each two share slabs of dy."""
        return self.paired and self.unit < 64

    @property
    def slab_cost(self) -> int:
        """What a row of slabs adds to the size of a tile besides its units; a column of them, where tiles have two."""
        return _SLAB_COST[self.unit]

    @property
    def sorts_rows(self) -> bool:
        """Whether rows of slabs are put in an order in which neighbours need the same slabs of dy."""
        return self.unit < 64 and self.slab_rows * -(-self.out_features // self.slab) <= 64 * self.nnz

    @property
    def max_size(self) -> int:
        """The size beyond which no tile fits."""
        return self.capacity + self.slab_cost * self.max_slabs

    @property
    def tiles(self) -> int:
        """As many tiles as any pattern can take."""
        units, rows = self.max_units, min(self.max_units, self.strips * self.slab_rows)
        # But for a strip's last, a tile has as many units or as many slabs as can be.
        tiles, most = units // self.capacity + self.strips, self.max_x_slabs
        if most < self.capacity:
            tiles = (tiles * most + rows) // max(1, most - 1)
        return min(units, max(self.target, tiles))

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
        For units of 64 and 128 the first is where the unit is in its tile.
      order: (nnz,) block ids, those of a tile together, inert ones last.
      places: (nnz,) for each block of `order`, where it is in its tile. Bits 0 to 7: which of the units; 8 to 11 and 12
        to 15: row and column of blocks in the unit; 16 to 20 and 21 to 25: rows and columns that exist, in eights.
    """

    tiles: jax.Array
    slabs: jax.Array
    slots: jax.Array
    order: jax.Array
    places: jax.Array


_LEAST_FOR_PAIRS, _LEAST_IF_SHARED = 132, 1536
"""With fewer units, tiles have few, and pairs save too little; the second if CTAs share tiles besides."""
_AT_ONCE = {1: 132, 2: 66, 3: 39, 4: 30}
"""By the number of CTAs that share a tile: the tiles that an H100 works on at a time."""
_PAIRED_AT_ONCE = {1: 132, 2: 60, 4: 30}
"""The same if each cluster has two."""

_NARROWER = 0.06
"""The part of all features of dy that the last strip may be narrower than the others."""

# Microseconds that a tile of 8192 tokens takes, measured on an H100, by unit.
_START = {16: 26.0, 32: 15.0, 64: 45.0, 128: 28.0}
_COPY = {16: 11.5, 32: 11.8, 64: 9.0, 128: 18.0}  # of a slab
_MULTIPLY = {16: 1.63, 32: 4.7, 64: 9.3, 128: 32.0}  # of a unit
_BEHIND = {16: 0.2, 32: 0.2, 64: 0.02, 128: 0.02}  # of the shorter of the two, which goes on behind the longer
_CROWDED = 14.0  # each slab of units of 64 beyond nine takes besides: stages get large, and few fit
# Of copies, where units are small:
_OF_X = 1.25  # slabs of x, which no pair copies at once
_APART = 1.36  # where CTAs share tiles and are not in pairs: few copy the same at a time
_TWO_STAGES = 1.17  # if there is room for two stages only
_NEEDED = 0.71  # the part of a strip's slabs of dy that a tile needs: its rows need the same ones


@functools.cache
def choose_layout(in_features: int, out_features: int, block_size: int, nnz: int) -> SddmmLayout:
    """Chooses what takes the least time by expectation, if the blocks are anywhere with equal chance.

    Example:
      >>> layout = choose_layout(4096, 4096, 64, nnz=1024)
      >>> layout.unit, layout.strip, layout.target, layout.split
      (64, 64, 132, 1)
    """
    return min(_layouts(in_features, out_features, block_size, nnz), key=_expected_time)


def _layouts(in_features: int, out_features: int, block_size: int, nnz: int) -> Iterator[SddmmLayout]:
    for unit in sorted({max(16, block_size), 128}):
        slab = max(64, unit)
        dy_slabs = -(-out_features // slab)
        # Of large units the kernels want strips of one slab, whose rows are units.
        widest = 1 if unit >= 64 else MAX_SLABS[unit] - 1
        for width in range(1, min(widest, dy_slabs) + 1):
            if -dy_slabs % width > _NARROWER * dy_slabs:
                continue  # the last strip would be much narrower
            for split in _AT_ONCE:
                layout = SddmmLayout(in_features, out_features, block_size, nnz, unit, width * slab, 1, split)
                shared_by_two = split == 2 and block_size == 128 and nnz <= _AT_ONCE[2]
                if unit == 128 and split > 1 and not shared_by_two:
                    continue  # not faster, as measured
                for waves in (1,) if split > 1 and layout.paired else (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
                    yield dataclasses.replace(layout, target=waves * _at_once(layout))


def _at_once(layout: SddmmLayout) -> int:
    return _PAIRED_AT_ONCE[layout.split] if layout.paired else _AT_ONCE[layout.split]


def _tiles(strips: float, units: float, most: int) -> int:
    """The tiles of strips of so many units, the last of which may be narrower."""
    return int(strips) * math.ceil(units / most) + math.ceil(strips % 1 * units / most)


def _expected_time(layout: SddmmLayout) -> float:
    per_slab = layout.slab // layout.unit
    dy_slabs = layout.strip // layout.slab
    density = min(1.0, layout.nnz / math.prod(layout.grid))
    density = 1 - (1 - density) ** (layout.ratio**2)  # of units
    in_row = per_slab**2 * dy_slabs  # units of a row of slabs
    rows = layout.slab_rows * (1 - (1 - density) ** in_row)  # that a strip needs
    units = layout.slab_rows * in_row * density
    strips = layout.out_features / layout.strip
    if layout.crosses_strips:
        of_strip = max(1, layout.target // layout.strips, math.ceil(units / layout.capacity))
        tiles = layout.strips * of_strip
        if tiles > layout.target:  # a tile goes on in the next strip, if only to be full
            full = min(layout.capacity, math.ceil(strips * units / layout.target))
            tiles, units = math.ceil(strips * units / full), full
            x_slabs, dy_slabs = units, 2 * dy_slabs
        else:
            x_slabs = units = math.ceil(units / of_strip)
    else:
        least = layout.limits[0][0] if layout.unit < 64 else math.ceil(units * strips / layout.target)
        fitting = (
            most for most in range(max(1, least), layout.capacity) if _tiles(strips, units, most) <= layout.target
        )
        full = next(fitting, layout.capacity)
        tiles = max(layout.target, _tiles(strips, units, full))
        of_strip = tiles // strips if tiles >= strips else tiles / strips
        x_slabs, units = rows / of_strip, full
        if of_strip > 1:  # tiles end within rows, the more often the more units these have
            x_slabs += max(0.0, 1 - 2 / max(1.0, in_row * density))
        if layout.unit < 64:
            in_column = x_slabs * per_slab**2 * (2 if layout.paired else 1)  # units of a column of slabs, or two tiles'
            dy_slabs *= _NEEDED * (1 - (1 - density) ** in_column)
    if units > layout.capacity or x_slabs > layout.max_x_slabs:
        return math.inf
    waves, slabs = math.ceil(tiles / _at_once(layout)), x_slabs + dy_slabs
    copy, multiply = _COPY[layout.unit] * slabs, _MULTIPLY[layout.unit] * units
    if layout.unit < 64:
        copy += _COPY[layout.unit] * (_OF_X - 1) * x_slabs
        if layout.split > 1 and not layout.paired:
            copy *= _APART
        elif slabs > _FEW_SLABS - 1:
            copy *= _TWO_STAGES
    elif layout.unit == 64:
        copy += _CROWDED * max(0, slabs - 9)
    busy = max(copy, multiply) + _BEHIND[layout.unit] * min(copy, multiply)
    return waves * (_START[layout.unit] + busy / layout.split)
