"""Measures groups of cases: prepares, checks, times, and turns the times into records."""

import dataclasses
import math
import traceback
from typing import Any

from benchmarks.cases import Selection, Sparsity, Workload
from benchmarks.checking import tolerance
from benchmarks.contenders import CONTENDERS, DENSE, Task
from benchmarks.loop import LoopProgram
from benchmarks.timing import CallProgram, Program, Times, measure


@dataclasses.dataclass(frozen=True)
class Method:
    """How to time.

    Attributes:
      timer: "call" (one call on the host's clock) or "loop" (many calls in one program on the device).
      cache: "cold" (inputs are not in the L2 cache when their turn comes) or "warm"; only the loop can be cold.
      repetitions: how often to run each program.
      budget: seconds for each program.
    """

    timer: str
    cache: str
    repetitions: int
    budget: float


@dataclasses.dataclass
class _Entry:
    record: dict[str, Any]
    program: Program | None = None


def measure_group(
    workload: Workload, sparsities: list[Sparsity], selection: Selection, method: Method, environment: dict[str, Any]
) -> list[dict[str, Any]]:
    """Times dense and our implementations on one product, in turns.

    Returns:
      A record for each contender and sparsity, dense first. Its "status" is "ok", "wrong" (the result failed the check)
      or "error" (it raised), with the reason in "message" and null for all times.
    """
    entries = [_prepare(DENSE, workload, None, method, environment)]
    entries += [
        _prepare(name, workload, sparsity, method, environment)
        for sparsity in sparsities
        for name in selection.implementations
    ]
    ready = [entry for entry in entries if entry.program is not None]
    if ready:
        programs = [entry.program for entry in ready]
        times = measure(programs, repetitions=method.repetitions, budget=method.budget)
        for entry, each in zip(ready, times, strict=True):
            entry.record |= _figures(entry.record["flops"], each)
    records = [entry.record for entry in entries]
    for record in records:
        record |= _against(record, records[0])
    return records


def _prepare(
    name: str, workload: Workload, sparsity: Sparsity | None, method: Method, environment: dict[str, Any]
) -> _Entry:
    record = {
        "contender": name,
        "product": workload.product,
        **workload.shape._asdict(),
        "dtype": workload.dtype,
        "pattern": sparsity and sparsity.pattern,
        "block_size": sparsity and sparsity.block_size,
        "density": sparsity.density if sparsity else 1.0,
        "status": "ok",
        "message": None,
        **dict.fromkeys(("actual_density", "flops", "error", "tolerance")),
        **dict.fromkeys(("calls_per_repetition", "input_copies", "working_set_bytes", "cache")),
        **dict.fromkeys(("median_s", "p10_s", "p90_s", "repetitions", "flops_per_s")),
    }
    try:
        task = CONTENDERS[name](workload, sparsity)
        record |= {"actual_density": task.density, "flops": task.flops}
        program = _program(task, method, environment["l2_bytes"])
        program.run()
        error = task.error(*program.result())
    except Exception as problem:  # One contender that fails is a result; the others are still measured.
        traceback.print_exception(problem, chain=False)
        return _Entry(record | {"status": "error", "message": f"{type(problem).__name__}: {problem}"})
    limit = tolerance(workload.dtype, environment["platform"])
    # JSON knows no infinity.
    record |= {"error": error if math.isfinite(error) else None, "tolerance": limit}
    if not error <= limit:
        message = f"the relative error is {error:.2e}, {limit:.0e} is allowed"
        return _Entry(record | {"status": "wrong", "message": message})
    record |= {
        "calls_per_repetition": program.calls,
        "input_copies": program.input_copies,
        "working_set_bytes": program.working_set,
        "cache": _cache(program, environment["l2_bytes"]),
    }
    return _Entry(record, program)


def _program(task: Task, method: Method, l2_bytes: int | None) -> Program:
    if method.timer == "call":
        return CallProgram(task)
    if method.cache == "cold" and l2_bytes is None:
        raise ValueError("the size of the L2 cache is not known here; measure with --cache warm")
    return LoopProgram(task, cold_bytes=2 * l2_bytes if method.cache == "cold" else 0)


def _cache(program: Program, l2_bytes: int | None) -> str | None:
    """Says what the L2 cache was, by the size of what went through it."""
    if l2_bytes is None:
        return None
    return "cold" if program.working_set >= 2 * l2_bytes else "warm"


def _figures(flops: int, times: Times) -> dict[str, Any]:
    return {
        "median_s": times.median,
        "p10_s": times.p10,
        "p90_s": times.p90,
        "repetitions": times.repetitions,
        "flops_per_s": flops / times.median,
    }


def _against(record: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    if record["median_s"] is None or dense["median_s"] is None:
        return {"speedup_over_dense": None, "fraction_of_dense_flops": None}
    return {
        "speedup_over_dense": dense["median_s"] / record["median_s"],
        "fraction_of_dense_flops": record["flops_per_s"] / dense["flops_per_s"],
    }
