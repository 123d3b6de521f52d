"""x @ w against dense products, on both implementations and every device."""

import dataclasses

import cases
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import strategies
from hypothesis import strategies as st

import jax_blocksparse as jbs

HIGHEST = jax.lax.Precision.HIGHEST


def check(x, w, wanted=None, *, precision=HIGHEST, preferred_element_type=None, tf32=False, **options):
    """Compares a product with NumPy's and with the dense product of the same dtype."""
    got = jbs.matmul(x, w, precision=precision, preferred_element_type=preferred_element_type, **options)
    dense = cases.dense(w)
    as_dense = jnp.dot(x, dense.astype(w.dtype), precision=precision, preferred_element_type=preferred_element_type)
    cases.assert_exact(got, cases.wide(x) @ dense if wanted is None else wanted, as_dense, tf32=tf32)


# In plain XLA, the transpose is the same program with other arrays.
DIRECTIONS = [
    *((*product, False) for product in cases.PRODUCTS),
    *((*product, True) for product in cases.PRODUCTS if product[0] == "native" or product[2] in cases.BLOCKS),
]


@pytest.mark.parametrize(("implementation", "dtype", "case", "transposed"), DIRECTIONS, ids=str)
def test_equals_the_dense_product(implementation, dtype, case, transposed, device):
    implementation = cases.available(implementation, device, dtype)
    with cases.enable_x64(dtype):
        if transposed:
            check(case.dy(dtype), case.w(dtype).T, implementation=implementation)
        else:
            check(case.x(dtype), case.w(dtype), implementation=implementation)


