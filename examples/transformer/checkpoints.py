"""Checkpoints: the state of model and optimizer, and the history that led there, saved and restored together."""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from transformer.training import State

History = dict[str, list[Any]]


class Checkpoints:
    """The checkpoints of one run; the newest is kept. Use as a context manager.

    Saving waits until the files are complete, since the training step overwrites the state's buffers.
    """

    def __init__(self, folder: Path) -> None:
        """Open the checkpoints below `folder`, which is made if it is missing."""
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Finish what is being written."""
        self._manager.close()

    def save(self, steps: int, state: State, history: History) -> None:
        """Save what holds after `steps` steps, unless it has been saved already."""
        if steps != self._manager.latest_step():
            items = ocp.args.Composite(state=ocp.args.StandardSave(state), history=ocp.args.JsonSave(history))
            self._manager.save(steps, args=items)

    def restore(self, like: State) -> tuple[State, History] | None:
        """Return (state, history) of the newest checkpoint, or None if there is none.

        Args:
          like: a state of the same structure, shapes and dtypes.
        """
        steps = self._manager.latest_step()
        if steps is None:
            return None
        items = ocp.args.Composite(state=ocp.args.StandardRestore(like), history=ocp.args.JsonRestore())
        restored = self._manager.restore(steps, args=items)
        return restored["state"], restored["history"]
