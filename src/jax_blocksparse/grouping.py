"""Which groups of output features share a tile: such as meet the same input features.

A tile reads the union of what its groups read. Of random columns, those put together by likeness have a union up to a
fifth smaller than neighbours have; of columns in no particular order that belong together, a much smaller one.
"""

import functools
import operator
from types import ModuleType
from typing import NamedTuple

import jax
import numpy as np

from jax_blocksparse.arrays import count_at, repeat

NEIGHBOURS = 256
"""About as many groups find partners among each other; comparing each with each would take much memory and time."""

MOST_GROUPS = 1024
"""More never do."""

_ROUNDS = 8  # after which few groups are left without a partner
_NEVER, _ALWAYS = np.int32(np.iinfo(np.int32).min), np.int32(np.iinfo(np.int32).max)


def pair_up(met: jax.Array, xp: ModuleType) -> jax.Array:
    """Puts pairs of groups that share much next to each other.

    Who likes each other most becomes a pair: in each round, all groups that are each other's best choice among those
    still free. Who is left in the end is paired in order. Groups like to share, and less so if the pair would have much
    more or less than others: tiles of like work keep step, and find in L2 what they share.

    Args:
      met: (sets, groups, parts) bool, where a group of a set has blocks; an even number of groups.
      xp: `numpy` or `jax.numpy`.

    Returns:
      (sets, groups) the order in which the groups at 2 i and 2 i + 1 make a pair, in each set.

    Example:
      >>> import numpy as np
      >>> met = np.array([[[1, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 1]]], bool)
      >>> pair_up(met, np).tolist()
      [[0, 2, 1, 3]]
    """
    groups = met.shape[1]
    here = xp.arange(groups, dtype=np.int32)
    met = met.astype(np.float32)
    shared = (met @ xp.swapaxes(met, 1, 2)).astype(np.int32)
    size = met.sum(2).astype(np.int32)
    usual = ((2 * size.sum(1) + groups // 2) // groups).astype(np.int32)
    uneven = abs(size[:, :, None] + size[:, None] - usual[:, None, None])
    # Among equals, a neighbour; and not everybody's first choice is the same.
    own = (here * 7919 + here**2 % groups * 10477) % groups
    tie = (own[:, None] + own - 2 * 10477 % groups * here[:, None] * here) % groups
    tie = xp.where(here[:, None] ^ 1 == here, groups, tie)
    liking = xp.where(here[:, None] == here, _NEVER, (2 * shared - uneven) * (groups + 1) + tie)

    def match(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        liking, partner = state
        best = xp.argmax(liking, axis=2).astype(np.int32)
        is_free = partner == groups
        is_mutual = xp.take_along_axis(best, best, 1) == here
        found = is_mutual & is_free & xp.take_along_axis(is_free, best, 1)
        return xp.minimum(liking, xp.where(found, _NEVER, _ALWAYS)[:, None]), xp.where(found, best, partner)

    _, partner = repeat(xp, _ROUNDS, match, (liking, xp.full(size.shape, groups, np.int32)))
    return xp.argsort(xp.where(partner == groups, groups, xp.minimum(here, partner)), axis=1, stable=True)


def _sets(groups: int, neighbours: int) -> int:
    """Into how many sets of the same, even size, about `neighbours`, an even number of groups is divided."""
    pairs = groups // 2
    sizes = (2 * size for size in range(1, min(pairs, MOST_GROUPS // 2) + 1) if pairs % size == 0)
    return groups // min(sizes, key=lambda size: max(size / neighbours, neighbours / size))


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


def arrange(
    xp: ModuleType,
    group: jax.Array,
    part: jax.Array,
    live: jax.Array,
    extents: tuple[int, int, int, int],
    *,
    fine: int = 1,
    stays: bool = False,
) -> Arrangement:
    """Arranges groups so that those of a tile share much, and the chunks of each tile.

    Args:
      xp: `numpy` or `jax.numpy`.
      group: of each piece of the pattern, the group of output features.
      part: of each piece, the part of the input features: the chunk, or half of it, or what `fine` says.
      live: whether the piece is there.
      extents: the number of tiles, of the groups of a tile, which is a power of two, of chunks, and of parts of one.
      fine: into how many parts each of those is cut by which the first pairs are made.
      stays: whether groups stay in order.
    """
    tiles, per_tile, chunks, parts = extents
    count = tiles * per_tile
    groups = xp.arange(count)[:, None]  # what is together so far, a row each
    parts_of_all = chunks * parts * fine
    cell = xp.where(live, group * parts_of_all + part, count * parts_of_all)
    met = count_at(xp, cell.ravel(), count * parts_of_all).reshape(count, parts_of_all) > 0
    while groups.shape[1] < per_tile and not stays:
        sets = _sets(len(groups), NEIGHBOURS // (fine if groups.shape[1] == 1 else 1))
        order = pair_up(met.reshape(sets, -1, met.shape[1]), xp)
        order = (order + xp.arange(sets)[:, None] * order.shape[1]).ravel()
        groups = groups[order].reshape(-1, groups.shape[1] * 2)
        met = met[order[::2]] | met[order[1::2]]
        each = met.shape[1] // (chunks * parts)
        met = functools.reduce(operator.or_, (met[:, i::each] for i in range(each)))
    place = xp.argsort(groups.ravel()).astype(np.int32)
    met = met.reshape(tiles, -1, chunks, met.shape[1] // chunks).any((1, 3))
    first = met.argmax(1).astype(np.int32)
    extent = chunks - met[:, ::-1].argmax(1).astype(np.int32) - first
    modulus = xp.where(2 * met.sum(1) > extent, extent, chunks).astype(np.int32)
    return Arrangement(groups.reshape(tiles, per_tile), place // per_tile, place % per_tile, first, modulus)
