"""How programs are run and timed: in turns, after a warm-up, many times each."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from benchmarks.tasks import JaxTask

LEAST_REPETITIONS = 5


class Program(Protocol):
    """A product ready to run, with its inputs.

    Attributes:
      calls: how often one run computes the product.
      input_copies: how many sets of inputs it goes through.
      working_set: bytes of those inputs.
    """

    calls: int
    input_copies: int
    working_set: int

    def fit(self) -> bool:
        """Chooses its length; to be called when nothing else is running. Says whether it must be built for that."""
        ...

    def build(self) -> None:
        """Compiles, which others may do meanwhile."""
        ...

    def calibrate(self) -> None:
        """Makes a run long enough to be timed; to be called when nothing else is running."""
        ...

    def run(self) -> float:
        """Computes, waits for the results and returns the seconds that took."""
        ...

    def result(self) -> tuple[tuple[Any, ...], jax.Array]:
        """Returns one set of inputs and what the last run computed from it."""
        ...


class CallProgram:
    """One call of the jitted function: for the CPU, where the time of a call is far above that of its dispatch."""

    calls = 1
    input_copies = 1

    def __init__(self, task: JaxTask) -> None:
        """Compiles the function for the task's first set of inputs."""
        self._operands = task.operands(0)
        self._compiled = jax.jit(task.function).lower(*self._operands).compile()
        self._output: jax.Array | None = None
        self.working_set = byte_count(self._operands)

    def fit(self) -> bool:
        """Says no: a run is one call."""
        return False

    def build(self) -> None:
        """Does nothing."""

    def calibrate(self) -> None:
        """Does nothing."""

    def run(self) -> float:
        """Calls the function, waits for its output and returns the seconds that took."""
        start = time.perf_counter()
        self._output = jax.block_until_ready(self._compiled(*self._operands))
        return time.perf_counter() - start

    def result(self) -> tuple[tuple[Any, ...], jax.Array]:
        """Returns the inputs and the last output."""
        return self._operands, self._output


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds a call: the median and the spread over the repetitions."""

    median: float
    p10: float
    p90: float
    repetitions: int

    @classmethod
    def of(cls, seconds: Sequence[float], calls: int) -> "Times":
        """Sums up the seconds that runs of `calls` calls took."""
        p10, median, p90 = (float(value) / calls for value in np.percentile(seconds, [10, 50, 90]))
        return cls(median, p10, p90, len(seconds))


def byte_count(tree: Any) -> int:
    """Returns the size of all arrays in a pytree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def measure(programs: Sequence[Program], *, repetitions: int, seconds: float) -> list[Times]:
    """Times programs in turns, so that a drift of the machine meets all of them alike.

    Args:
      programs: what to time.
      repetitions: how often to run each, if the time allows.
      seconds: for each program; one too slow for it is run less often, but `LEAST_REPETITIONS` times at least (or
        `repetitions` times, if that is fewer).
    """
    wanted = []
    for program in programs:
        affordable = int(seconds / program.run())  # it has been run before, if only to be checked
        wanted.append(min(repetitions, max(LEAST_REPETITIONS, affordable)))
    taken: list[list[float]] = [[] for _ in programs]
    order = np.random.default_rng(0)
    rounds = max(wanted)
    for turn in range(rounds):
        # What ran before leaves its traces in the caches: let it be another one each time.
        for i in order.permutation(len(programs)):
            # Programs with fewer repetitions sit out some turns, evenly spread.
            if (turn + 1) * wanted[i] // rounds > turn * wanted[i] // rounds:
                taken[i].append(programs[i].run())
    return [Times.of(each, program.calls) for each, program in zip(taken, programs, strict=True)]
