"""Compares results with a float64 product in plain JAX; no time is reported for a result that fails."""

import jax
import jax.numpy as jnp
import numpy as np

SAMPLED_ROWS = 32


def tolerance(dtype: str) -> float:
    """Returns the largest relative error that is rounding and not a mistake."""
    return {"bf16": 1e-2, "f16": 2e-3, "tf32": 1e-3, "f32": 1e-5}[dtype]


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
    with jax.enable_x64(True):
        return float(_relative_difference(a[rows], b, product[rows], None if mask is None else mask[rows]))


@jax.jit
def _relative_difference(a: jax.Array, b: jax.Array, product: jax.Array, mask: jax.Array | None) -> jax.Array:
    right = a.astype(jnp.float64) @ b.astype(jnp.float64)
    if mask is not None:
        right *= mask
    difference = jnp.linalg.norm(product.astype(jnp.float64) - right)
    return difference / jnp.maximum(jnp.linalg.norm(right), jnp.finfo(jnp.float64).tiny)


def _sample(size: int) -> np.ndarray:
    inner = np.random.default_rng(0).choice(size, min(SAMPLED_ROWS, size), replace=False)
    return np.unique(np.concatenate([[0, size - 1], inner]))
