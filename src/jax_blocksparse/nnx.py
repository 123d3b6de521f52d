"""Block-sparse layers for Flax NNX."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax.typing import ArrayLike, DTypeLike

from jax_blocksparse.activations import Activation, check_activation
from jax_blocksparse.advice import warn_if_dense_is_faster
from jax_blocksparse.initializers import Initializer, init_blocks
from jax_blocksparse.layers import choose_pattern
from jax_blocksparse.matrix import BlockSparseMatrix
from jax_blocksparse.mlp import mlp
from jax_blocksparse.ops import Implementation, matmul
from jax_blocksparse.pattern import BlockPattern


class Pattern(nnx.Variable):
    """The variable type that holds a layer's BlockPattern: saved and restored, but no parameter."""


class BlockSparseLinear(nnx.Module):
    """`nnx.Linear` with a block-sparse kernel: the same arguments, attributes, dtype promotion and use of `rngs`.

    At density 1 it computes what `nnx.Linear` with the same `rngs` computes. The pattern is state of its own variable
    type `Pattern`: `nnx.grad` and optimizers with `wrt=nnx.Param` leave it alone, checkpoints hold it, and a layer
    whose pattern is replaced by another of as many blocks compiles nothing anew.

    Args:
      in_features: the number of input features.
      out_features: the number of output features.
      block_size: rows and columns of a block, one of `jax_blocksparse.BLOCK_SIZES`; by default the pattern's, or 32.
      density: fraction of the blocks to keep, in (0, 1], at random places, equally many for each output (see
        `jax_blocksparse.patterns.random`). The places follow from the kernel's random key.
      pattern: where the blocks are, instead of block_size and density.
      use_bias: whether to add a bias to the output.
      dtype: the dtype of the computation; by default that of input and parameters, promoted.
      param_dtype: the dtype of the parameters.
      precision: see `jax_blocksparse.matmul`.
      kernel_init: initialiser of the kernel; it sees the fan-in that each output really has (see
        `jax_blocksparse.initializers.init_blocks`).
      bias_init: initialiser of the bias.
      dot_general: only `jax.lax.dot_general` is accepted: the product is not a dense one.
      promote_dtype: as in `nnx.Linear`.
      preferred_element_type: dtype of the product; see `jax_blocksparse.matmul`.
      implementation: see `jax_blocksparse.matmul`.
      rngs: random keys; two are drawn from `params`, in the order kernel, bias.
      kernel_metadata: metadata of the kernel's `nnx.Param`, whose axes are (blocks, in, out).
      bias_metadata: metadata of the bias's `nnx.Param`.

    Attributes:
      kernel: `nnx.Param`, (nnz, block_size, block_size).
      bias: `nnx.Param`, (out_features,), or None.
      pattern: `Pattern`; `pattern.get_value()` is the BlockPattern.

    Raises:
      ValueError: if density and pattern are both given or both missing, if the pattern has another shape, if the
        block size or density is out of range, or if another dot_general is given.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jax_blocksparse.nnx import BlockSparseLinear
      >>> layer = BlockSparseLinear(256, 512, block_size=32, density=0.25, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((8, 256))).shape, layer.kernel.shape
      ((8, 512), (32, 32, 32))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        block_size: int | None = None,
        density: float | None = None,
        pattern: BlockPattern | None = None,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),  # noqa: B008 (as in nnx.Linear)
        bias_init: Initializer = nnx.initializers.zeros_init(),  # noqa: B008
        dot_general: Any = jax.lax.dot_general,
        promote_dtype: Any = dtypes.promote_dtype,
        preferred_element_type: DTypeLike | None = None,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        if dot_general is not jax.lax.dot_general:
            raise ValueError(f"dot_general must be jax.lax.dot_general: the product is not dense; got {dot_general!r}")
        kernel_key = rngs.params()
        pattern = choose_pattern((in_features, out_features), block_size, density, pattern, kernel_key)
        self.kernel = nnx.Param(init_blocks(kernel_init, kernel_key, pattern, param_dtype), **kernel_metadata)
        self.pattern = Pattern(pattern)
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype), **bias_metadata)
        else:
            self.bias = nnx.data(None)
        self.in_features = in_features
        self.out_features = out_features
        self.block_size = pattern.block_size
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.dot_general = dot_general
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        self.implementation = implementation

    def __call__(self, inputs: ArrayLike, out_sharding: Any = None) -> jax.Array:
        """Applies the layer to the last axis.

        Args:
          inputs: (..., in_features).
          out_sharding: the sharding of the output, as in `nnx.Linear`, for meshes with explicit axes.

        Returns:
          (..., out_features).
        """
        bias = None if self.bias is None else self.bias[...]
        inputs, kernel, bias = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        warn_if_dense_is_faster(inputs, self.pattern.get_value())
        y = matmul(
            inputs,
            BlockSparseMatrix(kernel, self.pattern.get_value()),
            bias=bias,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            implementation=self.implementation,
        )
        if out_sharding is not None:
            y = jax.sharding.reshard(y, out_sharding)
        return y

    @property
    def matrix(self) -> BlockSparseMatrix:
        """The kernel as a (in_features, out_features) matrix."""
        return BlockSparseMatrix(self.kernel[...], self.pattern.get_value())

    @classmethod
    def from_linear(
        cls,
        linear: nnx.Linear,
        *,
        block_size: int | None = None,
        density: float | None = None,
        pattern: BlockPattern | None = None,
    ) -> "BlockSparseLinear":
        """Makes a block-sparse layer of a dense one, keeping the values of the blocks it keeps.

        Args:
          linear: the dense layer; it is not changed.
          block_size: rows and columns of a block.
          density: keeps this fraction of the blocks, those of largest norm.
          pattern: keeps the blocks of this pattern.

        Raises:
          ValueError: as `BlockSparseMatrix.fromdense`.

        Example:
          >>> from flax import nnx
          >>> from jax_blocksparse.nnx import BlockSparseLinear
          >>> dense = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
          >>> BlockSparseLinear.from_linear(dense, block_size=16, density=0.5).pattern.get_value()
          BlockPattern(64x128, block_size=16, nnz=16, density=0.5)
        """
        matrix = BlockSparseMatrix.fromdense(
            linear.kernel[...], block_size=block_size, density=density, pattern=pattern
        )
        layer = cls(
            linear.in_features,
            linear.out_features,
            pattern=matrix.pattern,
            kernel_init=nnx.initializers.zeros_init(),
            dot_general=linear.dot_general,
            rngs=nnx.Rngs(0),
            **_shared_options(linear),
        )
        layer.kernel[...] = matrix.data
        if linear.use_bias:
            layer.bias[...] = linear.bias[...]
        return layer

    def to_linear(self) -> nnx.Linear:
        """Makes the dense layer that computes the same.

        Example:
          >>> from flax import nnx
          >>> from jax_blocksparse.nnx import BlockSparseLinear
          >>> layer = BlockSparseLinear(64, 128, block_size=16, density=0.5, rngs=nnx.Rngs(0))
          >>> layer.to_linear().kernel.shape
          (64, 128)
        """
        linear = nnx.Linear(
            self.in_features,
            self.out_features,
            kernel_init=nnx.initializers.zeros_init(),
            rngs=nnx.Rngs(0),
            **_shared_options(self),
        )
        linear.kernel[...] = self.matrix.todense()
        if self.use_bias:
            linear.bias[...] = self.bias[...]
        return linear


class BlockSparseMLP(nnx.Module):
    """The feed-forward layer of a Transformer, act(x W_up + b_up) W_down + b_down, with block-sparse kernels.

    It computes what its two `BlockSparseLinear` layers would with the activation between them; bias and activation
    are computed inside the CUDA kernels, forward and backward (see `jax_blocksparse.mlp`).

    Args:
      in_features: the number of input features.
      hidden_features: the number of features between the layers.
      out_features: the number of output features; by default in_features.
      activation: "relu", "gelu_exact", "gelu_tanh" (what `nnx.gelu` computes) or "silu".
      block_size: of both kernels, see `BlockSparseLinear`.
      density: of both kernels, see `BlockSparseLinear`.
      up_pattern: the pattern of the first kernel, instead of block_size and density.
      down_pattern: the pattern of the second kernel, likewise.
      use_bias: whether to add biases.
      dtype: the dtype of the computation; by default that of input and parameters, promoted.
      param_dtype: the dtype of the parameters.
      precision: see `jax_blocksparse.matmul`.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.
      implementation: see `jax_blocksparse.matmul`.
      rngs: random keys, drawn from `params` for `up`, then for `down`.

    Attributes:
      up: `BlockSparseLinear`, in_features to hidden_features.
      down: `BlockSparseLinear`, hidden_features to out_features.

    Raises:
      ValueError: as `BlockSparseLinear`, and for an unknown activation.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jax_blocksparse.nnx import BlockSparseMLP
      >>> mlp = BlockSparseMLP(256, 1024, block_size=32, density=0.25, rngs=nnx.Rngs(0))
      >>> mlp(jnp.ones((8, 256))).shape
      (8, 256)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        activation: Activation = "gelu_tanh",
        block_size: int | None = None,
        density: float | None = None,
        up_pattern: BlockPattern | None = None,
        down_pattern: BlockPattern | None = None,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),  # noqa: B008 (as in nnx.Linear)
        bias_init: Initializer = nnx.initializers.zeros_init(),  # noqa: B008
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.activation = check_activation(activation)
        out_features = in_features if out_features is None else out_features
        options = {
            "block_size": block_size,
            "density": density,
            "use_bias": use_bias,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "precision": precision,
            "kernel_init": kernel_init,
            "bias_init": bias_init,
            "implementation": implementation,
            "rngs": rngs,
        }
        self.up = BlockSparseLinear(in_features, hidden_features, pattern=up_pattern, **options)
        self.down = BlockSparseLinear(hidden_features, out_features, pattern=down_pattern, **options)

    def __call__(self, inputs: ArrayLike) -> jax.Array:
        """Applies the layer to the last axis.

        Args:
          inputs: (..., in_features).

        Returns:
          (..., out_features).
        """
        up, down = self.up, self.down
        biases = [None if layer.bias is None else layer.bias[...] for layer in (up, down)]
        inputs, kernel_in, kernel_out, bias_in, bias_out = up.promote_dtype(
            (inputs, up.kernel[...], down.kernel[...], *biases), dtype=up.dtype
        )
        warn_if_dense_is_faster(inputs, up.pattern.get_value(), down.pattern.get_value())
        return mlp(
            inputs,
            BlockSparseMatrix(kernel_in, up.pattern.get_value()),
            BlockSparseMatrix(kernel_out, down.pattern.get_value()),
            bias_in=bias_in,
            bias_out=bias_out,
            activation=self.activation,
            precision=up.precision,
            implementation=up.implementation,
        )


def _shared_options(layer: nnx.Linear | BlockSparseLinear) -> dict[str, Any]:
    """What a layer and its dense or sparse twin have in common."""
    names = ("use_bias", "dtype", "param_dtype", "precision", "promote_dtype", "preferred_element_type")
    return {name: getattr(layer, name) for name in names}
