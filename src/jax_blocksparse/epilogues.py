"""Products that do something to their result before it is written, because XLA cannot fuse into a custom call.

    matmul_act_p:     y[g] = act(x[g] @ W[g] + bias[g]), and if asked for the slope, act' of the same sum
    scaled_matmul_p:  y[g] = (x[g] @ W[g]) * scale[g], and the sums of y over its rows, (G, N) in float32 or wider
    matmul_scaled_p:  y[g] = ((x[g] + bias[g]) * scale[g]) @ W[g]

W, `transpose` and batches are as in `matmul_p`; bias is (G, N), respectively (G, K), in float32 or wider, scale is as
large as the result, respectively as x. The second and the third are linear in scale, in data and in x, the third in x
and bias together, and each other's transposes. The second is what gradients of `act(x @ W1 + bias) @ W2` need: the
product with W2.T comes out multiplied with the slope of the activation, and its sums are the gradient of the bias.
"""

import functools

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, xla
from jax.sharding import PartitionSpec

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
scaled_matmul_p.multiple_results = True
matmul_scaled_p = Primitive("block_sparse_matmul_scaled")


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


def scaled_matmul(x, scale, data, *indices, **params):
    """What `scaled_matmul_p` computes, by `matmul_p` and plain jax.numpy."""
    y = bind(matmul_p, x, data, *indices, **params)
    y = y * scale.astype(y.dtype)
    return [y, y.astype(jnp.promote_types(y.dtype, jnp.float32)).sum(1)]


def matmul_scaled(x, bias, scale, data, *indices, **params):
    """What `matmul_scaled_p` computes, likewise."""
    return bind(matmul_p, _add(x, bias) * scale, data, *indices, **params)


def _add(x, bias):
    return x + bias[:, None].astype(x.dtype)


def _act_abstract(x, data, bias, *indices, activation, with_slope, **params):
    del activation, bias
    return [matmul_abstract(x, data, *indices, **params)] * (2 if with_slope else 1)


def _scaled_abstract(x, scale, data, *indices, **params):
    del scale
    y = matmul_abstract(x, data, *indices, **params)
    sharding = y.sharding.update(spec=PartitionSpec(y.sharding.spec[0], None))
    wide = jnp.promote_types(y.dtype, jnp.float32)
    return [y, y.update(shape=(y.shape[0], y.shape[2]), dtype=wide, sharding=sharding)]


def _matmul_scaled_abstract(x, bias, scale, data, *indices, **params):
    del bias, scale
    return matmul_abstract(x, data, *indices, **params)


def _act_jvp(primals, tangents, *, activation, with_slope, **params):
    (x, data, bias, *indices), (x_dot, data_dot, bias_dot, *_) = primals, tangents
    # The slope of no activation is 1.
    needs_slope = with_slope or activation is not None
    y, *slope = bind(matmul_act_p, *primals, activation=activation, with_slope=needs_slope, **params)
    results = [y, *slope] if with_slope else [y]
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
    dots = [slope[0] * pre_dot if slope else pre_dot]
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
    zeros = [ad.Zero(jax.typeof(result).to_tangent_aval()) for result in out]
    return out, functools.reduce(lambda a, b: list(map(ad.add_tangents, a, b)), terms, zeros)


def _matmul_scaled_jvp(primals, tangents, **params):
    x, bias, *rest = primals
    out = bind(matmul_scaled_p, *primals, **params)
    terms = []
    if not type(tangents[0]) is type(tangents[1]) is ad.Zero:
        sums = map(ad.instantiate_zeros, tangents[:2])
        terms.append(bind(matmul_scaled_p, *sums, *rest, **params))
    for i, tangent in enumerate(tangents[2:4]):
        if type(tangent) is not ad.Zero:
            terms.append(bind(matmul_scaled_p, x, bias, *rest[:i], tangent, *rest[i + 1 :], **params))
    return out, functools.reduce(ad.add_tangents, terms, ad.Zero(jax.typeof(out).to_tangent_aval()))


