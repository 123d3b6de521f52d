"""Many calls of a library outside JAX in one CUDA graph, so that no launch from Python is timed."""

import math
from typing import Any

import jax

from benchmarks.loop import LEAST_CALLS, MOST_CALLS, RUN_SECONDS
from benchmarks.tasks import Call, LibraryTask
from benchmarks.timing import byte_count


class GraphProgram:
    """A CUDA graph of several calls, each on inputs of its own or all on the same, replayed one time after the other.

    The twin of `LoopProgram`: as many calls and input sets, in the same order.
    """

    def __init__(self, task: LibraryTask, *, cold_bytes: int) -> None:
        """Makes the calls and captures them.

        Args:
          task: what to call.
          cold_bytes: the input sets together must be at least this large, so that none is in the L2 cache when its
            turn comes; 0 for a single set.
        """
        import torch

        first = task.operands(0)
        calls = min(MOST_CALLS, max(LEAST_CALLS, math.ceil(cold_bytes / byte_count(first))))
        self.input_copies = calls if cold_bytes else 1
        self.working_set = self.input_copies * byte_count(first)
        self._calls_per_replay = calls
        self._replays = 1
        sets = [task.prepare(task.operands(i)) for i in range(self.input_copies)]
        self._sets: list[Call] = [sets[i % self.input_copies] for i in range(calls)]
        self._last_operands = task.operands(self.input_copies - 1)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in self._sets[:2]:  # what a library does at its first call, such as compiling, cannot be captured
                call.launch()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for call in self._sets:
                call.launch()

    @property
    def calls(self) -> int:
        """How often one run computes the product."""
        return self._calls_per_replay * self._replays

    def calibrate(self) -> None:
        """Finds how many replays make a run long enough; to be called when nothing else is running."""
        self._replays = 1
        self.run()
        self._replays = max(1, math.ceil(RUN_SECONDS / min(self.run() for _ in range(2))))

    def run(self) -> float:
        """Replays the graph and returns the seconds that took on the device."""
        self._start.record()
        for _ in range(self._replays):
            self._graph.replay()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3

    def result(self) -> tuple[tuple[Any, ...], jax.Array]:
        """Returns the last set of inputs and its output, from the last replay."""
        return self._last_operands, self._sets[-1].output()
