"""What plans need of arrays, in NumPy and jax.numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_blocksparse.arrays import count_up_to, last_flagged, order_by, order_of

MODULES = pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])


@MODULES
@pytest.mark.parametrize("largest", [3, 2**31 - 1])
@pytest.mark.parametrize("minors", [2**20, 2**31])  # the second leaves no room for positions beside both
def test_order_is_stable_by_both_numbers(xp, largest, minors):
    rng = np.random.default_rng(0)
    major = rng.integers(-largest - 1, largest, 500, endpoint=True).astype(np.int32)
    major[::3] = major[0]
    minor = rng.integers(0, minors, 500).astype(np.int32)
    minor[::2] = minor[0]
    order = order_by(xp, xp.asarray(major), xp.asarray(minor), minors)
    np.testing.assert_array_equal(order, np.lexsort((minor, major)))


@MODULES
@pytest.mark.parametrize("largest", [3, 2**31 - 1])
def test_order_of_numbers_is_stable(xp, largest):
    key = np.random.default_rng(0).integers(-largest - 1, largest, 500, endpoint=True).astype(np.int32)
    key[::3] = key[0]
    np.testing.assert_array_equal(order_of(xp, xp.asarray(key)), np.argsort(key, kind="stable"))


@MODULES
def test_no_numbers_have_an_empty_order(xp):
    assert order_by(xp, xp.zeros(0, np.int32), xp.zeros(0, np.int32), 4).shape == (0,)


@MODULES
def test_counts_up_to_each_number(xp):
    values = np.array([2, 2, 3, 7, 9], np.int32)  # 9 is beyond
    np.testing.assert_array_equal(count_up_to(xp, xp.asarray(values), 9), [0, 0, 2, 3, 3, 3, 3, 4, 4])


@MODULES
def test_last_flagged_position(xp):
    flags = xp.asarray([False, False, True, False, True, False])
    np.testing.assert_array_equal(last_flagged(xp, flags), [0, 0, 2, 2, 4, 4])
