"""Pictures of a run, written as PNG."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jax_blocksparse.plot import plot_pattern
from transformer.checkpoints import History
from transformer.model import Transformer

_DPI = 130
_BASELINE_STYLES = (":", "-", "--", "-.")
_PATTERNS_WIDTH = 15  # inches


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure).print_figure(path, dpi=_DPI)


def loss_curve(path: Path, history: History, baselines: dict[str, float], title: str) -> None:
    """Draw training and held-out bits per byte over the steps, with the baselines as horizontal lines."""
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="step", ylabel="bits per byte")
    loss = np.asarray(history["loss"])
    steps = np.arange(1, len(loss) + 1)
    axes.plot(steps, loss, color="tab:blue", alpha=0.3, linewidth=0.7, label="training, each step")
    width = 1 + len(loss) // 50
    smooth = np.convolve(loss, np.full(width, 1 / width), mode="valid")
    axes.plot(steps[width - 1 :], smooth, color="tab:blue", label=f"training, mean of {width}")
    axes.plot(*np.transpose(history["held_out"]), "o-", color="tab:red", markersize=4, label="held-out")
    for (name, bits), style in zip(baselines.items(), _BASELINE_STYLES, strict=True):
        axes.axhline(bits, color="0.3", linestyle=style, linewidth=1, label=f"held-out, {name}: {bits:.2f}")
    # The first steps start at eight bits and would flatten all the rest.
    lowest, highest = min(loss.min(), *baselines.values()), max(baselines.values())
    axes.set(xlim=(0, len(loss)), ylim=(0.9 * lowest, 1.2 * highest))
    axes.grid(alpha=0.2)
    axes.legend(loc="upper right", fontsize="small")
    _save(figure, path)


def pattern_picture(path: Path, model: Transformer) -> None:
    """Draw the kept blocks of the six matrices of the first layer, in a row and to one scale.

    A matrix that is taller than wide lies on its side.
    """
    patterns = {name: layer.pattern.get_value() for name, layer in model.blocks[0].matrices().items()}
    longest = [max(pattern.shape) for pattern in patterns.values()]
    scale = (_PATTERNS_WIDTH - 0.8 * len(longest)) / sum(longest)
    height = scale * max(min(pattern.shape) for pattern in patterns.values()) + 1.5
    figure = Figure(figsize=(_PATTERNS_WIDTH, height), layout="constrained")
    figure.suptitle("Blocks kept in the matrices of the first layer")
    all_axes = figure.subplots(1, len(patterns), width_ratios=longest)
    for axes, (name, pattern) in zip(all_axes, patterns.items(), strict=True):
        names = {"xlabel": "output", "ylabel": "input"}
        if pattern.shape[0] > pattern.shape[1]:
            pattern, names = pattern.T, {"xlabel": "input", "ylabel": "output"}
        plot_pattern(pattern, ax=axes)
        axes.set(xticks=(0, pattern.shape[1]), yticks=(0, pattern.shape[0]), **names)
        axes.set_title(f"{name}\ndensity {pattern.density:.3g}")
    _save(figure, path)
