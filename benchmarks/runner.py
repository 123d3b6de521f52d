"""Measures groups of cases: prepares, checks, times, and turns the times into records."""

import concurrent.futures
import dataclasses
import math
import os
import traceback
from collections.abc import Callable
from operator import methodcaller
from typing import Any, TypeVar

from benchmarks.cases import Case, Group, Workload
from benchmarks.checking import tolerance
from benchmarks.contenders import CONTENDERS, DENSE
from benchmarks.inputs import Inputs
from benchmarks.loop import LoopProgram
from benchmarks.tasks import LibraryTask, Task
from benchmarks.timing import CallProgram, Program, Times, measure

_FITTINGS = 2  # the first goes by the time of calls from Python, too long for the shortest
_CHECKS_AT_A_TIME = 8  # each takes memory for matrices in float64

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Method:
    """How to time.

    Attributes:
      timer: "call" (one call on the host's clock) or "loop" (many calls in one program on the device).
      repetitions: how often to run each program.
      seconds: for each program; slow ones are run less often.
      l2_bytes: the size of the L2 cache; None where it is not known, and so no measurement is "cold".
      platform: what JAX calls the device's kind.
    """

    timer: str
    repetitions: int
    seconds: float
    l2_bytes: int | None
    platform: str


@dataclasses.dataclass
class _Entry:
    """A case on its way: `program` is None once it has failed."""

    record: dict[str, Any]
    task: Task | None = None
    program: Program | None = None

    def attempt(self, action: Callable[[Program], T]) -> T | None:
        """Does this with the program if it has not failed before; if it fails now, the record says so."""
        if self.program is None:
            return None
        try:
            return action(self.program)
        except Exception as problem:
            self.program = None
            self.record |= _failure(problem)
            return None


