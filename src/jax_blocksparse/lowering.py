"""How each platform runs the primitives: native custom calls on cpu and cuda, plain XLA elsewhere."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.export import DisabledSafetyCheck
from jax.interpreters import mlir
from jax.sharding import AxisType

from jax_blocksparse import _native, reference
from jax_blocksparse.pattern import INDEX_NAMES
from jax_blocksparse.plan import choose_layout
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
"""Up to this many rows of x, blocks are best fetched one by one, in any order."""

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


def _cuda_matmul(ctx, *operands, transpose, shape, **_):
    places = _matmul_operands(transpose, plan=True)
    x, data, *_, plan = avals = [ctx.avals_in[place] for place in places]
    layout = choose_layout(*(shape[::-1] if transpose else shape), data.shape[-1], data.shape[1])
    packs = layout.packs and x.dtype.itemsize == 2 and x.shape[1] > SMALL_BATCH
    # Where the kernel wants the blocks in its own order, it puts them here.
    workspace = ShapedArray((max(data.shape[0], plan.shape[0]), *data.shape[1:]) if packs else (0,), data.dtype)
    ctx = ctx.replace(avals_in=avals, avals_out=[*ctx.avals_out, workspace])
    call = jax.ffi.ffi_lowering(_native.MATMUL_TARGET)
    return call(
        ctx,
        *(operands[place] for place in places),
        transpose=transpose,
        tile_features=np.int32(layout.tile_features),
        capacity=np.int32(layout.capacity),
    )[:1]


def _sddmm_call(ctx, x, dy, rows, cols, *_, **__):
    return jax.ffi.ffi_lowering(_native.SDDMM_TARGET)(ctx.replace(avals_in=ctx.avals_in[:4]), x, dy, rows, cols)


def _automatically_sharded(plain: Callable[..., Any], out: ShapedArray) -> Callable[..., Any]:
    """Lets XLA find out how to shard each step of `plain`, whose types would have to say so on an explicit mesh."""
    mesh = out.sharding.mesh
    explicit = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind is AxisType.Explicit]
    return jax.sharding.auto_axes(plain, axes=tuple(explicit), out_sharding=out.sharding) if explicit else plain


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
            function = _automatically_sharded(functools.partial(plain, precision=precision, **params), ctx.avals_out[0])
            return mlir.lower_fun(function, multiple_results=False)(ctx, *operands)
        return native_call(ctx, *operands, **params)

    return rule


for _primitive, _cpu_call, _cuda_call, _plain in (
    (matmul_p, _cpu_matmul, _cuda_matmul, reference.matmul),
    (sddmm_p, _sddmm_call, _sddmm_call, reference.sddmm),
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
