"""Many calls in one compiled program: for accelerators, where Python and the launch must not be timed.

The program is a loop, and an iteration makes one call on each of several input sets. Two things would make its time a
lie, and both are looked for: XLA could merge calls or hoist them out of the loop, so the work in the body is counted in
the compiled HLO; and the time must grow in proportion to the number of iterations.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.contenders import Task
from benchmarks.timing import byte_count, seconds

# Eight calls in an iteration: enough for XLA to launch it as one CUDA graph, and to hide the kernel that counts
# iterations. More only to fill the L2 cache; then inputs so small as to need yet more stay in it.
LEAST_CALLS, MOST_CALLS = 8, 64
SHORT_TRIPS = 2
RUN_SECONDS = 0.02


class NotTimedError(RuntimeError):
    """The compiled program does not do all the work its time would be divided by."""


class LoopProgram:
    """A loop over calls of the function, on the device.

    The calls of an iteration must have inputs of their own (on equal ones XLA merges them), and every iteration gets
    them through an optimization barrier (else XLA hoists the calls out of the loop). Inputs and outputs are donated and
    handed back, so that the loop works in place and nothing is copied or cleared.
    """

    def __init__(self, task: Task, *, cold_bytes: int) -> None:
        """Compiles the program, finds how many iterations make a run long enough, and checks it.

        Args:
          task: what to call.
          cold_bytes: the input sets together must be at least this large, so that none is in the L2 cache when its
            turn comes; 0 for as few as make a good loop.

        Raises:
          NotTimedError: if the calls were merged, hoisted or do not take time in proportion to their number.
        """
        first = task.operands(0)
        self.input_copies = min(MOST_CALLS, max(LEAST_CALLS, math.ceil(cold_bytes / byte_count(first))))
        # Donation wants every buffer to be there once, also where sets share an array.
        operands = [jax.tree.map(jnp.copy, task.operands(i)) for i in range(self.input_copies)]
        shape = jax.eval_shape(task.function, *first)
        outputs = [jnp.full(shape.shape, jnp.nan, shape.dtype) for _ in operands]
        self.working_set = byte_count(operands)
        self._state = (operands, outputs)

        single = jax.jit(task.function).lower(*first).compile().as_text()
        self._wanted_work = self.input_copies * max(1, work_in_program(single))

        trips = SHORT_TRIPS
        short = long = self._fastest(task, trips)
        while trips == SHORT_TRIPS or long < RUN_SECONDS / 2:
            trips = max(2 * trips, math.ceil(trips * RUN_SECONDS / long))
            long = self._fastest(task, trips)
        self.calls = self.input_copies * trips
        # The part of the time that grows with the iterations; the rest is starting the program and, maybe, other work.
        explained = (long - short) / (trips - SHORT_TRIPS) * trips / long
        if not 0.7 < explained < 1.4:
            raise NotTimedError(
                f"time is not in proportion to calls: {SHORT_TRIPS} iterations take {short:.3e} s, {trips} {long:.3e} s"
            )

    def run(self) -> None:
        """Runs the loop to its end."""
        self._state = jax.block_until_ready(self._compiled(*self._state))

    def result(self) -> tuple[tuple[Any, ...], jax.Array]:
        """Returns the last set of inputs and its output, from the last iteration."""
        operands, outputs = self._state
        return operands[-1], outputs[-1]

    def _fastest(self, task: Task, trips: int) -> float:
        """Compiles and checks the program with this many iterations; returns the time of its fastest run."""

        def iteration(_: jax.Array, state: tuple[list[Any], list[jax.Array]]) -> tuple[list[Any], list[jax.Array]]:
            operands = jax.lax.optimization_barrier(state[0])
            return operands, [task.function(*arguments) for arguments in operands]

        def program(operands: list[Any], outputs: list[jax.Array]) -> tuple[list[Any], list[jax.Array]]:
            return jax.lax.fori_loop(0, trips, iteration, (operands, outputs))

        self._compiled = jax.jit(program, donate_argnums=(0, 1)).lower(*self._state).compile()
        found = work_in_loops(self._compiled.as_text())
        if found < self._wanted_work:
            raise NotTimedError(
                f"XLA merged or hoisted calls: {found} operations in the loop, {self._wanted_work} wanted"
            )
        self.run()
        return min(seconds(self) for _ in range(5))


_WORK = re.compile(r"\b(?:custom-call|dot|convolution|reduce|scatter)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*?\n}", re.MULTILINE | re.DOTALL)
_REFERENCE = re.compile(r"[={ ]%?([\w.-]+)")
_BODY = re.compile(r"\bwhile\(.*\bbody=%?([\w.-]+)")


def work_in_program(hlo: str) -> int:
    """Counts the operations of a compiled program that can stand for a product."""
    return len(_WORK.findall(hlo))


def work_in_loops(hlo: str) -> int:
    """Counts those in the bodies of its loops and in what these call."""
    computations = {match[1]: match[0] for match in _COMPUTATION.finditer(hlo)}
    reached: set[str] = set()
    pending = _BODY.findall(hlo)
    while pending:
        name = pending.pop()
        if name not in reached:
            reached.add(name)
            pending += [other for other in _REFERENCE.findall(computations[name]) if other in computations]
    return sum(work_in_program(computations[name]) for name in reached)
