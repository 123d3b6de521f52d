"""Plans: the lists that tell the Hopper kernels of y = x W what to copy and what to multiply, step by step.

Output features are cut into tiles, input features into chunks of 64. A step of a tile is a chunk in which the tile has
blocks. Everything here is static in size, so that a plan can be made by NumPy on the host or by jax.numpy under jit.
For x W^T, make the plan of the transposed pattern.
"""

import dataclasses
import math
from types import ModuleType
from typing import NamedTuple

import jax
import numpy as np

CHUNK = 64
"""Input features in a step."""

_GROUP = 64  # output features of one product of the tensor cores
_DEPTH = 16  # input features of one product
_LARGE_TILE = 128  # output features of a tile of large blocks
_COPY_UNIT = 2048  # bytes: small blocks are copied in multiples of it


@dataclasses.dataclass(frozen=True)
class PlanLayout:
    """What is static about a plan.

    Attributes:
      in_features: features contracted over.
      out_features: features of the result.
      block_size: one of `jax_blocksparse.BLOCK_SIZES`.
      tile_features: output features of a tile, 128 or 256; 128 for blocks of 64 and 128.
      capacity: the most blocks a step may have, for blocks of 8 to 32: what a stage of shared memory is made for. A
        chunk with more takes several steps.
    """

    in_features: int
    out_features: int
    block_size: int
    tile_features: int
    capacity: int

    @property
    def packs(self) -> bool:
        """Whether the kernel takes the blocks in the plan's order; else it fetches each by its id."""
        return self.block_size < CHUNK

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns."""
        return -(-self.in_features // self.block_size), -(-self.out_features // self.block_size)

    @property
    def tiles(self) -> int:
        """Tiles of output features."""
        return -(-self.out_features // self.tile_features)

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
    def passes(self) -> int:
        """Steps that a chunk full of blocks takes."""
        return -(-full_capacity(self.block_size, self.tile_features) // self.capacity) if self.packs else 1

    @property
    def max_steps(self) -> int:
        """Steps that a tile full of blocks takes."""
        return self.chunks * self.passes


class Plan(NamedTuple):
    """The lists, all int32.

    Attributes:
      order: (nnz,) block ids in the order in which the kernel wants their values, inert ones last; (0,) for blocks of
        64 and 128, which it takes in any order.
      tiles: (tiles, 2); per tile, those with most work first: which tile it is and how many steps it has.
      steps: (tiles, max_steps, 4). Blocks of 8 to 32: chunk, position in `order` of the first block, number of blocks,
        0. Blocks of 64 and 128: chunk, id of the block that meets the tile's first 64 features, id for the other 64
        (negative where there is none), 0.
      masks: (tiles, slices, max_steps), see `_masks`.
    """

    order: jax.Array
    tiles: jax.Array
    steps: jax.Array
    masks: jax.Array


def full_capacity(block_size: int, tile_features: int) -> int:
    """The number of blocks in which a tile meets a chunk."""
    return tile_features * CHUNK // block_size**2


def choose_layout(in_features: int, out_features: int, block_size: int, nnz: int) -> PlanLayout:
    """Chooses a layout by what is static about a pattern.

    Args:
      in_features: features contracted over.
      out_features: features of the result.
      block_size: one of `jax_blocksparse.BLOCK_SIZES`.
      nnz: number of blocks, inert ones included.

    Example:
      >>> choose_layout(4096, 4096, 32, nnz=1638)
      PlanLayout(in_features=4096, out_features=4096, block_size=32, tile_features=256, capacity=7)
    """
    grid = -(-in_features // block_size) * -(-out_features // block_size)
    density = min(1.0, nnz / max(1, grid))
    if block_size >= CHUNK:
        return PlanLayout(in_features, out_features, block_size, _LARGE_TILE, 0)
    tile_features = _choose_tile(block_size, density)
    return PlanLayout(
        in_features, out_features, block_size, tile_features, choose_capacity(block_size, tile_features, density)
    )


def _choose_tile(block_size: int, density: float) -> int:
    # A tile has as many sums either way. Copies bound sparse patterns, and a wide tile copies x less often; products
    # bound dense ones, and over 256 tokens they are twice as long, so that fewer have to be issued.
    return 256 if block_size == 32 and density < 0.4 else 128


def choose_capacity(block_size: int, tile_features: int, density: float) -> int:
    """A capacity that few steps of a random pattern of this density exceed, and that shared memory is not wasted on."""
    full = full_capacity(block_size, tile_features)
    density = min(1.0, density)  # inert and repeated blocks can make it more
    expected = full * density
    likely = math.ceil(expected + 3 * math.sqrt(expected * (1 - density))) + 1
    unit = max(1, _COPY_UNIT // (2 * block_size**2))
    least = full_capacity(block_size, max(16, block_size))  # the kernels want room for what one mask names
    return min(full, max(least, -(-likely // unit) * unit))


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
      >>> layout = PlanLayout(in_features=128, out_features=256, block_size=32, tile_features=256, capacity=16)
      >>> plan = make_plan(np.array([3, 0, 2]), np.array([1, 7, 0]), layout, np)
      >>> plan.order.tolist(), plan.tiles.tolist(), plan.steps[0].tolist()
      ([1, 2, 0], [[0, 2]], [[0, 0, 1, 0], [1, 1, 2, 0]])
    """
    grid = layout.grid
    live = (rows >= 0) & (rows < grid[0]) & (cols >= 0) & (cols < grid[1])
    make = _make_packed if layout.packs else _make_by_id
    return Plan(*(array.astype(np.int32) for array in make(rows, cols, live, layout, xp)))


