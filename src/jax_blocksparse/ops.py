"""The public products: check and name every argument, promote dtypes, flatten leading dimensions."""

import functools
from typing import TYPE_CHECKING, Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_blocksparse import lowering as _lowering  # noqa: F401  (registers the rules)
from jax_blocksparse.activations import Activation, check_activation
from jax_blocksparse.epilogues import bind_act
from jax_blocksparse.pattern import INDEX_NAMES, BlockPattern
from jax_blocksparse.primitives import bind, matmul_p, merge_axes, sddmm_p, split_axis

if TYPE_CHECKING:
    from jax_blocksparse.matrix import BlockSparseMatrix

Implementation = Literal["native", "xla"]

_DTYPES = ("float32", "float64", "bfloat16", "float16")


def matmul(
    x: ArrayLike,
    w: "BlockSparseMatrix",
    *,
    bias: ArrayLike | None = None,
    activation: Activation | None = None,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """The product x @ w of a dense array with a block-sparse matrix, with any leading dimensions.

    With bias or activation it is act(x @ w + bias), which the CUDA kernels compute before they write the result. Sums
    are accumulated in float32 (float64 for float64). Differentiable to any order in `x`, `w.data` and `bias`;
    cotangents are rounded to the dtype of the operands, as XLA rounds the operands of a dense product.

    Args:
      x: (..., K), float32, float64, bfloat16 or float16.
      w: (K, N), a BlockSparseMatrix.
      bias: (N,), added to every row of the product, in float32 at least.
      activation: applied to the sum, in float32 at least: "relu", "gelu_exact" (by the error function), "gelu_tanh"
        (its approximation, which is what `jax.nn.gelu` computes by default), "silu", or None.
      precision: as in `jnp.dot`, with the default of `jax.default_matmul_precision`. As there, it matters for float32
        on GPUs with TF32: the factors are rounded to that unless the precision is "highest".
      preferred_element_type: dtype of the result: that of the promoted inputs (default), or float32 for 16-bit inputs.
      implementation: "native" (the custom calls; an error where there is none), "xla" (plain jax.numpy), or None:
        native where it exists.

    Returns:
      (..., N), in the promoted dtype of x and w or the preferred one.

    Raises:
      ValueError: if sizes, dtypes or options do not fit.
      TypeError: if x or w is not an array, respectively a BlockSparseMatrix, of floats.
      NotImplementedError: at compilation, if `implementation="native"` and there is no native kernel.

    Example:
      >>> import jax.numpy as jnp, jax_blocksparse as jbs
      >>> w = jbs.BlockSparseMatrix.fromdense(jnp.eye(64), block_size=16)
      >>> jbs.matmul(jnp.ones((2, 3, 64)), w).shape
      (2, 3, 64)
      >>> jbs.matmul(jnp.ones((2, 64)), w, bias=-2 * jnp.ones(64), activation="relu").max()
      Array(0., dtype=float32)
    """
    data = check_matrix("w", w)
    x = check_features("x", x, "w", w.shape)
    bias = check_bias("bias", bias, "w", w.shape)
    dtype = jnp.promote_types(x.dtype, data.dtype)
    return _matmul(
        x.astype(dtype),
        data.astype(dtype),
        bias,
        *w.pattern.indices,
        activation=check_activation(activation),
        transpose=w.transposed,
        shape=w.pattern.shape,
        out_dtype=_out_dtype(dtype, preferred_element_type),
        precision=check_precision(precision),
        implementation=check_implementation(implementation),
    )


def sddmm(
    x: ArrayLike,
    dy: ArrayLike,
    pattern: BlockPattern,
    *,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """The blocks of x.T @ dy that a pattern asks for: a sampled dense-dense product, the gradient of `w.data`.

    Args:
      x: (..., K), float32, float64, bfloat16 or float16.
      dy: (..., N), with the same leading dimensions, which are all summed over.
      pattern: the blocks wanted of the (K, N) product.
      precision: as in `matmul`.
      preferred_element_type: as in `matmul`.
      implementation: as in `matmul`.

    Returns:
      (nnz, b, b): block `z` of the product at `(pattern.rows[z], pattern.cols[z])`; zeros for inert entries and for
      what lies outside the matrix.

    Raises:
      ValueError: if sizes, dtypes or options do not fit.
      TypeError: if x or dy is not an array of floats, or pattern no BlockPattern.
      NotImplementedError: at compilation, if `implementation="native"` and there is no native kernel.

    Example:
      >>> import jax.numpy as jnp, jax_blocksparse as jbs
      >>> pattern = jbs.BlockPattern.from_coordinates([0, 2], [1, 0], shape=(24, 16), block_size=8)
      >>> jbs.sddmm(jnp.ones((5, 24)), jnp.ones((5, 16)), pattern)[0, 0, 0]
      Array(5., dtype=float32)
    """
    _check_pattern("pattern", pattern)
    x, dy = _as_floats("x", x), _as_floats("dy", dy)
    for name, array, features in (("x", x, pattern.shape[0]), ("dy", dy, pattern.shape[1])):
        if array.ndim == 0 or array.shape[-1] != features:
            raise ValueError(f"{name} must have {features} features in its last axis for {pattern}, got {array.shape}")
    if x.shape[:-1] != dy.shape[:-1]:
        raise ValueError(f"x and dy must have the same leading dimensions, got {x.shape} and {dy.shape}")
    dtype = jnp.promote_types(x.dtype, dy.dtype)
    return _sddmm(
        x.astype(dtype),
        dy.astype(dtype),
        *pattern.indices,
        block_size=pattern.block_size,
        shape=pattern.shape,
        out_dtype=_out_dtype(dtype, preferred_element_type),
        precision=check_precision(precision),
        implementation=check_implementation(implementation),
    )


@functools.partial(
    jax.jit,
    static_argnames=("activation", "transpose", "shape", "out_dtype", "precision", "implementation"),
    inline=True,
)
def _matmul(x, data, bias, *indices, activation, **params):
    rows, indices = merge_axes(x, 0, x.ndim - 1)[None], [index[None] for index in indices]
    if bias is None and activation is None:
        y = bind(matmul_p, rows, data[None], *indices, **params)
    else:
        y = bind_act(rows, data[None], bias, *indices, activation=activation, **params)
    return split_axis(y[0], 0, x, 0, x.ndim - 1)


@functools.partial(
    jax.jit, static_argnames=("block_size", "shape", "out_dtype", "precision", "implementation"), inline=True
)
def _sddmm(x, dy, *indices, **params):
    x, dy = (merge_axes(each, 0, each.ndim - 1)[None] for each in (x, dy))
    return bind(sddmm_p, x, dy, *(index[None] for index in indices), **params)[0]


def check_matrix(name: str, w: "BlockSparseMatrix") -> jax.Array:
    """Returns the values of a matrix that is one and is whole, or raises TypeError or ValueError."""
    from jax_blocksparse.matrix import BlockSparseMatrix

    if not isinstance(w, BlockSparseMatrix):
        raise TypeError(
            f"{name} must be a BlockSparseMatrix, got {type(w).__name__}; for w @ x write so, with the operator"
        )
    _check_pattern(f"{name}.pattern", w.pattern)
    data, pattern = _as_floats(f"{name}.data", w.data), w.pattern
    block = (pattern.nnz, pattern.block_size, pattern.block_size)
    if data.shape != block:
        raise ValueError(f"{name}.data must have shape (nnz, block_size, block_size) = {block}, got {data.shape}")
    return data


def check_features(name: str, x: ArrayLike, w_name: str, w_shape: tuple[int, int]) -> jax.Array:
    """Returns x as an array of floats that can be multiplied with the matrix, or raises TypeError or ValueError."""
    x = _as_floats(name, x)
    if x.ndim == 0 or x.shape[-1] != w_shape[0]:
        raise ValueError(
            f"{name} must have {w_shape[0]} features ({w_name} has shape {w_shape}) in its last axis, got {x.shape}"
        )
    return x


def check_bias(name: str, bias: ArrayLike | None, w_name: str, w_shape: tuple[int, int]) -> jax.Array | None:
    """Returns the bias as an array that fits the matrix, if there is one, or raises TypeError or ValueError."""
    if bias is None:
        return None
    bias = _as_floats(name, bias)
    if bias.shape != w_shape[1:]:
        raise ValueError(f"{name} must have shape {w_shape[1:]} ({w_name} has shape {w_shape}), got {bias.shape}")
    return bias


def _as_floats(name: str, array: ArrayLike) -> jax.Array:
    try:
        array = jnp.asarray(array)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array, got {type(array).__name__}") from error
    if array.dtype.name not in _DTYPES:
        raise TypeError(f"{name} must have one of the dtypes {', '.join(_DTYPES)}, got {array.dtype}")
    return array


def _check_pattern(name: str, pattern: BlockPattern) -> None:
    """The index arrays must have the sizes that shape and block size imply; a restored checkpoint may not."""
    if not isinstance(pattern, BlockPattern):
        raise TypeError(f"{name} must be a BlockPattern, got {type(pattern).__name__}")
    wanted, got = pattern.index_shapes, tuple(index.shape for index in pattern.indices)
    if got != wanted:
        raise ValueError(
            f"{name} is {pattern}, whose {', '.join(INDEX_NAMES)} must have shapes {wanted}, "
            f"got {got}; was it made for another shape or block size, or stacked without vmap?"
        )


def _out_dtype(dtype: jnp.dtype, preferred: DTypeLike | None) -> str:
    allowed = (dtype.name,) if dtype.itemsize > 2 else (dtype.name, "float32")
    name = dtype.name if preferred is None else jnp.dtype(preferred).name
    if name not in allowed:
        raise ValueError(f"preferred_element_type must be {' or '.join(allowed)} for {dtype} inputs, got {name}")
    return name


def check_precision(precision: jax.lax.PrecisionLike) -> jax.lax.Precision | None:
    """Returns the precision as JAX's enumeration, that which is configured if it is None, or raises ValueError."""
    if precision is None:
        return _configured_precision()
    if isinstance(precision, jax.lax.Precision):
        return precision
    try:
        return jax.lax.Precision(precision)
    except ValueError:
        names = ", ".join(repr(each.name.lower()) for each in jax.lax.Precision)
        raise ValueError(f"precision must be None, a jax.lax.Precision or one of {names}, got {precision!r}") from None


def _configured_precision() -> jax.lax.Precision | None:
    name = jax.config.jax_default_matmul_precision
    if name is None:
        return None
    try:
        return jax.lax.Precision(name)
    except ValueError:  # an algorithm, which true float32 satisfies, whatever it is
        return jax.lax.Precision.HIGH if name == "TF32_TF32_F32" else jax.lax.Precision.HIGHEST


def check_implementation(implementation: Implementation | None) -> Implementation | None:
    """Returns the implementation, or raises ValueError."""
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(f"implementation must be None, 'native' or 'xla', got {implementation!r}")
    return implementation
