"""The activations that a product can apply to its result."""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

Activation = Literal["relu", "gelu_exact", "gelu_tanh", "silu"]

ACTIVATIONS = (None, *get_args(Activation))
"""All there are; their places are the numbers by which the CUDA kernels know them."""

_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}


def check_activation(activation: Activation | None) -> Activation | None:
    """Returns the activation, or raises ValueError."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS[1:])}, got {activation!r}")
    return activation


def value(activation: Activation | None, x: jax.Array) -> jax.Array:
    """The activation of each element."""
    return x if activation is None else _FUNCTIONS[activation](x)


def slope(activation: Activation | None, x: jax.Array) -> jax.Array:
    """The derivative of the activation at each element."""
    return jax.jvp(functools.partial(value, activation), (x,), (jnp.ones_like(x),))[1]


def curvature(activation: Activation | None, x: jax.Array) -> jax.Array:
    """The second derivative of the activation at each element."""
    return jax.jvp(functools.partial(slope, activation), (x,), (jnp.ones_like(x),))[1]
