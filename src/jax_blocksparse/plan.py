"""Plans: the lists that tell the Hopper kernels of y = x W what to copy and what to multiply, step by step.

Output features are cut into groups of 64, input features into chunks of 64. A tile is two or four groups that meet much
the same chunks. A step is a chunk in which a tile has blocks, with as many of them as a stage of shared memory holds; a
tile's steps follow each other. Everything is static in size, so that a plan can be made by NumPy on the host or by
jax.numpy under jit. For x W^T, make the plan of the transposed pattern.
"""

import dataclasses
import functools
import math
import operator
from types import ModuleType
from typing import NamedTuple

import jax
import numpy as np

from jax_blocksparse.arrays import count_at, flatten, order_by, sum_at
from jax_blocksparse.geometry import block_grid, is_live
from jax_blocksparse.grouping import Arrangement, arrange

CHUNK = 64
"""Input features in a step."""

GROUP = 64
"""Output features in a group: those of one product of the tensor cores."""

_DEPTH = 16  # input features of one product
_LARGE_TILE = 128  # output features of a tile of large blocks, so that those of a block of 128 are together


@dataclasses.dataclass(frozen=True)
class PlanLayout:
    """What is static about a plan.

    Attributes:
      in_features: features contracted over.
      out_features: features of the result.
      block_size: one of `jax_blocksparse.BLOCK_SIZES`.
      nnz: number of blocks, inert ones included.
      tile_features: output features of a tile. The kernels take 256 for blocks of 16 and 32, else 128.
      capacity: the most blocks a step may have, for blocks of 8 to 32: what a stage of shared memory is made for. A
        chunk with more takes several steps.
    """

    in_features: int
    out_features: int
    block_size: int
    nnz: int
    tile_features: int
    capacity: int

    @property
    def packs(self) -> bool:
        """Whether the kernel takes the blocks in the plan's order; else it fetches each by its id."""
        return self.block_size < CHUNK

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns."""
        return block_grid((self.in_features, self.out_features), self.block_size)

    @property
    def tiles(self) -> int:
        """Tiles of output features."""
        return -(-self.out_features // self.tile_features)

    @property
    def groups(self) -> int:
        """Groups of a tile."""
        return self.tile_features // GROUP

    @property
    def chunks(self) -> int:
        """Chunks of input features."""
        return -(-self.in_features // CHUNK)

    @property
    def slice_features(self) -> int:
        """Output features that a word of the masks is about."""
        return max(16, self.block_size)

    @property
    def slices(self) -> int:
        """Slices of a tile."""
        return self.tile_features // self.slice_features if self.packs else 0

    @property
    def max_steps(self) -> int:
        """The most steps that all tiles together can have."""
        chunks_met = self.nnz * max(1, self.block_size // CHUNK)
        split = self.nnz // self.capacity if self.packs else 0
        return min(self.tiles * self.chunks, chunks_met) + split

    @property
    def shapes(self) -> "Plan":
        """The shapes of the lists."""
        return Plan(
            tiles=(self.tiles, 4),
            steps=(self.max_steps, 4),
            masks=(self.slices, self.max_steps),
            order=(self.nnz if self.packs else 0,),
        )


class Plan(NamedTuple):
    """The lists, all int32.

    Attributes:
      tiles: (tiles, 4). Per tile, those with most work first: its first two groups, 16 bits each, its first step, how
        many it has, the other two groups.
      steps: (max_steps, 4). Blocks of 8 to 32: chunk, position in `order` of the first block, number of blocks, 0.
        Blocks of 64 and 128: chunk, id of the block that meets the tile's first group, id for the other one (negative
        where there is none), 0.
      masks: (slices, max_steps), see `_masks`; none for blocks of 64 and 128.
      order: (nnz,) block ids in the order in which the kernel wants their values, inert ones last; (0,) for blocks of
        64 and 128, which it takes in any order.
    """

    tiles: jax.Array
    steps: jax.Array
    masks: jax.Array
    order: jax.Array


_THIRD_STAGE = 6
"""Blocks of 32 to a step that leave room for a third stage of float32; worth a seventh at density .25."""


def full_capacity(block_size: int, tile_features: int) -> int:
    """The number of blocks in which a tile meets a chunk."""
    return tile_features * CHUNK // block_size**2


def choose_capacity(block_size: int, tile_features: int, density: float) -> int:
    """A capacity that few steps of a random pattern of this density exceed, and that shared memory is not wasted on."""
    full = full_capacity(block_size, tile_features)
    density = min(1.0, density)  # inert and repeated blocks can make it more
    expected = full * density
    deviation = math.sqrt(expected * (1 - density))
    likely = math.ceil(expected + 2.5 * deviation)
    if block_size == 32 and expected + deviation <= _THIRD_STAGE:
        likely = min(likely, _THIRD_STAGE)
    least = full_capacity(block_size, max(16, block_size))  # the kernels want room for what one mask names
    return min(full, max(least, likely))


def choose_layout(in_features: int, out_features: int, block_size: int, nnz: int) -> PlanLayout:
    """Chooses tile and capacity by what is static.

    Example:
      >>> layout = choose_layout(4096, 4096, 16, nnz=6554)
      >>> layout.tile_features, layout.capacity, layout.max_steps
      (256, 13, 1528)
    """
    density = nnz * block_size**2 / (in_features * out_features)
    # Wide tiles of features copy x less often. Blocks of 8 are bound by products, which are longer over more tokens.
    wide = block_size in (16, 32)
    tile_features = 256 if wide else _LARGE_TILE
    capacity = choose_capacity(block_size, tile_features, density) if block_size < CHUNK else 1
    return PlanLayout(in_features, out_features, block_size, nnz, tile_features, capacity)


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
      ([1, 2, 0], [[0, 0, 1, 0], [1, 1, 2, 0]])
    """
    live = is_live(rows, cols, layout.grid)
    make = _make_packed if layout.packs else _make_by_id
    plan = Plan(*make(rows, cols, live, layout, xp))
    return Plan(*(xp.reshape(array, shape).astype(np.int32) for array, shape in zip(plan, layout.shapes, strict=True)))


