"""Finds the native modules, registers their XLA custom calls and remembers why one is missing."""

import dataclasses
import importlib
import importlib.util
import pathlib
import re
import warnings
from types import ModuleType

import jax
import jaxlib

MATMUL_TARGET = "jax_blocksparse.matmul.v1"
SDDMM_TARGET = "jax_blocksparse.sddmm.v1"


@dataclasses.dataclass(frozen=True)
class Availability:
    """Whether native kernels are there; true or false as itself, with the reason beside it.

    Attributes:
      available: the custom calls are registered with JAX.
      reason: one sentence for a person: what was found, or what to do about it.
    """

    available: bool
    reason: str

    def __bool__(self) -> bool:
        return self.available


def _runtime_ffi_version() -> tuple[int, int]:
    """The (major, minor) of the FFI that the running jaxlib speaks, read from the headers it ships."""
    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    major, minor = (int(re.search(rf"#define XLA_FFI_API_{part} (\d+)", header)[1]) for part in ("MAJOR", "MINOR"))
    return major, minor


def _register(module: ModuleType, platform: str) -> None:
    built, running = module.XLA_FFI_API_VERSION, _runtime_ffi_version()
    if built > running:
        # XLA would refuse the handlers when the backend starts, and take the whole backend down with them.
        raise ImportError(
            f"{module.__name__} was built with XLA FFI headers {built[0]}.{built[1]}, but jaxlib "
            f"{jaxlib.__version__} speaks {running[0]}.{running[1]}; build it with an older jax or install a newer one"
        )
    for target, capsule in module.registrations().items():
        jax.ffi.register_ffi_target(target, capsule, platform=platform)


def _load(name: str, platform: str, absent: str) -> Availability:
    full_name = f"jax_blocksparse.{name}"
    if importlib.util.find_spec(full_name) is None:
        return Availability(False, absent)
    try:
        _register(importlib.import_module(full_name), platform)
    except ImportError as error:
        reason = f"{full_name} is installed but does not load: {error}"
        warnings.warn(f"{reason}. Falling back to plain XLA, which is slow.", RuntimeWarning, stacklevel=2)
        return Availability(False, reason)
    return Availability(True, f"{full_name} is registered")


_cpu = _load("_cpu", "cpu", "this installation has no CPU module: jax_blocksparse was not built by pip")
_cuda = _load("_cuda", "CUDA", "this installation was built without CUDA: nvcc was not found or was switched off")


def has_cuda() -> Availability:
    """Says whether the CUDA custom calls are part of this installation and loaded, and why not.

    It says nothing about GPUs: the module loads on a machine that has none.

    Returns:
      An `Availability`, which is true or false as itself and has a `reason`.

    Example:
      >>> import jax_blocksparse
      >>> print("CUDA kernels:", jax_blocksparse.has_cuda().reason)  # doctest: +ELLIPSIS
      CUDA kernels: ...
    """
    return _cuda


def has_cpu() -> Availability:
    """Says whether the CPU custom calls are part of this installation and loaded, and why not.

    Returns:
      An `Availability`, which is true or false as itself and has a `reason`.

    Example:
      >>> import jax_blocksparse
      >>> bool(jax_blocksparse.has_cpu())
      True
    """
    return _cpu
