"""Two products with an activation between them, whose gradients are fused as the products are."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_blocksparse.activations import Activation, check_activation
from jax_blocksparse.epilogues import bind_act, matmul_act_p, matmul_scaled_p, wide_bias
from jax_blocksparse.matrix import BlockSparseMatrix
from jax_blocksparse.ops import (
    Implementation,
    check_bias,
    check_features,
    check_implementation,
    check_matrix,
    check_precision,
)
from jax_blocksparse.primitives import bind, matmul_p, merge_axes, split_axis


def mlp(
    x: ArrayLike,
    w_in: BlockSparseMatrix,
    w_out: BlockSparseMatrix,
    *,
    bias_in: ArrayLike | None = None,
    bias_out: ArrayLike | None = None,
    activation: Activation = "gelu_tanh",
    precision: jax.lax.PrecisionLike = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Computes act(x @ w_in + bias_in) @ w_out + bias_out, the feed-forward layer of a Transformer.

    Values and derivatives, of any order, are those of two `matmul`s. What is gained is in the gradient: the product
    with w_out.T comes out of its kernel already multiplied with the slope of the activation, which saves reading and
    writing the hidden layer once more.

    Args:
      x: (..., K), float32, float64, bfloat16 or float16.
      w_in: (K, H).
      w_out: (H, N).
      bias_in: (H,).
      bias_out: (N,).
      activation: see `matmul`.
      precision: see `matmul`.
      implementation: see `matmul`.

    Returns:
      (..., N), in the promoted dtype of x and the matrices.

    Raises:
      ValueError: if sizes, dtypes or options do not fit.
      TypeError: if an argument is not an array, respectively a BlockSparseMatrix, of floats.
      NotImplementedError: at compilation, if `implementation="native"` and there is no native kernel.

    Example:
      >>> import jax, jax.numpy as jnp, jax_blocksparse as jbs
      >>> make = lambda shape: jbs.BlockSparseMatrix.fromdense(jnp.ones(shape), block_size=16, density=0.5)
      >>> jbs.mlp(jnp.ones((3, 64)), make((64, 256)), make((256, 64)), activation="relu").shape
      (3, 64)
    """
    data_in, data_out = check_matrix("w_in", w_in), check_matrix("w_out", w_out)
    x = check_features("x", x, "w_in", w_in.shape)
    if w_in.shape[1] != w_out.shape[0]:
        raise ValueError(f"w_out must have {w_in.shape[1]} rows (w_in has shape {w_in.shape}), got {w_out.shape}")
    bias_in, bias_out = (
        check_bias("bias_in", bias_in, "w_in", w_in.shape),
        check_bias("bias_out", bias_out, "w_out", w_out.shape),
    )
    dtype = functools.reduce(jnp.promote_types, (x.dtype, data_in.dtype, data_out.dtype))
    biases = wide_bias(bias_in, w_in.shape[1], dtype), wide_bias(bias_out, w_out.shape[1], dtype)
    common = {
        "out_dtype": dtype.name,
        "precision": check_precision(precision),
        "implementation": check_implementation(implementation),
    }
    options = [tuple(({"transpose": w.transposed, "shape": w.pattern.shape} | common).items()) for w in (w_in, w_out)]
    return _flattened(
        check_activation(activation),
        *options,
        x.astype(dtype),
        data_in.astype(dtype),
        data_out.astype(dtype),
        *biases,
        w_in.pattern.indices,
        w_out.pattern.indices,
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _flattened(activation, options_in, options_out, x, data_in, data_out, bias_in, bias_out, indices_in, indices_out):
    rows = merge_axes(x, 0, x.ndim - 1)[None]
    indices = ([index[None] for index in each] for each in (indices_in, indices_out))
    floats = (rows, data_in[None], data_out[None], bias_in, bias_out)
    y = _mlp(activation, options_in, options_out, *indices, *floats)
    return split_axis(y[0], 0, x, 0, x.ndim - 1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _mlp(activation, options_in, options_out, indices_in, indices_out, x, data_in, data_out, bias_in, bias_out):
    hidden = bind_act(x, data_in, bias_in, *indices_in, activation=activation, **dict(options_in))
    return bind_act(hidden, data_out, bias_out, *indices_out, activation=None, **dict(options_out))


@_mlp.defjvp
def _mlp_jvp(activation, options_in, options_out, primals, tangents):
    indices_in, indices_out, x, data_in, data_out, bias_in, bias_out = primals
    *_, x_dot, data_in_dot, data_out_dot, bias_in_dot, bias_out_dot = tangents
    options_in, options_out = dict(options_in), dict(options_out)
    hidden, slope = bind(
        matmul_act_p, x, data_in, bias_in[None], *indices_in, activation=activation, with_slope=True, **options_in
    )
    y = bind_act(hidden, data_out, bias_out, *indices_out, activation=None, **options_out)

    pre_dot = bind(matmul_p, x_dot, data_in, *indices_in, **options_in)
    pre_dot += bind(matmul_p, x, data_in_dot, *indices_in, **options_in)
    # The transpose of this product is the one that is scaled, and summed for the bias, as it is written.
    y_dot = bind(matmul_scaled_p, pre_dot, bias_in_dot[None], slope, data_out, *indices_out, **options_out)
    y_dot += bind(matmul_p, hidden, data_out_dot, *indices_out, **options_out)
    y_dot += jnp.broadcast_to(bias_out_dot, y_dot.shape).astype(y_dot.dtype)
    return y, y_dot
