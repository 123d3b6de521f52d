"""What is static about the plan of a product: sizes, tiles, how many blocks a step may have, and how to choose that."""

import dataclasses
import math
from typing import NamedTuple

import jax

from jax_blocksparse.geometry import block_grid

CHUNK = 64
"""Input features in a step."""

HALF = 32
"""Input features that a step of small blocks can have without their neighbours."""

GROUP = 64
"""Output features in a group: those of one product of the tensor cores."""

PANEL = 32
"""Output features of which a group has two."""

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
    def stored_features(self) -> int:
        """Output features that stay together. As in sm90/matmul.h."""
        return PANEL if self.block_size == 16 else GROUP

    @property
    def slices(self) -> int:
        """Slices of a tile."""
        return self.tile_features // self.slice_features if self.packs else 0

    @property
    def joins_halves(self) -> bool:
        """Whether a step can have halves of two chunks. With blocks of 8, a tile meets both halves of most chunks."""
        return 8 < self.block_size < CHUNK

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
            tiles=(self.tiles, 8),
            steps=(self.max_steps, 4),
            masks=(self.slices, self.max_steps),
            order=(self.nnz if self.packs else 0,),
        )


class Plan(NamedTuple):
    """The lists, all int32.

    Attributes:
      tiles: (tiles, 8). Per tile, those with most work first: the panels of up to four groups, two of 16 bits in a word
        each, its first step, how many it has, and two unused words.
      steps: (max_steps, 4). Blocks of 8 to 32: first half of a chunk, position in `order` of the first block, number of
        blocks, second half (negative where there is none). Blocks of 64 and 128: chunk, id of the block that meets the
        tile's first group, id for the other one (negative where there is none), 0.
      masks: (slices, max_steps), see `_masks` of plan.py; none for blocks of 64 and 128.
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
    density = min(1.0, max(1e-3, density))  # inert and repeated blocks can make it more
    # Of each of two halves, which have at least one.
    half = full / 2
    expected = half * density / (1 - (1 - density) ** half)
    variance = expected * (1 - density + half * density - expected)
    expected, deviation = 2 * expected, math.sqrt(2 * max(0.0, variance))
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
