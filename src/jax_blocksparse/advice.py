"""Is it worth it? The speed-up over a dense product to expect, from shipped measurements or measured here."""

import dataclasses
import functools
import importlib.resources
import itertools
import json
import logging
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_blocksparse import patterns
from jax_blocksparse.geometry import check_density, check_geometry
from jax_blocksparse.matrix import BlockSparseMatrix
from jax_blocksparse.ops import matmul, sddmm
from jax_blocksparse.pattern import BlockPattern

MEASUREMENTS = "measurements.json"
"""The file beside this module that holds what was measured where; `python -m benchmarks advice FILE` writes it."""

_PRODUCTS = ("y", "dx", "dw")
_LIVE_DENSITIES = (1.0, 0.5, 0.25, 0.1, 0.05)
# Beyond this factor in any size, what was measured at another shape says nothing.
_LIKE_ENOUGH = 4.0

_log = logging.getLogger("jax_blocksparse")


@dataclasses.dataclass(frozen=True)
class Expectation:
    """What one product gains.

    Attributes:
      speedup: time of the dense product over that of the block-sparse one; None if nothing is known.
      break_even: the density under which the block-sparse product is the faster one: 1 if it always is, 0 if at no
        measured density; None if nothing is known.
    """

    speedup: float | None = None
    break_even: float | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Advice:
    """What to expect of a block-sparse (K, N) weight on one device, by product; its repr is a table.

    Attributes:
      y: for x @ W.
      dx: for dy @ W.T.
      dw: for the blocks of x.T @ dy.
      device: the device it holds for.
      source: where the figures come from, in one sentence.
    """

    y: Expectation
    dx: Expectation
    dw: Expectation
    device: str
    source: str

    def __repr__(self) -> str:
        lines = [f"On {self.device}: {self.source}"]
        for name, product in (("y  = x @ W", self.y), ("dx = dy @ W.T", self.dx), ("dW = x.T @ dy", self.dw)):
            if product.speedup is not None:
                lines.append(f"  {name:14} {product.speedup:5.2f} times as fast as dense, {_range(product.break_even)}")
        return "\n".join(lines)


def advise(
    M: int,
    K: int,
    N: int,
    block_size: int,
    density: float,
    dtype: DTypeLike = jnp.bfloat16,
    *,
    device: jax.Device | None = None,
    measure: bool = False,
) -> Advice:
    """Tells how much faster than dense a block-sparse weight is on this device, and from which density on.

    Shipped measurements are those of random patterns at a few shapes. The measured shape that is nearest, by the
    factors between the sizes, stands for the one asked for; between densities the logarithm of the speed-up is
    interpolated in that of the density, and at the ends the last value holds.

    Args:
      M: rows of x: tokens, all leading dimensions taken together.
      K: input features.
      N: output features.
      block_size: one of `BLOCK_SIZES`.
      density: fraction of the blocks that are kept, in (0, 1].
      dtype: the dtype of the product; float16 counts as bfloat16 where only that was measured.
      device: a device of JAX; by default that on which JAX computes by default.
      measure: measures here and now instead, which compiles and takes some seconds.

    Returns:
      An `Advice`. Where nothing is known its figures are None, and `source` says so.

    Raises:
      ValueError: if a size, the block size or the density is out of range.

    Example:
      >>> import jax_blocksparse as jbs
      >>> advice = jbs.advise(256, 512, 512, 32, density=0.1, dtype="float32", measure=True)
      >>> advice.y.speedup > 0
      True
    """
    (K, N), block_size = check_geometry((K, N), block_size)
    density = check_density(density)
    if M < 1:
        raise ValueError(f"M must be at least 1, got {M}")
    dtype = jnp.dtype(dtype)
    device = _default_device() if device is None else device
    if measure:
        with jax.default_device(device):
            curves = {product: _measured_curve(product, M, K, N, block_size, density, dtype) for product in _PRODUCTS}
        source = f"measured now, {M} x {K} x {N}, {dtype.name}, blocks of {block_size}, density {density:g}"
    else:
        shape, curves = _shipped_curves(device.device_kind, (M, K, N), block_size, dtype.name)
        if shape is None:
            known = "no measurements of this device, dtype and block size are shipped; try measure=True"
            return Advice(Expectation(), Expectation(), Expectation(), device.device_kind, known)
        sizes = " x ".join(map(str, shape))
        source = f"from measurements at {sizes}, {dtype.name}, blocks of {block_size}, for density {density:g}"
    expectations = {
        product: Expectation(interpolate(*zip(*curve, strict=True), density), break_even(*zip(*curve, strict=True)))
        for product, curve in curves.items()
    }
    return Advice(**dict.fromkeys(_PRODUCTS, Expectation()) | expectations, device=device.device_kind, source=source)


def interpolate(densities: Sequence[float], speedups: Sequence[float], density: float) -> float:
    """The speed-up at a density, between those measured on logarithmic scales; the last value holds beyond the ends.

    Example:
      >>> from jax_blocksparse.advice import interpolate
      >>> round(interpolate([0.1, 0.4], [4.0, 1.0], 0.2), 3)
      2.0
    """
    points = sorted(zip(densities, speedups, strict=True))
    return float(np.exp(np.interp(math.log(density), *np.log(points).T)))


