"""Products that do something to their result before it is written, because XLA cannot fuse into a custom call.

    matmul_act_p:     y[g] = act(x[g] @ W[g] + bias[g]), and if asked for the slope, act' of the same sum
    scaled_matmul_p:  y[g] = (x[g] @ W[g]) * scale[g], or (x[g] * scale[g]) @ W[g], by `side`

W, `transpose` and batches are as in `matmul_p`; bias is (G, N) in float32 or wider, scale is as large as the result,
respectively as x. The second primitive is linear in x, scale and data; its two sides are each other's transposes. It
is what gradients of `act(x @ W1) @ W2` need: the product with W2.T comes out multiplied with the slope of the
activation.
"""

import functools

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, xla

from jax_blocksparse import activations
from jax_blocksparse.primitives import (
    batch_size,
    bind,
    fold_batch,
    match_batch,
    matmul_abstract,
    matmul_p,
    merge_axes,
    sddmm_p,
    split_axis,
)

matmul_act_p = Primitive("block_sparse_matmul_act")
matmul_act_p.multiple_results = True
scaled_matmul_p = Primitive("block_sparse_scaled_matmul")


def wide_bias(bias, features, dtype):
    """The bias in float32 or wider, zeros if it is None; for products in `dtype`."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return jnp.zeros(features, wide) if bias is None else bias.astype(wide)


def bind_act(x, data, bias, *indices, shape, transpose, activation, **params):
    """act(x @ W + bias) for a bias (N,) that all batch elements share, or None."""
    bias = wide_bias(bias, shape[0 if transpose else 1], x.dtype)
    params = params | {"shape": shape, "transpose": transpose, "activation": activation, "with_slope": False}
    return bind(matmul_act_p, x, data, bias[None], *indices, **params)[0]


def matmul_act(x, data, bias, *indices, activation, with_slope, **params):
    """What `matmul_act_p` computes, by `matmul_p` and plain jax.numpy."""
    y = bind(matmul_p, x, data, *indices, **params)
    pre = y.astype(bias.dtype) + bias[:, None]
    results = (activations.value, activations.slope) if with_slope else (activations.value,)
    return [result(activation, pre).astype(y.dtype) for result in results]


def scaled_matmul(x, scale, data, *indices, side, **params):
    """What `scaled_matmul_p` computes, by `matmul_p` and plain jax.numpy."""
    if side == "input":
        return bind(matmul_p, x * scale, data, *indices, **params)
    y = bind(matmul_p, x, data, *indices, **params)
    return y * scale.astype(y.dtype)


def _act_abstract(x, data, bias, *indices, activation, with_slope, **params):
    del activation, bias
    return [matmul_abstract(x, data, *indices, **params)] * (2 if with_slope else 1)


def _scaled_abstract(x, scale, data, *indices, side, **params):
    del side, scale
    return matmul_abstract(x, data, *indices, **params)


def _act_jvp(primals, tangents, *, activation, with_slope, **params):
    (x, data, bias, *indices), (x_dot, data_dot, bias_dot, *_) = primals, tangents
    y, slope = bind(matmul_act_p, *primals, activation=activation, with_slope=True, **params)
    results = [y, slope] if with_slope else [y]
    terms = []
    if type(x_dot) is not ad.Zero:
        terms.append(bind(matmul_p, x_dot, data, *indices, **params))
    if type(data_dot) is not ad.Zero:
        terms.append(bind(matmul_p, x, data_dot, *indices, **params))
    if type(bias_dot) is not ad.Zero:
        # In this order the transpose sums in the bias's dtype, not in one of 16 bits.
        terms.append(jnp.broadcast_to(bias_dot[:, None], y.shape).astype(y.dtype))
    if not terms:
        return results, [ad.Zero(jax.typeof(result).to_tangent_aval()) for result in results]
    pre_dot = functools.reduce(ad.add_tangents, terms)
    dots = [slope * pre_dot]
    if with_slope:
        pre = bind(matmul_p, x, data, *indices, **params).astype(bias.dtype) + bias[:, None]
        dots.append(activations.curvature(activation, pre).astype(y.dtype) * pre_dot)
    return results, dots


def _scaled_jvp(primals, tangents, **params):
    out = bind(scaled_matmul_p, *primals, **params)
    terms = [
        bind(scaled_matmul_p, *primals[:i], tangent, *primals[i + 1 :], **params)
        for i, tangent in enumerate(tangents[:3])
        if type(tangent) is not ad.Zero
    ]
    zero = ad.Zero(jax.typeof(out).to_tangent_aval())
    return out, functools.reduce(ad.add_tangents, terms) if terms else zero


def _scaled_transpose(ct, x, scale, data, *indices, side, transpose, shape, out_dtype, **params):
    del out_dtype
    operands = [x, scale, data]
    (place,) = (i for i, operand in enumerate(operands) if ad.is_undefined_primal(operand))
    aval = operands[place].aval
    results = [None] * (3 + len(indices))
    if type(ct) is ad.Zero:
        results[place] = ad.Zero(aval)
        return results
    forward = functools.partial(bind, scaled_matmul_p, transpose=transpose, shape=shape, **params)
    backward = functools.partial(bind, scaled_matmul_p, transpose=not transpose, shape=shape, **params)
    if place == 2:
        left, right = (x * scale, ct.astype(x.dtype)) if side == "input" else (x, (ct * scale).astype(x.dtype))
        left, right = (right, left) if transpose else (left, right)
        block_size = aval.shape[-1]
        result = bind(
            sddmm_p, left, right, *indices, block_size=block_size, shape=shape, out_dtype=aval.dtype, **params
        )
    elif place == 0:
        other = "output" if side == "input" else "input"
        result = backward(ct.astype(data.dtype), scale, data, *indices, side=other, out_dtype=aval.dtype)
    elif side == "input":
        result = backward(ct.astype(data.dtype), x, data, *indices, side="output", out_dtype=aval.dtype)
    else:
        result = forward(x, ct, data, *indices, side="output", out_dtype=aval.dtype)
    results[place] = match_batch(result, aval)
    return results


def _batch(primitive, args, dims, **params):
    """Vmapped axes become part of the leading axis, or more rows of x where all else but its scale is shared."""
    rows = [0, 1] if primitive is scaled_matmul_p else [0]
    many = primitive.multiple_results
    if any(dim is not None for i, dim in enumerate(dims) if i not in rows) or dims[0] is None:
        (x, *rest), like = fold_batch(args, dims, floats=3)
        operands = [jnp.broadcast_to(x, (batch_size(x, *rest), *x.shape[1:])), *rest]
        results = bind(primitive, *operands, **params)
        split = [split_axis(result, 0, like, 0, 2) for result in (results if many else [results])]
        return (split, [0] * len(split)) if many else (split[0], 0)
    args = list(args)
    x = args[0] = jnp.moveaxis(args[0], dims[0], 1)
    for i in rows[1:]:
        scale = args[i][:, None] if dims[i] is None else jnp.moveaxis(args[i], dims[i], 1)
        batch = max(scale.shape[0], x.shape[0])
        args[i] = jnp.broadcast_to(scale, (batch, x.shape[1], *scale.shape[2:]))
    for i in rows:
        args[i] = merge_axes(args[i], 1, 3)
    results = bind(primitive, *args, **params)
    split = [split_axis(result, 1, x, 1, 3) for result in (results if many else [results])]
    return (split, [1] * len(split)) if many else (split[0], 1)


matmul_act_p.def_impl(functools.partial(xla.apply_primitive, matmul_act_p))
matmul_act_p.def_abstract_eval(_act_abstract)
ad.primitive_jvps[matmul_act_p] = _act_jvp
batching.primitive_batchers[matmul_act_p] = functools.partial(_batch, matmul_act_p)

scaled_matmul_p.def_impl(functools.partial(xla.apply_primitive, scaled_matmul_p))
scaled_matmul_p.def_abstract_eval(_scaled_abstract)
ad.primitive_jvps[scaled_matmul_p] = _scaled_jvp
ad.primitive_transposes[scaled_matmul_p] = _scaled_transpose
batching.primitive_batchers[scaled_matmul_p] = functools.partial(_batch, scaled_matmul_p)
