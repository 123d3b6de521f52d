"""How to cut a sampled product into tiles: the choice of what is static about its plan, by a model of the time."""

import functools
import itertools
import math
from collections.abc import Iterator

from jax_blocksparse.sddmm_plan import CAPACITY, MAX_SLABS, SddmmLayout

_CLUSTERS = {1: 132, 2: 66, 4: 30}
"""By the number of CTAs that share a tile: clusters that an H100 runs at a time."""

# Microseconds that a tile of 8192 tokens takes, measured on an H100, by unit.
_START = {16: 15.0, 32: 25.0, 64: 45.0, 128: 28.0}
_COPY = {16: 14.0, 32: 14.0, 64: 9.0, 128: 18.0}  # of a slab
_CROWDED = 14.0  # each slab of units of 64 beyond nine takes besides: stages get large, and few fit
_MULTIPLY = {16: 2.1, 32: 4.9, 64: 9.3, 128: 32.0}  # of a unit


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
        for width in range(
            1, min(MAX_SLABS[unit] - CAPACITY[unit] if unit >= 64 else MAX_SLABS[unit] - 1, dy_slabs) + 1
        ):
            if 0 < dy_slabs % width < 0.75 * width:
                continue  # the last strip would be much narrower
            for split, clusters in _CLUSTERS.items():
                if unit == 128 and split > 1:
                    continue  # never faster, as measured
                for waves, whole_rows in itertools.product((1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64), (False, True)):
                    target = waves * clusters
                    yield SddmmLayout(
                        in_features, out_features, block_size, nnz, unit, width * slab, target, split, whole_rows
                    )


def _expected_time(layout: SddmmLayout) -> float:
    per_slab = layout.slab // layout.unit
    dy_slabs = layout.strip // layout.slab
    density = min(1.0, layout.nnz / math.prod(layout.grid))
    density = 1 - (1 - density) ** (layout.ratio**2)  # of units
    in_row = per_slab**2 * dy_slabs  # units of a row of slabs
    rows = layout.slab_rows * (1 - (1 - density) ** in_row)  # that a strip needs
    units = layout.slab_rows * in_row * density
    tiles = max(1, layout.target // layout.strips, math.ceil(units / layout.capacity))  # of a strip
    if layout.whole_rows:
        x_slabs = math.ceil(rows / tiles)
        units *= x_slabs / max(rows, 1e-9)
        units += 1.75 * math.sqrt(units * (1 - density))  # in the fullest tile
    else:
        units = math.ceil(units / tiles)
        x_slabs = rows / tiles + (1 if tiles > 1 else 0)
        x_slabs += 2 * math.sqrt(units * (1 - density)) / max(1.0, in_row * density)  # where rows are emptiest
        x_slabs = min(x_slabs, units)
    if units > layout.capacity or x_slabs > layout.max_x_slabs:
        return math.inf
    waves = math.ceil(layout.strips * tiles / _CLUSTERS[layout.split])
    copy, multiply = _COPY[layout.unit] * (x_slabs + dy_slabs), _MULTIPLY[layout.unit] * units
    if layout.unit == 64:
        copy += _CROWDED * max(0, x_slabs + dy_slabs - 9)
    return waves * (_START[layout.unit] + max(copy, multiply) / layout.split)
