"""Compares results with a float64 product in plain JAX; no time is reported for a result that fails."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

SAMPLED_ROWS = 32


def tolerance(dtype: str) -> float:
    """Returns the largest relative error that is rounding and not a mistake."""
    return {"bf16": 1e-2, "f16": 2e-3, "tf32": 2e-3, "f32": 1e-5}[dtype]


def relative_error(
    a: jax.Array,
    b: jax.Array,
    product: jax.Array,
    *,
    transposed: tuple[bool, bool] = (False, False),
    mask: np.ndarray | None = None,
) -> float:
    """Compares rows of `product` with those of a @ b, the first, the last and some between, in float64.

    Args:
      a: (P, Q).
      b: (Q, R).
      product: (P, R), what was computed.
      transposed: whether a and b are given as (Q, P) and (R, Q).
      mask: (P, R), 0 where the product is not wanted and `product` must be 0; 1 elsewhere.

    Returns:
      The norm of the difference over the norm of the right result; infinity if `product` holds anything not finite, in
      whichever row.
    """
    rows = _sample(product.shape[0])
    with jax.enable_x64(True):
        finite, right, found = jax.device_get(_compute(a, b, product, rows, transposed))
    if not finite:
        return float("inf")
    right = right if mask is None else right * mask[rows]
    return float(np.linalg.norm(found - right) / max(np.linalg.norm(right), np.finfo(np.float64).tiny))


# Nothing here is timed: without autotuning it compiles in a fraction of the time.
@functools.partial(jax.jit, static_argnums=4, compiler_options={"xla_gpu_autotune_level": 0})
def _compute(
    a: jax.Array, b: jax.Array, product: jax.Array, rows: jax.Array, transposed: tuple[bool, bool]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whether the product is finite; rows of a @ b and of the product."""
    a, b = (matrix.T if is_transposed else matrix for matrix, is_transposed in zip((a, b), transposed, strict=True))
    right = a[rows].astype(jnp.float64) @ b.astype(jnp.float64)
    return jnp.isfinite(product).all(), right, product[rows].astype(jnp.float64)


def _sample(size: int) -> np.ndarray:
    inner = np.random.default_rng(0).choice(size, min(SAMPLED_ROWS, size), replace=False)
    return np.unique(np.concatenate([[0, size - 1], inner]))
