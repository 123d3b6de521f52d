"""What was trained, in numbers, and the file that keeps them."""

import importlib.metadata
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from transformer.checkpoints import History
from transformer.data import Corpus
from transformer.model import VOCABULARY, Transformer
from transformer.settings import Settings

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "jax_blocksparse")


def model_size(model: Transformer, settings: Settings) -> dict[str, dict[str, int]]:
    """Parameters, their bytes, and FLOPs per byte of text, of this model and of the same one with dense matrices.

    A multiply-add counts as two FLOPs; looking up embeddings counts as none; attention counts the pairs that a causal
    mask leaves; training counts three times forward.
    """
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    matrices = [matrix for block in model.blocks for matrix in block.matrices().values()]
    stored = sum(matrix.kernel.size for matrix in matrices)
    dense = sum(matrix.in_features * matrix.out_features for matrix in matrices)
    attention = 2 * settings.layers * settings.d_model * (settings.context + 1)

    def numbers(in_matrices: int) -> dict[str, int]:
        parameters = sum(leaf.size for leaf in leaves) - stored + in_matrices
        forward = 2 * (in_matrices + settings.d_model * VOCABULARY) + attention
        return {
            "parameters": parameters,
            "parameter_bytes": parameters * leaves[0].dtype.itemsize,
            "forward_flops_per_token": forward,
            "training_flops_per_token": 3 * forward,
        }

    return {"model": numbers(stored), "dense_equivalent": numbers(dense)}


def describe(corpus: Corpus, weak: dict[str, float], size: dict[str, dict[str, int]]) -> str:
    """What is about to be trained, on which text, and what it has to beat."""
    model, dense = size["model"], size["dense_equivalent"]
    lines = [
        f"text: {corpus.name}, {len(corpus.train):,} bytes to learn from, {len(corpus.held_out):,} held out",
        f"text: sha256 {corpus.sha256()}",
        "held-out text in bits per byte: " + ", ".join(f"{name} {bits:.3f}" for name, bits in weak.items()),
        f"parameters: {model['parameters']:,} (dense: {dense['parameters']:,}), {model['parameter_bytes']:,} bytes",
        *(
            f"FLOPs per byte of text, {phase}: {model[key]:,} (dense: {dense[key]:,})"
            for phase, key in (("forward", "forward_flops_per_token"), ("training", "training_flops_per_token"))
        ),
    ]
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """Device, operating system and versions."""
    device = jax.local_devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices_seen": jax.device_count(),
        "machine": platform.platform(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def summary(history: History, settings: Settings) -> dict[str, float]:
    """The outcome of a run in a few numbers."""
    seconds = statistics.median(history["step_seconds"])
    return {
        "held_out_bits_per_byte": history["held_out"][-1][1],
        "best_held_out_bits_per_byte": min(bits for _, bits in history["held_out"]),
        "median_step_seconds": seconds,
        "tokens_per_second": settings.batch_size * settings.context / seconds,
        "training_seconds": sum(history["step_seconds"]),
    }


def verdict(
    outcome: dict[str, float], weak: dict[str, float], memory: dict[str, int], folder: Path, seconds: float
) -> str:
    """How the run ended, beside what it had to beat."""
    rows = {**weak, "this model": outcome["held_out_bits_per_byte"]}
    width = max(map(len, rows))
    lines = ["held-out text, bits per byte:"]
    lines += [f"  {name:<{width}}  {bits:.3f}" for name, bits in rows.items()]
    lines += [
        f"{1e3 * outcome['median_step_seconds']:.1f} ms per step, {outcome['tokens_per_second']:,.0f} bytes per second",
        *(f"device memory, {name.replace('_', ' ')}: {amount:,} bytes" for name, amount in memory.items()),
        f"{seconds:.0f} s in all; results.json and the pictures are in {folder}",
    ]
    return "\n".join(lines)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` where a reader sees either the old file or the whole new one."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    draft.replace(path)