def break_even(densities: Sequence[float], speedups: Sequence[float]) -> float:
    """The largest density at which block-sparse is at least as fast as dense, between those measured.

    The largest one measured if block-sparse wins there, 0 if it never does.

    Example:
      >>> from jax_blocksparse.advice import break_even
      >>> round(break_even([0.1, 0.4, 1.0], [4.0, 1.0, 0.4]), 3)
      0.4
    """
    points = sorted(zip(densities, speedups, strict=True), reverse=True)
    if points[0][1] >= 1:
        return points[0][0]
    for (next_density, next_speedup), (density, speedup) in itertools.pairwise(points):
        if speedup >= 1:
            part = math.log(speedup) / math.log(speedup / next_speedup)
            return density * (next_density / density) ** part
    return 0.0


def warn_if_dense_is_faster(inputs: jax.Array, *weights: BlockPattern) -> None:
    """Says in the log, once for each kind of layer and dtype, that a layer is too dense to gain anything.

    It goes by shipped measurements of y at a shape like the layer's; where there are none, as on CPUs, it stays silent.
    It is a warning of a logger: `logging.getLogger("jax_blocksparse").setLevel("ERROR")` silences it.

    Args:
      inputs: of the layer, in the dtype of the computation.
      weights: the patterns of its weights.
    """
    rows, dtype = math.prod(inputs.shape[:-1]), inputs.dtype.name
    for pattern in weights if rows else ():
        _judge((rows, *pattern.shape), pattern.block_size, pattern.density, dtype)


_judged: set[tuple[Any, ...]] = set()


def _judge(shape: tuple[int, int, int], block_size: int, density: float, dtype: str) -> None:
    # Sizes within a factor of two count as one kind: models have many layers that are nearly alike.
    kind = (*(size.bit_length() for size in shape), block_size, round(density, 2), dtype)
    if kind in _judged:
        return
    _judged.add(kind)
    device = _default_device().device_kind
    measured, curves = _shipped_curves(device, shape, block_size, dtype)
    if "y" not in curves or _distance(shape, measured) > math.log(_LIKE_ENOUGH):
        return
    densities, speedups = zip(*curves["y"], strict=True)
    speedup = interpolate(densities, speedups, density)
    if speedup < 1:
        _log.warning(
            "A block-sparse product %d x %d x %d in %s with blocks of %d and density %.2g is expected to take %.1f "
            "times as long as a dense one on %s: it is faster below density %.2g. See jax_blocksparse.advise.",
            *(*shape, dtype, block_size, density, 1 / speedup, device, break_even(densities, speedups)),
        )


def _default_device() -> jax.Device:
    chosen = jax.config.jax_default_device
    return chosen if isinstance(chosen, jax.Device) else jax.devices(chosen)[0]


def _range(limit: float) -> str:
    if limit == 0:
        return "slower than dense at every density measured"
    return "faster at every density" if limit == 1 else f"faster below density {limit:.2g}"


@functools.cache
def _shipped() -> dict[str, Any]:
    file = importlib.resources.files("jax_blocksparse").joinpath(MEASUREMENTS)
    return json.loads(file.read_text())["devices"] if file.is_file() else {}


def _distance(a: Sequence[int], b: Sequence[int]) -> float:
    return max(abs(math.log(x / y)) for x, y in zip(a, b, strict=True))


def _shipped_curves(
    device: str, shape: tuple[int, int, int], block_size: int, dtype: str
) -> tuple[tuple[int, int, int] | None, dict[str, list[tuple[float, float]]]]:
    """The nearest measured shape, and for each product measured there the (density, speed-up) pairs."""
    entries = [entry for entry in _shipped().get(device, {}).get("entries", ()) if entry["block_size"] == block_size]
    for wanted in (dtype, "bfloat16") if dtype == "float16" else (dtype,):
        alike = [entry for entry in entries if entry["dtype"] == wanted]
        if alike:
            nearest = min((tuple(entry["shape"]) for entry in alike), key=functools.partial(_distance, shape))
            return nearest, {each["product"]: each["curve"] for each in alike if tuple(each["shape"]) == nearest}
    return None, {}


def _measured_curve(
    product: str, M: int, K: int, N: int, block_size: int, density: float, dtype: jnp.dtype
) -> list[tuple[float, float]]:
    """(density, speed-up) pairs measured here, one of them at the density asked for."""
    x, dy, w = (_normal(shape, dtype) for shape in ((M, K), (M, N), (K, N)))
    dense, operands = {
        "y": (lambda x, w: x @ w, (x, w)),
        "dx": (lambda dy, w: dy @ w.T, (dy, w)),
        "dw": (lambda x, dy: x.T @ dy, (x, dy)),
    }[product]
    sparse = {"y": matmul, "dx": lambda dy, w: matmul(dy, w.T), "dw": sddmm}[product]
    reference = _seconds(dense, *operands)
    curve = []
    for each in sorted({*_LIVE_DENSITIES, density}):
        pattern = patterns.random((K, N), block_size, density=each)
        blocks = _normal((pattern.nnz, block_size, block_size), dtype)
        of = {"y": (x, BlockSparseMatrix(blocks, pattern)), "dx": (dy, BlockSparseMatrix(blocks, pattern))}
        curve.append((each, reference / _seconds(sparse, *of.get(product, (x, dy, pattern)))))
    return curve


def _normal(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape, dtype)


def _seconds(function: Any, *operands: Any) -> float:
    """The time of a call among many that are queued, so that only the device is timed where it is the slower one."""
    compiled = jax.jit(function).lower(*operands).compile()
    taken: list[float] = []
    calls = 1
    while len(taken) < 5:
        start = time.perf_counter()
        jax.block_until_ready([compiled(*operands) for _ in range(calls)])
        seconds = (time.perf_counter() - start) / calls
        wanted = min(20, math.ceil(0.01 / seconds))
        if wanted > 2 * calls:
            calls = wanted
        else:
            taken.append(seconds)
    return statistics.median(taken)
