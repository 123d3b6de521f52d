"""Which groups of output features share a tile: such as meet the same input features.

A tile reads the union of what its groups read. Of random columns, those put together by likeness have a union up to a
fifth smaller than neighbours have; of columns in no particular order that belong together, a much smaller one.
"""

from types import ModuleType
from typing import NamedTuple

import jax
import numpy as np

from jax_blocksparse.arrays import count_at, repeat

MOST_GROUPS = 1024
"""Beyond, groups stay in order: comparing each with each would take too much memory and time."""

_ROUNDS = 8  # after which few groups are left without a partner
_NEVER = np.iinfo(np.int32).min


def pair_up(met: jax.Array, xp: ModuleType) -> jax.Array:
    """Puts pairs of groups that share much next to each other.

    Who likes each other most becomes a pair: in each round, all groups that are each other's best choice among those
    still free. Who is left in the end is paired in order. Groups like to share, and less so if the pair would have much
    more or less than others: tiles of like work keep step, and find in L2 what they share.

    Args:
      met: (groups, parts) bool, where a group has blocks; an even number of groups.
      xp: `numpy` or `jax.numpy`.

    Returns:
      (groups,) the order in which the groups at 2 i and 2 i + 1 make a pair.

    Example:
      >>> import numpy as np
      >>> met = np.array([[1, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 1]], bool)
      >>> pair_up(met, np).tolist()
      [0, 2, 1, 3]
    """
    groups = met.shape[0]
    here = xp.arange(groups)
    met = met.astype(np.float32)
    shared = (met @ met.T).astype(np.int32)
    size = met.sum(1).astype(np.int32)
    uneven = abs(size[:, None] + size - (2 * size.sum() + groups // 2) // groups)
    # Among equals, a neighbour; and not everybody's first choice is the same.
    tie = ((here[:, None] + here) * 7919 + (here[:, None] - here) ** 2 % groups * 10477) % groups
    tie = xp.where(here[:, None] ^ 1 == here, groups, tie)
    liking = xp.where(here[:, None] == here, _NEVER, (2 * shared - uneven) * (groups + 1) + tie)

    def match(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        liking, partner = state
        best = xp.argmax(liking, axis=1)
        found = (best[best] == here) & (partner == groups)
        taken = found[:, None] | found
        return xp.where(taken, _NEVER, liking), xp.where(found, best, partner)

    _, partner = repeat(xp, _ROUNDS, match, (liking, xp.full_like(here, groups)))
    is_left = partner == groups
    return xp.argsort(xp.where(is_left, groups, xp.minimum(here, partner)), stable=True)


class Arrangement(NamedTuple):
    """Which groups make which tile, and in which order a tile meets its chunks.

    The order is that of the chunks; but where most of those between the first and the last are met, as in a band, it is
    that of their numbers modulo their extent. So tiles along a band, whose ranges overlap, read the same at the same
    time, and not each something new at first.

    Attributes:
      groups: (tiles, groups of a tile) the groups of each tile.
      tile: (groups,) the tile of each group.
      place: (groups,) the place of each group in its tile.
      first: (tiles,) the first chunk of each tile.
      modulus: (tiles,) by which its chunks are ordered.
    """

    groups: jax.Array
    tile: jax.Array
    place: jax.Array
    first: jax.Array
    modulus: jax.Array

    def turn_of(self, tile: jax.Array, chunk: jax.Array) -> jax.Array:
        """The number by which a chunk is ordered in a tile."""
        return chunk % self.modulus[tile]

    def chunk_at(self, tile: jax.Array, turn: jax.Array) -> jax.Array:
        """The chunk that has this number."""
        return self.first[tile] + (turn - self.first[tile]) % self.modulus[tile]

    def words(self, xp: ModuleType) -> jax.Array:
        """(tiles, 2) the groups of each tile, two to a word, 16 bits each; the second word is 0 if there are two."""
        pairs = self.groups.reshape(len(self.groups), -1, 2)
        words = pairs[..., 0] | pairs[..., 1] << 16
        return xp.pad(words, ((0, 0), (0, 2 - words.shape[1])))


def arrange(
    xp: ModuleType,
    group: jax.Array,
    part: jax.Array,
    live: jax.Array,
    extents: tuple[int, int, int, int],
    *,
    stays: bool = False,
) -> Arrangement:
    """Arranges groups so that those of a tile share much, and the chunks of each tile.

    Args:
      xp: `numpy` or `jax.numpy`.
      group: of each piece of the pattern, the group of output features.
      part: of each piece, the part of the input features: the chunk, or half of it.
      live: whether the piece is there.
      extents: the number of tiles, of the groups of a tile, which is a power of two, of chunks, and of parts of one.
      stays: whether groups stay in order, as they do where there are too many.
    """
    tiles, per_tile, chunks, parts = extents
    count = tiles * per_tile
    groups = xp.arange(count)[:, None]  # what is together so far, a row each
    cell = xp.where(live, group * chunks * parts + part, count * chunks * parts)
    met = count_at(xp, cell.ravel(), count * chunks * parts).reshape(count, -1) > 0
    if not stays and count <= MOST_GROUPS:
        while groups.shape[1] < per_tile:
            order = pair_up(met, xp)
            groups = groups[order].reshape(-1, groups.shape[1] * 2)
            met = met[order].reshape(groups.shape[0], 2, -1).any(1)
    place = xp.argsort(groups.ravel()).astype(np.int32)
    met = met.reshape(tiles, -1, chunks, parts).any((1, 3))
    first = met.argmax(1).astype(np.int32)
    extent = chunks - met[:, ::-1].argmax(1).astype(np.int32) - first
    modulus = xp.where(2 * met.sum(1) > extent, extent, chunks)
    return Arrangement(groups.reshape(tiles, per_tile), place // per_tile, place % per_tile, first, modulus)
