"""Pictures of a run, written as PNG."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jax_blocksparse.plot import plot_pattern
from transformer.checkpoints import History
from transformer.model import Transformer

_DPI = 130


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure).print_figure(path, dpi=_DPI)


def loss_curve(path: Path, history: History, baselines: dict[str, float], title: str) -> None:
    """Draw training and held-out bits per byte over the steps, with the baselines as horizontal lines."""
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="step", ylabel="bits per byte")
    loss = np.asarray(history["loss"])
    steps = np.arange(1, len(loss) + 1)
    axes.plot(steps, loss, color="tab:blue", alpha=0.25, linewidth=0.8)
    width = max(1, len(loss) // 40)
    smooth = np.convolve(loss, np.full(width, 1 / width), mode="valid")
    axes.plot(steps[width - 1 :], smooth, color="tab:blue", label=f"training (mean of {width} steps)")
    axes.plot(*np.transpose(history["held_out"]), "o-", color="tab:red", markersize=4, label="held-out")
    for (name, bits), style in zip(baselines.items(), (":", "-", "--", "-."), strict=True):
        axes.axhline(bits, color="0.35", linestyle=style, linewidth=1, label=f"{name}: {bits:.2f}")
    axes.set_ylim(0, min(loss.max(), 8.5) * 1.03)
    axes.set_xlim(0, len(loss))
    axes.grid(alpha=0.2)
    axes.legend(loc="upper right")
    _save(figure, path)


def pattern_picture(path: Path, model: Transformer) -> None:
    """Draw the kept blocks of the six matrices of the first block, in a row."""
    matrices = model.blocks[0].matrices()
    patterns = {name: layer.pattern.get_value() for name, layer in matrices.items()}
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    figure.suptitle("Blocks kept in the first of the model's layers")
    axes = figure.subplots(1, len(patterns), width_ratios=[p.shape[1] ** 0.5 for p in patterns.values()])
    for ax, (name, pattern) in zip(axes, patterns.items(), strict=True):
        plot_pattern(pattern, ax=ax)
        ax.set_title(f"{name} {pattern.shape[0]}×{pattern.shape[1]}\ndensity {pattern.density:.3g}")
    _save(figure, path)
