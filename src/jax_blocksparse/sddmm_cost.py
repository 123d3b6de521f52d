"""What sampled products cost on an H100, by how they are cut into tiles: a model of measured times.

It was fitted to measurements of random patterns, block sizes 16 to 64, densities 0.02 to 0.5, 768 to 16384 features.
What it chooses takes 2 % more than the best layout measured on the average over 105 of them, and at most a sixth more.
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax_blocksparse.sddmm_layout import SddmmLayout

FEW_SLABS = 18
"""Of small units: the slabs of which three stages fit into shared memory."""
AT_ONCE = {1: 132, 2: 66, 3: 39, 4: 30, 5: 22}
"""By the number of CTAs that share a tile: the tiles that an H100 works on at a time."""
PAIRED_AT_ONCE = {1: 132, 2: 60, 4: 30}
"""The same if each cluster has two."""

# Microseconds that a tile of 8192 tokens takes, measured on an H100, by unit.
_START = {16: 15.0, 32: 18.5, 64: 12.0, 128: 28.0}
_COPY = {16: 9.4, 32: 9.9, 64: 9.0, 128: 18.0}  # of a slab
_MULTIPLY = {16: 1.83, 32: 4.8, 64: 9.3, 128: 32.0}  # of a unit
_BEHIND = {16: 0.12, 32: 0.12, 64: 0.02, 128: 0.02}  # of the shorter of the two, which goes on behind the longer
_AT_LEAST = 33.0  # units of 64: besides, for all tokens
_LARGE_APART = 1.15  # units of 64: copies, where more than two CTAs share tiles
_CROWDED = 14.0  # each slab of units of 64 beyond nine takes besides: stages get large, and few fit
_LATER_WAVES = 1.2  # where CTAs share tiles: they drift apart
# Of copies, where units are small:
_OF_X = 1.54  # slabs of x, which no pair copies at once
_APART = {2: 1.34, 3: 1.38, 4: 1.43, 5: 1.32}  # where so many share tiles, not in pairs: few copy the same
_OF_X_APART = 1.2  # slabs of x there
_TWO_STAGES = 1.22  # if there is room for two stages only
_ALIKE = 0.34  # the part of a strip's slabs of dy that a tile does not need since its rows need the same ones, at most


def at_once(layout: "SddmmLayout") -> int:
    """The tiles that an H100 works on at a time."""
    return PAIRED_AT_ONCE[layout.split] if layout.paired else AT_ONCE[layout.split]


def expected_time(layout: "SddmmLayout") -> float:
    """Microseconds for 8192 tokens, if the blocks are anywhere with equal chance; infinite if it is impossible."""
    per_slab = layout.slab // layout.unit
    density = min(1.0, layout.nnz / math.prod(layout.grid))
    density = 1 - (1 - density) ** (layout.ratio**2)  # of units
    dy_slabs = layout.strip // layout.slab
    in_row = per_slab**2 * dy_slabs  # units of a row of slabs
    rows = layout.slab_rows * (1 - (1 - density) ** in_row)  # that a strip needs
    units = layout.slab_rows * in_row * density
    strips = layout.out_features / layout.strip
    if layout.crosses_strips:
        of_strip = max(1, layout.target // layout.strips, math.ceil(units / layout.capacity))
        tiles = layout.strips * of_strip
        if tiles > layout.target:  # a tile goes on in the next strip, if only to be full
            joins = not layout.capacity / 2 < units <= layout.capacity  # tiles have half of their units in either
            least = math.ceil(strips / 2 if joins else strips)
            full = min(layout.capacity, math.ceil(strips * units / max(least, layout.target)))
            tiles, units = max(least, math.ceil(strips * units / full)), full
            x_slabs, dy_slabs = units, 2 * dy_slabs
        else:
            x_slabs = units = math.ceil(units / of_strip)
    else:
        least = layout.limits[0][0] if layout.unit < 64 else 1
        room = layout.capacity - layout.capacity // 16  # few tiles can be quite full
        of_strip = max(1, layout.target // math.ceil(strips))
        full = min(max(least, math.ceil(units / of_strip)), room)
        tiles = max(layout.target, _tiles(strips, units, full))
        of_strip = tiles // strips if tiles >= strips else tiles / strips
        x_slabs, units = rows / of_strip, full
        if of_strip > 1:  # tiles end within rows, the more often the more units these have
            x_slabs += max(0.0, 1 - 2 / max(1.0, in_row * density))
        if layout.unit < 64:
            in_column = x_slabs * per_slab**2 * (2 if layout.paired else 1)  # units of a column of slabs, or two tiles'
            needed = 1 - (1 - density) ** in_column
            spread = math.sqrt(dy_slabs * needed * (1 - needed))  # the largest tiles need more than others
            dy_slabs = dy_slabs * (needed - _ALIKE * needed**4 * (1 - density) ** per_slab**2) + spread
    if units > layout.capacity or x_slabs > layout.max_x_slabs:
        return math.inf
    copy, multiply = _copy_time(layout, x_slabs, dy_slabs), _MULTIPLY[layout.unit] * units
    busy = max(copy, multiply) + _BEHIND[layout.unit] * min(copy, multiply)
    waves = math.ceil(tiles / at_once(layout))
    later = _LATER_WAVES if waves > 1 and layout.split > 1 else 1
    return waves * later * (_START[layout.unit] + busy / layout.split)


def _copy_time(layout: "SddmmLayout", x_slabs: float, dy_slabs: float) -> float:
    slabs = x_slabs + dy_slabs
    if layout.unit == 128:
        return _COPY[128] * slabs
    if layout.unit == 64:
        apart = _LARGE_APART if layout.split > 2 else 1
        return _AT_LEAST + apart * _COPY[64] * slabs + _CROWDED * max(0, slabs - 9)
    if layout.split > 1 and not layout.paired:
        return _COPY[layout.unit] * _APART[layout.split] * (_OF_X_APART * x_slabs + dy_slabs)
    time = _COPY[layout.unit] * (_OF_X * x_slabs + dy_slabs)
    return time * (_TWO_STAGES if slabs > FEW_SLABS else 1)


def _tiles(strips: float, units: float, most: int) -> int:
    """The tiles of strips of so many units, the last of which may be narrower."""
    return int(strips) * math.ceil(units / most) + math.ceil(strips % 1 * units / most)
