"""The two primitives: what they mean for shapes, derivatives and batches. Nothing here knows about platforms.

    matmul_p:  y[g] = x[g] @ W[g]       x (G, M, K), data (G, nnz, b, b)  ->  y (G, M, N)
               with `transpose`, y[g] = x[g] @ W[g].T,  x (G, M, N)       ->  y (G, M, K)
    sddmm_p:   data[g] = the blocks of x[g].T @ dy[g]                     ->  data (G, nnz, b, b)

W is what `data` and the six index arrays of a BlockPattern, (G, ...) too, describe. An operand whose leading size is 1
is shared by the whole batch. Both are linear in each float operand, and each other's transposes, so these few rules
give forward and reverse mode to any order.
"""

import functools

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, xla
from jax.sharding import PartitionSpec

matmul_p = Primitive("block_sparse_matmul")
sddmm_p = Primitive("block_sparse_sddmm")


def bind(primitive: Primitive, *operands: jax.Array, **params: object) -> jax.Array:
    """Binds a primitive to operands that may vary over different manual axes of an enclosing shard_map.

    Operands that are the same on every device of an axis (weights, usually) are first cast to vary over it: the
    transpose of that cast is the sum over devices that the gradient of a replicated weight needs.
    """
    axes = [jax.typeof(operand).manual_axis_type.varying for operand in operands]
    union = frozenset().union(*axes)
    operands = [
        jax.lax.pcast(operand, tuple(union - own), to="varying") if union - own else operand
        for operand, own in zip(operands, axes, strict=True)
    ]
    return primitive.bind(*operands, **params)


def batch_size(*operands: jax.Array) -> int:
    """The common leading size of operands that have it or 1."""
    return next((operand.shape[0] for operand in operands if operand.shape[0] != 1), 1)


def _leading_spec(*operands: ShapedArray) -> object:
    """How the batch axis of the result is sharded: as in the operand that has it."""
    size = batch_size(*operands)
    return next((operand.sharding.spec[0] for operand in operands if operand.shape[0] == size), None)


def _matmul_abstract(x, data, *indices, transpose, shape, out_dtype, **_):
    out_features = shape[0] if transpose else shape[1]
    spec = PartitionSpec(_leading_spec(x, data, indices[0]), x.sharding.spec[1], None)
    return x.update(
        shape=(batch_size(x, data, indices[0]), x.shape[1], out_features),
        dtype=jnp.dtype(out_dtype),
        weak_type=False,
        sharding=x.sharding.update(spec=spec),
    )


def _sddmm_abstract(x, dy, *indices, block_size, out_dtype, **_):
    spec = PartitionSpec(_leading_spec(x, dy, indices[0]), None, None, None)
    return x.update(
        shape=(batch_size(x, dy, indices[0]), indices[0].shape[1], block_size, block_size),
        dtype=jnp.dtype(out_dtype),
        weak_type=False,
        sharding=x.sharding.update(spec=spec),
    )


def _bilinear_jvp(primitive, primals, tangents, **params):
    """Both primitives are linear in operand 0 and in operand 1; the rest are indices."""
    (a, b, *indices), (a_dot, b_dot, *_) = primals, tangents
    out = bind(primitive, a, b, *indices, **params)
    terms = []
    if type(a_dot) is not ad.Zero:
        terms.append(bind(primitive, a_dot, b, *indices, **params))
    if type(b_dot) is not ad.Zero:
        terms.append(bind(primitive, a, b_dot, *indices, **params))
    return out, functools.reduce(ad.add_tangents, terms) if terms else ad.Zero(jax.typeof(out).to_tangent_aval())


def _like(cotangent: jax.Array, operand: ShapedArray) -> jax.Array:
    """Sums a cotangent over the batch if its operand was shared by it."""
    if operand.shape[0] == 1 != cotangent.shape[0]:
        return cotangent.sum(0, keepdims=True)
    return cotangent


