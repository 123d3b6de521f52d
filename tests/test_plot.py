"""Pictures show the blocks where the matrix has them."""

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("agg")

from matplotlib import pyplot
from matplotlib.colors import to_rgba

from jax_blocksparse import BlockPattern, patterns
from jax_blocksparse.plot import plot_pattern


@pytest.fixture(autouse=True)
def _no_figures_left():
    yield
    pyplot.close("all")


def pixel(axes, feature_in, feature_out):
    """The colour drawn for one element of the matrix."""
    axes.figure.canvas.draw()
    column, row = axes.transData.transform((feature_out + 0.5, feature_in + 0.5)).astype(int)
    return np.asarray(axes.figure.canvas.buffer_rgba())[::-1][row, column] / 255


@pytest.mark.parametrize("shape", [(64, 96), (57, 90)])
def test_draws_what_the_mask_says(shape):
    pattern = patterns.random(shape, 16, density=0.5)
    axes = plot_pattern(pattern, color="tab:red")
    drawn = np.isfinite(np.ma.filled(axes.images[0].get_array(), np.nan))
    np.testing.assert_array_equal(drawn, pattern.mask())
    for row, col in np.ndindex(pattern.grid):
        wanted = to_rgba("tab:red") if pattern.mask()[row, col] else to_rgba("white")
        inside = min(row * 16 + 8, shape[0] - 1), min(col * 16 + 8, shape[1] - 1)
        np.testing.assert_allclose(pixel(axes, *inside), wanted, atol=0.01)


def test_is_to_scale():
    axes = plot_pattern(patterns.banded((57, 90), 16, density=0.5))
    assert axes.images[0].get_extent() == [0, 96, 64, 0]
    assert axes.get_xlim() == (0, 90)
    assert axes.get_ylim() == (57, 0)
    assert axes.get_aspect() == 1
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("output feature", "input feature")
    assert axes.get_title() == "57 x 90, blocks of 16, density 0.5"


def test_draws_on_the_axes_given_or_the_current_ones():
    pattern = patterns.butterfly((64, 64), 16)
    _, (left, right) = pyplot.subplots(1, 2)
    assert plot_pattern(pattern, left) is left
    assert not right.images
    assert plot_pattern(pattern) is right


@pytest.mark.parametrize("capacity", [0, 3])
def test_nothing_to_draw(capacity):
    pattern = BlockPattern.from_coordinates([], [], shape=(32, 32), block_size=16, capacity=capacity)
    np.testing.assert_allclose(pixel(plot_pattern(pattern), 8, 8), to_rgba("white"))
