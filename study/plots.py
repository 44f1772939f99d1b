"""The study's plots, each as PNG and SVG, from its results.

python study/plots.py [RESULTS [PLOTS]]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure

from drawing import legend, points, style
from kfoc.compare.looks import look
from kfoc.reproduce.results import distinct, read, values, where
from plots_of_networks import influence, products, pruning
from plots_of_training import continual, laplace, optimizer
from tables import NAMES

HERE = Path(__file__).parent
PRODUCTS = ("K-FAC", "K-FOC", "EKFAC", "EK-FOC")


def errors(part: dict[str, Any]) -> Figure:
    """A panel a network and kind of Fisher; stages along, errors up."""
    rows = part["rows"]
    networks, stages = distinct(rows, "network"), distinct(rows, "stage")
    figure, axes = pyplot.subplots(
        2, len(networks), figsize=(2.7 * len(networks) + 0.6, 5.6), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for column, network in enumerate(networks):
        fishers = distinct(where(rows, network=network), "fisher")
        for axis, fisher in zip(axes[:, column], fishers, strict=False):
            for k, method in enumerate(NAMES):
                for x, stage in enumerate(stages):
                    cell = {"network": network, "fisher": fisher, "stage": stage}
                    found = values(rows, "error", method=method, **cell)
                    points(axis, x + 0.12 * (k - 2.5), found, method)
            axis.set_xticks(range(len(stages)), stages)
            axis.set_title(f"{network}, {fisher} Fisher", fontsize=9)
            axis.set_ylim(0, 1.3)
            axis.grid(axis="y", alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error, mean of layers")
    legend(figure, axes[0, 0])
    return figure


def inverse(part: dict[str, Any]) -> Figure:
    """Medians by damping: error and gain of the solve, log-determinant; a row a stage."""
    rows = part["rows"]
    dampings = part["settings"]["dampings, by the mean eigenvalue"]
    panels = {
        "solve": "error, mean gradient",
        "gain": "gain, mean gradient",
        "solve, random": "error, random vectors",
        "logdet": "log-determinant's error",
    }
    stages = distinct(rows, "stage")
    figure, axes = pyplot.subplots(
        len(stages), len(panels), figsize=(13, 3 * len(stages) + 0.4), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for line, stage in zip(axes, stages, strict=True):
        for axis, (key, title) in zip(line, panels.items(), strict=True):
            for method in PRODUCTS:  # of rank 2, most are refused
                columns = [row[key] for row in where(rows, stage=stage, method=method)]
                medians = [median_of(column[k] for column in columns) for k in range(len(dampings))]
                axis.plot(dampings, medians, **style(method))
            axis.set(xscale="log", xlabel="damping / mean eigenvalue")
            axis.set_title(f"{stage}: {title}", fontsize=9)
            axis.grid(alpha=0.3)
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
        2, len(networks), figsize=(4 * max(len(networks), 2), 6), sharey="row", squeeze=False,
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
        above.set_title(f"{network}, trained", fontsize=9)
        above.set_yscale("log", base=2)
        above.set_yticks([0.5, 1, 2, 4], ["1/2", "1", "2", "4"])
        below.set_xticks(range(len(dampings)), [f"{d:g}" for d in dampings])
        below.set(yscale="log", xlabel="damping / mean eigenvalue")
        below.set_yticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    axes[0, 0].set_ylabel("trace along F's eigenvectors / F's own")
    axes[1, 0].set_ylabel("overshoot, median of layers")
    legend(figure, axes[0, 0])
    return figure


# Name of a plot -> the part that it is of, and what draws it.
PLOTS = {
    "errors": ("errors", errors),
    "inverse": ("inverse", inverse),
    "spectrum": ("inverse", spectrum),
    "laplace": ("laplace", laplace),
    "optimizer": ("optimizer", optimizer),
    "continual": ("continual", continual),
    "influence": ("influence", influence),
    "products": ("influence", products),
    "pruning": ("pruning", pruning),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="?", default=str(HERE / "results"))
    parser.add_argument("plots", nargs="?", default=str(HERE.parent / "docs" / "study"))
    arguments = parser.parse_args()
    folder = Path(arguments.plots)
    matplotlib.rcParams["svg.hashsalt"] = "kfoc"  # the same file from the same results
    folder.mkdir(parents=True, exist_ok=True)
    for name, (part, draw) in PLOTS.items():
        path = Path(arguments.results) / f"{part}.json"
        if path.exists() and read(path)["rows"]:
            figure = draw(read(path))
            figure.savefig(folder / f"{name}.png", dpi=150)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            pyplot.close(figure)


if __name__ == "__main__":
    main()
