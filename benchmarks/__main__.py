"""The command line: `python -m benchmarks`, run from the root of the repository.

Without a command it measures. `show`, `figures`, `readme` and `advice`, each with the file of an earlier run, print its
tables, draw its pictures, write README's section on speed, and write what `jax_blocksparse.advise` knows of the device.
"""

import os

# A peer that allocates for itself needs room on the GPU beside JAX.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from benchmarks import figures, readme, report, shipping, tables
from benchmarks.cases import DTYPES, PATTERNS, PRESETS, PRODUCTS, Case, Group, Selection, Shape, Workload
from benchmarks.contenders import CONTENDERS, DENSE
from benchmarks.environment import copy_bandwidth, describe, gpu_state, l2_bytes
from benchmarks.loop import LEAST_CALLS
from benchmarks.runner import Method, Runner
from jax_blocksparse import BLOCK_SIZES


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the tables and writes the JSON.

    Args:
      arguments: the command line without the program's name; `sys.argv` by default.

    Returns:
      The exit status: 0 if everything was measured, 1 if a result was wrong or a contender failed.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and arguments[0] in _COMMANDS:
        parser = argparse.ArgumentParser(prog=f"python -m benchmarks {arguments[0]}")
        parser.add_argument("file", type=pathlib.Path, help="the JSON file of an earlier run")
        if arguments[0] == "readme":
            parser.add_argument("layer", type=pathlib.Path, nargs="?", help="that of an earlier run of benchmarks.mlp")
        files = vars(parser.parse_args(arguments[1:])).values()
        _COMMANDS[arguments[0]](*(file for file in files if file is not None))
        return 0
    options = _parser().parse_args(arguments)
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    preset = options.preset or ("cpu" if on_cpu else "standard")
    given = {name: getattr(options, name) for name in _FIELDS if getattr(options, name) is not None}
    selections = [dataclasses.replace(selection, **given) for selection in PRESETS[preset]]
    method = Method(
        timer=options.timer or ("call" if on_cpu else "loop"),
        repetitions=options.repeats,
        seconds=options.seconds,
        l2_bytes=l2_bytes(device),
        platform=device.platform,
    )
    results = {
        "complete": False,
        "preset": preset,
        "environment": describe(device, options.revision),
        "settings": dataclasses.asdict(method),
        "missing": {},
        "left_out": [],
        "results": [],
    }
    path = options.output or report.default_path(results["environment"])
    _measure(_groups(selections, results), Runner(method), device, options.budget, results, path)
    print(tables.markdown(results))
    print(f"results are in {path}", file=sys.stderr)
    return 0 if all(record["status"] == "ok" for record in results["results"]) else 1


def _groups(selections: Sequence[Selection], results: dict[str, Any]) -> list[Group]:
    """All groups, each once, with the cases that can be measured here; what cannot be is noted in the results."""
    wanted = {name for selection in selections for name in selection.contenders}
    results["missing"] = {
        name: reason for name in CONTENDERS if name in wanted and (reason := CONTENDERS[name].missing())
    }
    for name, reason in results["missing"].items():
        print(f"without {name}: {reason}", file=sys.stderr)
    found: dict[tuple[Workload, str], dict[Case, None]] = {}
    for group in (group for selection in selections for group in selection.groups()):
        cases = found.setdefault((group.workload, group.cache), {})
        for case in group.cases:
            if case.contender not in results["missing"] and CONTENDERS[case.contender].offers(
                group.workload, case.sparsity
            ):
                cases[case] = None
    groups = []
    for (workload, cache), cases in found.items():
        most = _cases_at_a_time(workload)
        parts = (tuple(cases)[start : start + most] for start in range(0, len(cases), most))
        groups += [Group(workload, cache, part) for part in parts]
    return groups


