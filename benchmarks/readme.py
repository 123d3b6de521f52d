"""What README and docs/performance.md say in figures, made from reports."""

import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from benchmarks import fractions
from benchmarks import report as reports
from benchmarks.environment import ROOT
from benchmarks.report import NAMES, PRODUCT_NAMES, against_best_peer, main_workload, select
from benchmarks.tables import table

README = ROOT / "README.md"
FIGURES = ROOT / "docs" / "figures"

_SECTION = re.compile(
    r"<!-- python -m benchmarks readme (?P<files>.+?) -->\n(?P<text>.*)<!-- end of what that command writes -->",
    re.DOTALL,
)
_ALT = {
    "speedup": "Speed-up over dense against density, by block size",
    "peers": "Speed-up over dense against density, beside other libraries",
    "throughput": "TFLOP/s on non-zero blocks, by block size",
    "break_even": "Break-even density, by block size",
}


def section(report: dict[str, Any], layer: dict[str, Any] | None = None) -> str:
    """Returns README's section, which depends on nothing but the reports: of products, and of `benchmarks.mlp`."""
    workload = main_workload(report["results"])
    m, k, n = (workload[size] for size in "mkn")
    records = select(report["results"], **workload)
    environment = report["environment"]
    commit, dirty = environment["revision"]["commit"] or "unknown", environment["revision"]["dirty"]
    revision = f"{commit[:12]}{' with local changes' if dirty else ''}"
    versions = environment["versions"]
    images = [f"![{_ALT[name]}]({(FIGURES / f'{name}.png').relative_to(ROOT)})" for name in _figures(records)]
    return "\n\n".join(
        (
            f"How many times faster than `jnp.dot` with a dense W: y / dx / dW at {m} x {k} x {n} (tokens,\n"
            f"inputs, outputs) in {_long(workload['dtype'])}, random blocks, on {environment['device']}:",
            _table(records),
            *_beside_peers(records),
            *images,
            *_of_layer(layer),
            f"Measured on {environment['date'][:10]} at revision {revision}, with jax {versions['jax']}, the\n"
            "products and dense in turns in one process, inputs not in the L2 cache, every result checked.",
        )
    )


def load(files: Sequence[pathlib.Path]) -> list[dict[str, Any]]:
    """Reads a report of products and, where there is a second file, one of `benchmarks.mlp`."""
    products, *layer = files
    return [reports.load(products), *(json.loads(path.read_text()) for path in layer)]


def current(document: pathlib.Path) -> tuple[list[pathlib.Path], str]:
    """Returns the reports that a document's section says it is made from, and the section's text.

    Raises:
      ValueError: if the document has no such section.
    """
    found = _SECTION.search(document.read_text())
    if not found:
        raise ValueError(f"{document.name} has no section between the comments of `python -m benchmarks readme`")
    return [ROOT / file for file in found["files"].split()], found["text"]


def write(*files: pathlib.Path) -> None:
    """Writes the documents' sections and README's pictures."""
    from benchmarks import figures

    loaded = load(files)
    command = " ".join(("python -m benchmarks readme", *(str(path.resolve().relative_to(ROOT)) for path in files)))
    for document, make in SECTIONS.items():
        current(document)
        text = f"<!-- {command} -->\n{make(*loaded)}\n<!-- end of what that command writes -->"
        document.write_text(_SECTION.sub(lambda _, text=text: text, document.read_text()))
    figures.draw(loaded[0], FIGURES)


def _figures(records: list[dict[str, Any]]) -> list[str]:
    has_peers = any(record["contender"] != "native" for record in records)
    return ["speedup", *(["peers"] if has_peers else []), "break_even"]


def _table(records: list[dict[str, Any]]) -> str:
    ours = select(records, contender="native")
    densities = sorted({record["density"] for record in ours}, reverse=True)
    rows = [["block size", *(f"density {density:g}" for density in densities)]]
    for block in sorted({record["block_size"] for record in ours}, reverse=True):
        cells = []
        for density in densities:
            values = {r["product"]: r["speedup_over_dense"] for r in select(ours, block_size=block, density=density)}
            cells.append(" / ".join(_times(values.get(product)) for product in PRODUCT_NAMES))
        rows.append([str(block), *cells])
    return table(rows)


def _beside_peers(records: list[dict[str, Any]]) -> list[str]:
    pairs = against_best_peer(records)
    if not pairs:
        return []
    gains = [ours["speedup_over_dense"] / peer["speedup_over_dense"] for ours, peer in pairs]
    peers = {record["contender"] for record in records} - {"native"}
    names = ", ".join(name for contender, name in NAMES.items() if contender in peers)
    return [
        f"In the {len(gains)} cases measured beside other libraries ({names}),\n"
        f"the fastest of those takes {_times(min(gains))} to {_times(max(gains))} times as long."
    ]


def _of_layer(layer: dict[str, Any] | None) -> list[str]:
    if layer is None:
        return []
    settings = layer["settings"]
    dense, *sparse = layer["results"]
    sizes = " -> ".join(str(settings[size]) for size in ("features", "hidden", "features"))
    return [
        f"A feed-forward layer {sizes} with biases and gelu, {settings['tokens']} tokens,\n"
        f"{settings['dtype']}, forward and backward, takes {dense['median_s'] * 1e3:.1f} ms in dense Flax;"
        f" how many times faster\n`BlockSparseMLP` is at density {settings['density']:g}:",
        table([[each["model"] for each in sparse], [_times(each["speedup"]) for each in sparse]]),
    ]


def _times(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _long(dtype: str) -> str:
    return {"bf16": "bfloat16", "f16": "float16", "tf32": "float32 (TF32)", "f32": "float32"}[dtype]


SECTIONS = {README: section, ROOT / "docs" / "performance.md": lambda products, *_: fractions.section(products)}
"""By document: what makes the text of its section."""
