"""A whole feed-forward layer, forward and backward: `python -m benchmarks.mlp`, run from the root of the repository.

It times the gradient of a scalar of a Flax MLP (two `nnx.Linear` with gelu between them) by its parameters and its
input, and of `BlockSparseMLP` of the same sizes, prints a table and writes a JSON file.
"""

import argparse
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import report
from benchmarks.environment import describe, gpu_state
from jax_blocksparse import BLOCK_SIZES
from jax_blocksparse.nnx import BlockSparseMLP


class DenseMLP(nnx.Module):
    """The layer as it is written in Flax."""

    def __init__(self, features: int, hidden: int, dtype: Any, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(features, hidden, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(hidden, features, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(tokens, features) to the same."""
        return self.down(nnx.gelu(self.up(x)))


def gradient_of(model: nnx.Module) -> tuple[Callable[..., Any], Any]:
    """A jitted function of (parameters, x, dy) that returns output and gradients, and the parameters."""
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(parameters: Any, rest: Any, x: jax.Array, dy: jax.Array) -> Any:
        y, back = jax.vjp(lambda parameters, x: nnx.merge(graph, parameters, rest)(x), parameters, x)
        return y, back(dy)

    return lambda parameters, x, dy: step(parameters, rest, x, dy), parameters


def times(models: dict[str, nnx.Module], x: jax.Array, dy: jax.Array, repeats: int) -> dict[str, list[float]]:
    """Seconds of a step of each model, in turns, each the mean of calls that follow each other on the device."""
    steps = {name: gradient_of(model) for name, model in models.items()}
    for step, parameters in steps.values():
        jax.block_until_ready(step(parameters, x, dy))
    taken, calls = {name: [] for name in steps}, 10
    for _ in range(repeats):
        for name, (step, parameters) in steps.items():
            start = time.perf_counter()
            results = [step(parameters, x, dy) for _ in range(calls)]
            jax.block_until_ready(results)
            taken[name].append((time.perf_counter() - start) / calls)
            del results
    return taken


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table and writes the JSON.

    Args:
      arguments: the command line without the program's name; `sys.argv` by default.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mlp", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=16384)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--blocks", type=int, nargs="+", default=[128, 64, 32, 16], choices=BLOCK_SIZES)
    parser.add_argument("--dtype", default="bfloat16", help="of the computation; parameters are float32")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--revision", help="what to record instead of what git says")
    parser.add_argument("--output", type=pathlib.Path, help="default: benchmarks/results/DEVICE-DATE-mlp.json")
    options = parser.parse_args(arguments)

    dtype, device = jnp.dtype(options.dtype), jax.devices()[0]
    sizes = (options.features, options.hidden)
    models: dict[str, nnx.Module] = {"dense": DenseMLP(*sizes, dtype, nnx.Rngs(0))}
    for block_size in options.blocks:
        models[f"block {block_size}"] = BlockSparseMLP(
            *sizes, block_size=block_size, density=options.density, dtype=dtype, rngs=nnx.Rngs(0)
        )
    x, dy = (jax.random.normal(jax.random.key(i), (options.tokens, options.features), dtype) for i in range(2))
    taken = times(models, x, dy, options.repeats)

    dense = statistics.median(taken["dense"])
    results = {
        "environment": describe(device, options.revision) | {"gpu": gpu_state(device)},
        "settings": {name: value for name, value in vars(options).items() if name not in ("output", "revision")},
        "results": [
            {
                "model": name,
                "median_s": statistics.median(seconds),
                "min_s": min(seconds),
                "max_s": max(seconds),
                "speedup": dense / statistics.median(seconds),
            }
            for name, seconds in taken.items()
        ],
    }
    default = report.default_path(results["environment"])
    path = options.output or default.with_name(f"{default.stem}-mlp.json")
    report.save(path, results)
    print(f"{options.tokens} tokens, {options.features} -> {options.hidden} -> {options.features}, {dtype.name}")
    for record in results["results"]:
        print(f"{record['model']:>10}  {record['median_s'] * 1e3:8.3f} ms  {record['speedup']:6.2f} x dense")
    print(f"results are in {path}")


if __name__ == "__main__":
    main()
