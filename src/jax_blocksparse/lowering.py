"""How each platform runs the primitives: native custom calls on cpu and cuda, plain XLA elsewhere."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.export import DisabledSafetyCheck
from jax.interpreters import mlir
from jax.sharding import AxisType, PartitionSpec

from jax_blocksparse import _native, epilogues, reference, sddmm_layout
from jax_blocksparse.activations import ACTIVATIONS
from jax_blocksparse.epilogues import matmul_act_p, matmul_scaled_p, scaled_matmul_p
from jax_blocksparse.pattern import INDEX_NAMES
from jax_blocksparse.plan_layout import choose_layout
from jax_blocksparse.primitives import matmul_p, sddmm_p

DISABLED_EXPORT_CHECKS = (
    DisabledSafetyCheck.custom_call(_native.MATMUL_TARGET),
    DisabledSafetyCheck.custom_call(_native.SDDMM_TARGET),
)
"""For `jax.export.export(f, disabled_checks=...)`, which refuses custom calls that it does not know.

A program exported so needs `import jax_blocksparse` before it runs; the names of the custom calls carry a version, and
a later release keeps the old ones.
"""

SMALL_BATCH = 64
"""Up to so many rows of x, blocks are best fetched one by one, in any order. As kFewTokens in cuda/kernels.h."""

PACKING_PAYS_FROM = 800_000
"""Few rows of x are packed for so many products of a row and a small block; for fewer, it costs more than it saves."""

SUM_TOKENS = 64
"""The CUDA kernels sum so many rows of y; XLA sums these sums. The same as kSumTokens in cuda/epilogue.h."""

_DTYPES = {"cpu": ("float32", "float64", "bfloat16", "float16"), "cuda": ("float32", "bfloat16", "float16")}


def _matmul_operands(transpose: bool, plan: bool) -> list[int]:
    """Which operands of `matmul_p` the custom call takes, in its order."""
    names = ("x", "data", *INDEX_NAMES)
    used = ["row_ptr", "row_order", "cols", "dx_plan"] if transpose else ["col_ptr", "col_order", "rows", "y_plan"]
    return [names.index(name) for name in ("x", "data", *(used if plan else used[:-1]))]


def _cpu_matmul(ctx, *operands, transpose, **_):
    places = _matmul_operands(transpose, plan=False)
    ctx = ctx.replace(avals_in=[ctx.avals_in[place] for place in places])
    call = jax.ffi.ffi_lowering(_native.MATMUL_TARGET)
    return call(ctx, *(operands[place] for place in places), transpose=transpose)


def _allows_tf32(aval: ShapedArray, precision: jax.lax.Precision | None) -> bool:
    """Whether factors like this one may be rounded to TF32, as XLA does at all precisions but the highest."""
    return aval.dtype == np.float32 and precision != jax.lax.Precision.HIGHEST


def _packs_x(x: ShapedArray, data: ShapedArray) -> bool:
    """Whether the kernel for few rows packs x: small blocks need all of it many times, in pieces of few bytes."""
    (_, rows, features), (_, nnz, block_size, _) = x.shape, data.shape
    if x.dtype.itemsize != 2 or features % 8 != 0:
        return False
    if block_size == 32:
        return rows > 32 and nnz * rows >= 2 * PACKING_PAYS_FROM
    return block_size < 32 and rows > 8 and nnz * rows >= PACKING_PAYS_FROM


def _packed_shape(rows: int, features: int) -> tuple[int, int]:
    """How many rows and features packed x has room for. As PackedXElements in cuda/kernels.h."""
    return max(16, 1 << (rows - 1).bit_length()), -(-features // 32) * 32


def _cuda_product(ctx, x, data, indices, *, bias=None, scale=None, activation=None, with_slope=False, **params):
    """The custom call for y = act(x W + bias) * scale, which takes and gives empty arrays for what is left out.

    Operands are pairs of a value and its type. There are column sums where there is a scale.
    """
    transpose, shape, tf32 = params["transpose"], params["shape"], _allows_tf32(x[1], params["precision"])
    operands = [x, data, *indices]
    operands = [operands[place] for place in _matmul_operands(transpose, plan=True)]
    for operand, empty in ((bias, ShapedArray((1, 0), np.float32)), (scale, ShapedArray((1, 0, 0), x[1].dtype))):
        operands.append(operand or (mlir.ir_constant(np.zeros(empty.shape, empty.dtype)), empty))

    layout = choose_layout(*(shape[::-1] if transpose else shape), data[1].shape[-1], data[1].shape[1])
    y = ctx.avals_out[0]
    slope = y if with_slope else ShapedArray((0,), y.dtype)
    sums = ShapedArray((0, 0, 0), np.float32)
    if scale is not None:
        spec = PartitionSpec(y.sharding.spec[0], None, None)
        sums_shape = (y.shape[0], -(-y.shape[1] // SUM_TOKENS), y.shape[2])
        sums = y.update(shape=sums_shape, dtype=np.dtype(np.float32), sharding=y.sharding.update(spec=spec))
    # Where the kernel wants the blocks, or few rows of x, in its own order, it puts them here. A program for any number
    # of rows has the room that many of them want.
    rows = x[1].shape[1]
    if not jax.export.is_symbolic_dim(rows) and rows <= SMALL_BATCH:
        packs = _packs_x(x[1], data[1])
        workspace = (x[1].shape[0], *_packed_shape(*x[1].shape[1:]))
    else:
        # Of float32, large blocks are read along the depth only, and must be transposed where rows are not.
        packs = (layout.packs or not transpose) if tf32 else (layout.packs and x[1].dtype.itemsize == 2)
        workspace = (max(data[1].shape[0], indices[0][1].shape[0]), *data[1].shape[1:])
    workspace = ShapedArray(workspace if packs else (0,), data[1].dtype)

    call_ctx = ctx.replace(avals_in=[aval for _, aval in operands], avals_out=[y, slope, sums, workspace])
    y, slope, partial_sums, _ = jax.ffi.ffi_lowering(_native.MATMUL_TARGET)(
        call_ctx,
        *(value for value, _ in operands),
        transpose=transpose,
        tf32=tf32,
        activation=np.int32(ACTIVATIONS.index(activation)),
        tile_features=np.int32(layout.tile_features),
        capacity=np.int32(layout.capacity),
    )
    if scale is not None:
        sum_ctx = ctx.replace(avals_in=[sums], avals_out=ctx.avals_out[1:])
        return [y, *_lower_plain(sum_ctx, lambda sums: [sums.sum(1)], (partial_sums,))]
    return [y, slope] if with_slope else [y]


def _cuda_matmul(ctx, *operands, **params):
    x, data, *indices = zip(operands, ctx.avals_in, strict=True)
    return _cuda_product(ctx, x, data, indices, **params)


def _cuda_matmul_act(ctx, *operands, **params):
    x, data, bias, *indices = zip(operands, ctx.avals_in, strict=True)
    return _cuda_product(ctx, x, data, indices, bias=bias, **params)


def _cuda_scaled_matmul(ctx, *operands, **params):
    x, scale, data, *indices = zip(operands, ctx.avals_in, strict=True)
    return _cuda_product(ctx, x, data, indices, scale=scale, **params)


def _cpu_sddmm(ctx, x, dy, rows, cols, *_, **__):
    return jax.ffi.ffi_lowering(_native.SDDMM_TARGET)(ctx.replace(avals_in=ctx.avals_in[:4]), x, dy, rows, cols)


def _cuda_sddmm(ctx, *operands, block_size, shape, precision, **_):
    names = ("x", "dy", *INDEX_NAMES)
    places = [names.index(name) for name in ("x", "dy", "rows", "cols", "dw_plan")]
    layout = sddmm_layout.choose_layout(*shape, block_size, ctx.avals_in[2].shape[1])
    return jax.ffi.ffi_lowering(_native.SDDMM_TARGET)(
        ctx.replace(avals_in=[ctx.avals_in[place] for place in places]),
        *(operands[place] for place in places),
        tf32=_allows_tf32(ctx.avals_in[0], precision),
        unit=np.int32(layout.unit),
        split=np.int32(layout.split),
        tiles=np.int32(layout.tiles),
    )


def _lower_plain(ctx, plain: Callable[..., Any], operands: tuple[Any, ...]) -> Any:
    """Lowers a jax.numpy function, which returns a list where there are several results.

    XLA finds out how to shard each of its steps, whose types would have to say so on an explicit mesh.
    """
    shardings = [aval.sharding for aval in ctx.avals_out]
    mesh, several = shardings[0].mesh, ctx.primitive.multiple_results
    explicit = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind is AxisType.Explicit]
    if explicit:
        out_sharding = shardings if several else shardings[0]
        plain = jax.sharding.auto_axes(plain, axes=tuple(explicit), out_sharding=out_sharding)
    return mlir.lower_fun(plain, multiple_results=several)(ctx, *operands)


def _rule(platform: str, native_call: Callable[..., Any] | None, reason: str, plain: Callable[..., Any]) -> Any:
    """The lowering rule of one primitive for one platform; `native_call` is None where there is no native kernel."""

    def rule(ctx, *operands, implementation, precision, **params):
        dtype = str(ctx.avals_in[0].dtype)
        missing = reason if native_call is None else ""
        if not missing and dtype not in _DTYPES[platform]:
            missing = f"the native kernels for {platform} take {', '.join(_DTYPES[platform])}, not {dtype}"
        if implementation == "native" and missing:
            raise NotImplementedError(f"implementation='native' was asked for, but {missing}")
        if implementation == "xla" or missing:
            return _lower_plain(ctx, functools.partial(plain, precision=precision, **params), operands)
        return native_call(ctx, *operands, precision=precision, **params)

    return rule


def _composed(plain: Callable[..., Any]) -> Any:
    """The lowering rule of a primitive with an epilogue, by those without."""

    def rule(ctx, *operands, **params):
        return _lower_plain(ctx, functools.partial(plain, **params), operands)

    return rule


def _fused(cuda_call: Callable[..., Any], plain: Callable[..., Any]) -> Any:
    """The same for cuda, where the native kernels have epilogues."""

    def rule(ctx, *operands, **params):
        is_native = str(ctx.avals_in[0].dtype) in _DTYPES["cuda"] and params["implementation"] != "xla"
        if ctx.primitive is scaled_matmul_p:  # the kernels scale their result, with numbers of its dtype
            is_native &= ctx.avals_in[1].dtype == ctx.avals_out[0].dtype
        rule = cuda_call if is_native else _composed(plain)
        return rule(ctx, *operands, **params)

    return rule


for _primitive, _cpu_call, _cuda_call, _plain in (
    (matmul_p, _cpu_matmul, _cuda_matmul, reference.matmul),
    (sddmm_p, _cpu_sddmm, _cuda_sddmm, reference.sddmm),
):
    mlir.register_lowering(
        _primitive, _rule("other", None, "native kernels exist for the platforms cpu and cuda only", _plain)
    )
    for _platform, _call, _availability in (
        ("cpu", _cpu_call, _native.has_cpu()),
        ("cuda", _cuda_call, _native.has_cuda()),
    ):
        mlir.register_lowering(
            _primitive,
            _rule(_platform, _call if _availability else None, _availability.reason, _plain),
            platform=_platform,
        )

for _primitive, _cuda_call, _plain in (
    (matmul_act_p, _cuda_matmul_act, epilogues.matmul_act),
    (scaled_matmul_p, _cuda_scaled_matmul, epilogues.scaled_matmul),
    (matmul_scaled_p, None, epilogues.matmul_scaled),
):
    mlir.register_lowering(_primitive, _composed(_plain))
    if _cuda_call is not None and _native.has_cuda():
        mlir.register_lowering(_primitive, _fused(_cuda_call, _plain), platform="cuda")
