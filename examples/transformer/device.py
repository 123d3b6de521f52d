"""What depends on the device: how a function is compiled and what the program calls."""

import collections
import re
from collections.abc import Callable
from typing import Any

import jax

from transformer.settings import Settings

_OUR_CALLS = re.compile(r'custom_call_target="(jax_blocksparse[^"]*)"')


def on_gpu() -> bool:
    """True if JAX computes on a GPU."""
    return jax.default_backend() == "gpu"


def compile_for(settings: Settings, function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
    """Compile `function` for arguments like `args`; with `settings.deterministic` the same way on every run."""
    options = {"xla_gpu_deterministic_ops": True} if on_gpu() and settings.deterministic else None
    return jax.jit(function, donate_argnums=donate).lower(*args).compile(options)


def native_calls(compiled: Any) -> dict[str, int]:
    """How often a compiled program calls each native kernel of jax_blocksparse, by the name of the target."""
    return dict(sorted(collections.Counter(_OUR_CALLS.findall(compiled.as_text())).items()))


def memory() -> dict[str, int]:
    """Bytes of device memory in use and at the peak; empty where the device does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {name: stats[name] for name in ("bytes_in_use", "peak_bytes_in_use", "bytes_limit") if name in stats}
