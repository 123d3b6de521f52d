"""Many calls in one compiled program: for accelerators, where Python and the launch must not be timed.

The program is a loop, and an iteration makes several calls, each on inputs of its own or all on the same. Two things
would make its time a lie, and both are looked for: XLA could merge calls or hoist them out of the loop, so the work in
the body is counted in the compiled HLO; and the time must grow in proportion to the number of iterations.
"""

import functools
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.tasks import JaxTask
from benchmarks.timing import byte_count

# Eight calls in an iteration: enough for XLA to launch it as one CUDA graph; more if that is short, to hide how the
# graph is launched, or to fill the L2 cache. Inputs so small as to need yet more stay in it.
LEAST_CALLS, MOST_CALLS, ITERATION_SECONDS = 8, 64, 0.0004
# The inner loop, whose length is compiled in, takes about so long; the outer one, which waits for the host to look at
# its condition, makes of it a run of about so long.
INNER_SECONDS, RUN_SECONDS = 0.003, 0.006
LEAST_TRIPS = 2  # XLA knows a loop of one trip for none
_ATTEMPTS = 3  # to be alone on the machine


class NotTimedError(RuntimeError):
    """The compiled program does not do all the work its time would be divided by."""


class LoopProgram:
    """A loop over calls of the function, on the device.

    The inputs of each call are arguments of their own, also where they are the same arrays (on equal ones XLA merges
    the calls), and every iteration gets them through an optimization barrier (else XLA hoists the calls out of it).
    Outputs are donated and handed back, so that the loop works in place and nothing is copied or cleared.
    """

    def __init__(self, task: JaxTask, *, cold_bytes: int) -> None:
        """Compiles a single call.

        Args:
          task: what to call.
          cold_bytes: as many bytes of other input sets lie between two uses of one, so that it is not in the L2 cache
            when its turn comes; 0 for a single set.
        """
        self._task = task
        self._cold_bytes = cold_bytes
        self._first = task.operands(0)
        self._single = jax.jit(task.function).lower(*self._first).compile()
        self._compiled: Any = None
        self._overhead = 0.0
        self._rounds = 1

    def fit(self) -> bool:
        """Chooses the length of the loop by the time of a call, first of one that Python makes."""
        if self._compiled is None:
            seconds = _seconds_of_call(self._single, self._first)
        else:
            taken = self._time_round()
            if taken > INNER_SECONDS / 2:
                return False
            seconds = taken / self.calls
        self.input_copies, self._calls = choose_calls(byte_count(self._first), self._cold_bytes, seconds)
        self._trips = max(LEAST_TRIPS, round(INNER_SECONDS / self._calls / seconds))
        return True

    def build(self) -> None:
        """Compiles the loop.

        Raises:
          NotTimedError: if the calls were merged or hoisted.
        """
        function, trips = self._task.function, self._trips
        operands = [self._first, *(self._task.operands(i) for i in range(1, self.input_copies))]
        self.working_set = byte_count(operands)
        self._operands = operands * (self._calls // self.input_copies)
        shape = jax.eval_shape(function, *self._first)
        self._outputs = [jnp.full(shape.shape, jnp.nan, shape.dtype) for _ in self._operands]

        def iteration(_: jax.Array, state: tuple[list[Any], list[jax.Array]]) -> tuple[list[Any], list[jax.Array]]:
            operands = jax.lax.optimization_barrier(state[0])
            return operands, [function(*arguments) for arguments in operands]

        @functools.partial(jax.jit, donate_argnums=2)
        def program(rounds: jax.Array, operands: list[Any], outputs: list[jax.Array]) -> list[jax.Array]:
            def inner_loop(_: jax.Array, state: Any) -> Any:
                return jax.lax.fori_loop(0, trips, iteration, state)

            return jax.lax.fori_loop(0, rounds, inner_loop, (operands, outputs))[1]

        self._compiled = program.lower(jnp.int32(1), self._operands, self._outputs).compile()
        wanted = self._calls * max(1, work_in_program(self._single.as_text()))
        found = work_in_inner_loops(self._compiled.as_text())
        if found < wanted:
            raise NotTimedError(f"XLA merged or hoisted calls: {found} operations in the loop, {wanted} wanted")

    @property
    def calls(self) -> int:
        """How often one run computes the product."""
        return self._calls * self._trips * self._rounds

    def calibrate(self) -> None:
        """Finds how many rounds make a run long enough; to be called when nothing else is running.

        Raises:
          NotTimedError: if the time does not grow in proportion to them.
        """
        for _ in range(_ATTEMPTS):
            short = self._time_round()
            wanted = max(1, math.ceil(RUN_SECONDS / short))
            self._rounds = max(2, wanted)
            long = min(self.run() for _ in range(2))
            # The part of the time that grows with the rounds; the rest may be other work, of others too.
            explained = (long - short) / (self._rounds - 1) * self._rounds / long
            if 0.7 < explained < 1.4:
                self._rounds = wanted
                return
        raise NotTimedError(
            f"time is not in proportion to calls: 1 round takes {short:.3e} s, {self._rounds} {long:.3e} s, "
            f"without the {self._overhead:.3e} s of none"
        )

    def _time_round(self) -> float:
        """Times a round, and before it what the host takes to start the program and to hear of its end, at the least.

        If that is found too long, a round seems to take nothing; no length of a loop is to follow from it.
        """
        self._rounds, self._overhead = 0, 0.0
        self._overhead = min(self.run() for _ in range(5))
        self._rounds = 1
        self.run()
        return max(min(self.run() for _ in range(2)), INNER_SECONDS / 100)

    def run(self) -> float:
        """Runs the loop to its end and returns the seconds that its rounds took."""
        rounds = jnp.int32(self._rounds)
        start = time.perf_counter()
        self._outputs = jax.block_until_ready(self._compiled(rounds, self._operands, self._outputs))
        return time.perf_counter() - start - self._overhead

    def result(self) -> tuple[tuple[Any, ...], jax.Array]:
        """Returns the last set of inputs and its output, from the last iteration."""
        return self._operands[-1], self._outputs[-1]


def choose_calls(set_bytes: int, cold_bytes: int, seconds: float) -> tuple[int, int]:
    """Chooses how many sets of inputs to go through, and how many calls to make in an iteration.

    Args:
      set_bytes: of one set.
      cold_bytes: as much lies between two uses of a set, if the sets need not be too many for that; 0 for a single set.
      seconds: that a call takes. The slow need no company.
    """
    copies = min(MOST_CALLS, math.ceil(cold_bytes / set_bytes) + 1) if cold_bytes else 1
    wanted = min(max(LEAST_CALLS, ITERATION_SECONDS / seconds), MOST_CALLS, RUN_SECONDS / LEAST_TRIPS / seconds)
    return copies, copies * math.ceil(wanted / copies)


def _seconds_of_call(compiled: Any, operands: tuple[Any, ...]) -> float:
    """A rough upper bound of a call's time: queued several times, if that is short."""
    taken = math.inf
    for calls in (1, 1, 10):
        if taken < INNER_SECONDS or calls == 1:
            start = time.perf_counter()
            jax.block_until_ready([compiled(*operands) for _ in range(calls)])
            taken = min(taken, (time.perf_counter() - start) / calls)
    return taken


_WORK = re.compile(r"\b(?:custom-call|dot|convolution|reduce|scatter)\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*?\n}", re.MULTILINE | re.DOTALL)
_REFERENCE = re.compile(r"[={ ]%?([\w.-]+)")
_BODY = re.compile(r"\bwhile\(.*\bbody=%?([\w.-]+)")


def work_in_program(hlo: str) -> int:
    """Counts the operations of a compiled program that can stand for a product."""
    return len(_WORK.findall(hlo))


def work_in_inner_loops(hlo: str) -> int:
    """Counts those in the loops within the program's loops, and in what these call."""
    computations = {match[2]: match[0] for match in _COMPUTATION.finditer(hlo)}
    entry = next(match[0] for match in _COMPUTATION.finditer(hlo) if match[1])
    reached: set[str] = set()
    pending = [inner for outer in _BODY.findall(entry) for inner in _BODY.findall(computations[outer])]
    while pending:
        name = pending.pop()
        if name not in reached:
            reached.add(name)
            pending += [other for other in _REFERENCE.findall(computations[name]) if other in computations]
    return sum(work_in_program(computations[name]) for name in reached)
