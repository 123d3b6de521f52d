"""Loss, optimizer and the training step."""

import functools

import jax
import optax
from flax import nnx

from transformer.model import VOCABULARY, Transformer
from transformer.settings import Settings

# What a step turns over: graph definition and state of the pair (model, optimizer).
Graph = nnx.GraphDef
State = nnx.State


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """AdamW with clipped gradients, a linear warm-up and a cosine down to a tenth of the peak."""
    warmup = min(settings.warmup, settings.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, settings.lr, warmup, settings.steps, settings.lr / 10)
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(
            schedule,
            b2=0.95,
            weight_decay=settings.weight_decay,
            mask=functools.partial(jax.tree.map, lambda x: x.ndim > 1),  # matrices, not the gains of the norms
        ),
    )


def create(settings: Settings) -> tuple[Graph, State]:
    """Build model and optimizer as (graph definition, state)."""
    model = Transformer(settings)
    optimizer = nnx.Optimizer(model, make_optimizer(settings), wrt=nnx.Param)
    return nnx.split((model, optimizer))


def loss_of(model: Transformer, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats of every byte but the first of uint8 (batch, context + 1) windows."""
    # One-hot targets rather than indices: a gather's gradient is a scatter, slow where it has to be deterministic.
    targets = jax.nn.one_hot(windows[:, 1:], VOCABULARY)
    return optax.softmax_cross_entropy(model(windows[:, :-1]), targets).mean()


def train_step(graph: Graph, state: State, windows: jax.Array) -> tuple[State, jax.Array]:
    """One step of the optimizer on uint8 (batch, context + 1) windows; returns the new state and the loss in nats."""
    model, optimizer = nnx.merge(graph, state)
    loss, gradients = nnx.value_and_grad(loss_of)(model, windows)
    optimizer.update(model, gradients)
    return nnx.state((model, optimizer)), loss


def evaluate(graph: Graph, state: State, batches: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats over uint8 (batches, batch, context + 1)."""
    model, _ = nnx.merge(graph, state)
    return jax.lax.map(lambda windows: loss_of(model, windows), batches).mean()
