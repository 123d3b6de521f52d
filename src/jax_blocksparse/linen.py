"""Block-sparse layers for Flax linen."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import serialization
from flax.linen import dtypes
from jax.typing import ArrayLike, DTypeLike

from jax_blocksparse.activations import Activation
from jax_blocksparse.advice import warn_if_dense_is_faster
from jax_blocksparse.initializers import Initializer, init_blocks
from jax_blocksparse.layers import check_fit, choose_pattern
from jax_blocksparse.matrix import BlockSparseMatrix
from jax_blocksparse.mlp import mlp
from jax_blocksparse.ops import Implementation, matmul
from jax_blocksparse.pattern import INDEX_NAMES, BlockPattern, check_is_pattern

PATTERN_COLLECTION = "sparsity"
"""The variable collection that holds the patterns."""

PATTERN_NAME = "kernel_pattern"
"""The name of a layer's pattern, a BlockPattern, in that collection."""


class BlockSparseDense(nn.Module):
    """`nn.Dense` with a block-sparse kernel: the same attributes, dtype promotion and use of random keys.

    At density 1 it computes what `nn.Dense` computes. The pattern is a variable of the collection "sparsity", named
    "kernel_pattern": keep it beside "params" in checkpoints and in `apply`, and out of the optimizer. A lifted
    transform that stacks layers (`nn.scan`, `nn.vmap`) needs `variable_axes={"params": 0, "sparsity": 0}`.

    Attributes:
      features: the number of output features.
      use_bias: whether to add a bias to the output.
      dtype: the dtype of the computation; by default that of input and parameters, promoted.
      param_dtype: the dtype of the parameters.
      precision: see `jax_blocksparse.matmul`.
      kernel_init: initialiser of the kernel; it sees the fan-in that each output really has (see
        `jax_blocksparse.initializers.init_blocks`).
      bias_init: initialiser of the bias.
      promote_dtype: as in `nn.Dense`.
      dot_general: must be None: the product is not a dense one.
      dot_general_cls: must be None, likewise.
      block_size: rows and columns of a block, one of `jax_blocksparse.BLOCK_SIZES`; by default the pattern's, or 32.
      density: fraction of the blocks to keep, in (0, 1], at random places, equally many for each output (see
        `jax_blocksparse.patterns.random`). The places follow from the kernel's random key.
      pattern: where the blocks are, instead of block_size and density.
      implementation: see `jax_blocksparse.matmul`.

    Raises:
      ValueError: if density and pattern are both given or both missing, if pattern, variables or input have another
        size, if block size or density is out of range, if a dot_general is given, or if the collection "sparsity" is
        missing.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_blocksparse.linen import BlockSparseDense
      >>> layer = BlockSparseDense(512, density=0.25)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((8, 256)))
      >>> layer.apply(variables, jnp.ones((8, 256))).shape, variables["params"]["kernel"].shape
      ((8, 512), (32, 32, 32))
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: jax.lax.PrecisionLike = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    promote_dtype: Any = dtypes.promote_dtype
    dot_general: Any = None
    dot_general_cls: Any = None
    block_size: int | None = None
    density: float | None = None
    pattern: BlockPattern | None = None
    implementation: Implementation | None = None

    def __call__(self, inputs: ArrayLike) -> jax.Array:
        """Applies the layer to the last axis.

        Args:
          inputs: (..., in_features).

        Returns:
          (..., features).
        """
        matrix, bias = self.weights(jnp.shape(inputs)[-1])
        inputs, kernel, bias = self.promote_dtype(inputs, matrix.data, bias, dtype=self.dtype)
        warn_if_dense_is_faster(inputs, matrix.pattern)
        return matmul(
            inputs,
            BlockSparseMatrix(kernel, matrix.pattern),
            bias=bias,
            precision=self.precision,
            implementation=self.implementation,
        )

    @nn.compact
    def weights(self, in_features: int) -> tuple[BlockSparseMatrix, jax.Array | None]:
        """Returns kernel and bias in param_dtype; makes them while the variables are initialised."""
        if self.dot_general is not None or self.dot_general_cls is not None:
            raise ValueError("dot_general and dot_general_cls must be None: the product is not dense")
        shape = (in_features, self.features)
        pattern = self._stored_pattern(shape)

        def init_kernel(key: jax.Array) -> jax.Array:
            nonlocal pattern
            if pattern is None:
                pattern = choose_pattern(shape, self.block_size, self.density, self.pattern, key)
            return init_blocks(self.kernel_init, key, pattern, self.param_dtype)

        kernel = self.param("kernel", init_kernel)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        self.variable(PATTERN_COLLECTION, PATTERN_NAME, lambda: pattern)
        return BlockSparseMatrix(kernel, pattern), bias

    def _stored_pattern(self, shape: tuple[int, int]) -> BlockPattern | None:
        """The pattern in the variables, or None while the layer is being initialised."""
        if not self.has_variable(PATTERN_COLLECTION, PATTERN_NAME):
            if self.is_initializing():
                return None
            raise ValueError(
                f"the variables hold no collection {PATTERN_COLLECTION!r} for {self.name or type(self).__name__}: "
                f"pass what init returned, params and {PATTERN_COLLECTION}"
            )
        pattern = self.get_variable(PATTERN_COLLECTION, PATTERN_NAME)
        check_is_pattern(f"the variable {PATTERN_NAME}", pattern)
        check_fit(pattern, shape, self.block_size)
        return pattern


class BlockSparseMLP(nn.Module):
    """The feed-forward layer of a Transformer, act(x W_up + b_up) W_down + b_down, with block-sparse kernels.

    It computes what its two `BlockSparseDense` layers, `up` and `down`, would with the activation between them; bias
    and activation are computed inside the CUDA kernels, forward and backward (see `jax_blocksparse.mlp`).

    Attributes:
      hidden_features: the number of features between the layers.
      features: the number of output features; by default that of the input.
      activation: "relu", "gelu_exact", "gelu_tanh" (what `nn.gelu` computes) or "silu".
      use_bias: whether to add biases.
      dtype: the dtype of the computation; by default that of input and parameters, promoted.
      param_dtype: the dtype of the parameters.
      precision: see `jax_blocksparse.matmul`.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.
      block_size: of both kernels, see `BlockSparseDense`.
      density: of both kernels, see `BlockSparseDense`.
      up_pattern: the pattern of the first kernel, instead of block_size and density.
      down_pattern: the pattern of the second kernel, likewise.
      implementation: see `jax_blocksparse.matmul`.

    Raises:
      ValueError: as `BlockSparseDense`, and for an unknown activation.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_blocksparse.linen import BlockSparseMLP
      >>> mlp = BlockSparseMLP(1024, density=0.25)
      >>> mlp.init_with_output(jax.random.key(0), jnp.ones((8, 256)))[0].shape
      (8, 256)
    """

    hidden_features: int
    features: int | None = None
    activation: Activation = "gelu_tanh"
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: jax.lax.PrecisionLike = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    block_size: int | None = None
    density: float | None = None
    up_pattern: BlockPattern | None = None
    down_pattern: BlockPattern | None = None
    implementation: Implementation | None = None

    @nn.compact
    def __call__(self, inputs: ArrayLike) -> jax.Array:
        """Applies the layer to the last axis.

        Args:
          inputs: (..., in_features).

        Returns:
          (..., features).
        """
        in_features = jnp.shape(inputs)[-1]
        names = ("use_bias", "param_dtype", "kernel_init", "bias_init", "block_size", "density")
        options = {name: getattr(self, name) for name in names}
        features = in_features if self.features is None else self.features
        up = BlockSparseDense(self.hidden_features, pattern=self.up_pattern, name="up", **options)
        down = BlockSparseDense(features, pattern=self.down_pattern, name="down", **options)
        (w_in, bias_in), (w_out, bias_out) = up.weights(in_features), down.weights(self.hidden_features)
        inputs, kernel_in, kernel_out, bias_in, bias_out = dtypes.promote_dtype(
            inputs, w_in.data, w_out.data, bias_in, bias_out, dtype=self.dtype
        )
        warn_if_dense_is_faster(inputs, w_in.pattern, w_out.pattern)
        return mlp(
            inputs,
            BlockSparseMatrix(kernel_in, w_in.pattern),
            BlockSparseMatrix(kernel_out, w_out.pattern),
            bias_in=bias_in,
            bias_out=bias_out,
            activation=self.activation,
            precision=self.precision,
            implementation=self.implementation,
        )


def _to_state_dict(pattern: BlockPattern) -> dict[str, Any]:
    indices = {name: getattr(pattern, name) for name in INDEX_NAMES}
    return {
        "in_features": pattern.shape[0],
        "out_features": pattern.shape[1],
        "block_size": pattern.block_size,
    } | indices


def _from_state_dict(target: BlockPattern, state: dict[str, Any]) -> BlockPattern:
    pattern = BlockPattern(
        **{name: state[name] for name in INDEX_NAMES},
        shape=(state["in_features"], state["out_features"]),
        block_size=state["block_size"],
    )
    if (pattern.shape, pattern.block_size) != (target.shape, target.block_size):
        raise ValueError(f"the state holds {pattern}, which has another shape or block size than {target}")
    return pattern


serialization.register_serialization_state(BlockPattern, _to_state_dict, _from_state_dict)
