"""What becomes of the records: a JSON file, and tables in Markdown, which a terminal shows as well."""

import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.environment import ROOT

SCHEMA = 2

PRODUCT_NAMES = {"y": "y = x W", "dx": "dx = dy Wᵀ", "dw": "dW = xᵀ dy"}


def default_path(environment: dict[str, Any]) -> pathlib.Path:
    """Returns where the results of this device and minute go."""
    device = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    minute = environment["date"][:16].replace(":", "")
    return ROOT / "benchmarks" / "results" / f"{device}-{minute}.json"


def save(path: pathlib.Path, report: dict[str, Any]) -> None:
    """Writes a report; an interruption leaves the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"schema": SCHEMA, **report}, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def load(path: pathlib.Path) -> dict[str, Any]:
    """Reads a report.

    Raises:
      ValueError: if the file was written by another version of this program.
    """
    report = json.loads(path.read_text())
    if report.get("schema") != SCHEMA:
        raise ValueError(f"{path.name} has schema {report.get('schema')!r}, this program reads {SCHEMA}")
    return report


def select(records: Iterable[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """Returns the records of measured times that have these values."""
    return [
        record
        for record in records
        if record["status"] == "ok" and all(record[key] == value for key, value in wanted.items())
    ]


def shape_of(record: dict[str, Any]) -> tuple[int, int, int]:
    """Returns (M, K, N)."""
    return record["m"], record["k"], record["n"]


def main_workload(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns what the first record has in common with all that pictures and README show beside it."""
    first = next(record for record in records if record["contender"] == "native")
    return {key: first[key] for key in ("m", "k", "n", "dtype", "pattern", "cache")}


def markdown(report: dict[str, Any]) -> str:
    """Returns the whole report: a heading that says what was measured where, and a table for each workload."""
    parts = [_heading(report["environment"], report["settings"])]
    for (product, *sizes, dtype), records in itertools.groupby(report["results"], _workload):
        shape = "x".join(str(size) for size in sizes)
        parts.append(f"### {product}, {shape}, {dtype}\n\n{_table(list(records))}")
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


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
