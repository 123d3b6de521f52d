"""What is static about the plan of a sampled product: sizes, how it is cut into tiles, and how to choose that."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax

from jax_blocksparse.geometry import block_grid
from jax_blocksparse.sddmm_cost import AT_ONCE, FEW_SLABS, PAIRED_AT_ONCE, at_once, expected_time

CAPACITY = {16: 160, 32: 48, 64: 12, 128: 3}
"""By unit: the number that a tile can have. As in sddmm.h."""
MAX_SLABS = {16: 28, 32: 28, 64: 14, 128: 4}
"""By unit: the number of slabs that a tile can need. As in sddmm.h."""
_WARPS = 8
"""That multiply the units of a tile. As in sddmm_common.cuh."""
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
        """Whether two tiles that follow each other share slabs of dy. As in sddmm_launch.cuh."""
        if self.split == 1:
            return self.max_units > _LEAST_FOR_PAIRS
        sparse = 8 * self.max_units <= math.prod(self.units)
        in_one_wave = self.max_units <= PAIRED_AT_ONCE.get(self.split, 0) * self.capacity
        return self.unit < 64 and sparse and in_one_wave and self.max_units > _LEAST_IF_SHARED

    @property
    def slab_rows(self) -> int:
        """Slabs of all of x."""
        return -(-self.in_features // self.slab)

    @property
    def limits(self) -> tuple[tuple[int, int], ...]:
        """The most units and slabs of x (of dy, where tiles cross strips) of a tile, the strictest limits first.

        Small units: as many as make full work for all warps, if the target allows, and slabs as leave room for three
        stages; or only the latter; or as many as a tile can have.
        """
        if self.crosses_strips:
            return ((self.capacity, self.max_dy_slabs),)
        if self.unit >= 64:
            return ((self.capacity, self.max_x_slabs),)
        even = min(self.capacity, -(-max(1, self.max_units) // (_WARPS * self.target)) * _WARPS)
        few = max(1, FEW_SLABS - self.max_dy_slabs)
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
_WAVES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""How often all CTAs take a tile, of which the best number is sought; a few from the least that is enough on."""
_NARROWER = 0.06
"""The part of all features of dy that the last strip may be narrower than the others."""


@functools.cache
def choose_layout(in_features: int, out_features: int, block_size: int, nnz: int) -> SddmmLayout:
    """Chooses what takes the least time by expectation, if the blocks are anywhere with equal chance.

    Example:
      >>> layout = choose_layout(4096, 4096, 64, nnz=1024)
      >>> layout.unit, layout.strip, layout.target, layout.split
      (64, 64, 132, 1)
    """
    return min(_layouts(in_features, out_features, block_size, nnz), key=expected_time)


def _layouts(in_features: int, out_features: int, block_size: int, nnz: int) -> Iterator[SddmmLayout]:
    units = {max(16, block_size), 128}
    if block_size == 32 and 16 * nnz <= math.prod(block_grid((in_features, out_features), block_size)):
        units.add(64)  # few of which have more than one block
    for unit in sorted(units):
        slab = max(64, unit)
        dy_slabs = -(-out_features // slab)
        # Of large units the kernels want strips of one slab, whose rows are units.
        widest = 1 if unit >= 64 else MAX_SLABS[unit] - 1
        for width in range(1, min(widest, dy_slabs) + 1):
            if -dy_slabs % width > _NARROWER * dy_slabs:
                continue  # the last strip would be much narrower
            for split in AT_ONCE:
                layout = SddmmLayout(in_features, out_features, block_size, nnz, unit, width * slab, 1, split)
                shared_by_two = split == 2 and block_size == 128 and nnz <= AT_ONCE[2]
                if unit == 128 and split > 1 and not shared_by_two:
                    continue  # not faster, as measured
                together, waves = at_once(layout), _WAVES
                if unit < 64 and split > 1 and layout.paired:
                    waves = _WAVES[:1]
                elif unit < 64:  # no fewer than hold all units, and few more
                    enough = [wave for wave in _WAVES if wave * together * layout.capacity >= layout.max_units]
                    waves = enough[:5] or _WAVES[-1:]
                for wave in waves:
                    yield dataclasses.replace(layout, target=wave * together)
