"""What is measured: shapes, products, patterns, and the named selections of them."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.numpy as jnp

from jax_blocksparse import BLOCK_SIZES, BlockPattern, patterns

PRODUCTS = ("y", "dx", "dw")
"""y = x W, dx = dy W^T, dw = x^T dy (its blocks, where W is block-sparse)."""

DTYPES = {"bf16": jnp.bfloat16, "f16": jnp.float16, "tf32": jnp.float32, "f32": jnp.float32}

PRECISIONS = {"tf32": "default", "f32": "highest"}
"""The `precision` to ask for where a dtype leaves it open: a GPU's default for float32 is TF32."""

PATTERNS: dict[str, Callable[..., BlockPattern]] = {
    "random": lambda shape, b, density: patterns.random(shape, b, density=density, seed=0),
    "bernoulli": lambda shape, b, density: patterns.random(shape, b, density=density, seed=0, distribution="bernoulli"),
    "barabasi-albert": lambda shape, b, density: patterns.barabasi_albert(shape, b, density=density, seed=0),
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
        return _make_pattern(self, shape)


@functools.cache  # many contenders want the same one
def _make_pattern(sparsity: Sparsity, shape: Shape) -> BlockPattern:
    return PATTERNS[sparsity.pattern]((shape.k, shape.n), sparsity.block_size, sparsity.density)


class Case(NamedTuple):
    """Who is measured on which blocks."""

    contender: str
    sparsity: Sparsity


class Group(NamedTuple):
    """What is timed in turns, beside dense: cases of one workload."""

    workload: Workload
    cache: str
    cases: tuple[Case, ...]

    def __str__(self) -> str:
        product, shape, dtype = self.workload.product, self.workload.shape, self.workload.dtype
        return f"{product} {shape} {dtype}{', warm' if self.cache == 'warm' else ''}, {len(self.cases)} cases"


@dataclasses.dataclass(frozen=True)
class Selection:
    """What to measure: all combinations of these.

    Attributes:
      cache: "cold" (inputs are not in the L2 cache when their turn comes) or "warm"; on a CPU it means nothing.
    """

    shapes: tuple[Shape, ...]
    blocks: tuple[int, ...] = BLOCK_SIZES[::-1]
    densities: tuple[float, ...] = (0.25, 0.05)
    dtypes: tuple[str, ...] = ("bf16",)
    products: tuple[str, ...] = PRODUCTS
    patterns: tuple[str, ...] = ("random",)
    contenders: tuple[str, ...] = ("native",)
    cache: str = "cold"

    def groups(self) -> Iterator[Group]:
        """Yields a group for each workload."""
        cases = tuple(
            Case(contender, Sparsity(*sparsity))
            for *sparsity, contender in itertools.product(self.patterns, self.blocks, self.densities, self.contenders)
        )
        for workload in itertools.product(self.shapes, self.dtypes, self.products):
            yield Group(Workload(*workload), self.cache, cases)


PEERS = ("torch-bsr", "stk", "cusparse-bell")
SLOW_PEERS = ("cusparse-bsr", "xla", "jax-bcoo")

_MAIN = Selection(shapes=(Shape(8192, 4096, 4096),), densities=(1.0, 0.5, 0.25, 0.1, 0.05, 0.02))
# Their y and dx are one kernel; each that is compiled takes seconds.
_PEERS = dataclasses.replace(
    _MAIN, blocks=(128, 64, 32, 16), densities=(0.5, 0.25, 0.1, 0.05), products=("y", "dw"), contenders=PEERS
)
# Up to seventy times slower than dense.
_SLOW_PEERS = dataclasses.replace(_PEERS, densities=(0.1,), contenders=("cusparse-bsr",))
_WIDE, _DEEP, _LONG = (
    Selection(shapes=(shape,))
    for shape in (Shape(8192, 4096, 16384), Shape(8192, 16384, 4096), Shape(32768, 1024, 4096))
)
_FEW_TOKENS = Selection(
    shapes=(*(Shape(m, 12288, 12288) for m in (64, 32)), *(Shape(m, 4096, 14336) for m in (16, 4, 1))),
    blocks=(16, 32, 64, 128),
    densities=(0.5, 0.25, 0.1, 0.05),
    products=("y",),
)
_FEW_TOKENS_PEERS = dataclasses.replace(
    _FEW_TOKENS, shapes=_FEW_TOKENS.shapes[:1], densities=(0.1, 0.05), contenders=("torch-bsr", "cusparse-bell")
)
_FEW_TOKENS_WARM = dataclasses.replace(
    _FEW_TOKENS, shapes=_FEW_TOKENS.shapes[::4], blocks=(32,), densities=(0.1, 0.05), cache="warm"
)
# So small that a call costs what its launch does.
_TINY = Selection(shapes=(Shape(16, 64, 64),), blocks=(16,), densities=(0.5,), cache="warm")
_OTHER_PATTERNS = dataclasses.replace(_MAIN, blocks=(16, 32, 64, 128), densities=(0.1,), patterns=tuple(PATTERNS)[1:])
_TF32 = dataclasses.replace(_PEERS, dtypes=("tf32",), contenders=("native",))
_F16 = dataclasses.replace(_MAIN, blocks=(16, 64), densities=(0.1,), dtypes=("f16",), products=("y", "dw"))
_F32 = dataclasses.replace(_TF32, densities=(0.1,), dtypes=("f32",), contenders=("native", "xla"))

PRESETS: dict[str, tuple[Selection, ...]] = {
    "cpu": (Selection(shapes=(Shape(2048, 2048, 2048),), densities=(1.0, 0.5, 0.25, 0.1, 0.05), dtypes=("f32",)),),
    "quick": (_MAIN,),
    "standard": (
        _MAIN,
        _PEERS,
        _SLOW_PEERS,
        _OTHER_PATTERNS,
        _FEW_TOKENS_PEERS,
        dataclasses.replace(_FEW_TOKENS, shapes=_FEW_TOKENS.shapes[::2]),
        _WIDE,
        _TF32,
        _F32,
        _DEEP,
        _TINY,
        dataclasses.replace(_FEW_TOKENS, shapes=_FEW_TOKENS.shapes[1::2]),
        _F16,
        _FEW_TOKENS_WARM,
        _LONG,
    ),
    "full": (
        dataclasses.replace(_MAIN, contenders=("native", *PEERS, *SLOW_PEERS)),
        dataclasses.replace(_FEW_TOKENS, densities=_MAIN.densities, contenders=("native", *PEERS, *SLOW_PEERS)),
        dataclasses.replace(_OTHER_PATTERNS, blocks=_MAIN.blocks, densities=_MAIN.densities),
        *(
            dataclasses.replace(each, densities=_MAIN.densities, contenders=("native", *PEERS))
            for each in (_WIDE, _DEEP, _LONG)
        ),
        *(
            dataclasses.replace(each, blocks=_MAIN.blocks, densities=_MAIN.densities, contenders=("native", "xla"))
            for each in (_TF32, _F16, _F32)
        ),
        dataclasses.replace(_FEW_TOKENS, products=PRODUCTS, cache="warm"),
    ),
}
"""Most wanted first, so that a run that is cut short has it."""
