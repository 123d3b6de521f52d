"""The few functions of cuSPARSE that the benchmark calls, through ctypes: no Python package binds its block formats.

Importing it fails where the library is not found. Matrices are given as PyTorch tensors, which the launches keep alive.
"""

import ctypes
import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

import torch

# From cusparse.h and library_types.h.
BLOCKED_ELL_ALGORITHM = 13
_DEFAULT_ALGORITHM = 0
_NO_TRANSPOSE = 0
_BASE_ZERO = 0
_ORDER_COLUMNS, _ORDER_ROWS = 1, 2
_INT32 = 2
_FLOAT32 = 0
_TYPES = {torch.float32: _FLOAT32, torch.float16: 2, torch.bfloat16: 14}


def _load() -> ctypes.CDLL:
    """Finds the library among NVIDIA's wheels, where PyTorch has it from, or on the system's path."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        for path in pathlib.Path(folder).rglob("libcusparse.so*"):
            return ctypes.CDLL(str(path))
    return ctypes.CDLL("libcusparse.so.12")


_cusparse = _load()


def _check(status: int) -> None:
    if status:
        _cusparse.cusparseGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"cuSPARSE: {_cusparse.cusparseGetErrorString(status).decode()}")


_handle = ctypes.c_void_p()
_check(_cusparse.cusparseCreate(ctypes.byref(_handle)))


def version() -> int:
    """Returns what cuSPARSE says its version is, such as 12603."""
    value = ctypes.c_int()
    _check(_cusparse.cusparseGetVersion(_handle, ctypes.byref(value)))
    return value.value


class Descriptor:
    """What cuSPARSE knows of a matrix, and the tensors it consists of."""

    def __init__(self, create: Callable[..., int], *arguments: Any, tensors: tuple[torch.Tensor, ...]) -> None:
        self.handle = ctypes.c_void_p()
        self.tensors = tensors
        _check(create(ctypes.byref(self.handle), *arguments))


def bsr(row_ptr: torch.Tensor, cols: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]) -> Descriptor:
    """Describes a matrix in BSR whose values are (nnz, b, b)."""
    nnz, b, _ = values.shape
    sizes = (ctypes.c_int64(size) for size in (shape[0] // b, shape[1] // b, nnz, b, b))
    return Descriptor(
        _cusparse.cusparseCreateBsr,
        *sizes,
        *(_pointer(tensor) for tensor in (row_ptr, cols, values)),
        *(_INT32, _INT32, _BASE_ZERO, _TYPES[values.dtype], _ORDER_ROWS),
        tensors=(row_ptr, cols, values),
    )


def blocked_ell(cols: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]) -> Descriptor:
    """Describes a matrix in Blocked-ELL: cols (rows, width) of blocks, -1 for none, and values (rows, b, width, b)."""
    _, b, width, _ = values.shape
    sizes = (ctypes.c_int64(size) for size in (*shape, b, width * b))
    return Descriptor(
        _cusparse.cusparseCreateBlockedEll,
        *sizes,
        *(_pointer(cols), _pointer(values)),
        *(_INT32, _BASE_ZERO, _TYPES[values.dtype]),
        tensors=(cols, values),
    )


def spmm(a: Descriptor, b: torch.Tensor, c: torch.Tensor, algorithm: int = _DEFAULT_ALGORITHM) -> Callable[[], None]:
    """Returns what queues c = a b on PyTorch's current stream."""
    return _launch("cusparseSpMM", a, _dense(b), _dense(c), algorithm)


def sddmm(a: torch.Tensor, b: torch.Tensor, c: Descriptor) -> Callable[[], None]:
    """Returns what queues c = the blocks of a b on PyTorch's current stream."""
    return _launch("cusparseSDDMM", _dense(a), _dense(b), c, _DEFAULT_ALGORITHM)


def _launch(name: str, a: Descriptor, b: Descriptor, c: Descriptor, algorithm: int) -> Callable[[], None]:
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    scaled = (ctypes.byref(one), a.handle, b.handle, ctypes.byref(zero), c.handle)
    arguments = (_handle, _NO_TRANSPOSE, _NO_TRANSPOSE, *scaled, _FLOAT32, algorithm)
    size = ctypes.c_size_t()
    _check(getattr(_cusparse, f"{name}_bufferSize")(*arguments, ctypes.byref(size)))
    workspace = torch.empty(max(1, size.value), dtype=torch.uint8, device="cuda")
    function = getattr(_cusparse, name)

    def launch(kept: tuple[Any, ...] = (a, b, c)) -> None:
        _check(_cusparse.cusparseSetStream(_handle, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)))
        _check(function(*arguments, _pointer(workspace)))

    return launch


def _dense(tensor: torch.Tensor) -> Descriptor:
    by_rows = tensor.stride(1) == 1
    sizes = (*tensor.shape, tensor.stride(0) if by_rows else tensor.stride(1))
    return Descriptor(
        _cusparse.cusparseCreateDnMat,
        *(ctypes.c_int64(size) for size in sizes),
        *(_pointer(tensor), _TYPES[tensor.dtype], _ORDER_ROWS if by_rows else _ORDER_COLUMNS),
        tensors=(tensor,),
    )


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