def _matmul_transpose(ct, x, data, *indices, transpose, shape, out_dtype, **params):
    del out_dtype  # the cotangent has it; gradients have the dtype of what they belong to
    nothing = (None,) * len(indices)
    if ad.is_undefined_primal(x):
        if type(ct) is ad.Zero:
            return ad.Zero(x.aval), None, *nothing
        ct = ct.astype(data.dtype)
        dx = bind(matmul_p, ct, data, *indices, transpose=not transpose, shape=shape, out_dtype=x.aval.dtype, **params)
        return _like(dx, x.aval), None, *nothing
    if type(ct) is ad.Zero:
        return None, ad.Zero(data.aval), *nothing
    ct = ct.astype(x.dtype)
    # y = x W gives dW = x' dy; y = x W' gives dW' = x' dy, that is dW = dy' x.
    left, right = (ct, x) if transpose else (x, ct)
    block_size, dtype = data.aval.shape[-1], data.aval.dtype
    dw = bind(sddmm_p, left, right, *indices, block_size=block_size, shape=shape, out_dtype=dtype, **params)
    return None, _like(dw, data.aval), *nothing


def _sddmm_transpose(ct, x, dy, *indices, block_size, shape, out_dtype, **params):
    del block_size, out_dtype
    nothing = (None,) * len(indices)
    if ad.is_undefined_primal(x):
        if type(ct) is ad.Zero:
            return ad.Zero(x.aval), None, *nothing
        ct = ct.astype(dy.dtype)
        dx = bind(matmul_p, dy, ct, *indices, transpose=True, shape=shape, out_dtype=x.aval.dtype, **params)
        return _like(dx, x.aval), None, *nothing
    if type(ct) is ad.Zero:
        return None, ad.Zero(dy.aval), *nothing
    ct = ct.astype(x.dtype)
    ddy = bind(matmul_p, x, ct, *indices, transpose=False, shape=shape, out_dtype=dy.aval.dtype, **params)
    return None, _like(ddy, dy.aval), *nothing


def _merge_axes(args, dims):
    """Merges the vmapped axes of all operands into their leading ones.

    Returns the operands and the sizes of the vmapped and of the former leading axis. Only what is shared by both stays
    of leading size 1; the index arrays, which describe one pattern, stay together.
    """
    size = next(arg.shape[dim] for arg, dim in zip(args, dims, strict=True) if dim is not None)
    args = [arg if dim is None else jnp.moveaxis(arg, dim, 0) for arg, dim in zip(args, dims, strict=True)]
    batch = next((n for a, d in zip(args, dims, strict=True) if (n := a.shape[0 if d is None else 1]) != 1), 1)

    def merge(arg: jax.Array, dim: int | None, share: bool) -> jax.Array:
        if share and dim is None and arg.shape[0] == 1:
            return arg
        tail = arg.shape[1:] if dim is None else arg.shape[2:]
        arg = arg[None] if dim is None else arg
        return jnp.broadcast_to(arg, (size, batch, *tail)).reshape(size * batch, *tail)

    share_indices = all(dim is None for dim in dims[2:])
    share = (True, True, *(share_indices for _ in args[2:]))
    return [merge(*each) for each in zip(args, dims, share, strict=True)], size, batch


def _batch(primitive, args, dims, **params):
    """One call for the whole batch: vmapped axes become (part of) the leading axis that the primitives have anyway."""
    args, size, batch = _merge_axes(args, dims)
    out = bind(primitive, *args, **params)
    return out.reshape(size, batch, *out.shape[1:]), 0


def _matmul_batch(args, dims, **params):
    x, *weights = args
    if any(dim is not None for dim in dims[1:]):
        return _batch(matmul_p, args, dims, **params)
    # Weights that all examples share: more rows for one product.
    x = jnp.moveaxis(x, dims[0], 1)
    y = bind(matmul_p, x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3]), *weights, **params)
    return y.reshape(y.shape[0], x.shape[1], x.shape[2], y.shape[2]), 1


matmul_p.def_impl(functools.partial(xla.apply_primitive, matmul_p))
matmul_p.def_abstract_eval(_matmul_abstract)
ad.primitive_jvps[matmul_p] = functools.partial(_bilinear_jvp, matmul_p)
ad.primitive_transposes[matmul_p] = _matmul_transpose
batching.primitive_batchers[matmul_p] = _matmul_batch

sddmm_p.def_impl(functools.partial(xla.apply_primitive, sddmm_p))
sddmm_p.def_abstract_eval(_sddmm_abstract)
ad.primitive_jvps[sddmm_p] = functools.partial(_bilinear_jvp, sddmm_p)
ad.primitive_transposes[sddmm_p] = _sddmm_transpose
batching.primitive_batchers[sddmm_p] = functools.partial(_batch, sddmm_p)
