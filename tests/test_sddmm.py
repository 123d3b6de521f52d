"""The blocks of x.T @ dy against dense products, on both implementations and every device."""

import functools

import cases
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strategies

import jax_blocksparse as jbs
from jax_blocksparse import sddmm_layout

HIGHEST = jax.lax.Precision.HIGHEST


def check(x, dy, pattern, *, precision=HIGHEST, preferred_element_type=None, tf32=False, **options):
    """Compares the blocks with NumPy's and with those of the dense product of the same dtype."""
    got = jbs.sddmm(x, dy, pattern, precision=precision, preferred_element_type=preferred_element_type, **options)
    leading = int(np.prod(x.shape[:-1]))
    x, dy = x.reshape(leading, x.shape[-1]), dy.reshape(leading, dy.shape[-1])
    as_dense = np.asarray(jnp.dot(x.T, dy, precision=precision, preferred_element_type=preferred_element_type))
    wanted = cases.wide(x).T @ cases.wide(dy)
    cases.assert_exact(got, cases.sampled(wanted, pattern), cases.sampled(as_dense, pattern), tf32=tf32)


@pytest.mark.parametrize(("implementation", "dtype", "case"), cases.PRODUCTS, ids=str)
def test_equals_the_dense_product(implementation, dtype, case, device):
    implementation = cases.available(implementation, device, dtype)
    with cases.enable_x64(dtype):
        check(case.x(dtype), case.dy(dtype), case.pattern, implementation=implementation)


@pytest.mark.parametrize("precision", [None, "high", "highest"])
@pytest.mark.parametrize("case", cases.TILES + cases.TILES_OF_FLOAT32, ids=str)
def test_float32_is_as_precise_as_asked_for(case, precision, device):
    tf32 = cases.uses_tf32("float32", precision, device)
    check(case.x(), case.dy(), case.pattern, implementation="native", precision=precision, tf32=tf32)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("block_size", "shape", "density", "tokens"),
    [
        (128, (2056, 2056), 0.5, 300),
        (64, (3080, 1544), 0.5, 300),
        (32, (3080, 2056), 0.5, 300),
        (16, (4104, 3080), 0.25, 300),
        (16, (2056, 2056), 0.5, 300),  # in units of 128
        (64, (16392, 1032), 0.5, 70),  # walks strips together
    ],
)
def test_pairs_of_tiles_equal_the_dense_product(block_size, shape, density, tokens):
    pattern = jbs.patterns.random(shape, block_size, density=density)
    layout = sddmm_layout.choose_layout(*shape, block_size, pattern.nnz)
    assert layout.split == 1
    assert layout.paired
    x, dy = (cases.normal((tokens, size), "bfloat16", seed=6) for size in shape)
    product = jax.jit(functools.partial(jbs.sddmm, implementation="native"))
    got = np.asarray(product(x, dy, pattern))
    assert cases.relative_error(got, cases.sampled(cases.wide(x).T @ cases.wide(dy), pattern)) < 4e-3
    for _ in range(3):
        assert np.asarray(product(x, dy, pattern)).tobytes() == got.tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("shape", "density"), [((2056, 4104), 0.6), ((16392, 520), 0.6)])  # the second: all of x
def test_waves_of_tiles_equal_the_dense_product(shape, density, dtype):
    pattern = jbs.patterns.random(shape, 64, density=density, distribution="bernoulli")
    layout = sddmm_layout.choose_layout(*shape, 64, pattern.nnz)
    assert (layout.unit, layout.split) == (64, 1)
    assert pattern.nnz > 132 * 8
    x, dy = (cases.normal((4100, size), dtype, seed=6) for size in shape)
    product = jax.jit(functools.partial(jbs.sddmm, implementation="native"))
    got = np.asarray(product(x, dy, pattern))
    as_dense = np.asarray(jnp.dot(x.T, dy, precision=HIGHEST, preferred_element_type="float32"))
    assert cases.relative_error(got, cases.sampled(as_dense, pattern)) < 4e-3
    assert np.asarray(product(x, dy, pattern)).tobytes() == got.tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("block_size", "shape", "density", "split", "paired"),
    [
        (64, (2056, 2056), 0.3, 2, False),
        (64, (2056, 2056), 0.2, 3, False),
        (64, (3080, 1032), 0.25, 4, False),
        (64, (2056, 2056), 0.05, 5, False),
        (32, (2056, 2056), 0.03, 5, False),  # in units of 64
        (32, (4104, 4104), 0.08, 3, False),
        (32, (4104, 4104), 0.05, 4, False),
        (16, (2056, 2056), 0.08, 5, False),
        (128, (2056, 2056), 0.2, 2, False),
        (32, (4104, 4104), 0.1, 2, True),
        (16, (2056, 2056), 0.1, 4, True),
        (16, (4104, 4104), 0.05, 4, True),
    ],
)
def test_tiles_shared_by_several_equal_the_dense_product(block_size, shape, density, split, paired, dtype):
    pattern = jbs.patterns.barabasi_albert(shape, block_size, density=density, seed=0)
    layout = sddmm_layout.choose_layout(*shape, block_size, pattern.nnz)
    assert (layout.split, layout.paired) == (split, paired)
    x, dy = (cases.normal((300, size), dtype, seed=6) for size in shape)
    product = jax.jit(functools.partial(jbs.sddmm, implementation="native"))
    got = np.asarray(product(x, dy, pattern))
    assert cases.relative_error(got, cases.sampled(cases.wide(x).T @ cases.wide(dy), pattern)) < 4e-3
    assert np.asarray(product(x, dy, pattern)).tobytes() == got.tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("tokens", [64, 330])