@pytest.mark.parametrize("transposed", [False, True], ids=["w", "wT"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", cases.BLOCKS + cases.TILES + cases.MANY_TILES[:2], ids=str)
def test_16_bit_inputs_can_give_float32(dtype, case, transposed, device):
    x, w = (case.dy(dtype), case.w(dtype).T) if transposed else (case.x(dtype), case.w(dtype))
    check(x, w, preferred_element_type="float32", implementation="native")


@pytest.mark.parametrize("transposed", [False, True], ids=["w", "wT"])
@pytest.mark.parametrize(
    ("dtype", "case"),
    [
        *(("bfloat16", case) for case in cases.MANY_TILES),
        *((dtype, case) for case in cases.MANY_TILES[:2] for dtype in ("float16", "float32")),
        *((dtype, case) for case in cases.MANY_TILES[-3:] for dtype in ("float16", "float32")),
    ],
    ids=str,
)
def test_many_tiles(dtype, case, transposed, device):
    x, w = (case.dy(dtype), case.w(dtype).T) if transposed else (case.x(dtype), case.w(dtype))
    check(x, w, implementation="native", precision=None, tf32=cases.uses_tf32(dtype, None, device))
    first, again = (np.asarray(jbs.matmul(x, w, implementation="native")).tobytes() for _ in range(2))
    assert first == again


@pytest.mark.parametrize("transposed", [False, True], ids=["w", "wT"])
@pytest.mark.parametrize("rows", [1, 8, 16, 17, 32, 33, 64, 65])
@pytest.mark.parametrize("case", cases.TILES, ids=str)
def test_few_rows(case, rows, transposed, device):
    """Around the numbers at which GPUs change to another kernel or another tile of it."""
    dtype = "float16" if rows % 2 else "bfloat16"
    case = dataclasses.replace(case, leading=(rows,))
    x, w = (case.dy(dtype), case.w(dtype).T) if transposed else (case.x(dtype), case.w(dtype))
    check(x, w, implementation="native")


@pytest.mark.parametrize("transposed", [False, True], ids=["w", "wT"])
@pytest.mark.parametrize("block_size", jbs.BLOCK_SIZES)
def test_few_rows_and_long_lists(block_size, transposed, device):
    """So long that a warp of the GPU kernel for few rows reads its part of a list in several goes."""
    shape = (block_size, 16384) if transposed else (16384, block_size)
    w = cases.random_w(shape, block_size, density=1.0, dtype="bfloat16")
    x = cases.normal((20, 16384), "bfloat16", seed=4)
    check(x, w.T if transposed else w, implementation="native")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_inputs_can_give_float32_in_plain_xla(dtype, device):
    case = cases.BLOCKS[1]
    check(case.x(dtype), case.w(dtype), preferred_element_type=jnp.float32, implementation="xla")


@pytest.mark.parametrize(
    ("x_dtype", "w_dtype", "wanted"),
    [("float32", "bfloat16", "float32"), ("bfloat16", "float32", "float32"), ("bfloat16", "float16", "float32")],
)
def test_dtypes_are_promoted(x_dtype, w_dtype, wanted, implementation, device):
    case = cases.BLOCKS[0]
    x, w = case.x(x_dtype), case.w(w_dtype)
    got = jbs.matmul(x, w, implementation=implementation, precision=HIGHEST)
    assert got.dtype == wanted
    assert cases.relative_error(got, cases.wide(x) @ cases.dense(w)) < 1e-6


@pytest.mark.parametrize("transposed", [False, True], ids=["w", "wT"])
@pytest.mark.parametrize("precision", [None, "high", "highest"])
@pytest.mark.parametrize("case", cases.TILES + cases.TILES_OF_FLOAT32, ids=str)
def test_float32_is_as_precise_as_asked_for(case, precision, transposed, device):
    x, w = (case.dy(), case.w().T) if transposed else (case.x(), case.w())
    tf32 = cases.uses_tf32("float32", precision, device)
    check(x, w, implementation="native", precision=precision, tf32=tf32)


# GPUs multiply these by plain FMA: true float32, and blocks of 8 in sizes that tensor copies do not accept.
PLAIN_FMA = [*(("float32", case) for case in cases.BLOCKS), *((d, cases.BLOCKS[0]) for d in ("bfloat16", "float16"))]


@pytest.mark.parametrize("transposed", [False, True], ids=["w", "wT"])
@pytest.mark.parametrize("rows", [63, 65, 128, 129, 257])
@pytest.mark.parametrize(("dtype", "case"), PLAIN_FMA, ids=str)
def test_rows_around_the_tiles_of_plain_fma(dtype, case, rows, transposed, device):
    case = dataclasses.replace(case, leading=(rows,))
    x, w = (case.dy(dtype), case.w(dtype).T) if transposed else (case.x(dtype), case.w(dtype))
    check(x, w, implementation="native")


@pytest.mark.parametrize("configured", ["float32", "F32_F32_F32", "highest"])
def test_default_precision_can_be_configured(configured, device):
    case = cases.TILES[2]
    with jax.default_matmul_precision(configured):
        check(case.x(), case.w(), implementation="native", precision=None)


@pytest.mark.parametrize("precision", ["default", "fastest", jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGH])
def test_every_precision_has_its_names(precision, device):
    case = cases.BLOCKS[2]
    check(case.x(), case.w(), implementation="native", precision=precision)


@pytest.mark.parametrize(("implementation", "examples"), [("native", 25), ("xla", 6)])
def test_equals_scipy_on_random_patterns(implementation, examples, device):
    """SciPy's BSR product knows nothing of ours, neither of its patterns nor of its tails."""

    @hypothesis.settings(max_examples=examples)
    @hypothesis.given(strategies.cases(), strategies.dtypes, st.booleans())
    def holds(case, dtype, transposed):
        with cases.enable_x64(dtype):
            x, w = case.dy(dtype) if transposed else case.x(dtype), case.w(dtype)
            bsr = bsr_array(case, w.data)
            wanted = product_with_scipy(x, bsr.T if transposed else bsr, case.shape[0 if transposed else 1])
            chosen = cases.available(implementation, device, dtype)
            check(x, w.T if transposed else w, wanted, implementation=chosen)

    holds()


def bsr_array(case, data):
    """The case's matrix in SciPy's format, padded to whole blocks, which is all that BSR can hold."""
    b = case.block_size
    grid = tuple(-(-size // b) for size in case.shape)
    live = [z for z in range(len(case.rows)) if case.rows[z] < grid[0]]
    live.sort(key=lambda z: (case.rows[z], case.cols[z]))
    indptr = np.searchsorted([case.rows[z] for z in live], np.arange(grid[0] + 1))
    blocks = np.nan_to_num(cases.wide(data))[live]
    indices = np.array([case.cols[z] for z in live], np.int32)
    return scipy.sparse.bsr_array((blocks.reshape(-1, b, b), indices, indptr), shape=[size * b for size in grid])


def product_with_scipy(x, bsr, features):
    rows = cases.wide(x).reshape(int(np.prod(x.shape[:-1])), x.shape[-1])
    padded = np.pad(rows, ((0, 0), (0, bsr.shape[0] - x.shape[-1])))
    return (padded @ bsr)[:, :features].reshape(*x.shape[:-1], features)


@pytest.mark.parametrize(
    ("dtype", "block_size"), [("float32", 16), ("float32", 64), ("bfloat16", 16), ("bfloat16", 64)]
)
@pytest.mark.parametrize("transposed", [False, True], ids=["w", "wT"])
def test_is_the_same_to_the_bit_every_time(implementation, dtype, block_size, transposed, device):
    w = cases.random_w((512, 640), block_size, density=0.3, dtype=dtype)
    w = w.T if transposed else w
    x = cases.normal((515, w.shape[0]), dtype, seed=4)

    def product(x, w):
        return jbs.matmul(x, w, implementation=implementation)

    first = np.asarray(product(x, w)).tobytes()
    jitted = jax.jit(product)
    for again in (product, jitted, jitted, jitted):
        assert np.asarray(again(x, w)).tobytes() == first


@pytest.mark.parametrize(
    ("dtype", "case"),
    [
        *(("float32", case) for case in cases.CASES if 0 not in case.leading),
        *(("bfloat16", case) for case in cases.BLOCKS + cases.TILES + cases.MANY_TILES),
    ],
    ids=str,
)
def test_every_element_of_the_result_is_written(dtype, case, device):
    """The custom call gets a buffer full of NaN to write to: a donated one."""

    def product(buffer, x, w):
        del buffer
        return jbs.matmul(x, w, implementation="native")

    poison = jnp.full((*case.leading, case.shape[1]), jnp.nan, dtype)
    address = poison.unsafe_buffer_pointer()
    y = jax.jit(product, donate_argnums=0, keep_unused=True)(poison, case.x(dtype), case.w(dtype))
    assert y.unsafe_buffer_pointer() == address
    assert jnp.isfinite(y).all()


def test_features_without_weights_do_not_matter(implementation, device):
    case = cases.BLOCKS[1]
    b, w = case.block_size, case.w()
    x = case.x()
    x[:, 2 * b : 3 * b] = np.nan  # block row 2 is empty
    x[3, 0] = np.inf  # spoils its own row only
    got = np.asarray(jbs.matmul(x, w, implementation=implementation))
    assert np.isfinite(np.delete(got, 3, axis=0)).all()
    assert not np.isfinite(got[3]).all()


@pytest.mark.gpu
def test_operands_with_more_elements_than_32_bits_count():
    rows, features = 2**26 + 8, 32
    with jax.default_device(jax.devices("cuda")[0]):
        pattern = jbs.BlockPattern.from_coordinates([3], [0], shape=(features, 8), block_size=8)
        w = jbs.BlockSparseMatrix(jnp.ones((1, 8, 8), "bfloat16"), pattern)
        x = jnp.ones((rows, features), "bfloat16").at[-8:].set(2)
        y = jbs.matmul(x, w, implementation="native")
        blocks = jbs.sddmm(x, y, pattern, preferred_element_type="float32", implementation="native")
        assert (y[:-8] == 8).all()
        assert (y[-8:] == 16).all()
        np.testing.assert_allclose(blocks, 8 * (rows - 8) + 8 * 2 * 16, rtol=1e-5)
