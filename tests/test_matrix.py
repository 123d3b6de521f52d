"""BlockSparseMatrix: made from and turned into other formats, and used with operators.

Values are small integers, so that every product is exact whatever the platform multiplies with.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from cases import dense as densified
from cases import inside
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_blocksparse import BlockPattern, BlockSparseMatrix, patterns
from jax_blocksparse.pattern import INDEX_NAMES

SHAPES = [(32, 48), (30, 41), (16, 16), (5, 3), (33, 16)]


def integers(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(jnp.dtype(dtype))


def matrix(shape=(30, 41), block_size=16, density=0.5, seed=0, dtype=np.float32):
    """A matrix whose stored values beyond its edge are NaN: they must not matter."""
    pattern = patterns.random(shape, block_size, density=density, seed=seed)
    return with_values(pattern, seed, dtype)


def with_values(pattern, seed=0, dtype=np.float32):
    data = integers((pattern.nnz, pattern.block_size, pattern.block_size), seed, dtype)
    return BlockSparseMatrix(jnp.asarray(np.where(inside(pattern), data, np.array(np.nan, dtype))), pattern)


def assert_equal(got, wanted):
    got, wanted = (
        np.asarray(each.todense() if isinstance(each, BlockSparseMatrix) else each) for each in (got, wanted)
    )
    assert got.shape == wanted.shape
    np.testing.assert_array_equal(got.astype(np.float64), wanted.astype(np.float64))


class TestFromDense:
    @pytest.mark.parametrize(
        ("shape", "block_size"), [*((shape, 16) for shape in SHAPES), ((30, 41), 8), ((30, 41), 64)]
    )
    def test_round_trip(self, shape, block_size):
        dense = integers(shape)
        w = BlockSparseMatrix.fromdense(dense, block_size=block_size)
        assert (w.shape, w.block_size, w.dtype) == (shape, block_size, jnp.float32)
        assert_equal(w, dense)
        assert_equal(w.T, dense.T)

    def test_keeps_the_blocks_that_are_not_zero(self):
        dense = np.zeros((40, 24), np.float32)
        dense[9, 3] = 1e-30  # the square is 0 in float32
        dense[39, 23] = np.nan
        w = BlockSparseMatrix.fromdense(dense, block_size=8)
        assert np.argwhere(w.pattern.mask()).tolist() == [[1, 0], [4, 2]]
        np.testing.assert_array_equal(w.todense(), dense)
        assert BlockSparseMatrix.fromdense(np.zeros((8, 8)), block_size=8).nnz == 0

    @pytest.mark.parametrize(
        ("shape", "density", "jitted"),
        [
            *(((32, 48), density, False) for density in (0.01, 0.3, 0.5, 1.0)),
            *((shape, 0.4, jitted) for shape in ((30, 41), (5, 3)) for jitted in (False, True)),
        ],
    )
    def test_density_keeps_the_blocks_of_largest_norm(self, shape, density, jitted):
        b, dense = 8, np.random.default_rng(0).standard_normal(shape).astype(np.float32)

        def prune(dense):
            return BlockSparseMatrix.fromdense(dense, block_size=b, density=density)

        w = (jax.jit(prune) if jitted else prune)(dense)
        grid = w.pattern.grid
        padded = np.zeros((grid[0] * b, grid[1] * b))
        padded[: shape[0], : shape[1]] = dense
        norms = np.linalg.norm(padded.reshape(grid[0], b, grid[1], b), axis=(1, 3))
        count = max(1, round(density * norms.size))
        mask = norms >= np.sort(norms, axis=None)[-count]
        np.testing.assert_array_equal(w.pattern.mask(), mask)
        kept = np.repeat(np.repeat(mask, b, axis=0), b, axis=1)[: shape[0], : shape[1]]
        assert_equal(w, np.where(kept, dense, 0))

    @pytest.mark.parametrize("value", [300, 1e-4])
    def test_norms_of_half_precision_neither_overflow_nor_vanish(self, value):
        dense = np.full((16, 16), value, np.float16)
        dense[8:, 8:] *= 2
        w = BlockSparseMatrix.fromdense(dense, block_size=8, density=0.25)
        assert w.pattern.mask().tolist() == [[False, False], [False, True]]
        assert w.dtype == jnp.float16
        assert BlockSparseMatrix.fromdense(dense, block_size=8).nnz == 4

    @pytest.mark.parametrize("jitted", [False, True])
    def test_pattern_says_what_to_keep(self, jitted):
        dense = integers((30, 41))
        pattern = BlockPattern.from_coordinates([1, 2, 0], [2, 9, 0], shape=(30, 41), block_size=16)

        def cut(dense, pattern):
            return BlockSparseMatrix.fromdense(dense, pattern=pattern)

        w = (jax.jit(cut) if jitted else cut)(dense, pattern)
        wanted = np.zeros((3, 16, 16))
        wanted[0, :14, :9] = dense[16:, 32:]
        wanted[2] = dense[:16, :16]
        np.testing.assert_array_equal(w.data, wanted)
        assert_equal(w, densified(w))

    def test_positions_outside_the_grid_stay_empty(self):
        @jax.jit
        def cut(rows, cols, dense):
            pattern = BlockPattern.from_coordinates(rows, cols, shape=(32, 32), block_size=16)
            return BlockSparseMatrix.fromdense(dense, pattern=pattern)

        w = cut(np.array([-1, 1, 0, 1]), np.array([0, -1, 2, 1]), np.ones((32, 32), np.float32))
        assert np.asarray(w.data).any(axis=(1, 2)).tolist() == [False, False, False, True]

    def test_gradient_goes_to_the_blocks_that_are_kept(self):
        pattern = patterns.random((30, 41), 16, density=0.5)
        kept = densified(BlockSparseMatrix(jnp.ones((pattern.nnz, 16, 16)), pattern))
        gradient = jax.grad(lambda x: jnp.sum(BlockSparseMatrix.fromdense(x, pattern=pattern).data * 3))(
            integers((30, 41))
        )
        np.testing.assert_array_equal(gradient, 3 * kept)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"dense": np.ones(3)}, ValueError, r"dense must have two dimensions, got shape \(3,\)"),
            ({"dense": np.ones((0, 8))}, ValueError, r"shape must have positive sizes, got \(0, 8\)"),
            ({"block_size": None}, ValueError, "fromdense needs block_size or pattern"),
            ({"block_size": 9}, ValueError, "block_size must be one of .*, got 9"),
            ({"density": 0.0}, ValueError, r"density must be a number in \(0, 1\], got 0.0"),
            ({"pattern": np.eye(2)}, TypeError, "pattern must be a BlockPattern, got ndarray"),
        ],
    )
    def test_errors(self, change, error, message):
        with pytest.raises(error, match=message):
            BlockSparseMatrix.fromdense(**{"dense": np.ones((30, 41)), "block_size": 16} | change)

    @pytest.mark.parametrize(
        ("shape", "change", "message"),
        [
            ((30, 41), {"density": 0.5}, "give density or pattern, not both"),
            (
                (30, 41),
                {"block_size": 8},
                r"with block_size=8 does not fit .*shape \(30, 41\) and block size 16 are wanted",
            ),
            (
                (32, 48),
                {},
                r"dense of shape \(30, 41\) with block_size=16 does not fit BlockPattern\(32x48.*\(32, 48\)",
            ),
        ],
    )
    def test_errors_with_a_pattern(self, shape, change, message):
        pattern = patterns.banded(shape, 16, density=0.5)
        with pytest.raises(ValueError, match=message):
            BlockSparseMatrix.fromdense(np.ones((30, 41)), **{"block_size": 16, "pattern": pattern} | change)

    def test_jit_needs_to_know_how_many_blocks(self):
        with pytest.raises(ValueError, match="under jit fromdense needs density or pattern"):
            jax.jit(lambda x: BlockSparseMatrix.fromdense(x, block_size=8))(jnp.ones((8, 8)))
        known = jnp.eye(16)
        assert_equal(jax.jit(lambda: BlockSparseMatrix.fromdense(known, block_size=8))(), known)


class TestToDense:
    def test_leaves_out_inert_entries_and_what_lies_beyond_the_edge(self):
        pattern = BlockPattern.from_coordinates([2, 1, 2], [0, 2, -4], shape=(30, 41), block_size=16)
        data = jnp.full((3, 16, 16), jnp.nan).at[1, :14, :9].set(2.0)
        wanted = np.zeros((30, 41))
        wanted[16:, 32:] = 2
        assert_equal(BlockSparseMatrix(data, pattern), wanted)

    def test_damaged_positions_do_not_wrap_around(self):
        w = matrix((32, 32), 16, 1.0)
        damaged = dataclasses.replace(w, pattern=jax.tree.map(lambda leaf: leaf - 1, w.pattern))
        assert_equal(damaged, densified(damaged))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_keeps_the_dtype(self, dtype):
        w = matrix(dtype=dtype)
        assert w.todense().dtype == dtype
        assert_equal(w, densified(w))


def scipy_matrices():
    rng = np.random.default_rng(0)
    entries = np.where(rng.random((48, 64)) < 0.02, integers((48, 64)), 0)
    return {
        "bsr": (scipy.sparse.bsr_array(entries, blocksize=(16, 16)), None),
        "bsr of other blocks": (scipy.sparse.bsr_array(entries, blocksize=(4, 8)), 16),
        "csr": (scipy.sparse.csr_array(entries), 8),
        "csr with tails": (scipy.sparse.csr_array(entries[:45, :61]), 16),
        "csc": (scipy.sparse.csc_array(entries), 16),
        "coo": (scipy.sparse.coo_array(entries[:45]), 8),
        "csr_matrix": (scipy.sparse.csr_matrix(entries), 8),
        "dia": (scipy.sparse.eye_array(40), 16),
        "nothing": (scipy.sparse.csr_array((20, 30)), 16),
    }


class TestSciPy:
    @pytest.mark.parametrize("name", scipy_matrices())
    def test_from_scipy(self, name):
        source, block_size = scipy_matrices()[name]
        before = source.copy()
        w = BlockSparseMatrix.from_scipy_sparse(source, block_size=block_size)
        assert w.shape == source.shape
        assert_equal(w, source.toarray())
        assert w.nnz == BlockSparseMatrix.fromdense(source.toarray(), block_size=w.block_size).nnz
        # The source is as it was.
        assert source.shape == before.shape
        assert (source != before).nnz == 0

    def test_stored_zeros_keep_their_block_and_duplicates_add_up(self):
        entries = (np.array([0.0, 1.0, 2.0]), (np.array([0, 9, 9]), np.array([0, 9, 9])))
        w = BlockSparseMatrix.from_scipy_sparse(scipy.sparse.coo_array(entries, shape=(16, 16)), block_size=8)
        assert np.argwhere(w.pattern.mask()).tolist() == [[0, 0], [1, 1]]
        assert w.todense()[9, 9] == 3

    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_round_trip(self, shape, transposed):
        w = matrix(shape).T if transposed else matrix(shape)
        there = w.to_scipy_sparse()
        assert there.format == ("bsr" if all(size % 16 == 0 for size in shape) else "csr")
        assert there.shape == w.shape
        np.testing.assert_array_equal(there.toarray(), densified(w))
        back = BlockSparseMatrix.from_scipy_sparse(there, block_size=16)
        np.testing.assert_array_equal(back.pattern.mask(), w.pattern.mask().T if transposed else w.pattern.mask())
        assert_equal(back, w)

    def test_bsr_keeps_block_size_order_and_inert_entries_apart(self):
        pattern = BlockPattern.from_coordinates([1, 2, 0, 1], [2, 9, 1, 0], shape=(32, 48), block_size=16)
        w = BlockSparseMatrix(jnp.asarray(integers((4, 16, 16))).at[1].set(jnp.nan), pattern)
        bsr = w.to_scipy_sparse()
        assert bsr.blocksize == (16, 16)
        assert bsr.indices.tolist() == [1, 0, 2]
        np.testing.assert_array_equal(bsr.toarray(), densified(w))
        assert BlockSparseMatrix.from_scipy_sparse(bsr).block_size == 16

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_comes_out_as_float32(self, dtype):
        w = matrix(dtype=dtype)
        there = w.to_scipy_sparse()
        assert there.dtype == np.float32
        np.testing.assert_array_equal(there.toarray(), densified(w))

    def test_float64(self):
        source = scipy.sparse.csr_array(np.diag(np.full(20, 1 / 3)))
        assert BlockSparseMatrix.from_scipy_sparse(source, block_size=8).dtype == jnp.float32
        with jax.enable_x64(True):
            w = BlockSparseMatrix.from_scipy_sparse(source, block_size=8)
            assert w.dtype == jnp.float64
            there = w.to_scipy_sparse()
        assert there.dtype == np.float64
        assert (there != source).nnz == 0

    @pytest.mark.parametrize(
        ("source", "block_size", "error", "message"),
        [
            (np.eye(16), 8, TypeError, "matrix must be a SciPy sparse array or matrix, got ndarray"),
            (
                scipy.sparse.eye_array(16, format="csr"),
                None,
                ValueError,
                "block_size is needed for a matrix of format 'csr'",
            ),
            (scipy.sparse.bsr_array(np.ones((16, 16)), blocksize=(8, 16)), None, ValueError, "without square blocks"),
            (
                scipy.sparse.bsr_array(np.ones((12, 12)), blocksize=(4, 4)),
                None,
                ValueError,
                "block_size must be .*, got 4",
            ),
            (scipy.sparse.eye_array(16), 7, ValueError, "block_size must be one of .*, got 7"),
            (scipy.sparse.coo_array(np.ones(16)), 8, ValueError, r"shape must be two integers .*, got \(16,\)"),
        ],
    )
    def test_errors(self, source, block_size, error, message):
        with pytest.raises(error, match=message):
            BlockSparseMatrix.from_scipy_sparse(source, block_size=block_size)

    @settings(max_examples=12)
    @given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.sampled_from([8, 16]), st.integers(0, 99))
    def test_products_agree_with_scipy(self, shape, block_size, seed):
        source = scipy.sparse.random_array(shape, density=0.05, rng=np.random.default_rng(seed)).tocsr()
        source.data = integers(source.data.shape, seed)
        w = BlockSparseMatrix.from_scipy_sparse(source, block_size=block_size)
        x = integers((3, shape[0]), seed + 1)
        np.testing.assert_array_equal(x @ w, x @ source)
        x = integers((shape[1], 2), seed + 2)
        np.testing.assert_array_equal(w @ x, source @ x)


X = {"vector": (30,), "matrix": (7, 30), "batch": (2, 3, 30), "empty": (0, 30)}


@pytest.mark.parametrize("transposed", [False, True])
class TestProducts:
    def w(self, transposed):
        return matrix((41, 30)).T if transposed else matrix((30, 41))

    @pytest.mark.parametrize("leading", X)
    @pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
    def test_x_at_w(self, transposed, leading, kind):
        w, x = self.w(transposed), integers(X[leading])
        y = kind(x) @ w
        assert isinstance(y, jax.Array)
        assert_equal(y, x @ densified(w))

    @pytest.mark.parametrize("leading", X)
    @pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
    def test_w_at_x(self, transposed, leading, kind):
        w, x = self.w(transposed).T, integers(X[leading])
        x = x if x.ndim == 1 else np.swapaxes(x, -1, -2)
        y = w @ kind(x)
        assert isinstance(y, jax.Array)
        assert_equal(y, densified(w) @ x)

    def test_under_jit_and_vmap(self, transposed):
        w, x = self.w(transposed), integers((3, 4, 30))
        assert_equal(jax.jit(lambda x, w: x @ w)(x, w), x @ densified(w))
        assert_equal(jax.jit(lambda x, w: w.T @ x.mT)(x, w), densified(w).T @ np.swapaxes(x, 1, 2))
        assert_equal(jax.vmap(lambda x: x @ w)(x), x @ densified(w))

    def test_gradients(self, transposed):
        w, x = self.w(transposed), integers((7, 30))
        dy = integers((7, 41), seed=1)
        dx, dw = jax.grad(lambda x, w: jnp.sum((x @ w) * dy), argnums=(0, 1), allow_int=True)(x, w)
        assert_equal(dx, dy @ densified(w).T)
        kept = densified(BlockSparseMatrix(jnp.ones_like(w.data), w.pattern, w.transposed))
        assert_equal(BlockSparseMatrix(dw.data, w.pattern, w.transposed), kept * (x.T @ dy))


def test_products_name_what_does_not_fit():
    w = matrix((30, 41))
    with pytest.raises(
        ValueError, match=r"x must have 30 features \(w has shape \(30, 41\)\) in its last axis, got \(7, 41\)"
    ):
        jnp.ones((7, 41)) @ w
    with pytest.raises(
        ValueError, match=r"w @ x needs 41 rows in x \(w has shape \(30, 41\)\), got x of shape \(30, 7\)"
    ):
        w @ jnp.ones((30, 7))
    with pytest.raises(ValueError, match=r"w @ x needs 41 rows in x .*, got x of shape \(30,\)"):
        w @ jnp.ones(30)
    with pytest.raises(ValueError, match=r"w @ x needs 41 rows in x .*, got x of shape \(\)"):
        w @ 1.0
    with pytest.raises(TypeError, match="a product of two block-sparse matrices is not supported"):
        w @ w.T


class TestArithmetic:
    @pytest.mark.parametrize("scalar", [2, 0.5, np.float32(3), np.float64(0.25), np.array(2.0), jnp.float32(2), True])
    def test_scalars(self, scalar):
        w = matrix()
        for scaled, wanted in (
            (w * scalar, densified(w) * scalar),
            (scalar * w, densified(w) * scalar),
            (w / scalar, densified(w) / scalar),
            (w.T * scalar, densified(w).T * scalar),
        ):
            assert isinstance(scaled, BlockSparseMatrix)
            assert scaled.dtype == jnp.float32
            np.testing.assert_array_equal(scaled.todense(), wanted.astype(np.float32))

    def test_python_scalars_keep_half_precision(self):
        w = matrix(dtype="bfloat16")
        assert (w * 2).dtype == (0.5 * w).dtype == (w / 3).dtype == jnp.bfloat16
        assert (w * jnp.float32(2)).dtype == jnp.float32  # as for arrays

    def test_sums_on_one_pattern(self):
        v = matrix()
        w = with_values(v.pattern, seed=1)
        assert_equal(v + w, densified(v) + densified(w))
        assert_equal(v - w, densified(v) - densified(w))
        assert_equal(v.T + w.T, (densified(v) + densified(w)).T)
        assert_equal(-v, -densified(v))
        assert_equal(v + matrix(), 2 * densified(v))  # another object, but the same blocks

    def test_under_jit(self):
        v = matrix()
        assert_equal(jax.jit(lambda v, scalar: v * scalar - v / 2)(v, 3.0), 2.5 * densified(v))

        @jax.jit
        def add(v, w):
            return v + w

        with pytest.raises(
            ValueError, match=r"must know it.*Under jit pass one BlockPattern and build both matrices on it"
        ):
            add(v, v)
        assert_equal(
            jax.jit(lambda a, b, p: BlockSparseMatrix(a, p) + BlockSparseMatrix(b, p))(v.data, v.data, v.pattern), v * 2
        )

    @pytest.mark.parametrize(
        "change",
        [{"seed": 1}, {"density": 1.0}, {"block_size": 8}, {"shape": (41, 30)}, {"shape": (31, 41)}],
        ids=str,
    )
    def test_sums_of_different_patterns_are_refused(self, change):
        self.refuse_sum(matrix(), matrix(**change))

    def test_sum_with_a_transpose_is_refused(self):
        square = with_values(BlockPattern.from_coordinates([0, 1], [0, 1], shape=(32, 32), block_size=16))
        self.refuse_sum(square, square.T)

    def refuse_sum(self, a, b):
        for operation in (lambda a, b: a + b, lambda a, b: a - b):
            with pytest.raises(ValueError, match=r"\+ and - need two matrices on one pattern"):
                operation(a, b)

    @pytest.mark.parametrize(
        "operation",
        [
            lambda w: w + 1,
            lambda w: 1 - w,
            lambda w: w * w,
            lambda w: w / w,
            lambda w: 2 / w,
            lambda w: w * np.ones(41),
            lambda w: jnp.ones(41) * w,
            lambda w: np.ones((30, 41)) + w,
            lambda w: w + jnp.ones((30, 41)),
        ],
    )
    def test_what_would_not_be_block_sparse_is_refused(self, operation):
        with pytest.raises(TypeError):
            operation(matrix())


def test_attributes():
    w = matrix((30, 41), 16)
    assert (w.shape, w.T.shape, w.ndim) == ((30, 41), (41, 30), 2)
    assert (w.block_size, w.nnz, w.density) == (16, w.pattern.nnz, w.pattern.density)
    assert w.T.data is w.data
    assert w.T.pattern is w.pattern
    assert not w.T.T.transposed
    half = w.T.astype("bfloat16")
    assert (half.dtype, half.transposed) == (jnp.bfloat16, True)
    assert_equal(half, densified(w).T)
    with pytest.raises(TypeError, match="unhashable"):
        hash(w)
    with pytest.raises(AttributeError):
        w.data = w.data


def test_repr():
    w = matrix((30, 41))
    assert repr(w) == "BlockSparseMatrix(30x41, float32, block_size=16, nnz=3, density=0.5)"
    assert repr(w.T) == "BlockSparseMatrix(41x30, float32, block_size=16, nnz=3, density=0.5, transposed view)"
    assert repr(jax.eval_shape(lambda: w)) == repr(w)
    assert repr(jax.tree.map(jnp.shape, w)).startswith(
        "BlockSparseMatrix(data=(3, 16, 16), pattern=BlockPattern(30x41,"
    )


class TestPytree:
    def test_only_float_leaf_is_data(self):
        leaves = jax.tree.leaves_with_path(matrix())
        floats = [jax.tree_util.keystr(path) for path, leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
        assert floats == [".data"]
        assert len(leaves) == 1 + len(INDEX_NAMES)

    def test_through_jit(self):
        w = matrix().T
        through = jax.jit(lambda w: w.T * 2)(w)
        assert not through.transposed
        assert_equal(through, 2 * densified(w).T)

    def test_grad_of_data(self):
        w = matrix((32, 48))

        def loss(data):
            return jnp.sum(BlockSparseMatrix(data, w.pattern).todense() ** 2) / 2

        np.testing.assert_array_equal(jax.grad(loss)(w.data), w.data)

    def test_vmap_and_scan_over_stacked_matrices(self):
        ws = [matrix((32, 32), seed=seed) for seed in (0, 1, 2)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ws)
        x = integers((5, 32))
        assert_equal(jax.vmap(lambda w: x @ w)(stacked), np.stack([x @ densified(w) for w in ws]))
        assert_equal(jax.vmap(lambda w: w.todense())(stacked), np.stack([densified(w) for w in ws]))
        scanned, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, stacked)
        assert_equal(scanned, x @ densified(ws[0]) @ densified(ws[1]) @ densified(ws[2]))
