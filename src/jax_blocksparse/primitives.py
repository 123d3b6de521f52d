"""The two primitives: what they mean for shapes, derivatives and batches. Nothing here knows about platforms.

    matmul_p:  y[g] = x[g] @ W[g]       x (G, M, K), data (G, nnz, b, b)  ->  y (G, M, N)
               with `transpose`, y[g] = x[g] @ W[g].T,  x (G, M, N)       ->  y (G, M, K)
    sddmm_p:   data[g] = the blocks of x[g].T @ dy[g]                     ->  data (G, nnz, b, b)

W is what `data` and the index arrays of a BlockPattern, (G, ...) too, describe. An operand whose leading size is 1
is shared by the whole batch. Both are linear in each float operand, and each other's transposes, so these few rules
give forward and reverse mode to any order.
"""

import functools
import math

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


def merge_axes(x: jax.Array, start: int, stop: int) -> jax.Array:
    """Makes one axis of the axes from `start` to before `stop`, sharded over all mesh axes that they are sharded over.

    A plain reshape refuses arrays whose type says that an inner one of these axes is sharded (explicit meshes).
    """
    shape, sharding = x.shape, jax.typeof(x).sharding
    parts = (part if isinstance(part, tuple) else (part,) for part in sharding.spec[start:stop])
    merged = tuple(name for part in parts for name in part if name is not None)
    spec = PartitionSpec(*sharding.spec[:start], merged or None, *sharding.spec[stop:])
    shape = (*shape[:start], math.prod(shape[start:stop]), *shape[stop:])
    return jax.lax.reshape(x, shape, out_sharding=sharding.update(spec=spec))


def split_axis(y: jax.Array, axis: int, like: jax.Array, start: int, stop: int) -> jax.Array:
    """Undoes `merge_axes(like, start, stop)` in the result `y` of a product: its `axis` becomes those axes again."""
    sharding, wanted = jax.typeof(y).sharding, jax.typeof(like).sharding.spec[start:stop]
    spec = PartitionSpec(*sharding.spec[:axis], *wanted, *sharding.spec[axis + 1 :])
    shape = (*y.shape[:axis], *like.shape[start:stop], *y.shape[axis + 1 :])
    return jax.lax.reshape(y, shape, out_sharding=sharding.update(spec=spec))


def batch_size(*operands: jax.Array) -> int:
    """The common leading size of operands that have it or 1."""
    return next((operand.shape[0] for operand in operands if operand.shape[0] != 1), 1)


def _leading_spec(*operands: ShapedArray) -> object:
    """How the batch axis of the result is sharded: as in the operand that has it."""
    size = batch_size(*operands)
    return next((operand.sharding.spec[0] for operand in operands if operand.shape[0] == size), None)


def matmul_abstract(x, data, *indices, transpose, shape, out_dtype, **_):
    """The type of the result of `matmul_p`."""
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


def match_batch(cotangent: jax.Array, operand: ShapedArray) -> jax.Array:
    """Sums a cotangent over the batch if its operand was shared by it; on explicit meshes, shards it likewise."""
    if operand.shape[0] == 1 != cotangent.shape[0]:
        cotangent = cotangent.sum(0, keepdims=True)
    if jax.typeof(cotangent).sharding.spec != operand.sharding.spec:
        cotangent = jax.reshard(cotangent, operand.sharding)
    return cotangent


def _matmul_transpose(ct, x, data, *indices, transpose, shape, out_dtype, **params):
    del out_dtype  # the cotangent has it; gradients have the dtype of what they belong to
    nothing = (None,) * len(indices)
    if ad.is_undefined_primal(x):
        if type(ct) is ad.Zero:
            return ad.Zero(x.aval), None, *nothing
        ct = ct.astype(data.dtype)
        dx = bind(matmul_p, ct, data, *indices, transpose=not transpose, shape=shape, out_dtype=x.aval.dtype, **params)
        return match_batch(dx, x.aval), None, *nothing
    if type(ct) is ad.Zero:
        return None, ad.Zero(data.aval), *nothing
    ct = ct.astype(x.dtype)
    # y = x W gives dW = x' dy; y = x W' gives dW' = x' dy, that is dW = dy' x.
    left, right = (ct, x) if transpose else (x, ct)
    block_size, dtype = data.aval.shape[-1], data.aval.dtype
    dw = bind(sddmm_p, left, right, *indices, block_size=block_size, shape=shape, out_dtype=dtype, **params)
    return None, match_batch(dw, data.aval), *nothing


