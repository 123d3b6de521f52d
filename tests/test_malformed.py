"""Index arrays that no constructor makes: whatever they hold, a product reads and writes its own buffers only.

The oracle is the contract of the custom calls, written out in NumPy: an id or a position out of range is skipped.
"""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_blocksparse as jbs

HUGE = 2**31 - 1
CASE = cases.BLOCKS[1]


def fenced(array, device):
    """The array on a device; on a CPU, with NaN (or the index 0) around it in memory, so that reading outside shows."""
    array = np.asarray(array)
    if device.platform != "cpu":
        return jax.device_put(array, device)
    margin, filler = 4096, 0 if np.issubdtype(array.dtype, np.integer) else np.nan
    memory = np.full(array.size + 2 * margin, filler, array.dtype)
    start = margin + -memory[margin:].ctypes.data % 64 // array.itemsize
    inside = memory[start : start + array.size].reshape(array.shape)
    inside[...] = array
    result = jax.device_put(inside, device, may_alias=True)
    assert result.unsafe_buffer_pointer() == inside.ctypes.data
    return result


def finite_w(case, dtype="float32"):
    """The case's matrix without the NaN in its tails, which a misplaced block may rightly bring into the matrix."""
    w = case.w(dtype)
    return dataclasses.replace(w, data=jnp.nan_to_num(w.data))


# What to put in place of one leaf of the pattern, made from the leaf as it should be.
BREAKAGES = {
    "negative": lambda leaf: np.full_like(leaf, -1),
    "very_negative": lambda leaf: np.full_like(leaf, -HUGE - 1),
    "huge": lambda leaf: np.full_like(leaf, HUGE),
    "one_too_many": lambda leaf: leaf + 1,
    "one_too_few": lambda leaf: leaf - 1,
    "decreasing": lambda leaf: leaf[::-1].copy(),
    "one_wild_entry": lambda leaf: np.concatenate([leaf[:1], [HUGE], leaf[2:]]).astype(np.int32),
    "end_before_start": lambda leaf: np.concatenate([leaf[:-1], [-HUGE]]).astype(np.int32),
    "far_beyond": lambda leaf: leaf * 1000 + 500,
}


def broken(pattern, name, breakage):
    leaf = BREAKAGES[breakage](np.asarray(getattr(pattern, name)))
    return dataclasses.replace(pattern, **{name: jnp.asarray(leaf)})


def matmul_by_contract(x, w):
    """x @ w, as the custom call has to compute it from the index arrays as they are."""
    pattern, b = w.pattern, w.block_size
    leaves = ("row_ptr", "row_order", "cols") if w.transposed else ("col_ptr", "col_order", "rows")
    ptr, order, inner = (np.asarray(getattr(pattern, name)) for name in leaves)
    in_blocks = -(-x.shape[1] // b)
    padded = np.pad(cases.wide(x), ((0, 0), (0, in_blocks * b - x.shape[1])))
    inside = np.arange(in_blocks * b) < x.shape[1]
    y = np.zeros((x.shape[0], (len(ptr) - 1) * b))
    for out in range(len(ptr) - 1):
        begin, end = np.clip(ptr[out : out + 2], 0, pattern.nnz)
        for z in order[begin:end]:
            if 0 <= z < pattern.nnz and 0 <= inner[z] < in_blocks:
                here = slice(inner[z] * b, (inner[z] + 1) * b)
                block = cases.wide(w.data[z])
                block = np.where(inside[here, None], block.T if w.transposed else block, 0)
                y[:, out * b : (out + 1) * b] += padded[:, here] @ block
    return y[:, : w.shape[1]]


def check_matmul(x, w, device, implementation, tolerance=1e-6):
    x, w = jax.tree.map(lambda leaf: fenced(leaf, device), (x, w))
    y = jbs.matmul(x, w, implementation=implementation, precision="highest")
    assert cases.relative_error(y, matmul_by_contract(x, w)) < tolerance


def check_sddmm(x, dy, pattern, device, implementation, tolerance=1e-6):
    x, dy, pattern = jax.tree.map(lambda leaf: fenced(leaf, device), (x, dy, pattern))
    blocks = jbs.sddmm(x, dy, pattern, implementation=implementation, precision="highest")
    wanted = cases.sampled(cases.wide(x).T @ cases.wide(dy), pattern)
    assert cases.relative_error(blocks, wanted) < tolerance


@pytest.mark.parametrize("breakage", BREAKAGES)
@pytest.mark.parametrize("name", ["rows", "col_ptr", "col_order"])
def test_matmul_skips_what_is_out_of_range(name, breakage, implementation, device):
    w = finite_w(CASE)
    w = dataclasses.replace(w, pattern=broken(w.pattern, name, breakage))
    check_matmul(CASE.x(), w, device, implementation)


@pytest.mark.parametrize("breakage", BREAKAGES)
@pytest.mark.parametrize("name", ["cols", "row_ptr", "row_order"])
def test_transposed_matmul_skips_what_is_out_of_range(name, breakage, implementation, device):
    w = finite_w(CASE)
    w = dataclasses.replace(w, pattern=broken(w.pattern, name, breakage))
    check_matmul(CASE.dy(), w.T, device, implementation)


@pytest.mark.parametrize("breakage", BREAKAGES)
@pytest.mark.parametrize("name", ["rows", "cols"])
def test_sddmm_gives_zeros_for_what_is_out_of_range(name, breakage, implementation, device):
    check_sddmm(CASE.x(), CASE.dy(), broken(CASE.pattern, name, breakage), device, implementation)


@pytest.mark.parametrize("case", cases.BLOCKS + cases.TINY, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("seed", range(3))
def test_random_numbers_for_indices(case, dtype, seed, device):
    """Every kernel, with all index arrays full of noise, some of it in range."""
    w, rng = finite_w(case, dtype), np.random.default_rng(seed)

    def noise(leaf):
        return jnp.asarray(np.where(rng.random(leaf.shape) < 0.7, rng.integers(-1, 7, leaf.shape), HUGE), jnp.int32)

    w = dataclasses.replace(w, pattern=jax.tree.map(noise, w.pattern))
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    check_matmul(case.x(dtype), w, device, "native", tolerance)
    check_matmul(case.dy(dtype), w.T, device, "native", tolerance)
    check_sddmm(case.x(dtype), case.dy(dtype), w.pattern, device, "native", tolerance)
