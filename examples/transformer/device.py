"""What depends on the device: how a function is compiled, which attention kernel works, what the program calls."""

import collections
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from transformer.settings import Settings

_OUR_CALLS = re.compile(r'custom_call_target="(jax_blocksparse[^"]*)"')


def on_gpu() -> bool:
    """True if JAX computes on a GPU."""
    return jax.default_backend() == "gpu"


def compile_for(settings: Settings, function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
    """Compile `function` for arguments like `args`; with `settings.deterministic` the same way on every run."""
    options = {"xla_gpu_deterministic_ops": True} if on_gpu() and settings.deterministic else None
    return jax.jit(function, donate_argnums=donate).lower(*args).compile(options)


def attention_kernel(settings: Settings) -> str:
    """The attention kernel to use, "xla" or "cudnn"; `auto` tries cuDNN's on the shapes of the run."""
    if settings.attention != "auto":
        return settings.attention
    if not on_gpu() or jnp.dtype(settings.dtype).itemsize != 2:
        return "xla"

    def probe(x: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(x, x, x, is_causal=True, implementation="cudnn").sum()

    shape = (settings.batch_size, settings.context, settings.heads, settings.d_model // settings.heads)
    try:
        compile_for(settings, jax.grad(probe), jax.ShapeDtypeStruct(shape, settings.dtype))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        print(f"attention: XLA's own kernel, because cuDNN's was refused ({str(error).splitlines()[0]})")
        return "xla"
    return "cudnn"


def native_calls(compiled: Any) -> dict[str, int]:
    """How often a compiled program calls each native kernel of jax_blocksparse, by the name of the target."""
    return dict(sorted(collections.Counter(_OUR_CALLS.findall(compiled.as_text())).items()))


def memory() -> dict[str, int]:
    """Bytes of device memory in use and at the peak; empty where the device does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {name: stats[name] for name in ("bytes_in_use", "peak_bytes_in_use", "bytes_limit") if name in stats}