def _make_packed(
    rows: jax.Array, cols: jax.Array, live: jax.Array, layout: PlanLayout, xp: ModuleType
) -> tuple[jax.Array, ...]:
    b, tile_features, slices, size = layout.block_size, layout.tile_features, layout.slices, layout.max_steps
    in_slice = layout.slice_features // b  # block columns of a slice
    cells = layout.tiles * layout.chunks
    group, chunk = xp.where(live, cols * b // GROUP, 0), rows * b // CHUNK
    arranged = arrange(xp, group, chunk, live, (layout.tiles, layout.groups, layout.chunks))
    tile = arranged.tile[group]
    cell = xp.where(live, tile * layout.chunks + arranged.turn_of(tile, chunk), cells)
    slice_ = arranged.place[group] * (GROUP // layout.slice_features) + cols * b % GROUP // layout.slice_features
    bit = rows % (CHUNK // b) * in_slice + cols % in_slice

    order = order_by(xp, cell, slice_ * 16 + bit, slices * 16)
    cell, slice_, bit = cell[order], slice_[order], bit[order]
    position = xp.arange(layout.nnz)
    count = count_at(xp, cell, cells)
    first = xp.pad(xp.cumsum(count) - count, (0, 1))
    rank = position - first[cell]
    opens_step = (rank % layout.capacity == 0) & (cell < cells)
    step = xp.where(cell < cells, xp.cumsum(opens_step) - 1, size)

    opened = xp.where(opens_step, step, size)
    blocks = count_at(xp, step, size)
    cell, position = (sum_at(xp, opened, value, size) for value in (cell, position))
    tile = cell // layout.chunks
    steps = xp.stack([arranged.chunk_at(tile, cell % layout.chunks), position, blocks, xp.zeros_like(blocks)], -1)

    word = xp.where(step < size, step * slices + slice_, size * slices)
    present = sum_at(xp, word, 1 << bit, size * slices).reshape(size, slices)
    counts = count_at(xp, word, size * slices).reshape(size, slices)

    # The bytes to copy, with x as a tile of 2^15 sums has it.
    work = xp.where(blocks > 0, 2**15 // tile_features * CHUNK, 0) + blocks * b**2
    tiles = _sort_tiles(xp, xp.where(blocks > 0, tile, layout.tiles), work, arranged, layout)
    return tiles, steps, _masks(xp, present, counts, layout).T, order


def _masks(xp: ModuleType, present: jax.Array, counts: jax.Array, layout: PlanLayout) -> jax.Array:
    """Makes a word for each step and slice.

    * bits 0 to 15: the blocks present, bit row * (block columns of a slice) + column
    * bits 16 to 19: for each 16 input features, whether the 64 features that the slice belongs to have any block there
    * bits 20 up: the position, among the blocks of the step, of the first one of the slice
    """
    b = layout.block_size
    in_slice = layout.slice_features // b
    bits = max(1, _DEPTH // b) * in_slice  # that 16 input features take in a word
    in_group = GROUP // layout.slice_features
    anywhere = functools.reduce(operator.or_, (present[:, i::in_group] for i in range(in_group)))
    groups = xp.zeros_like(anywhere)
    for depth in range(CHUNK // _DEPTH):
        occupied = anywhere >> (depth * _DEPTH // b * in_slice) & ((1 << bits) - 1)
        groups = groups | (occupied != 0) << depth
    groups = xp.repeat(groups, in_group, axis=-1)
    return present | groups << 16 | (xp.cumsum(counts, -1) - counts) << 20


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
    arranged = arrange(xp, group, chunk, live, (layout.tiles, per_tile, layout.chunks), stays=pieces > 1)
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
    """Makes the list of tiles of the tile and the work of each step, and of the groups of the tiles."""
    steps = count_at(xp, tile, layout.tiles)
    first = xp.cumsum(steps) - steps
    by_work = xp.argsort(-sum_at(xp, tile, work, layout.tiles), stable=True)
    words = arranged.words(xp)[by_work]
    return xp.stack([words[:, 0], first[by_work], steps[by_work], words[:, 1]], -1)
