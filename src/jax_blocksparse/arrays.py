"""What plans need of arrays, much of it different in NumPy and jax.numpy. `xp` is one of the two."""

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeVar

import jax
import numpy as np

_State = TypeVar("_State")

_ALIGNMENT = 4  # integers: the kernels read four at a time
_DIGIT = 16  # bits


def keep_freed_memory() -> None:
    """Has the C library keep up to 48 MB of freed memory, where it is glibc, instead of giving it back to the system.

    A third of the time of a plan was getting it again, array by array. glibc stops that for arrays no larger than the
    largest freed so far, up to 32 MB.
    """
    np.empty(24 * 2**20, np.uint8)


def order_of(xp: ModuleType, key: jax.Array) -> jax.Array:
    """The stable order of integers."""
    if xp is not np:
        return xp.argsort(key, stable=True)
    if not key.size:
        return np.zeros(0, np.int64)
    # NumPy sorts numbers of 16 bits by counting them: a third of the time of sorting, with the keys, where they were.
    key = key.astype(np.int64) - key.min()
    order = np.argsort(key.astype(np.uint16), kind="stable")
    for shift in range(_DIGIT, int(key.max()).bit_length(), _DIGIT):
        order = order[np.argsort((key >> shift).astype(np.uint16)[order], kind="stable")]
    return order


def order_by(xp: ModuleType, major: jax.Array, minor: jax.Array, minors: int) -> jax.Array:
    """The stable order by `major`, then by `minor`, whose numbers are 0 to minors - 1."""
    if xp is np:  # jax.numpy has no integers that surely hold both
        return order_of(np, major.astype(np.int64) * minors + minor)
    return xp.lexsort((minor, major))


def sum_at(xp: ModuleType, index: jax.Array, values: jax.Array, size: int) -> jax.Array:
    """Sums values into an array of `size` zeros; the index `size` stands for nowhere."""
    if xp is np:
        return np.bincount(index, values, size + 1)[:size].astype(np.int32)
    return xp.zeros(size, np.int32).at[index].add(values.astype(np.int32), mode="drop")


def count_at(xp: ModuleType, index: jax.Array, size: int) -> jax.Array:
    """How often each of the numbers below `size` is in `index`; the number `size` stands for nowhere."""
    if xp is np:
        return np.bincount(index, minlength=size + 1)[:size].astype(np.int32)
    return sum_at(xp, index, xp.ones_like(index), size)


def count_up_to(xp: ModuleType, values: jax.Array, size: int) -> jax.Array:
    """For each number below `size`, how many of the values are at most that.

    A table to look up instead of searching sorted values, which is a loop on the device.
    """
    return xp.cumsum(count_at(xp, values, size), dtype=np.int32)


def put_at(xp: ModuleType, index: jax.Array, values: jax.Array, size: int) -> jax.Array:
    """Puts values into an array of `size` zeros; an index beyond stands for nowhere."""
    if xp is np:
        result = np.zeros(size + 1, np.int32)
        result[np.minimum(index, size)] = values
        return result[:size]
    return xp.zeros(size, np.int32).at[index].set(values.astype(np.int32), mode="drop")


def last_flagged(xp: ModuleType, flags: jax.Array) -> jax.Array:
    """For each position, the last flagged one up to it, or 0."""
    flagged = xp.where(flags, xp.arange(flags.shape[0]), 0)
    return np.maximum.accumulate(flagged) if xp is np else jax.lax.cummax(flagged)


def changes(xp: ModuleType, values: jax.Array) -> jax.Array:
    """Where a value differs from the one before; true at the front."""
    return xp.concatenate([xp.ones(min(1, values.shape[0]), bool), values[1:] != values[:-1]])


def repeat(xp: ModuleType, times: int, step: Callable[[_State], _State], state: _State) -> _State:
    """Applies a function that many times."""
    if xp is not np:
        return jax.lax.fori_loop(0, times, lambda _, state: step(state), state)
    for _ in range(times):
        state = step(state)
    return state


def flat_size(layout: Any) -> int:
    """The number of integers in a flat plan with the lists of `layout.shapes`."""
    return sum(-(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT for shape in layout.shapes)


def flatten(lists: Sequence[jax.Array], xp: ModuleType) -> jax.Array:
    """Puts lists one after the other, each padded to a multiple of 16 bytes."""
    return xp.concatenate([xp.pad(each.ravel(), (0, -each.size % _ALIGNMENT)) for each in lists])
