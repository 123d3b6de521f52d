"""vmap in every combination: right values, and one call for the whole batch."""

import dataclasses
import itertools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_blocksparse as jbs
from jax_blocksparse.pattern import INDEX_NAMES
from jax_blocksparse.primitives import matmul_p, sddmm_p

OUTER, INNER = 2, 3
PATTERNS = [jbs.patterns.random((21, 13), 8, density=0.6, seed=seed) for seed in range(OUTER * INNER)]

# Every operand for every element of an outer and an inner batch: leaves of shape (OUTER, INNER, ...).
X = cases.normal((OUTER, INNER, 5, 21), "float32", seed=1)
DY = cases.normal((OUTER, INNER, 5, 13), "float32", seed=2)
DATA = cases.normal((OUTER, INNER, PATTERNS[0].nnz, 8, 8), "float32", seed=3)
PATTERN = jax.tree.map(lambda *leaves: np.stack(leaves).reshape(OUTER, INNER, -1), *PATTERNS)
OPERANDS = {"matmul": (X, DATA, PATTERN), "sddmm": (X, DY, PATTERN)}

# Which of the three operands are batched.
COMBINATIONS = [which for which in itertools.product([False, True], repeat=3) if any(which)]
# Nothing in the batching rules looks at the implementation; these are all that plain XLA's own batching sees.
IMPLEMENTED_COMBINATIONS = [
    *(("native", which) for which in COMBINATIONS),
    *(("xla", which) for which in [(True, False, False), (False, True, False), (True, True, True)]),
]


def product(kind, implementation="native"):
    """matmul or sddmm as a function of two float operands and a pattern."""
    options = {"implementation": implementation, "precision": "highest"}
    if kind == "matmul":
        return lambda x, data, pattern: jbs.matmul(x, jbs.BlockSparseMatrix(data, pattern), **options)
    return lambda x, dy, pattern: jbs.sddmm(x, dy, pattern, **options)


def reference(kind, x, second, pattern):
    if kind == "matmul":
        return cases.wide(x) @ cases.dense(jbs.BlockSparseMatrix(second, pattern))
    return cases.sampled(cases.wide(x).T @ cases.wide(second), pattern)


def take(operand, *index):
    return jax.tree.map(lambda leaf: leaf[index], operand)


def batch(kind, which):
    """The inner batch of those operands that `which` names, the first element of the others; and vmap's in_axes."""
    args = [
        take(operand, 0) if here else take(operand, 0, 0) for operand, here in zip(OPERANDS[kind], which, strict=True)
    ]
    return args, [0 if here else None for here in which]


@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize(("implementation", "which"), IMPLEMENTED_COMBINATIONS, ids=str)
def test_every_combination(kind, implementation, which, device):
    """Batched operands on their last axis, the result on its axis 1."""
    args, _ = batch(kind, which)
    on_last_axis = [
        jax.tree.map(lambda leaf: np.moveaxis(leaf, 0, -1), arg) if here else arg
        for arg, here in zip(args, which, strict=True)
    ]
    got = jax.vmap(product(kind, implementation), [-1 if here else None for here in which], out_axes=1)(*on_last_axis)
    each = [[take(arg, i) if here else arg for arg, here in zip(args, which, strict=True)] for i in range(INNER)]
    wanted = np.stack([reference(kind, *one) for one in each], axis=1)
    assert cases.relative_error(got, wanted) < 1e-6


@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize("which", COMBINATIONS, ids=str)
def test_is_one_call(kind, which):
    args, axes = batch(kind, which)
    text = jax.jit(jax.vmap(product(kind), axes)).trace(*args).lower(lowering_platforms=("cpu",)).as_text()
    assert text.count(f"custom_call @jax_blocksparse.{kind}.v1") == 1
    assert "while" not in text


