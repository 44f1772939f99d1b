"""The study's plots, each as PNG and SVG, from its results.

python study/plots.py [RESULTS [PLOTS]]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib import pyplot, rc_context
from matplotlib.figure import Figure

from drawing import PAGE, SMALL, legend, points, style
from kfoc.compare.looks import COLUMN, STYLE, look
from kfoc.reproduce.results import distinct, read, save, values, where
from paired import in_order
from plots_of_gain import gain
from plots_of_networks import influence, products, pruning
from plots_of_training import continual, laplace, optimizer
from tables import NAMES

HERE = Path(__file__).parent
PRODUCTS = ("K-FAC", "K-FOC", "EKFAC", "EK-FOC")


def errors(part: dict[str, Any]) -> Figure:
    """A panel a network; stages along, errors of the exact Fisher up."""
    rows = where(part["rows"], fisher="exact")
    networks, stages = in_order(distinct(rows, "network")), distinct(rows, "stage")
    lines = -(-len(networks) // 2)
    figure, axes = pyplot.subplots(
        lines, 2, figsize=(COLUMN, 1.35 * lines + 0.5), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, network in zip(axes.flat, networks, strict=False):
        for k, method in enumerate(NAMES):
            for x, stage in enumerate(stages):
                cell = {"network": network, "stage": stage, "method": method}
                found = values(rows, "error", **cell)
                points(axis, x + 0.13 * (k - 2.5), found, method, **SMALL)
        axis.set_xticks(range(len(stages)), stages)
        axis.set_title(network)
        axis.set_ylim(0, 1)
    for axis in axes.flat[len(networks) :]:
        axis.set_axis_off()
    figure.supylabel("relative error, mean of layers")
    legend(figure, axes[0, 0], rows=2)
    return figure


def inverse(part: dict[str, Any]) -> Figure:
    """Medians by damping: error and gain of the solve, log-determinant; a row a stage."""
    rows = part["rows"]
    dampings = part["settings"]["dampings, by the mean eigenvalue"]
    panels = {
        "solve": "error, mean gradient",
        "gain": "gain, mean gradient",
        "solve, random": "error, random vectors",
        "logdet": "error, log-det.",
    }
    stages = distinct(rows, "stage")
    figure, axes = pyplot.subplots(
        len(stages), len(panels), figsize=(PAGE, 1.8 * len(stages) + 0.3), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for line, stage in zip(axes, stages, strict=True):
        for axis, (key, title) in zip(line, panels.items(), strict=True):
            for method in PRODUCTS:  # of rank 2, most are refused
                columns = [row[key] for row in where(rows, stage=stage, method=method)]
                medians = [median_of(column[k] for column in columns) for k in range(len(dampings))]
                axis.plot(dampings, medians, **style(method))
            axis.set(xscale="log", title=f"{stage}: {title}")
    figure.supxlabel("damping / mean eigenvalue")
    legend(figure, axes[0, 0])
    return figure


def median_of(found: Iterable[float | None]) -> float:
    """nan where one is missing: the median of those that were not refused would flatter."""
    there = list(found)
    return (
        float("nan") if None in there else statistics.median(abs(v) for v in there if v is not None)
    )


def spectrum(part: dict[str, Any]) -> Figure:
    """Trained networks: what each has of F along F's own eigenvectors, and the overshoot."""
    rows = where(part["rows"], stage="trained")
    networks, bands = distinct(rows, "network"), list(rows[0]["bands"])
    dampings = part["settings"]["overshoot at"]
    figure, axes = pyplot.subplots(
        2, len(networks), figsize=(PAGE, 4), sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for (above, below), network in zip(axes.T, networks, strict=True):
        for k, method in enumerate(PRODUCTS):
            mine = where(rows, network=network, method=method)
            bar = {"width": 0.18, "color": look(method)["color"], "label": method}
            for x, band in enumerate(bands):
                shares = [row["bands"][band] for row in mine]
                ratio = sum(share[1] for share in shares) / sum(share[0] for share in shares)
                above.bar(x + 0.2 * (k - 1.5), ratio - 1, bottom=1, **bar)
            for x in range(len(dampings)):
                middle = median_of(row["overshoot"][x] for row in mine)
                below.bar(x + 0.2 * (k - 1.5), middle - 1, bottom=1, **bar)
        above.axhline(1, color="black", linewidth=0.8)
        above.set_xticks(range(len(bands)), bands)
        above.set_title(f"{network}, trained")
        above.set_yscale("log", base=2)
        above.set_yticks([0.5, 1, 2, 4], ["1/2", "1", "2", "4"])
        below.set_xticks(range(len(dampings)), [f"{d:g}" for d in dampings])
        below.set(yscale="log", xlabel="damping / mean eigenvalue")
        below.set_yticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    axes[0, 0].set_ylabel("trace along F's\neigenvectors / F's own")
    axes[1, 0].set_ylabel("overshoot, median of layers")
    legend(figure, axes[0, 0])
    return figure


# Name of a plot -> the parts that it is of, and what draws it.
PLOTS: dict[str, tuple[tuple[str, ...], Callable[..., Figure]]] = {
    "errors": (("errors",), errors),
    "inverse": (("inverse",), inverse),
    "spectrum": (("inverse",), spectrum),
    "laplace": (("laplace",), laplace),
    "optimizer": (("optimizer",), optimizer),
    "continual": (("continual",), continual),
    "influence": (("influence",), influence),
    "products": (("influence",), products),
    "pruning": (("pruning",), pruning),
    "gain": (("errors", "influence", "optimizer"), gain),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="?", default=str(HERE / "results"))
    parser.add_argument("plots", nargs="?", default=str(HERE.parent / "docs" / "study"))
    arguments = parser.parse_args()
    folder = Path(arguments.plots)
    folder.mkdir(parents=True, exist_ok=True)
    paths = Path(arguments.results).glob("*.json")
    results = {path.stem: found for path in paths if (found := read(path))["rows"]}
    for name, (parts, draw) in PLOTS.items():
        if results.keys() >= set(parts):
            with rc_context(STYLE):
                figure = draw(*(results[part] for part in parts))
                save(figure, folder / name)
            pyplot.close(figure)


if __name__ == "__main__":
    main()