def _make_packed(
    rows: jax.Array, cols: jax.Array, live: jax.Array, layout: PlanLayout, xp: ModuleType
) -> tuple[jax.Array, ...]:
    b, nnz = layout.block_size, rows.shape[0]
    in_slice = layout.slice_features // b  # block columns of a slice
    cell = cols * b // layout.tile_features * layout.chunks + rows * b // CHUNK
    slice_ = cols * b % layout.tile_features // layout.slice_features
    bit = rows % (CHUNK // b) * in_slice + cols % in_slice

    cells = layout.tiles * layout.chunks
    cell = xp.where(live, cell, cells)
    order = xp.lexsort((slice_ * 16 + bit, cell))
    cell, slice_, bit = cell[order], slice_[order], bit[order]
    start = xp.searchsorted(cell, xp.arange(cells + 1))
    rank = xp.arange(nnz) - start[cell]

    shape = (layout.tiles, layout.max_steps, layout.slices)
    number = cell * layout.passes + rank // layout.capacity
    in_a_step = (cell < cells) & (rank < layout.passes * layout.capacity)
    word = xp.where(in_a_step, number * layout.slices + slice_, math.prod(shape))
    present = _sum_at(xp, word, 1 << bit, math.prod(shape)).reshape(shape)
    counts = _sum_at(xp, word, xp.ones_like(bit), math.prod(shape)).reshape(shape)
    blocks = counts.sum(-1)

    step = xp.arange(layout.max_steps)
    first = start[:-1].reshape(layout.tiles, layout.chunks, 1) + xp.arange(layout.passes) * layout.capacity
    steps = xp.stack(
        [
            xp.broadcast_to(step // layout.passes, blocks.shape),
            first.reshape(blocks.shape),
            blocks,
            xp.zeros_like(blocks),
        ],
        -1,
    )
    masks = _masks(xp, present, counts, layout)
    # The bytes to copy, with x as a tile of 2^15 sums has it.
    work = (blocks > 0) * (2**15 // layout.tile_features * CHUNK) + blocks * b**2
    tiles, steps, masks = _compact(xp, blocks > 0, work.sum(-1), steps, masks)
    return order, tiles, steps, masks.swapaxes(1, 2)


def _masks(xp: ModuleType, present: jax.Array, counts: jax.Array, layout: PlanLayout) -> jax.Array:
    """Makes a word for each tile, step and slice.

    * bits 0 to 15: the blocks present, bit row * (block columns of a slice) + column
    * bits 16 to 19: for each 16 input features, whether the 64 features that the slice belongs to have any block there
    * bits 20 up: the position, among the blocks of the step, of the first one of the slice
    """
    b = layout.block_size
    in_slice = layout.slice_features // b
    depths = xp.arange(CHUNK // _DEPTH)
    bits = max(1, _DEPTH // b) * in_slice  # that 16 input features take in a word
    occupied = (present[..., None] >> (depths * _DEPTH // b * in_slice) & ((1 << bits) - 1)) != 0
    in_group = _GROUP // layout.slice_features
    groups = occupied.reshape(*present.shape[:-1], layout.slices // in_group, in_group, depths.shape[0]).any(-2)
    groups = xp.repeat((groups << depths).sum(-1), in_group, axis=-1)
    return present | groups << 16 | (xp.cumsum(counts, -1) - counts) << 20


def _make_by_id(
    rows: jax.Array, cols: jax.Array, live: jax.Array, layout: PlanLayout, xp: ModuleType
) -> tuple[jax.Array, ...]:
    pieces = layout.block_size // CHUNK  # that a block is cut into, each way
    part = xp.arange(pieces)
    chunk = rows[:, None, None] * pieces + part[:, None]
    group = cols[:, None, None] * pieces + part
    per_tile = _LARGE_TILE // _GROUP
    place = (group // per_tile * layout.chunks + chunk) * per_tile + group % per_tile
    shape = (layout.tiles, layout.chunks, per_tile)
    place = xp.where(live[:, None, None] & (chunk < layout.chunks), place, math.prod(shape))
    ids = xp.broadcast_to(xp.arange(rows.shape[0])[:, None, None] + 1, place.shape)
    ids = _sum_at(xp, place.ravel(), ids.ravel(), math.prod(shape)).reshape(shape) - 1

    chunks = xp.broadcast_to(xp.arange(layout.chunks), shape[:2])[..., None]
    steps = xp.concatenate([chunks, ids, xp.zeros_like(chunks)], -1)
    present = (ids >= 0).sum(-1)
    work = (present > 0) * 4 + present  # a piece of x is four times as large as one of W
    tiles, steps = _compact(xp, present > 0, work.sum(-1), steps)
    return xp.zeros(0, np.int32), tiles, steps, xp.zeros((layout.tiles, 0, layout.max_steps), np.int32)


def _compact(xp: ModuleType, keep: jax.Array, work: jax.Array, *per_step: jax.Array) -> tuple[jax.Array, ...]:
    """Moves the steps to keep to the front of their tile's list and the tiles with most work to the front."""
    by_work = xp.argsort(-work, stable=True)
    steps = xp.argsort(~keep[by_work], axis=1, stable=True)
    tiles = xp.stack([by_work, keep[by_work].sum(1)], -1)
    return tiles, *(xp.take_along_axis(array[by_work], steps[..., None], 1) for array in per_step)


def _sum_at(xp: ModuleType, index: jax.Array, values: jax.Array, size: int) -> jax.Array:
    """Sums values into an array of `size` zeros; the index `size` stands for nowhere."""
    if xp is np:
        return np.bincount(index, values, size + 1)[:size].astype(np.int32)
    return xp.zeros(size, np.int32).at[index].add(values, mode="drop")
