"""Runs every kernel for GPUs once, on small sizes, for compute-sanitizer to look at:

    compute-sanitizer --kernel-name kns=jax_blocksparse --tool memcheck python tests/sanitize.py
    compute-sanitizer --kernel-name kns=jax_blocksparse --tool racecheck python tests/sanitize.py

With two numbers, I and N, it takes every N-th check from check I on, so that N processes can share the work. Each
compute-sanitizer then needs a `--port` of its own: they crash where they meet.

Plans and lists full of random numbers are among the inputs: whatever they lead to, it must not be outside a buffer.
"""

import os

# Choosing among XLA's own kernels would take most of the time.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"

import dataclasses
import functools
import itertools
import sys
import time
from unittest import mock

import cases
import jax
import jax.numpy as jnp
import numpy as np

import jax_blocksparse as jbs
from jax_blocksparse import activations, lowering

SHAPE = (328, 392)  # what tensor copies accept, and multiples of no tile
ODD_SHAPE = (61, 45)
TINY_SHAPE = (120, 104)  # of which all fits into shared memory
PAIRED = ((128, (2056, 2056)), (32, (3080, 2056)))  # large enough for tiles of dW that share copies
# Tiles that five, four, three or, in pairs, four and two share; the last in units of 64.
SHARED = (
    (32, (2056, 2056), 0.15),
    (64, (3080, 1032), 0.25),
    (32, (4104, 4104), 0.085),
    (16, (2056, 2056), 0.1),
    (32, (4104, 4104), 0.1),
    (32, (2056, 2056), 0.03),
)
MANY_TOKENS = 4400  # with these shapes, more tiles of any size than an H100 has SMs
WIDE, TALL, SQUARE = (136, 1032), (1032, 136), (1032, 1032)


def damaged(w):
    """The matrix with random numbers in its index arrays."""
    random = np.random.default_rng(0)
    wild = np.array([-(2**31), -1, 0, 1, 2, 3, 7, 1000, 2**20 + 5, 2**31 - 1])
    leaves = {
        name: jnp.asarray(np.where(random.random(leaf.shape) < 0.3, random.choice(wild, leaf.shape), leaf))
        for name in jbs.pattern.INDEX_NAMES
        for leaf in [np.asarray(getattr(w.pattern, name))]
    }
    leaves = {name: leaf.astype(jnp.int32) for name, leaf in leaves.items()}
    return dataclasses.replace(w, pattern=dataclasses.replace(w.pattern, **leaves))


def products(dtype, block_size, tokens, shape, *, density=0.4, damage=False, precision=None):
    """Compares y, dx and dW with NumPy, or only computes them if the index arrays are damaged."""
    w = cases.random_w(shape, block_size, density=density, dtype=dtype)
    if damage:
        w = damaged(w)
    x, dy = (cases.normal((tokens, size), dtype, seed=1) for size in shape)

    @jax.jit
    def run(x, dy, w):
        options = {"precision": precision, "implementation": "native"}
        return jbs.matmul(x, w, **options), jbs.matmul(dy, w.T, **options), jbs.sddmm(x, dy, w.pattern, **options)

    results = jax.block_until_ready(run(x, dy, w))
    if damage:
        return
    dense, x, dy = cases.dense(w), cases.wide(x), cases.wide(dy)
    wanted = x @ dense, dy @ dense.T, cases.sampled(x.T @ dy, w.pattern)
    for name, got, want in zip(("y", "dx", "dW"), results, wanted, strict=True):
        error = cases.relative_error(got, want)
        assert error < (1e-3 if dtype == "float32" else 6e-3), (
            f"{name} {dtype} {block_size} {tokens}: error {error:.1e}"
        )


def few_rows(block_size, tokens, *, packs=False, damage=False):
    """Compares y and dx of few rows and uneven columns with NumPy, with x packed if asked for."""
    with mock.patch.object(lowering, "PACKING_PAYS_FROM", 0 if packs else 2**40):
        for transposed in (False, True):
            w = cases.uneven_w(block_size, "bfloat16", transposed=transposed)
            x = cases.normal((tokens, w.shape[0]), "bfloat16", seed=1)
            y = jax.block_until_ready(jbs.matmul(x, damaged(w) if damage else w, implementation="native"))
            if not damage:
                error = cases.relative_error(y, cases.wide(x) @ cases.dense(w))
                assert error < 6e-3, f"few rows {block_size} {tokens} {packs}: error {error:.1e}"


