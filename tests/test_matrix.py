"""BlockSparseMatrix: what it is, and what operators make of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import dense as densified
from matrix_cases import assert_equal, integers, matrix, with_values

from jax_blocksparse import BlockPattern, BlockSparseMatrix
from jax_blocksparse.pattern import INDEX_NAMES

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
