"""The training loop: a live bar, evaluations and checkpoints at their steps."""

import dataclasses
import math
import time
from collections.abc import Callable

import jax
import numpy as np
from tqdm import tqdm

from transformer.checkpoints import Checkpoints, History
from transformer.data import training_batch
from transformer.settings import Settings
from transformer.training import State

_SPEED_OVER_STEPS = 20


def new_history() -> History:
    """A run that has not begun: what its lists will hold is said in `Loop.history`."""
    return {"loss": [], "step_seconds": [], "held_out": []}


@dataclasses.dataclass
class Loop:
    """A run under way.

    Attributes:
      settings: of the run.
      text: to learn from.
      held_out: uint8 (batches, batch, context + 1), windows to be judged on.
      train_step: compiled, (state, uint8 (batch, context + 1)) -> (state, loss in nats); may reuse the state's buffers.
      evaluate: compiled, (state, held_out) -> loss in nats.
      checkpoints: of the run.
      history: `loss` in bits per byte and `step_seconds` of each step so far, `held_out` as pairs of steps done and
        bits per byte.
    """

    settings: Settings
    text: bytes
    held_out: np.ndarray
    train_step: Callable[[State, np.ndarray], tuple[State, jax.Array]]
    evaluate: Callable[[State, np.ndarray], jax.Array]
    checkpoints: Checkpoints
    history: History

    def run(self, state: State) -> State:
        """Train from where the history ends to the last step, and return the state reached."""
        settings = self.settings
        done = len(self.history["loss"])
        with tqdm(total=settings.steps, initial=done, unit="step", dynamic_ncols=True, disable=None) as bar:
            for stop in self._stops(done):
                state = self._train_until(stop, state, bar)
                if stop % settings.eval_interval == 0 or stop == settings.steps:
                    bits = float(self.evaluate(state, self.held_out)) / math.log(2)
                    self.history["held_out"].append([stop, bits])
                    tqdm.write(f"step {stop:6d}: held-out {bits:.4f} bits/byte, training {self._recent_loss():.4f}")
                if stop % settings.checkpoint_interval == 0 or stop == settings.steps:
                    self.checkpoints.save(stop, state, self.history)
        return state

    def _stops(self, done: int) -> list[int]:
        """The steps after `done` at which there is something to do besides training."""
        steps = self.settings.steps
        every = (self.settings.eval_interval, self.settings.checkpoint_interval)
        return sorted({stop for n in every for stop in range(n, steps + 1, n) if stop > done} | ({steps} - {done}))

    def _recent_loss(self) -> float:
        return float(np.mean(self.history["loss"][-_SPEED_OVER_STEPS:]))

    def _train_until(self, stop: int, state: State, bar: tqdm) -> State:
        """Train up to step `stop`, reading each loss one step late so that the device always has work to do."""
        settings, history = self.settings, self.history
        clock = [time.perf_counter()]

        def record(loss: jax.Array) -> None:
            history["loss"].append(float(loss) / math.log(2))
            clock.append(time.perf_counter())
            history["step_seconds"].append(clock[-1] - clock[-2])
            recent = clock[-_SPEED_OVER_STEPS - 1 :]
            speed = settings.batch_size * settings.context * (len(recent) - 1) / (recent[-1] - recent[0])
            bar.set_postfix_str(f"{history['loss'][-1]:.3f} bits/byte, {speed:,.0f} bytes/s", refresh=False)
            bar.update()

        late = None
        for step in range(len(history["loss"]), stop):
            state, loss = self.train_step(state, training_batch(self.text, step, settings))
            if late is not None:
                record(late)
            late = loss
        record(late)
        return state
