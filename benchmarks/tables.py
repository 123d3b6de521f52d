"""A report as tables in Markdown, which a terminal shows as well."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from benchmarks.cases import DTYPES
from benchmarks.report import against_best_peer, beside_random, select, shape_of

FEW_TOKENS = 64
"""Up to so many, reading the blocks bounds a product."""

Rows = Iterator[list[str]]


def markdown(report: dict[str, Any]) -> str:
    """Returns the whole report: a heading that says what was measured where, and a table for each workload."""
    parts = [_heading(report["environment"], report["settings"])]
    for (product, *sizes, dtype), records in itertools.groupby(report["results"], _workload):
        shape = "x".join(str(size) for size in sizes)
        parts.append(f"### {product}, {shape}, {dtype}\n\n{_table(list(records))}")
    records, copy_bytes_per_s = report["results"], report["environment"].get("copy_bytes_per_s")
    comparisons = {
        "Beside the fastest peer": _beside_peers(records),
        "Beside random blocks": _beside_random(records),
        "Few tokens: beside 1.25 times the reading of the blocks, and 3 us": _beside_bandwidth(
            records, copy_bytes_per_s or math.inf
        ),
    }
    for title, comparison in comparisons.items():
        rows = list(comparison)
        parts += [f"### {title}\n\n{table(rows)}"] if len(rows) > 1 else []
    failures = [f"* {name}: {reason}" for name, reason in report["missing"].items()]
    failures += [f"* {_label(each)}: {each['message']}" for each in report["results"] if each["status"] != "ok"]
    failures += [f"* {group}: the time was up" for group in report["left_out"]]
    if failures:
        parts.append("### Not measured\n\n" + "\n".join(failures))
    return "\n\n".join(parts)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table whose first row is the heading."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


def _workload(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["product"], *shape_of(record), record["dtype"]


def _label(record: dict[str, Any]) -> str:
    shape = "x".join(str(size) for size in shape_of(record))
    return f"{shape}, " + ", ".join(
        f"{record[key]}" for key in ("contender", "product", "dtype", "pattern", "block_size", "density")
    )


def _heading(environment: dict[str, Any], settings: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    commit, dirty = environment["revision"]["commit"], environment["revision"]["dirty"]
    revision = f"{commit[:12] if commit else 'unknown'}{' with local changes' if dirty else ''}"
    method = "one call on the host's clock" if settings["timer"] == "call" else "many calls in a loop on the device"
    copy = environment.get("copy_bytes_per_s")
    return (
        f"{environment['device']}, {environment['date']}, revision {revision}\n{versions}\n"
        f"Median time of {method}; FLOP/s count non-zero blocks only; spread is p10 to p90."
        + (f" A device copy reads and writes {copy / 1e12:.2f} TB/s." if copy else "")
    )


def _table(records: list[dict[str, Any]]) -> str:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "contender": lambda r: r["contender"],
        "pattern": lambda r: r["pattern"] or "",
        "block": lambda r: str(r["block_size"] or ""),
        "density": lambda r: f"{r['density']:g}",
        "L2": lambda r: r["cache"] or "",
        "time": lambda r: _time(r["median_s"]),
        "spread": lambda r: f"{_time(r['p10_s'])} to {_time(r['p90_s'])}",
        "TFLOP/s": lambda r: f"{r['flops_per_s'] / 1e12:.3g}",
        "of dense": lambda r: _optional(r["fraction_of_dense_flops"], ".2f"),
        "speed-up": lambda r: _optional(r["speedup_over_dense"], ".2f"),
        "runs": lambda r: str(r["repetitions"]),
        "error": lambda r: f"{r['error']:.0e}",
    }
    names = list(columns)
    rows = [
        [text(record) for text in columns.values()]
        if record["status"] == "ok"
        else [columns[name](record) for name in names[:5]] + [record["status"]] + [""] * (len(names) - 6)
        for record in records
    ]
    return table([names, *rows])


def _beside_peers(records: list[dict[str, Any]]) -> Rows:
    yield ["case", "speed-up", "fastest peer", "its speed-up", "ours over it"]
    for ours, peer in against_best_peer(records):
        gain, peer_gain = (_optional(each["speedup_over_dense"], ".2f") for each in (ours, peer))
        yield [_case(ours), gain, peer["contender"], peer_gain, f"{ours['flops_per_s'] / peer['flops_per_s']:.2f}"]


def _beside_random(records: list[dict[str, Any]]) -> Rows:
    """FLOP/s on non-zero blocks, since patterns do not hit a density alike."""
    yield ["case", "TFLOP/s", "random blocks", "part of it"]
    for pair in beside_random(records):
        ours, random = (each["flops_per_s"] for each in pair)
        yield [_case(pair[0]), f"{ours / 1e12:.3g}", f"{random / 1e12:.3g}", f"{ours / random:.2f}"]


def _beside_bandwidth(records: list[dict[str, Any]], bytes_per_s: float) -> Rows:
    yield ["case", "time", "bound", "part of it"]
    for ours in select(records, contender="native", product="y", cache="cold"):
        if ours["m"] <= FEW_TOKENS:
            bound = reading_bound(ours, bytes_per_s)
            yield [_case(ours), _time(ours["median_s"]), _time(bound), f"{ours['median_s'] / bound:.2f}"]


def reading_bound(record: dict[str, Any], bytes_per_s: float) -> float:
    """Returns the seconds in which a product with few tokens is to be done: its blocks read, and a start."""
    blocks = record["flops"] / (2 * record["m"]) * DTYPES[record["dtype"]].dtype.itemsize
    return 1.25 * blocks / bytes_per_s + 3e-6


def _case(record: dict[str, Any]) -> str:
    shape = "x".join(str(size) for size in shape_of(record))
    warm = ", warm" if record["cache"] == "warm" else ""
    blocks = f"{record['pattern']} {record['block_size']}, {record['density']:g}"
    return f"{record['product']}, {shape}, {record['dtype']}, {blocks}{warm}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