def layer(dtype, block_size, activation, *, tokens=300, shape=SHAPE, density=0.4, damage=False):
    """Compares the gradients of a fused layer with those of plain JAX on the CPU, or only computes them."""
    make = damaged if damage else lambda w: w
    w_in, w_out = (make(cases.random_w(s, block_size, density=density, dtype=dtype)) for s in (shape, shape[::-1]))
    x, ct = (cases.normal((tokens, shape[0]), dtype, seed=i) for i in (1, 2))
    biases = [cases.normal(size, "float32", seed=3) for size in shape[::-1]]

    def fused(x, data_in, data_out, *biases):
        matrices = jbs.BlockSparseMatrix(data_in, w_in.pattern), jbs.BlockSparseMatrix(data_out, w_out.pattern)
        options = {"activation": activation, "implementation": "native"}
        return jbs.mlp(x, *matrices, bias_in=biases[0], bias_out=biases[1], **options)

    args = x, w_in.data, w_out.data, *biases
    got = jax.block_until_ready(jax.jit(lambda ct, *args: jax.vjp(fused, *args)[1](ct))(ct, *args))
    if damage:
        return

    def plain(x, w_in, w_out, *biases):
        return activations.value(activation, x @ w_in + biases[0]) @ w_out + biases[1]

    with jax.default_device(jax.devices("cpu")[0]):  # which takes less time to compile for, and no cuBLAS
        args = [jnp.asarray(cases.wide(arg), "float32") for arg in (x, cases.dense(w_in), cases.dense(w_out), *biases)]
        dx, dw_in, dw_out, *d_biases = jax.vjp(plain, *args)[1](jnp.asarray(cases.wide(ct), "float32"))
    wanted = dx, cases.sampled(dw_in, w_in.pattern), cases.sampled(dw_out, w_out.pattern), *d_biases
    for i, (each, want) in enumerate(zip(got, wanted, strict=True)):
        error = cases.relative_error(each, cases.wide(want))
        assert error < 2e-2, f"gradient {i} of {activation} {dtype} {block_size}: error {error:.1e}"


def checks():
    """All of them, each a function without arguments."""
    small = [
        *(("bfloat16", b, tokens, SHAPE) for b, tokens in itertools.product(jbs.BLOCK_SIZES, (1, 33, 300))),
        *(("float16", b, 300, SHAPE) for b in jbs.BLOCK_SIZES),
        *(("float32", b, 300, SHAPE) for b in jbs.BLOCK_SIZES),
        *(("float32", b, 70, ODD_SHAPE) for b in jbs.BLOCK_SIZES),
        *(("bfloat16", b, 130, ODD_SHAPE) for b in jbs.BLOCK_SIZES),
    ]
    for each in small:
        yield functools.partial(products, *each)
    # Large tiles, several for each SM. With few blocks of 64 or 128, or few features, two teams take turns; with few of
    # 16 and 32, halves of chunks share steps.
    large = [
        *itertools.product(("bfloat16", "float32"), jbs.BLOCK_SIZES, (WIDE, TALL), (0.4,)),
        *itertools.product(("bfloat16", "float32"), (64, 128), (SQUARE,), (0.4, 0.1)),
        ("bfloat16", 128, (2568, 2568), 0.12),
        *itertools.product(("bfloat16", "float32"), (16, 32), (SQUARE,), (0.05,)),
        *itertools.product(("float16",), jbs.BLOCK_SIZES, (TALL,), (0.4,)),
    ]
    for dtype, b, shape, density in large:
        yield functools.partial(products, dtype, b, MANY_TOKENS, shape, density=density)
    for b, tokens in itertools.product(jbs.BLOCK_SIZES, (33, 300)):
        yield functools.partial(products, "bfloat16", b, tokens, SHAPE, damage=True)
    # Few blocks, of which a kernel holds all.
    for b, damage in itertools.product(jbs.BLOCK_SIZES, (False, True)):
        yield functools.partial(products, "bfloat16", b, 35, TINY_SHAPE, density=0.1, damage=damage)
    for b in jbs.BLOCK_SIZES:
        yield functools.partial(products, "float32", b, 300, SHAPE, damage=True)
    for b, tokens, damage in itertools.product(jbs.BLOCK_SIZES, (33, 300), (False, True)):
        yield functools.partial(products, "float32", b, tokens, SHAPE, damage=damage, precision="highest")
    for dtype, (b, shape), damage in itertools.product(("bfloat16", "float32"), PAIRED, (False, True)):
        yield functools.partial(products, dtype, b, 300, shape, density=0.5, damage=damage)
    for b, damage in itertools.product(jbs.BLOCK_SIZES, (False, True)):
        yield functools.partial(few_rows, b, 6, damage=damage)
        yield functools.partial(few_rows, b, 31, damage=damage)
        if b <= 32:
            yield functools.partial(few_rows, b, 39, packs=True, damage=damage)
    for dtype, (b, shape, density), damage in itertools.product(("bfloat16", "float32"), SHARED, (False, True)):
        yield functools.partial(products, dtype, b, 300, shape, density=density, damage=damage)
    layers = [
        *(("bfloat16", b, "gelu_tanh") for b in jbs.BLOCK_SIZES),
        *(("float16", 16, activation) for activation in activations.ACTIVATIONS),
        *(("bfloat16", 64, activation) for activation in activations.ACTIVATIONS),
        ("float32", 32, "silu"),
    ]
    for each in layers:
        yield functools.partial(layer, *each)
    for tokens in (7, 40):
        yield functools.partial(layer, "bfloat16", 32, "gelu_tanh", tokens=tokens)
    for b in (32, 128):
        yield functools.partial(layer, "bfloat16", b, "relu", damage=True)
    for b, density, damage in itertools.product((64, 128), (0.4, 0.1), (False, True)):
        many = {"tokens": MANY_TOKENS, "shape": SQUARE, "density": density, "damage": damage}
        yield functools.partial(layer, "bfloat16", b, "gelu_tanh", **many)


def main(part=0, parts=1):
    for index, check in itertools.islice(enumerate(checks()), int(part), None, int(parts)):
        start = time.perf_counter()
        check()
        seconds = time.perf_counter() - start
        print(f"{index} ({seconds:.1f} s)", check.func.__name__, *check.args, *check.keywords.items(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