def _cases_at_a_time(workload: Workload) -> int:
    """As many as surely have room on the device."""
    m, k, n = workload.shape
    output = {"y": m * n, "dx": m * k, "dw": k * n}[workload.product]
    per_case = (LEAST_CALLS * output + 2 * k * n) * DTYPES[workload.dtype].dtype.itemsize
    return max(1, _ROOM // per_case)


def _measure(
    groups: Sequence[Group],
    runner: Runner,
    device: jax.Device,
    budget: float,
    results: dict[str, Any],
    path: pathlib.Path,
) -> None:
    """Goes through the groups until the budget is spent, and writes the file after each."""
    start = time.perf_counter()
    if device.platform == "gpu":
        results["environment"]["copy_bytes_per_s"] = copy_bandwidth()
    for number, group in enumerate(groups, start=1):
        before = time.perf_counter()
        if number > 1 and before - start > budget:
            results["left_out"] = [str(each) for each in groups[number - 1 :]]
            print(f"the budget is spent: {len(results['left_out'])} groups are left out", file=sys.stderr)
            break
        results["results"] += [{"group": number, **record} for record in runner.measure(group)]
        results["environment"]["gpu"] = gpu_state(device)  # while it is still hot
        report.save(path, results)
        print(f"[{number}/{len(groups)}] {group}: {time.perf_counter() - before:.1f} s", file=sys.stderr)
    results["complete"] = not results["left_out"]
    report.save(path, results)


def _draw(path: pathlib.Path) -> None:
    for file in figures.draw(report.load(path), path.with_suffix("")):
        print(file)


_COMMANDS: dict[str, Callable[..., None]] = {
    "show": lambda path: print(tables.markdown(report.load(path))),
    "figures": _draw,
    "readme": readme.write,
    "advice": lambda path: shipping.write(report.load(path)),
}

_ROOM = 30 * 10**9
"""Bytes for the inputs and outputs of what is timed in turns."""

_FIELDS = tuple(field.name for field in dataclasses.fields(Selection))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures y = x W, dx = dy W^T and dW = x^T dy with a block-sparse W beside the dense product.",
        epilog="`python -m benchmarks show|figures|readme|advice FILE` makes tables, pictures, README's section on "
        "speed and the measurements that the package ships, from the file of an earlier run.",
    )
    contenders = [name for name in CONTENDERS if name != DENSE]
    parser.add_argument("--preset", choices=PRESETS, help="what to measure (default: standard; on a CPU, cpu)")
    parser.add_argument(
        "--shapes", type=_list(Shape.parse), metavar="MxKxN,...", help="instead of the preset's, as all below"
    )
    parser.add_argument("--blocks", type=_list(_one_of(BLOCK_SIZES, int)), metavar="B,...")
    parser.add_argument("--densities", type=_list(_density), metavar="D,...")
    parser.add_argument("--dtypes", type=_list(_one_of(DTYPES)), metavar=",".join(DTYPES))
    parser.add_argument("--products", type=_list(_one_of(PRODUCTS)), metavar=",".join(PRODUCTS))
    parser.add_argument("--patterns", type=_list(_one_of(PATTERNS)), metavar=",".join(PATTERNS))
    parser.add_argument("--contenders", type=_list(_one_of(contenders)), metavar=",".join(contenders))
    parser.add_argument("--cache", choices=("cold", "warm"), help="whether inputs may lie in a GPU's L2")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="repetitions of each case (default 20)")
    parser.add_argument(
        "--seconds", type=float, default=2.5, metavar="S", help="for each case; slow ones are repeated less"
    )
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="S", help="for all; what would start later is left out"
    )
    parser.add_argument("--timer", choices=("call", "loop"), help="time calls (CPU), or loops on the device (others)")
    parser.add_argument("--revision", metavar="COMMIT", help="to record instead of what git says")
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE", help="where the JSON goes")
    return parser


def _list(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Makes a parser of comma-separated values, whose complaints argparse passes on."""

    def parse_list(text: str) -> tuple[Any, ...]:
        try:
            return tuple(parse(part.strip()) for part in text.split(","))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse_list


def _one_of(allowed: Sequence[Any] | dict[str, Any], convert: Callable[[str], Any] = str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        for value in allowed:
            if text == str(value):
                return convert(text)
        raise ValueError(f"choose from {', '.join(map(str, allowed))}; got {text!r}")

    return parse


def _density(text: str) -> float:
    density = float(text)
    if not 0 < density <= 1:
        raise ValueError(f"a density is in (0, 1], got {text!r}")
    return density


if __name__ == "__main__":
    sys.exit(main())