class Runner:
    """Measures groups, one after the other; inputs and dense are kept while the workload is the same."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._inputs: Inputs | None = None
        self._dense: _Entry | None = None
        self._dense_of: tuple[Workload, str] | None = None

    def measure(self, group: Group) -> list[dict[str, Any]]:
        """Times dense and the other contenders of a group in turns.

        Returns:
          A record for each contender and sparsity, dense first. Its "status" is "ok", "wrong" (the result failed the
          check) or "error" (it raised), with the reason in "message" and null for all times.
        """
        added = []
        if self._dense_of != (group.workload, group.cache):
            self._dense = self._inputs = None  # frees their memory before the next are made
            self._inputs = Inputs(group.workload)
            self._dense = self._entry(Case(DENSE, None), group)  # alone: XLA times the kernels it chooses from
            self._dense_of = (group.workload, group.cache)
            added = [self._dense]
        entries = self._prepare(group, added)
        entries.insert(0, dataclasses.replace(self._dense, record=dict(self._dense.record)))
        for entry in entries:
            self._calibrate(entry)
        ready = [entry for entry in entries if entry.program is not None]
        if ready:
            programs = [entry.program for entry in ready]
            times = measure(programs, repetitions=self._method.repetitions, seconds=self._method.seconds)
            for entry, each in zip(ready, times, strict=True):
                entry.record |= _figures(entry, each)
        for entry in entries:
            entry.record |= _against(entry.record, entries[0].record)
        return [entry.record for entry in entries]

    def _prepare(self, group: Group, added: list[_Entry]) -> list[_Entry]:
        """Makes, compiles and checks the programs of a group, and compiles and checks what is added to them.

        What is in JAX is compiled in parallel. Libraries with compilers and captures of their own come in turn, and
        never while JAX runs what it may capture. Whatever is timed is timed with nothing else running.
        """
        threads = 1 if self._method.platform == "cpu" else len(os.sched_getaffinity(0))
        alone = {case for case in group.cases if CONTENDERS[case.contender].needs}
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            futures = {case: pool.submit(self._entry, case, group) for case in group.cases if case not in alone}
            others = {case: self._entry(case, group) for case in group.cases if case in alone}
            in_jax = [*added, *(future.result() for future in futures.values())]
            for _ in range(_FITTINGS):
                unfit = [entry for entry in in_jax if entry.attempt(methodcaller("fit"))]
                list(pool.map(methodcaller("attempt", methodcaller("build")), unfit))
        with concurrent.futures.ThreadPoolExecutor(min(threads, _CHECKS_AT_A_TIME)) as pool:
            list(pool.map(lambda entry: self._check(entry, group.workload.dtype), in_jax))
        for entry in others.values():
            entry.attempt(methodcaller("fit"))
            entry.attempt(methodcaller("build"))
            self._check(entry, group.workload.dtype)
        return [others[case] if case in alone else futures[case].result() for case in group.cases]

    def _entry(self, case: Case, group: Group) -> _Entry:
        workload, sparsity = group.workload, case.sparsity
        record = {
            "contender": case.contender,
            "product": workload.product,
            **workload.shape._asdict(),
            "dtype": workload.dtype,
            "pattern": sparsity and sparsity.pattern,
            "block_size": sparsity and sparsity.block_size,
            "density": sparsity.density if sparsity else 1.0,
            "cache": None,
            "status": "ok",
            "message": None,
            **dict.fromkeys(("actual_density", "flops", "error", "tolerance")),
            **dict.fromkeys(("calls_per_repetition", "input_copies", "working_set_bytes")),
            **dict.fromkeys(("median_s", "p10_s", "p90_s", "repetitions", "flops_per_s")),
        }
        try:
            task = CONTENDERS[case.contender].task(self._inputs, sparsity)
            record |= {"actual_density": task.density, "flops": task.flops}
            return _Entry(record, task, self._program(task, group.cache))
        except Exception as problem:  # One contender that fails is a result; the others are still measured.
            return _Entry(record | _failure(problem))

    def _check(self, entry: _Entry, dtype: str) -> None:
        def error(program: Program) -> float:
            program.run()
            return entry.task.error(*program.result())

        found, limit = entry.attempt(error), tolerance(dtype)
        if found is None:
            return
        # JSON knows no infinity.
        entry.record |= {"error": found if math.isfinite(found) else None, "tolerance": limit}
        if not found <= limit:
            entry.record |= {"status": "wrong", "message": f"the relative error is {found:.2e}, {limit:.0e} is allowed"}
            entry.program = None

    def _program(self, task: Task, cache: str) -> Program:
        if self._method.timer == "call":
            return CallProgram(task)
        cold_bytes = 2 * self._method.l2_bytes if cache == "cold" and self._method.l2_bytes else 0
        if isinstance(task, LibraryTask):
            from benchmarks.graph import GraphProgram

            return GraphProgram(task, cold_bytes=cold_bytes)
        return LoopProgram(task, cold_bytes=cold_bytes)

    def _calibrate(self, entry: _Entry) -> None:
        entry.attempt(methodcaller("calibrate"))
        if entry.program is None:
            return
        l2_bytes = self._method.l2_bytes
        entry.record |= {
            "calls_per_repetition": entry.program.calls,
            "input_copies": entry.program.input_copies,
            "working_set_bytes": entry.program.working_set,
            "cache": l2_bytes and ("cold" if entry.program.working_set >= 2 * l2_bytes else "warm"),
        }


def _failure(problem: Exception) -> dict[str, Any]:
    traceback.print_exception(problem, limit=-3, chain=False)
    message = str(problem).strip().splitlines() or [""]
    return {"status": "error", "message": f"{type(problem).__name__}: {message[0]}"}


def _figures(entry: _Entry, times: Times) -> dict[str, Any]:
    return {
        "median_s": times.median,
        "p10_s": times.p10,
        "p90_s": times.p90,
        "repetitions": times.repetitions,
        "flops_per_s": entry.record["flops"] / times.median,
    }


def _against(record: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    if record["median_s"] is None or dense["median_s"] is None:
        return {"speedup_over_dense": None, "fraction_of_dense_flops": None}
    return {
        "speedup_over_dense": dense["median_s"] / record["median_s"],
        "fraction_of_dense_flops": record["flops_per_s"] / dense["flops_per_s"],
    }
