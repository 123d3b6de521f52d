"""Pictures of patterns; needs matplotlib."""

from typing import TYPE_CHECKING

import numpy as np

from jax_blocksparse.pattern import BlockPattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_pattern(pattern: BlockPattern, ax: "Axes | None" = None, *, color: str = "tab:blue") -> "Axes":
    """Draws where the blocks of a matrix are, to scale, with element indices on the axes.

    Args:
      pattern: the pattern, outside jit.
      ax: the axes to draw on; by default the current ones of pyplot.
      color: any matplotlib colour, for the blocks.

    Returns:
      The axes.

    Example:
      >>> import matplotlib; matplotlib.use("agg")
      >>> import jax_blocksparse as jbs
      >>> jbs.plot.plot_pattern(jbs.patterns.butterfly((256, 256), 16)).get_title()
      '256 x 256, blocks of 16, density 0.312'
    """
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap

    ax = pyplot.gca() if ax is None else ax
    (k, n), (grid_k, grid_n), b = pattern.shape, pattern.grid, pattern.block_size
    ax.imshow(
        np.where(pattern.mask(), 1.0, np.nan),
        cmap=ListedColormap([color]),
        extent=(0, grid_n * b, grid_k * b, 0),
        interpolation="nearest",
        aspect="equal",
    )
    ax.set(
        xlim=(0, n),
        ylim=(k, 0),
        xlabel="output feature",
        ylabel="input feature",
        title=f"{k} x {n}, blocks of {b}, density {pattern.density:.3g}",
    )
    return ax
