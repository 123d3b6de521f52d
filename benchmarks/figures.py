"""Pictures of a report; needs matplotlib."""

import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from benchmarks.contenders import CONTENDERS, DENSE
from benchmarks.report import NAMES, PRODUCT_NAMES, main_workload, select
from jax_blocksparse.advice import break_even

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = list[dict[str, Any]]

# From light to dark with the size of a block; the colours of one map, also in print and to the colour-blind.
_BLOCK_COLORS = {8: "#a8d08d", 16: "#5fb596", 32: "#2b8fa3", 64: "#2a5f9e", 128: "#3b2a78"}
_PEER_COLORS = ("#d1495b", "#e08e45", "#8d6a9f", "#7a7a7a", "#b8a03c", "#c77d9b")
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def draw(report: dict[str, Any], folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws what the report has data for and returns the files."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    workload = main_workload(report["results"])
    records = select(report["results"], **workload)
    title = (
        f"{workload['m']} x {workload['k']} x {workload['n']}, {workload['dtype']}, {report['environment']['device']}"
    )
    pictures = {"speedup": _speedups, "peers": _peers, "throughput": _throughput, "break_even": _break_even}
    files = []
    with mpl.rc_context(_STYLE):
        for name, picture in pictures.items():
            figure = picture(records, select(report["results"], contender=DENSE))
            if figure is not None:
                figure.suptitle(title, fontsize=9, color="#555555")
                files.append(folder / f"{name}.png")
                figure.savefig(files[-1])
                pyplot.close(figure)
    return files


def _speedups(records: Records, _: Records) -> "Figure":
    """Speed-up over dense against density: a panel for each product, a line for each block size."""
    products = _present(records, "product", PRODUCT_NAMES)
    figure, panels = _panels(1, len(products), height=3.2, legend=True, sharey=True)
    ours = select(records, contender="native")
    for panel, product in zip(panels[0], products, strict=True):
        _speedup_axes(panel, ours)
        for block in _present(ours, "block_size", _BLOCK_COLORS):
            line = _line(select(ours, product=product, block_size=block), "speedup_over_dense")
            panel.plot(*line, color=_BLOCK_COLORS[block], marker="o", markersize=3.5, label=f"blocks of {block}")
        panel.set_title(PRODUCT_NAMES[product])
        panel.set_xlabel("density")
    panels[0][0].set_ylabel("speed-up over dense")
    _legend_below(figure, panels[0][0], columns=6)
    return figure


def _peers(records: Records, _: Records) -> "Figure | None":
    """Speed-up over dense against density, with peers: a row for each product, a column for each block size."""
    peers = [name for name in _present(records, "contender", CONTENDERS) if name != "native"]
    if not peers:
        return None
    colors = dict(zip((name for name in NAMES if name != "native"), _PEER_COLORS, strict=True))
    with_peers = [record for record in records if record["contender"] in peers]
    products = _present(with_peers, "product", PRODUCT_NAMES)
    blocks = _present(with_peers, "block_size", _BLOCK_COLORS)
    figure, panels = _panels(len(products), len(blocks), height=2.2, legend=True, sharex=True, sharey=True)
    for row, product in zip(panels, products, strict=True):
        for panel, block in zip(row, blocks, strict=True):
            here = select(records, product=product, block_size=block)
            _speedup_axes(panel, records)
            for name in (*peers, "native"):
                style = (
                    {"color": "#12355b", "linewidth": 2.4, "zorder": 3}
                    if name == "native"
                    else {"color": colors[name], "linewidth": 1.2}
                )
                line = _line(select(here, contender=name), "speedup_over_dense")
                panel.plot(*line, marker="o", markersize=3, label=NAMES[name], **style)
        row[0].set_ylabel(f"{PRODUCT_NAMES[product]}\nspeed-up over dense")
    for top, bottom, block in zip(panels[0], panels[-1], blocks, strict=True):
        top.set_title(f"blocks of {block}")
        bottom.set_xlabel("density")
    _legend_below(figure, panels[0][0], columns=4)
    return figure


def _throughput(records: Records, dense: Records) -> "Figure":
    """TFLOP/s on non-zero blocks by block size: a panel for each product, a line for each density."""
    import matplotlib as mpl

    ours = select(records, contender="native")
    products = _present(ours, "product", PRODUCT_NAMES)
    densities = sorted({record["density"] for record in ours}, reverse=True)
    blocks = _present(ours, "block_size", _BLOCK_COLORS)
    shades = mpl.colormaps["viridis_r"]
    figure, panels = _panels(1, len(products), height=3.4, sharey=True)
    for panel, product in zip(panels[0], products, strict=True):
        for i, density in enumerate(densities):
            chosen = select(ours, product=product, density=density)
            rates = {record["block_size"]: record["flops_per_s"] / 1e12 for record in chosen}
            places = [blocks.index(block) for block in blocks if block in rates]
            values = [rates[blocks[place]] for place in places]
            color = shades(0.12 + 0.85 * i / max(1, len(densities) - 1))
            panel.plot(places, values, color=color, marker="o", markersize=3.5, label=f"density {density:g}")
        like = {key: ours[0][key] for key in ("m", "k", "n", "dtype")}
        rates = [record["flops_per_s"] / 1e12 for record in select(dense, product=product, **like)]
        if rates:
            panel.axhline(max(rates), color="#888888", linestyle="--", linewidth=1)
            panel.annotate(
                "dense", (0, max(rates)), xytext=(0, -10), textcoords="offset points", color="#666666", fontsize=8
            )
        panel.set(xticks=range(len(blocks)), xticklabels=blocks, xlabel="block size", title=PRODUCT_NAMES[product])
        panel.grid(visible=False, axis="x")
    panels[0][0].set_ylabel("TFLOP/s on non-zero blocks")
    panels[0][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    panels[0][0].set_ylim(bottom=0)  # of all panels, and only now, since it ends their scaling
    return figure


def _break_even(records: Records, _: Records) -> "Figure":
    """The density at which block-sparse and dense are equally fast: a group for each block size, a bar a product."""
    ours = select(records, contender="native")
    products = _present(ours, "product", PRODUCT_NAMES)
    blocks = _present(ours, "block_size", _BLOCK_COLORS)
    figure, panels = _panels(1, 1, width=6.0, height=3.2)
    panel = panels[0][0]
    width = 0.8 / len(products)
    for i, (product, color) in enumerate(zip(products, ("#12355b", "#2b8fa3", "#e08e45"), strict=False)):
        for place, block in enumerate(blocks):
            line = _line(select(ours, product=product, block_size=block), "speedup_over_dense")
            value = break_even(*line) if line else 0
            x = place + (i - (len(products) - 1) / 2) * width
            panel.bar(x, value, 0.9 * width, color=color, label=PRODUCT_NAMES[product] if place == 0 else None)
            panel.annotate(
                f"{value:.2f}", (x, value), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7
            )
    panel.set(
        xticks=range(len(blocks)), xticklabels=blocks, xlabel="block size", ylabel="break-even density", ylim=(0, 1.1)
    )
    panel.grid(visible=False, axis="x")
    panel.set_axisbelow(True)
    panel.legend(fontsize=8, loc="upper left", ncols=3)
    return figure


def _panels(rows: int, columns: int, *, height: float, width: float = 2.9, legend: bool = False, **options: Any) -> Any:
    from matplotlib import pyplot

    size = (width * columns + 0.6, height * rows + (0.5 if legend else 0.2))
    return pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)


def _legend_below(figure: "Figure", panel: "Axes", columns: int) -> None:
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=8)