def _weight_gradient(x, dy, data, *indices, transpose, **params):
    """Of y = x W for data, which is not known yet."""
    left, right = (dy.astype(x.dtype), x) if transpose else (x, dy.astype(x.dtype))
    params = params | {"block_size": data.aval.shape[-1], "out_dtype": data.aval.dtype}
    return match_batch(bind(sddmm_p, left, right, *indices, **params), data.aval)


def _scaled_transpose(cts, x, scale, data, *indices, out_dtype, **params):
    ct, sums_ct = map(ad.instantiate_zeros, cts)
    results = [None] * (3 + len(indices))
    if ad.is_undefined_primal(x):
        backward = params | {"transpose": not params["transpose"], "out_dtype": x.aval.dtype}
        dx = bind(matmul_scaled_p, ct.astype(data.dtype), sums_ct, scale, data, *indices, **backward)
        results[0] = match_batch(dx, x.aval)
    elif ad.is_undefined_primal(scale):
        forward = params | {"out_dtype": scale.aval.dtype}
        dscale, _ = bind(scaled_matmul_p, x, _add(ct, sums_ct), data, *indices, **forward)
        results[1] = match_batch(dscale, scale.aval)
    else:
        results[2] = _weight_gradient(x, _add(ct, sums_ct) * scale, data, *indices, **params)
    return results


def _matmul_scaled_transpose(ct, x, bias, scale, data, *indices, out_dtype, **params):
    del out_dtype  # the cotangent has it
    operands = [x, bias, scale, data]
    is_unknown = [ad.is_undefined_primal(operand) for operand in operands]
    if type(ct) is ad.Zero:
        results = [ad.Zero(each.aval) if unknown else None for each, unknown in zip(operands, is_unknown, strict=True)]
    elif is_unknown[3]:
        results = [None, None, None, _weight_gradient(_add(x, bias) * scale, ct, data, *indices, **params)]
    else:
        factor = _add(x, bias) if is_unknown[2] else scale
        backward = params | {"transpose": not params["transpose"], "out_dtype": data.dtype}
        product, sums = bind(scaled_matmul_p, ct.astype(data.dtype), factor, data, *indices, **backward)
        results = [
            match_batch(result.astype(each.aval.dtype), each.aval) if unknown else None
            for result, each, unknown in zip((product, sums, product), operands, is_unknown, strict=False)
        ] + [None]
    return results + [None] * len(indices)


def _batch(primitive, floats, rows, args, dims, **params):
    """Vmapped axes become part of the leading axis, or more rows of x where only the operands `rows` have them."""
    many = primitive.multiple_results
    if any(dim is not None for i, dim in enumerate(dims) if i not in rows) or dims[0] is None:
        (x, *rest), like = fold_batch(args, dims, floats)
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
batching.primitive_batchers[matmul_act_p] = functools.partial(_batch, matmul_act_p, 3, [0])

scaled_matmul_p.def_impl(functools.partial(xla.apply_primitive, scaled_matmul_p))
scaled_matmul_p.def_abstract_eval(_scaled_abstract)
ad.primitive_jvps[scaled_matmul_p] = _scaled_jvp
ad.primitive_transposes[scaled_matmul_p] = _scaled_transpose
batching.primitive_batchers[scaled_matmul_p] = functools.partial(_batch, scaled_matmul_p, 3, [])

matmul_scaled_p.def_impl(functools.partial(xla.apply_primitive, matmul_scaled_p))
matmul_scaled_p.def_abstract_eval(_matmul_scaled_abstract)
ad.primitive_jvps[matmul_scaled_p] = _matmul_scaled_jvp
ad.primitive_transposes[matmul_scaled_p] = _matmul_scaled_transpose
batching.primitive_batchers[matmul_scaled_p] = functools.partial(_batch, matmul_scaled_p, 4, [0, 2])
