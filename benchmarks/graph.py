"""Many calls of a library outside JAX in one CUDA graph, so that no launch from Python is timed."""

import math
import time
from typing import Any

import jax

from benchmarks.loop import RUN_SECONDS, choose_calls
from benchmarks.tasks import Call, LibraryTask
from benchmarks.timing import byte_count


class GraphProgram:
    """A CUDA graph of several calls, each on inputs of its own or all on the same, replayed one time after the other.

    The twin of `LoopProgram`: as many calls and input sets, in the same order.
    """

    def __init__(self, task: LibraryTask, *, cold_bytes: int) -> None:
        """Makes a first call, for which some libraries compile.

        Args:
          task: what to call.
          cold_bytes: as many bytes of other input sets lie between two uses of one, so that it is not in the L2 cache
            when its turn comes; 0 for a single set.
        """
        import torch

        self._task = task
        self._cold_bytes = cold_bytes
        self._first = task.operands(0)
        self._call = task.prepare(self._first)
        self._call.launch()
        torch.cuda.synchronize()
        self._graph: Any = None

    def fit(self) -> bool:
        """Chooses the number of calls by the time of one."""
        import torch

        if self._graph is not None:
            return False
        start = time.perf_counter()
        self._call.launch()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        self.input_copies, self._calls = choose_calls(byte_count(self._first), self._cold_bytes, seconds)
        return True

    def build(self) -> None:
        """Captures the calls."""
        import torch

        operands = [self._first, *(self._task.operands(i) for i in range(1, self.input_copies))]
        self.working_set = byte_count(operands)
        sets = [self._call, *map(self._task.prepare, operands[1:])]
        self._last_operands = operands[-1]
        self._sets: list[Call] = sets * (self._calls // self.input_copies)
        self._replays = 1
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        for call in sets:  # what a library does at its first call cannot be captured
            call.launch()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.Stream()):
            # What JAX's threads do to the device meanwhile must not end the capture.
            self._graph.capture_begin(capture_error_mode="thread_local")
            for call in self._sets:
                call.launch()
            self._graph.capture_end()

    @property
    def calls(self) -> int:
        """How often one run computes the product."""
        return len(self._sets) * self._replays

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
