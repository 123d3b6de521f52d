"""Runs every kernel for GPUs once, on small sizes, for compute-sanitizer to look at:

    compute-sanitizer --tool memcheck python tests/sanitize.py
    compute-sanitizer --tool racecheck python tests/sanitize.py

Plans and lists full of random numbers are among the inputs: whatever they lead to, it must not be outside a buffer.
"""

import dataclasses
import itertools
import sys

import cases
import jax
import jax.numpy as jnp
import numpy as np

import jax_blocksparse as jbs

SHAPE = (328, 392)  # what tensor copies accept, and multiples of no tile
ODD_SHAPE = (61, 45)
PAIRED = ((128, (2056, 2056)), (32, (3080, 2056)))  # large enough for tiles of dW that share copies
MANY_TOKENS = 4400  # with these shapes, more tiles of any size than an H100 has SMs
WIDE, TALL = (136, 1032), (1032, 136)


def products(dtype, block_size, tokens, shape, *, density=0.4, activation=None, damage=False):
    """Compares y, dx and dW with NumPy, or only computes them if the index arrays are damaged."""
    w = cases.random_w(shape, block_size, density=density, dtype=dtype)
    if damage:
        random = np.random.default_rng(0)
        wild = np.array([-(2**31), -1, 0, 1, 2, 3, 7, 1000, 2**20 + 5, 2**31 - 1])
        leaves = {
            name: jnp.asarray(np.where(random.random(leaf.shape) < 0.3, random.choice(wild, leaf.shape), leaf))
            for name in jbs.pattern.INDEX_NAMES
            for leaf in [np.asarray(getattr(w.pattern, name))]
        }
        leaves = {name: leaf.astype(jnp.int32) for name, leaf in leaves.items()}
        w = dataclasses.replace(w, pattern=dataclasses.replace(w.pattern, **leaves))
    x, dy = (cases.normal((tokens, size), dtype, seed=1) for size in shape)

    @jax.jit
    def run(x, dy, w):
        y = jbs.matmul(x, w, activation=activation, implementation="native")
        dx = jbs.matmul(dy, w.T, implementation="native")
        return y, dx, jbs.sddmm(x, dy, w.pattern, implementation="native")

    results = jax.block_until_ready(run(x, dy, w))
    if damage:
        return
    dense, x, dy = cases.dense(w), cases.wide(x), cases.wide(dy)
    wanted = x @ dense, dy @ dense.T, cases.sampled(x.T @ dy, w.pattern)
    if activation is not None:
        wanted = (np.maximum(wanted[0], 0), *wanted[1:])
    for name, got, want in zip(("y", "dx", "dW"), results, wanted, strict=True):
        error = cases.relative_error(got, want)
        assert error < (1e-5 if dtype == "float32" else 6e-3), (
            f"{name} {dtype} {block_size} {tokens}: error {error:.1e}"
        )


def main():
    checks = [
        *(("bfloat16", b, tokens, SHAPE) for b, tokens in itertools.product(jbs.BLOCK_SIZES, (1, 33, 300))),
        *(("float16", b, 300, SHAPE) for b in jbs.BLOCK_SIZES),
        *(("float32", b, 70, ODD_SHAPE) for b in jbs.BLOCK_SIZES),
        *(("bfloat16", b, 130, ODD_SHAPE) for b in jbs.BLOCK_SIZES),
    ]
    for check in checks:
        products(*check)
    # Large tiles, several for each SM; at the lower density blocks of 128 have another kernel.
    large = [*itertools.product(("bfloat16", "float16"), jbs.BLOCK_SIZES, (WIDE, TALL), (0.4, 0.1))]
    for dtype, b, shape, density in large:
        products(dtype, b, MANY_TOKENS, shape, density=density)
    for b, tokens in itertools.product(jbs.BLOCK_SIZES, (33, 300)):
        products("bfloat16", b, tokens, SHAPE, damage=True)
    for b in (16, 64):
        products("bfloat16", b, 300, SHAPE, activation="relu")
    for b, shape in PAIRED:
        products("bfloat16", b, 300, shape, density=0.5)
        products("bfloat16", b, 300, shape, density=0.5, damage=True)
    print(f"{len(checks) + len(large) + 2 * len(jbs.BLOCK_SIZES) + 2 + 2 * len(PAIRED)} checks")


if __name__ == "__main__":
    sys.exit(main())