def _speedup_axes(panel: "Axes", records: Records) -> None:
    """Logarithmic axes, from dense to sparse, with the ideal and dense as lines to compare with."""
    densities = [record["actual_density"] for record in records] or [0.05, 1.0]
    least, most = min(densities), max(densities)
    panel.set(xscale="log", yscale="log")
    panel.plot(
        [most, least], [1 / most, 1 / least], color="#aaaaaa", linestyle="--", linewidth=1, label="ideal: 1 / density"
    )
    panel.axhline(1, color="#444444", linewidth=0.8)
    panel.set_xlim(most * 1.12, least / 1.12)
    shown = sorted({record["density"] for record in records})
    panel.set_xticks(shown, [f"{density:g}" for density in shown])
    panel.minorticks_off()
    ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50]
    low = min([record["speedup_over_dense"] for record in records] + [0.8])
    panel.set_ylim(max(0.008, low * 0.85), 1.15 / least)
    panel.set_yticks([tick for tick in ticks if panel.get_ylim()[0] <= tick <= panel.get_ylim()[1]])
    panel.yaxis.set_major_formatter("{x:g}x")


def _line(records: Records, key: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(densities, values), from dense to sparse."""
    points = sorted(((record["actual_density"], record[key]) for record in records), reverse=True)
    return tuple(zip(*points, strict=True)) or ((), ())


def _present(records: Records, key: str, order: Iterable[Any]) -> list[Any]:
    found = {record[key] for record in records}
    return [value for value in order if value in found]