@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        ((True, False, False), (True, False, False)),
        ((True, False, False), (False, True, False)),
        ((False, True, False), (True, False, False)),
        ((True, True, False), (False, True, True)),
        ((False, False, True), (True, False, False)),
        ((True, True, True), (True, True, True)),
    ],
    ids=str,
)
def test_nested(kind, outer, inner, device):
    """One batch in another, each over other operands: still one call."""

    def chosen(o, i):
        """Every operand for element (o, i), or for all if slices are given."""
        return [
            take(operand, o if in_outer else 0, i if in_inner else 0)
            for operand, in_outer, in_inner in zip(OPERANDS[kind], outer, inner, strict=True)
        ]

    over_inner = jax.vmap(product(kind), [0 if here else None for here in inner])
    over_both = jax.vmap(over_inner, [0 if here else None for here in outer])
    args = chosen(slice(None), slice(None))
    wanted = [[reference(kind, *chosen(o, i)) for i in range(INNER)] for o in range(OUTER)]
    assert cases.relative_error(over_both(*args), np.array(wanted)) < 1e-6
    assert len(cases.equations(jax.make_jaxpr(over_both)(*args).jaxpr, matmul_p, sddmm_p)) == 1


def test_shared_weights_are_not_copied():
    """The batch becomes more rows of x, and the weights are passed as they are."""
    args, axes = batch("matmul", (True, False, False))
    (call,) = cases.equations(jax.make_jaxpr(jax.vmap(product("matmul"), axes))(*args).jaxpr, matmul_p)
    assert call.invars[0].aval.shape == (1, INNER * 5, 21)
    assert all(operand.aval.shape[0] == 1 for operand in call.invars)


@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize("which", [(False, True, False), (True, True, False), (False, False, True)], ids=str)
def test_shared_operands_of_a_batched_product_are_not_copied(kind, which):
    args, axes = batch(kind, which)
    (call,) = cases.equations(jax.make_jaxpr(jax.vmap(product(kind), axes))(*args).jaxpr, matmul_p, sddmm_p)
    sizes = [operand.aval.shape[0] for operand in call.invars]
    first, second, pattern = (INNER if here else 1 for here in which)
    assert sizes == [first, second, *[pattern] * len(INDEX_NAMES)]


def test_pattern_of_which_one_leaf_is_batched(device):
    """Blocks that move within their columns: all index arrays of a call have one batch size."""
    x, data, pattern = X[0, 0], DATA[0, 0], PATTERNS[0]
    rows = np.stack([pattern.rows, (np.asarray(pattern.rows) + 1) % pattern.grid[0]])
    patterns = [dataclasses.replace(pattern, rows=one) for one in rows]
    got = jax.vmap(lambda rows: product("matmul")(x, data, dataclasses.replace(pattern, rows=rows)))(rows)
    assert cases.relative_error(got, np.stack([reference("matmul", x, data, one) for one in patterns])) < 1e-6


def test_batch_of_one(device):
    args = [take(operand, 0, slice(0, 1)) for operand in OPERANDS["matmul"]]
    wanted = reference("matmul", *(take(operand, 0, 0) for operand in OPERANDS["matmul"]))
    assert cases.relative_error(jax.vmap(product("matmul"))(*args), wanted[None]) < 1e-6


def test_per_example_gradients(implementation, device):
    x, data, pattern = X[0], DATA[0, 0], PATTERNS[0]

    def loss(data, x):
        return jnp.sin(product("matmul", implementation)(x, data, pattern)).sum()

    got = jax.vmap(jax.grad(loss), in_axes=(None, 0))(data, x)
    dense = cases.dense(jbs.BlockSparseMatrix(data, pattern))
    wanted = [cases.sampled(one.T @ np.cos(one @ dense), pattern) for one in cases.wide(x)]
    assert cases.relative_error(got, np.array(wanted)) < 1e-5


def test_gradients_of_an_ensemble(implementation, device):
    """As many independent matrices as there are patterns, one x for all."""
    x, data, patterns = X[0, 0], DATA[0], take(PATTERN, 0)

    def loss(x, data):
        return jnp.sin(jax.vmap(product("matmul", implementation), (None, 0, 0))(x, data, patterns)).sum()

    dx, ddata = jax.grad(loss, argnums=(0, 1))(x, data)
    members = list(zip(data, PATTERNS[:INNER], strict=True))
    dense = [cases.dense(jbs.BlockSparseMatrix(*member)) for member in members]
    dy = [np.cos(cases.wide(x) @ w) for w in dense]
    assert cases.relative_error(dx, sum(g @ w.T for g, w in zip(dy, dense, strict=True))) < 1e-5
    wanted = [cases.sampled(cases.wide(x).T @ g, pattern) for g, (_, pattern) in zip(dy, members, strict=True)]
    assert cases.relative_error(ddata, np.array(wanted)) < 1e-5