def _sddmm_transpose(ct, x, dy, *indices, block_size, shape, out_dtype, **params):
    del block_size, out_dtype
    nothing = (None,) * len(indices)
    if ad.is_undefined_primal(x):
        if type(ct) is ad.Zero:
            return ad.Zero(x.aval), None, *nothing
        ct = ct.astype(dy.dtype)
        dx = bind(matmul_p, dy, ct, *indices, transpose=True, shape=shape, out_dtype=x.aval.dtype, **params)
        return match_batch(dx, x.aval), None, *nothing
    if type(ct) is ad.Zero:
        return None, ad.Zero(dy.aval), *nothing
    ct = ct.astype(x.dtype)
    ddy = bind(matmul_p, x, ct, *indices, transpose=False, shape=shape, out_dtype=dy.aval.dtype, **params)
    return None, match_batch(ddy, dy.aval), *nothing


def fold_batch(args, dims, floats=2):
    """Merges the vmapped axes of all operands into their leading ones.

    Returns the operands, and one of them as it was before two axes became one. Only what both batches share stays of
    leading size 1; the index arrays behind the first `floats` operands, which describe one pattern, stay together.
    """
    size = next(arg.shape[dim] for arg, dim in zip(args, dims, strict=True) if dim is not None)
    args = [arg[None] if dim is None else jnp.moveaxis(arg, dim, 0) for arg, dim in zip(args, dims, strict=True)]
    batch = next((arg.shape[1] for arg in args if arg.shape[1] != 1), 1)
    shared = [dim is None and arg.shape[1] == 1 for arg, dim in zip(args, dims, strict=True)]
    shared[floats:] = [all(shared[floats:])] * len(shared[floats:])
    args = [
        arg if share else jnp.broadcast_to(arg, (size, batch, *arg.shape[2:]))
        for arg, share in zip(args, shared, strict=True)
    ]
    like = next(arg for arg, dim in zip(args, dims, strict=True) if dim is not None)
    return [merge_axes(arg, 0, 2) for arg in args], like


def _batch(primitive, args, dims, **params):
    """One call for the whole batch: vmapped axes become (part of) the leading axis that the primitives have anyway."""
    operands, like = fold_batch(args, dims)
    return split_axis(bind(primitive, *operands, **params), 0, like, 0, 2), 0


def _matmul_batch(args, dims, **params):
    x, *weights = args
    if any(dim is not None for dim in dims[1:]):
        return _batch(matmul_p, args, dims, **params)
    # Weights that all examples share: more rows for one product.
    x = jnp.moveaxis(x, dims[0], 1)
    y = bind(matmul_p, merge_axes(x, 1, 3), *weights, **params)
    return split_axis(y, 1, x, 1, 3), 1


matmul_p.def_impl(functools.partial(xla.apply_primitive, matmul_p))
matmul_p.def_abstract_eval(matmul_abstract)
ad.primitive_jvps[matmul_p] = functools.partial(_bilinear_jvp, matmul_p)
ad.primitive_transposes[matmul_p] = _matmul_transpose
batching.primitive_batchers[matmul_p] = _matmul_batch

sddmm_p.def_impl(functools.partial(xla.apply_primitive, sddmm_p))
sddmm_p.def_abstract_eval(_sddmm_abstract)
ad.primitive_jvps[sddmm_p] = functools.partial(_bilinear_jvp, sddmm_p)
ad.primitive_transposes[sddmm_p] = _sddmm_transpose
batching.primitive_batchers[sddmm_p] = functools.partial(_batch, sddmm_p)