def test_tiles_with_units_of_two_columns_equal_the_dense_product(tokens, dtype):
    lengths = [7, 1, 1, 12, 30, 2, 0, 5, 5, 6, 3, 1, 9, 2, 2] * 2
    rows = np.concatenate([np.arange(length) + col % 3 for col, length in enumerate(lengths)])
    shape = 64 * 32, 64 * len(lengths)
    pattern = jbs.BlockPattern.from_coordinates(
        rows, np.repeat(np.arange(len(lengths)), lengths), shape=shape, block_size=64
    )
    x, dy = (cases.normal((tokens, size), dtype, seed=6) for size in shape)
    product = jax.jit(functools.partial(jbs.sddmm, implementation="native"))
    got = np.asarray(product(x, dy, pattern))
    assert cases.relative_error(got, cases.sampled(cases.wide(x).T @ cases.wide(dy), pattern)) < 4e-3
    assert np.asarray(product(x, dy, pattern)).tobytes() == got.tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", cases.BLOCKS + cases.TILES, ids=str)
def test_16_bit_inputs_can_give_float32(dtype, case, device):
    x, dy = case.x(dtype), case.dy(dtype)
    check(x, dy, case.pattern, preferred_element_type="float32", implementation="native")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_inputs_can_give_float32_in_plain_xla(dtype, device):
    case = cases.BLOCKS[1]
    check(case.x(dtype), case.dy(dtype), case.pattern, preferred_element_type=jnp.float32, implementation="xla")


@pytest.mark.parametrize(("x_dtype", "dy_dtype"), [("float32", "bfloat16"), ("float16", "bfloat16")])
def test_dtypes_are_promoted(x_dtype, dy_dtype, implementation, device):
    case = cases.BLOCKS[0]
    x, dy = case.x(x_dtype), case.dy(dy_dtype)
    got = jbs.sddmm(x, dy, case.pattern, implementation=implementation, precision=HIGHEST)
    assert got.dtype == "float32"
    assert cases.relative_error(got, cases.sampled(cases.wide(x).T @ cases.wide(dy), case.pattern)) < 1e-6


@pytest.mark.parametrize(("implementation", "examples"), [("native", 25), ("xla", 6)])
def test_equals_the_dense_product_on_random_patterns(implementation, examples, device):
    @hypothesis.settings(max_examples=examples)
    @hypothesis.given(strategies.cases(), strategies.dtypes)
    def holds(case, dtype):
        chosen = cases.available(implementation, device, dtype)
        with cases.enable_x64(dtype):
            check(case.x(dtype), case.dy(dtype), case.pattern, implementation=chosen)

    holds()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transposed_pattern_gives_transposed_blocks(implementation, dtype, device):
    case = cases.BLOCKS[1]
    x, dy, pattern = case.x(dtype), case.dy(dtype), case.pattern
    blocks = jbs.sddmm(x, dy, pattern, implementation=implementation)
    swapped = jbs.sddmm(dy, x, pattern.T, implementation=implementation)
    np.testing.assert_allclose(
        np.asarray(swapped.mT, np.float64), np.asarray(blocks, np.float64), rtol=2 * jnp.finfo(dtype).eps, atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_is_the_same_to_the_bit_every_time(implementation, dtype, device):
    pattern = jbs.patterns.random((512, 640), 16, density=0.3)
    x, dy = cases.normal((515, 512), dtype, seed=4), cases.normal((515, 640), dtype, seed=5)

    def product(x, dy, pattern):
        return jbs.sddmm(x, dy, pattern, implementation=implementation)

    first = np.asarray(product(x, dy, pattern)).tobytes()
    jitted = jax.jit(product)
    for again in (product, jitted, jitted, jitted):
        assert np.asarray(again(x, dy, pattern)).tobytes() == first


@pytest.mark.parametrize(
    ("dtype", "case"),
    [
        *(("float32", case) for case in cases.CASES if case.rows),
        *(("bfloat16", case) for case in cases.BLOCKS + cases.TILES),
    ],
    ids=str,
)
def test_every_element_of_the_result_is_written(dtype, case, device):
    """The custom call gets a buffer full of NaN to write to: a donated one."""

    def product(buffer, x, dy, pattern):
        del buffer
        return jbs.sddmm(x, dy, pattern, implementation="native")

    poison = jnp.full((len(case.rows), case.block_size, case.block_size), jnp.nan, dtype)
    address = poison.unsafe_buffer_pointer()
    blocks = jax.jit(product, donate_argnums=0, keep_unused=True)(poison, case.x(dtype), case.dy(dtype), case.pattern)
    assert blocks.unsafe_buffer_pointer() == address
    assert jnp.isfinite(blocks).all()


def test_features_without_blocks_do_not_matter(implementation, device):
    case = cases.BLOCKS[1]
    b, x, dy = case.block_size, case.x(), case.dy()
    x[:, 2 * b : 3 * b] = np.nan  # no block is in block row 2
    dy[:, b : 2 * b] = np.inf  # nor in block column 1
    assert jnp.isfinite(jbs.sddmm(x, dy, case.pattern, implementation=implementation)).all()
