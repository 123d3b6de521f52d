"""Compares results with a float64 product on the host; no time is reported for a result that fails."""

import jax
import jax.numpy as jnp
import numpy as np

SAMPLED_ROWS = 32


def tolerance(dtype: str, platform: str) -> float:
    """Returns the largest relative error that is rounding and not a mistake."""
    if dtype == "f32":
        # Off the CPU a float32 product may run in TF32, unless JAX is told otherwise.
        return 1e-5 if platform == "cpu" else 1e-3
    return {"bf16": 1e-2, "f16": 2e-3}[dtype]


def relative_error(a: jax.Array, b: jax.Array, product: jax.Array, mask: jax.Array | None = None) -> float:
    """Compares rows of `product` with those of a @ b, the first, the last and some between, in float64.

    Args:
      a: (P, Q).
      b: (Q, R).
      product: (P, R), what was computed.
      mask: (P, R), 0 where the product is not wanted and `product` must be 0; 1 elsewhere.

    Returns:
      The norm of the difference over the norm of the right result; infinity if `product` holds anything not finite, in
      whichever row.
    """
    if not bool(jnp.isfinite(product).all()):
        return float("inf")
    rows = _sample(product.shape[0])
    right = _float64(a[rows]) @ _float64(b)
    if mask is not None:
        right *= _float64(mask[rows])
    difference = np.linalg.norm(_float64(product[rows]) - right)
    return float(difference / max(np.linalg.norm(right), np.finfo(np.float64).tiny))


def _sample(size: int) -> np.ndarray:
    inner = np.random.default_rng(0).choice(size, min(SAMPLED_ROWS, size), replace=False)
    return np.unique(np.concatenate([[0, size - 1], inner]))


def _float64(array: jax.Array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)
