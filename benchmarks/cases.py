"""What is measured: shapes, products, patterns, and the named selections of them."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.numpy as jnp

from jax_blocksparse import BlockPattern, patterns

PRODUCTS = ("y", "dx", "dw")
"""y = x W, dx = dy W^T, dw = x^T dy (its blocks, where W is block-sparse)."""

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16}

PATTERNS: dict[str, Callable[..., BlockPattern]] = {
    "random": lambda shape, b, density: patterns.random(shape, b, density=density, seed=0),
    "bernoulli": lambda shape, b, density: patterns.random(shape, b, density=density, seed=0, distribution="bernoulli"),
    "banded": lambda shape, b, density: patterns.banded(shape, b, density=density),
    "block-diagonal": lambda shape, b, density: patterns.block_diagonal(shape, b, density=density),
    "butterfly": lambda shape, b, density: patterns.butterfly(shape, b, density=density),
}
"""Each takes the shape (K, N), the block size and the density."""


class Shape(NamedTuple):
    """M tokens, K input features, N output features."""

    m: int
    k: int
    n: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Reads "MxKxN"; raises ValueError if that is not what the text is."""
        try:
            m, k, n = (int(size) for size in text.split("x"))
        except ValueError:
            raise ValueError(f"a shape is written MxKxN, such as 2048x2048x2048; got {text!r}") from None
        if min(m, k, n) < 1:
            raise ValueError(f"a shape has positive sizes, got {text!r}")
        return cls(m, k, n)

    def __str__(self) -> str:
        return f"{self.m}x{self.k}x{self.n}"


@dataclasses.dataclass(frozen=True)
class Workload:
    """One product at one size: what the dense and the block-sparse contenders have in common."""

    shape: Shape
    dtype: str
    product: str

    @property
    def dense_flops(self) -> int:
        """Multiplications and additions of the dense product."""
        return 2 * self.shape.m * self.shape.k * self.shape.n


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """Where the blocks of W are."""

    pattern: str
    block_size: int
    density: float

    def make(self, shape: Shape) -> BlockPattern:
        """Returns the pattern for the W of this shape."""
        return PATTERNS[self.pattern]((shape.k, shape.n), self.block_size, self.density)


@dataclasses.dataclass(frozen=True)
class Selection:
    """What to measure: all combinations of these."""

    shapes: tuple[Shape, ...]
    blocks: tuple[int, ...]
    densities: tuple[float, ...]
    dtypes: tuple[str, ...]
    products: tuple[str, ...] = PRODUCTS
    patterns: tuple[str, ...] = ("random",)
    implementations: tuple[str, ...] = ("native",)

    def groups(self) -> Iterator[tuple[Workload, list[Sparsity]]]:
        """Yields the cases that are timed in turns with one run of dense: they differ only in density."""
        for shape, dtype, product in itertools.product(self.shapes, self.dtypes, self.products):
            for pattern, block in itertools.product(self.patterns, self.blocks):
                yield Workload(shape, dtype, product), [Sparsity(pattern, block, d) for d in self.densities]


PRESETS = {
    "cpu": Selection(
        shapes=(Shape(2048, 2048, 2048),),
        blocks=(32, 16, 64, 128, 8),
        densities=(1.0, 0.5, 0.25, 0.1, 0.05),
        dtypes=("f32",),
    ),
    "gpu": Selection(
        shapes=(Shape(8192, 4096, 4096),),
        blocks=(16, 32, 64, 128, 8),
        densities=(0.5, 0.25, 0.1, 0.05),
        dtypes=("bf16",),
    ),
    "quick": Selection(
        shapes=(Shape(512, 512, 512),),
        blocks=(32,),
        densities=(0.25,),
        dtypes=("f32",),
    ),
}
