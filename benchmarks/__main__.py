"""The command line: `python -m benchmarks`, run from the root of the repository."""

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from benchmarks import report
from benchmarks.cases import DTYPES, PATTERNS, PRESETS, PRODUCTS, Selection, Shape
from benchmarks.contenders import CONTENDERS, DENSE
from benchmarks.environment import describe, gpu_state
from benchmarks.runner import Method, measure_group
from jax_blocksparse import BLOCK_SIZES


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the tables and writes the JSON.

    Args:
      arguments: the command line without the program's name; `sys.argv` by default.

    Returns:
      The exit status: 0 if everything was measured, 1 if a result was wrong or a contender failed.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.show:
        print(report.markdown(report.load(options.show)))
        return 0
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    selection = PRESETS[options.preset or ("cpu" if on_cpu else "gpu")]
    given = {name: getattr(options, name) for name in _FIELDS if getattr(options, name) is not None}
    selection = dataclasses.replace(selection, **given)
    timer = options.timer or ("call" if on_cpu else "loop")
    method = Method(
        timer=timer,
        cache=options.cache or ("warm" if on_cpu or timer == "call" else "cold"),
        repetitions=options.repeats,
        budget=options.budget,
    )
    if method.cache == "cold" and method.timer == "call":
        parser.error("--cache cold needs --timer loop")
    environment = describe(device, options.revision)
    path = options.output or report.default_path(environment)
    results = _measure(selection, method, device, environment, path)
    print(report.markdown(results))
    return 0 if all(record["status"] == "ok" for record in results["results"]) else 1


def _measure(
    selection: Selection, method: Method, device: jax.Device, environment: dict[str, Any], path: pathlib.Path
) -> dict[str, Any]:
    results: dict[str, Any] = {
        "complete": False,
        "environment": environment,
        "settings": {**dataclasses.asdict(selection), **dataclasses.asdict(method)},
        "results": [],
    }
    groups = list(selection.groups())
    for number, (workload, sparsities) in enumerate(groups, start=1):
        start = time.perf_counter()
        records = measure_group(workload, sparsities, selection, method, environment)
        results["results"] += [{"group": number, **record} for record in records]
        environment["gpu"] = gpu_state(device)  # while it is still hot
        results["complete"] = number == len(groups)
        report.save(path, results)
        what = (
            f"{workload.product} {workload.shape} {workload.dtype} {sparsities[0].pattern} {sparsities[0].block_size}"
        )
        print(f"[{number}/{len(groups)}] {what}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    print(f"results are in {path}", file=sys.stderr)
    return results


_FIELDS = tuple(field.name for field in dataclasses.fields(Selection))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures y = x W, dx = dy W^T and dW = x^T dy with a block-sparse W beside the dense product.",
    )
    implementations = [name for name in CONTENDERS if name != DENSE]
    parser.add_argument("--preset", choices=PRESETS, help="what to measure; by default that of the device")
    parser.add_argument("--shapes", type=_list(Shape.parse), metavar="MxKxN,...")
    parser.add_argument("--blocks", type=_list(_one_of(BLOCK_SIZES, int)), metavar="B,...")
    parser.add_argument("--densities", type=_list(_density), metavar="D,...")
    parser.add_argument("--dtypes", type=_list(_one_of(DTYPES)), metavar=",".join(DTYPES))
    parser.add_argument("--products", type=_list(_one_of(PRODUCTS)), metavar=",".join(PRODUCTS))
    parser.add_argument("--patterns", type=_list(_one_of(PATTERNS)), metavar=",".join(PATTERNS))
    parser.add_argument("--implementations", type=_list(_one_of(implementations)), metavar=",".join(implementations))
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="repetitions of each case (default 20)")
    parser.add_argument("--budget", type=float, default=2.5, metavar="SECONDS", help="per case; slow ones repeat less")
    parser.add_argument("--timer", choices=("call", "loop"), help="time calls (CPU), or loops on the device (others)")
    parser.add_argument("--cache", choices=("cold", "warm"), help="whether inputs may lie in a GPU's L2 (default cold)")
    parser.add_argument("--revision", metavar="COMMIT", help="to record where the folder is no git checkout")
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE", help="where the JSON goes")
    parser.add_argument("--show", type=pathlib.Path, metavar="FILE", help="print the tables of an earlier run, and end")
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
