"""Many calls of a library outside JAX in one CUDA graph, so that no launch from Python is timed."""

import math
import time
from typing import Any

import jax

from benchmarks.loop import RUN_SECONDS, choose_calls
from benchmarks.tasks import Call, LibraryTask
from benchmarks.timing import DEVICE, byte_count


class GraphProgram:
    """A CUDA graph of several calls, each on inputs of its own or all on the same, replayed one time after the other.

    The twin of `LoopProgram`: as many calls and input sets, in the same order.
    """

    def __init__(self, task: LibraryTask, *, cold_bytes: int) -> None:
        """Makes the calls and captures them.

        Args:
          task: what to call.
          cold_bytes: as many bytes of other input sets lie between two uses of one, so that it is not in the L2 cache
            when its turn comes; 0 for a single set.
        """
        import torch

        first = task.operands(0)
        seconds = _seconds_of_call(task.prepare(first))
        self.input_copies, calls = choose_calls(byte_count(first), cold_bytes, seconds)
        operands = [first, *(task.operands(i) for i in range(1, self.input_copies))]
        self.working_set = byte_count(operands)
        sets = [task.prepare(each) for each in operands]
        self._last_operands = operands[-1]
        self._sets: list[Call] = sets * (calls // self.input_copies)
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


def _seconds_of_call(call: Call) -> float:
    """A rough upper bound of a call's time, after what a library does at its first, such as compiling."""
    import torch

    call.launch()
    torch.cuda.synchronize()
    with DEVICE:
        start = time.perf_counter()
        call.launch()
        torch.cuda.synchronize()
        return time.perf_counter() - start
