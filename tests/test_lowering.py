"""What XLA is given to compile: our custom calls where there are native kernels, and never a dense matrix."""

import functools
import math
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_blocksparse as jbs

CASE = cases.BLOCKS[1]
TARGETS = {"matmul": "jax_blocksparse.matmul.v1", "sddmm": "jax_blocksparse.sddmm.v1"}


def product(kind, implementation=None, dtype="float32"):
    """A product as a function of two float operands, and the operands."""
    w = CASE.w(dtype)
    if kind == "matmul":
        function = lambda x, data: jbs.matmul(  # noqa: E731
            x, jbs.BlockSparseMatrix(data, CASE.pattern), implementation=implementation
        )
        return function, (CASE.x(dtype), w.data)
    return lambda x, dy: jbs.sddmm(x, dy, CASE.pattern, implementation=implementation), (CASE.x(dtype), CASE.dy(dtype))


def lowered(function, args, *platforms):
    return jax.jit(function).trace(*args).lower(lowering_platforms=platforms).as_text()


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("implementation", [None, "native"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_cpu_runs_the_custom_call(kind, implementation, dtype):
    with cases.enable_x64(dtype):
        text = lowered(*product(kind, implementation, dtype), "cpu")
    assert text.count(f"@{TARGETS[kind]}(") == 1


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cuda_runs_the_custom_call_where_it_was_built(kind, dtype):
    """Lowering for a GPU needs none."""
    text = lowered(*product(kind, dtype=dtype), "cuda")
    assert text.count(f"@{TARGETS[kind]}(") == bool(jbs.has_cuda())


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize(("platform", "dtype"), [("cuda", "float64"), ("tpu", "float32"), ("rocm", "float32")])
def test_plain_xla_runs_where_there_is_no_kernel(kind, platform, dtype):
    with cases.enable_x64(dtype):
        text = lowered(*product(kind, dtype=dtype), platform)
        assert "jax_blocksparse" not in text
        with pytest.raises(NotImplementedError, match=r"implementation='native' was asked for, but .*(cuda|CUDA)"):
            lowered(*product(kind, "native", dtype), platform)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_xla_means_no_custom_call(kind, platform):
    assert "jax_blocksparse" not in lowered(*product(kind, "xla"), platform)


@pytest.mark.parametrize("kind", TARGETS)
def test_one_program_for_several_platforms(kind):
    text = lowered(*product(kind), "cpu", "cuda", "tpu")
    assert text.count(f"@{TARGETS[kind]}(") == 1 + bool(jbs.has_cuda())


def test_call_takes_the_orders_of_its_direction():
    """A product by the columns of W and one by its rows, with the index arrays as they are."""
    pattern = jbs.BlockPattern.from_coordinates([0, 1, 3], [0, 1, 1], shape=(64, 32), block_size=16)
    w = jbs.BlockSparseMatrix(jnp.ones((3, 16, 16)), pattern)

    def both(x, dy, w):
        return x @ w, dy @ w.T

    text = lowered(both, (np.ones((5, 64), "f4"), np.ones((5, 32), "f4"), w), "cpu")
    forward, backward = (line for line in text.splitlines() if f"@{TARGETS['matmul']}(" in line)
    assert "transpose = false" in forward
    assert "tensor<1x5x64xf32>, tensor<1x3x16x16xf32>, tensor<1x3xi32>" in forward
    assert "transpose = true" in backward
    assert "tensor<1x5x32xf32>, tensor<1x3x16x16xf32>, tensor<1x5xi32>" in backward


def compiled_step(implementation, x, ws):
    """Loss and gradients of a network of block-sparse layers, compiled for the present device."""

    def loss(data, x, patterns):
        for values, pattern in zip(data, patterns, strict=True):
            x = jax.nn.relu(jbs.matmul(x, jbs.BlockSparseMatrix(values, pattern), implementation=implementation))
        return (x**2).sum()

    step = jax.jit(jax.value_and_grad(loss))
    return step.lower([w.data for w in ws], x, [w.pattern for w in ws]).compile()


def test_train_step_has_one_call_for_each_product(device):
    """Three products a layer, but for the first one, whose input needs no gradient."""
    ws = [cases.random_w((96, 96), 16, density=0.5) for _ in range(3)]
    text = compiled_step("native", np.ones((8, 96), np.float32), ws).as_text()
    calls = re.findall(r'custom_call_target="(jax_blocksparse\.[^"]*)"', text)
    assert calls.count(TARGETS["matmul"]) == 3 + 2
    assert calls.count(TARGETS["sddmm"]) == 3
    assert len(calls) == 8


def test_no_dense_matrix_in_memory(implementation, device):
    """Forward and backward of a matrix that would take 1 GiB if it were dense."""
    size, b, nnz, tokens = 16384, 32, 512, 8
    make = functools.partial(jbs.BlockPattern.from_coordinates, shape=(size, size), block_size=b)
    pattern = jax.eval_shape(make, *[jax.ShapeDtypeStruct((nnz,), jnp.int32)] * 2)
    w = jbs.BlockSparseMatrix(jax.ShapeDtypeStruct((nnz, b, b), jnp.float32), pattern)
    compiled = compiled_step(implementation, jax.ShapeDtypeStruct((tokens, size), jnp.float32), [w, w])
    shapes = re.findall(r"\w\[([\d,]+)\]", compiled.as_text())
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert nnz * b * b <= largest < size**2 / 64
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * size**2 / 64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_not_copied(dtype, device):
    """The custom call reads the weights where they are: only results and activations take memory."""
    w = cases.random_w((2048, 2048), 64, density=0.25, dtype=dtype)
    compiled = jax.jit(lambda x, w: (x @ w) @ w.T).lower(cases.normal((4, 2048), dtype, seed=1), w).compile()
    assert w.data.nbytes >= 2**20
    assert compiled.memory_analysis().temp_size_in_bytes < w.data.nbytes / 8
