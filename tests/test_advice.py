"""`advise`: what it says from shipped measurements, without any, and measured here; and what layers say by it."""

import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import jax_blocksparse as jbs
from jax_blocksparse import advice
from jax_blocksparse.__main__ import main

CURVES = {
    "y": [[0.1, 4.0], [0.4, 1.0], [1.0, 0.5]],
    "dx": [[0.1, 8.0], [0.4, 3.0], [1.0, 1.5]],
    "dw": [[0.1, 0.5], [0.4, 0.25]],
}
ENTRIES = [
    {"dtype": "bfloat16", "shape": [4096, 1024, 1024], "block_size": 32, "product": product, "curve": curve}
    for product, curve in CURVES.items()
] + [{"dtype": "bfloat16", "shape": [64, 1024, 1024], "block_size": 32, "product": "y", "curve": [[0.1, 9.0]]}]


@pytest.fixture
def shipped(monkeypatch):
    """Measurements of the device that the tests run on, and nothing judged so far."""
    kind = jax.devices()[0].device_kind
    monkeypatch.setattr(advice, "_shipped", lambda: {kind: {"entries": ENTRIES}})
    monkeypatch.setattr(advice, "_judged", set())
    return kind


def test_interpolates_on_logarithmic_scales(shipped):
    found = jbs.advise(4096, 1024, 1024, 32, 0.2)
    assert found.y.speedup == pytest.approx(2)
    assert found.y.break_even == pytest.approx(0.4)
    assert found.dx.break_even == 1
    assert found.dw.break_even == 0
    assert found.device == shipped
    assert jbs.advise(4096, 1024, 1024, 32, 0.01).y.speedup == pytest.approx(4)
    assert jbs.advise(4096, 1024, 1024, 32, 1).dw.speedup == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("crossing", "expected"), [((2.0, 0.5), 0.2), ((1.0, 0.5), 0.1), ((3.0, 1.0), 0.4), ((0.9, 0.5), 0.0)]
)
def test_break_even(crossing, expected):
    assert advice.break_even([0.4, 0.1], crossing[::-1]) == pytest.approx(expected)


def test_nearest_shape_and_dtype_count(shipped):
    assert jbs.advise(16, 1024, 2048, 32, 0.1).y.speedup == pytest.approx(9)
    assert jbs.advise(16, 1024, 2048, 32, 0.1).dx == jbs.Expectation()
    assert jbs.advise(9999, 1000, 3000, 32, 0.1, "float16").y.speedup == pytest.approx(4)
    for known in (jbs.advise(4096, 1024, 1024, 64, 0.1), jbs.advise(4096, 1024, 1024, 32, 0.1, "float32")):
        assert known.y == known.dx == known.dw == jbs.Expectation()
        assert "no measurements" in repr(known)


def test_repr_is_a_table(shipped):
    text = repr(jbs.advise(4096, 1024, 1024, 32, 0.2))
    assert f"On {shipped}: from measurements at 4096 x 1024 x 1024, bfloat16" in text
    assert "y  = x @ W      2.00 times as fast as dense, faster below density 0.4" in text
    assert "faster at every density" in text
    assert "slower than dense at every density measured" in text


def test_measures(monkeypatch):
    monkeypatch.setattr(advice, "_LIVE_DENSITIES", (0.5,))
    monkeypatch.setattr(advice, "_shipped", lambda: pytest.fail("not wanted"))
    found = jbs.advise(40, 64, 96, 16, 0.25, "float32", measure=True)
    assert all(product.speedup > 0 for product in (found.y, found.dx, found.dw))
    assert found.source.startswith("measured now, 40 x 64 x 96, float32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 64, 64, 32, 0.1), "M must be at least 1"),
        ((8, 64, 64, 24, 0.1), "block_size"),
        ((8, 64, 64, 32, 1.5), "density"),
        ((8, 0, 64, 32, 0.5), "shape"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        jbs.advise(*arguments)


def test_what_is_shipped_is_whole():
    for about in advice._shipped().values():
        assert about["entries"]
        for entry in about["entries"]:
            assert jnp.dtype(entry["dtype"])
            assert entry["product"] in CURVES
            densities = [density for density, _ in entry["curve"]]
            assert densities == sorted(densities)
            assert all(density <= 1 and speedup > 0 for density, speedup in entry["curve"])


def messages(caplog):
    return [record.message for record in caplog.records if record.name == "jax_blocksparse"]


@pytest.mark.parametrize("density", [0.1, 0.9])
def test_layers_say_once_that_dense_is_faster(shipped, caplog, density):
    inputs = jax.ShapeDtypeStruct((4, 1024, 1024), jnp.bfloat16)
    layer = jbs.nnx.BlockSparseLinear(1024, 1024, density=density, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            nnx.eval_shape(lambda layer, x: layer(x), layer, inputs)
        assert len(messages(caplog)) == (density > 0.4)
        module = jbs.linen.BlockSparseDense(1024, density=density, dtype=jnp.bfloat16)
        jax.eval_shape(module.init, jax.random.key(0), inputs)
    assert isinstance(module, linen.Module)
    assert len(messages(caplog)) == (density > 0.4)
    assert all("faster below density 0.4" in message for message in messages(caplog))


def test_layers_are_silent_where_nothing_is_known(shipped, caplog):
    with caplog.at_level(logging.WARNING):
        for inputs, width in ((jnp.ones((4096, 64)), 64), (jnp.ones((0, 1024), jnp.bfloat16), 1024)):
            layer = jbs.nnx.BlockSparseLinear(width, width, density=0.9, rngs=nnx.Rngs(0))
            nnx.eval_shape(lambda layer, x: layer(x), layer, inputs)
    assert messages(caplog) == []


def test_command_line(capsys):
    arguments = ["advise", "--M", "64", "--K", "64", "--N", "64", "--block-size", "8", "--density"]
    main([*arguments, "0.5", "--dtype", "float64"])
    assert "no measurements" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*arguments, "2"])
    assert "density" in capsys.readouterr().err


def test_command_line_starts():
    command = [sys.executable, "-m", "jax_blocksparse", "advise", "--help"]
    assert "--measure" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
