"""What docs/performance.md says in figures, made from a report: how near to dense, to peers and to memory's speed."""

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.report import against_best_peer, beside_random, main_workload, select, shape_of
from benchmarks.tables import FEW_TOKENS, reading_bound, table

Records = list[dict[str, Any]]


def section(report: dict[str, Any]) -> str:
    """Returns the section's text, which depends on nothing but the report."""
    records, environment = report["results"], report["environment"]
    main = main_workload(records)
    parts = list(_fractions(records, main))
    few = [each for each in select(records, contender="native", product="y", cache="cold") if each["m"] <= FEW_TOKENS]
    if few and "copy_bytes_per_s" in environment:
        bytes_per_s = environment["copy_bytes_per_s"]
        parts += [
            "Few tokens: the time of y, and in parentheses its ratio to 1.25 times what reading the blocks takes at\n"
            f"the {bytes_per_s / 1e12:.2f} TB/s of a copy, and 3 us:",
            _grid(few, _few_tokens_row, "density", lambda each: _against_reading(each, bytes_per_s)),
        ]
    of_random = _against_random(records, main)
    if of_random:
        parts += [
            "Other patterns: FLOP/s on non-zero blocks against those of random blocks with equal fan-in, as\n"
            "many within a fifth, at the shape of the first table:",
            _grid(of_random, lambda each: f"{each['pattern']} {each['block_size']}", "product", _ratio),
        ]
    others = _other_dtypes(records, main)
    if others:
        parts += [
            f"Other dtypes: FLOP/s on non-zero blocks as a fraction of dense {main['dtype']}, at the shape of the\n"
            "first table, and in parentheses how many times as long plain XLA takes (tf32 and f32 are float32 with\n"
            "the precision of the tensor cores and with its own):",
            _grid(others, _other_dtypes_row, "density", _other_dtype),
        ]
    return "\n\n".join(parts)


def _fractions(records: Records, main: dict[str, Any]) -> Iterator[str]:
    """A table for each shape, the main one first."""
    like = {key: main[key] for key in ("dtype", "pattern", "cache")}
    ours = [each for each in select(records, contender="native", **like) if each["m"] > FEW_TOKENS]
    peers = {_case(ours): peer for ours, peer in against_best_peer(records)}

    def cell(record: dict[str, Any]) -> str:
        peer = peers.get(_case(record))
        beside = f" ({peer['fraction_of_dense_flops']:.2f})" if peer else ""
        return f"{record['fraction_of_dense_flops']:.2f}{beside}"

    for shape in dict.fromkeys(map(shape_of, ours)):
        here = [each for each in ours if shape_of(each) == shape]
        sizes = " x ".join(map(str, shape))
        beside = "; in parentheses the fastest peer" if any(_case(each) in peers for each in here) else ""
        yield f"FLOP/s on non-zero blocks as a fraction of dense at {sizes}, by density{beside}:"
        yield _grid(here, lambda each: f"{each['product']} {each['block_size']}", "density", cell)


def _against_random(records: Records, main: dict[str, Any]) -> Records:
    """Our records of other patterns, each with its rate against the random one's as "ratio"."""
    like = {key: main[key] for key in ("m", "k", "n", "dtype", "cache")}
    pairs = beside_random(select(records, **like))
    return [ours | {"ratio": ours["flops_per_s"] / random["flops_per_s"]} for ours, random in pairs]


def _other_dtypes(records: Records, main: dict[str, Any]) -> Records:
    """Our records of other dtypes, with their "fraction" of the main one's dense rate and XLA's time over ours."""
    like = {key: main[key] for key in ("m", "k", "n", "cache")}
    dense = {each["product"]: each for each in select(records, contender="dense", dtype=main["dtype"], **like)}
    by_xla = {_case(ours): peer for ours, peer in against_best_peer(records) if peer["contender"] == "xla"}
    others = select(records, contender="native", pattern=main["pattern"], **like)
    return [
        record
        | {
            "fraction": record["flops_per_s"] / dense[record["product"]]["flops_per_s"],
            "xla_times": by_xla[_case(record)]["median_s"] / record["median_s"] if _case(record) in by_xla else None,
        }
        for record in others
        if record["dtype"] != main["dtype"] and record["product"] in dense
    ]


def _grid(records: Records, row: Callable[[dict[str, Any]], str], column: str, cell: Callable[..., str]) -> str:
    """A table of one cell for each record; rows and columns in the order in which they first come."""
    rows: dict[str, dict[Any, str]] = {}
    for record in records:
        rows.setdefault(row(record), {})[record[column]] = cell(record)
    columns = list(dict.fromkeys(record[column] for record in records))
    heads = [f"density {value:g}" if column == "density" else str(value) for value in columns]
    return table(
        [["", *heads], *([name, *(cells.get(value, "") for value in columns)] for name, cells in rows.items())]
    )


def _few_tokens_row(record: dict[str, Any]) -> str:
    return f"{' x '.join(map(str, shape_of(record)))}, {record['block_size']}"


def _against_reading(record: dict[str, Any], bytes_per_s: float) -> str:
    seconds = record["median_s"]
    return f"{seconds * 1e6:.1f} us ({seconds / reading_bound(record, bytes_per_s):.2f})"


def _other_dtypes_row(record: dict[str, Any]) -> str:
    return f"{record['dtype']} {record['product']} {record['block_size']}"


def _other_dtype(record: dict[str, Any]) -> str:
    beside = "" if record["xla_times"] is None else f" ({record['xla_times']:.1f})"
    return f"{record['fraction']:.2f}{beside}"


def _ratio(record: dict[str, Any]) -> str:
    return f"{record['ratio']:.2f}"


def _case(record: dict[str, Any]) -> tuple[Any, ...]:
    return (
        *shape_of(record),
        *(record[key] for key in ("product", "dtype", "pattern", "block_size", "density", "cache")),
    )
