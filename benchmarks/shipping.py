"""What `jax_blocksparse.advise` knows: the speed-ups of a report, added to the file that the package ships."""

import itertools
import json
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.report import select, shape_of
from jax_blocksparse.advice import MEASUREMENTS

SHIPPED = ROOT / "src" / "jax_blocksparse" / MEASUREMENTS

# On a GPU a float32 product is one in TF32 unless asked for otherwise.
_DTYPES = {"bf16": "bfloat16", "f16": "float16", "tf32": "float32"}


def entries(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the curves of speed-up against density on random patterns, inputs not in the cache.

    Raises:
      ValueError: if the report is not one of a GPU: CPUs differ too much to ship figures for.
    """
    if report["environment"]["platform"] != "gpu":
        raise ValueError(f"only measurements of GPUs are shipped, not those of {report['environment']['device']}")
    records = select(report["results"], contender="native", pattern="random", cache="cold")
    records = [record for record in records if record["dtype"] in _DTYPES]
    records.sort(key=lambda record: (_line(record), record["density"]))
    made = []
    for (dtype, shape, block, product), line in itertools.groupby(records, _line):
        made.append(
            {
                "dtype": _DTYPES[dtype],
                "shape": shape,
                "block_size": block,
                "product": product,
                "curve": [[round(r["actual_density"], 5), round(r["speedup_over_dense"], 3)] for r in line],
            }
        )
    return made


def write(report: dict[str, Any]) -> None:
    """Puts the report's curves in the place of what the package shipped for this device."""
    shipped = json.loads(SHIPPED.read_text()) if SHIPPED.exists() else {"devices": {}}
    environment = report["environment"]
    shipped["devices"][environment["device"]] = {
        "date": environment["date"],
        "revision": environment["revision"]["commit"],
        "versions": {name: environment["versions"][name] for name in ("jax_blocksparse", "jax")},
        "entries": entries(report),
    }
    heads = {device: {**about, "entries": []} for device, about in shipped["devices"].items()}
    text = json.dumps({"devices": heads}, indent=1)
    for about in shipped["devices"].values():
        lines = ",\n".join(f"    {json.dumps(entry)}" for entry in about["entries"])
        text = text.replace('"entries": []', f'"entries": [\n{lines}\n   ]', 1)
    SHIPPED.write_text(text + "\n")


def _line(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["dtype"], shape_of(record), record["block_size"], record["product"]
