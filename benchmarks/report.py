"""What becomes of the records: a JSON file, and what to find in it."""

import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.environment import ROOT

SCHEMA = 2

NAMES = {
    "native": "jax_blocksparse",
    "xla": "plain XLA",
    "torch-bsr": "PyTorch BSR (Triton)",
    "cusparse-bell": "cuSPARSE Blocked-ELL",
    "cusparse-bsr": "cuSPARSE BSR",
    "stk": "stk (Triton)",
    "jax-bcoo": "jax.experimental.sparse",
}
"""What contenders are called."""

CASE = ("product", "m", "k", "n", "dtype", "pattern", "block_size", "density", "cache")
"""What two records of the same case have in common."""

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


def against_best_peer(records: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Returns, for each case of ours that a peer has been measured on, our record and that of the fastest peer."""
    pairs = []
    records = list(records)
    for ours in select(records, contender="native"):
        like = {key: ours[key] for key in CASE}
        rivals = [each for each in select(records, **like) if each["contender"] not in ("native", "dense")]
        if rivals:
            pairs.append((ours, max(rivals, key=lambda each: each["flops_per_s"])))
    return pairs


def beside_random(records: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Returns, for each case of ours on other patterns, our record and that on as many random blocks within a fifth."""
    pairs = []
    records = select(records, contender="native")
    for ours in records:
        like = {key: ours[key] for key in CASE} | {"pattern": "random"}
        randoms = select(records, **like) if ours["pattern"] != "random" else []
        pairs += [(ours, each) for each in randoms if 0.8 < ours["actual_density"] / each["actual_density"] < 1.2]
    return pairs


def shape_of(record: dict[str, Any]) -> tuple[int, int, int]:
    """Returns (M, K, N)."""
    return record["m"], record["k"], record["n"]


def main_workload(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns what the first record has in common with all that pictures and README show beside it."""
    first = next(record for record in records if record["contender"] == "native")
    return {key: first[key] for key in ("m", "k", "n", "dtype", "pattern", "cache")}
