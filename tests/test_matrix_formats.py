"""BlockSparseMatrix made from and turned into other formats."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from cases import dense as densified
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix_cases import SHAPES, assert_equal, integers, matrix

from jax_blocksparse import BlockPattern, BlockSparseMatrix, patterns


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
