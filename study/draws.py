"""What a draw costs: errors against the exact Fisher of the same samples, by how labels are drawn.

    python study/draws.py [--draw] [--quick --out FOLDER]

Measures, and writes the results (results/draws.json), the picture and the table of docs/draws.md.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot, rc_context
from matplotlib.figure import Figure
from torch import Tensor, nn

import kfoc
from borrowed import borrowed
from drawing import PAGE, legend, logarithmic
from kfoc.compare.looks import STYLE
from kfoc.reproduce.results import Row, Unit, distinct, keep, markdown, read, save, values
from report import filled
from subjects import Subject, cnn, layers, mlp, small_digits, trained

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
ESTIMATORS = {"F itself": kfoc.BlockDiagonal, "K-FAC": kfoc.KFAC, "K-FOC": kfoc.KFOC}
KINDS = {"plain": "mc-plain", "weighted": "mc", "exact": "exact"}
# Of draws, which are no methods, and have no colour of theirs but that of what is exact.
LOOKS = {"plain": ("#882255", "s"), "weighted": ("#44aa99", "o"), "exact": ("#000000", "*")}


class Transformer(nn.Module):
    """Classes of an image whose rows are the tokens; one block of attention and MLP."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.1 * torch.randn(8, width))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images.flatten(1, 2)) + self.position
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        x = x + self.down(nn.functional.gelu(self.up(x)))
        return self.head(x.mean(1))


STAGES = {"trained": 600}
SUBJECTS = (
    Subject("MLP", lambda: mlp(64, 14, 14, 10), small_digits, STAGES),
    Subject("CNN", cnn, small_digits, STAGES),
    Subject("transformer", Transformer, small_digits, STAGES),
)


def settings(quick: bool) -> dict[str, Any]:
    return {
        "samples": [20] if quick else [40, 160, 640],  # with one draw
        "few": 20 if quick else 160,  # with several
        "draws": [2] if quick else [4, 16],
        "networks": 1 if quick else 3,
        "seeds of draws": 1 if quick else 3,
        "data": "scikit-learn's digits, on which the networks are trained",
    }


def units(quick: bool) -> Iterator[Unit]:
    for subject in SUBJECTS[2:] if quick else SUBJECTS:
        for seed in range(settings(quick)["networks"]):
            unit = {"network": subject.name, "seed": seed}
            yield unit, functools.partial(of_network, subject, seed, quick)


def of_network(subject: Subject, seed: int, quick: bool) -> Iterator[Row]:
    """One for each number of samples and of draws, kind of draw, and estimator."""
    chosen = settings(quick)
    (_, model), *_ = trained(subject, seed, quick)
    sizes = [(size, [1]) for size in chosen["samples"]]
    for size, draws in [*sizes, (chosen["few"], chosen["draws"])]:
        images = subject.data()[0][:size].double()
        for row in errors(model.double(), images, draws, chosen["seeds of draws"]):
            yield {"samples": size} | row


def errors(model: nn.Module, images: Tensor, draws: list[int], seeds: int) -> Iterator[Row]:
    """Relative errors against the exact blocks of these images, medians over the layers."""

    def blocks(estimator: str, kind: str, **options: Any) -> dict[str, Tensor]:
        found = kfoc.fit(
            model, [(images, None)], fisher=KINDS[kind], estimator=ESTIMATORS[estimator](),
            layers=layers(model), **options,
        )  # fmt: skip
        return {name: block.to_dense() for name, block in found.items()}

    exact = blocks("F itself", "exact")

    def error(found: dict[str, Tensor]) -> float:
        each = [((found[name] - f).norm() / f.norm()).item() for name, f in exact.items()]
        return statistics.median(each)

    for estimator in ESTIMATORS:
        common = {"estimator": estimator, "kind": "exact", "draws": 1, "draw": 0}
        if draws == [1]:  # the others are of samples that have been
            yield common | {"error": error(blocks(estimator, "exact"))}
        for kind in ("plain", "weighted"):
            for count in draws:
                for draw in range(seeds):
                    found = error(blocks(estimator, kind, mc_samples=count, seed=draw))
                    yield common | {"kind": kind, "draws": count, "draw": draw, "error": found}


def table(found: list[Row]) -> str:
    """Medians over networks and draws; F itself / K-FAC / K-FOC in a cell."""
    lines = []
    cases = sorted({(row["samples"], row["draws"]) for row in found})
    for network in distinct(found, "network"):
        for samples, draws in cases:
            of = {"plain": draws, "weighted": draws, "exact": 1}
            cells = []
            for kind in KINDS:
                cell = {"network": network, "samples": samples, "kind": kind, "draws": of[kind]}
                each = [values(found, "error", estimator=name, **cell) for name in ESTIMATORS]
                cells.append(" / ".join(f"{statistics.median(some):.3f}" for some in each))
            lines.append([network, str(samples), str(draws), *cells])
    return markdown(["network", "samples", "draws", *KINDS], lines)


def figure(found: list[Row], few: int) -> Figure:
    """A row an estimator, a column a network: by samples on the left, by draws on the right."""
    networks = distinct(found, "network")
    columns = [(network, along) for along in ("samples", "draws") for network in networks]
    shown, axes = pyplot.subplots(
        len(ESTIMATORS), len(columns), figsize=(PAGE, 4.6), sharey="row", sharex="col",
        layout="constrained",
    )  # fmt: skip
    for line, estimator in zip(axes, ESTIMATORS, strict=True):
        for axis, (network, along) in zip(line, columns, strict=True):
            fixed = {"draws": 1} if along == "samples" else {"samples": few}
            cell = {"network": network, "estimator": estimator} | fixed
            curves(axis, [row for row in found if cell.items() <= row.items()], along)
        line[0].set_ylabel(f"{estimator}: relative error")
    for k, (network, along) in enumerate(columns):
        fixed = "1 draw" if along == "samples" else f"{few} samples"
        axes[0, k].set_title(f"{network},\n{fixed}")
        axes[-1, k].set_xlabel(along)
    legend(shown, axes[1, 0])
    return shown


def curves(axis: Any, found: list[Row], along: str) -> None:
    """Medians with all that was found around them, logarithmic both ways."""
    ticks = sorted({row[along] for row in found})
    for kind, (colour, marker) in LOOKS.items():
        if kind == "exact" and along == "draws":
            each = [values(found, "error", kind=kind)] * len(ticks)
        else:
            each = [values(found, "error", kind=kind, **{along: x}) for x in ticks]
        if not max(map(max, each)):  # F itself, of which nothing is lost
            continue
        middle = [statistics.median(some) for some in each]
        axis.plot(ticks, middle, color=colour, marker=marker, label=kind, zorder=3)
        axis.fill_between(ticks, [*map(min, each)], [*map(max, each)], color=colour, alpha=0.15)
    axis.set(xscale="log")
    logarithmic(axis)
    axis.set_xticks(ticks, ticks, minor=False)
    axis.set_xticks([], minor=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny, to see that all of it runs")
    parser.add_argument("--draw", action="store_true", help="of the results that are there")
    parser.add_argument("--out", type=Path, help="folder of all that is written")
    arguments = parser.parse_args()
    if arguments.quick and not arguments.out:
        parser.error("--quick needs an --out of its own: it would overwrite the results")
    results = (arguments.out or HERE / "results") / "draws.json"
    results.parent.mkdir(parents=True, exist_ok=True)
    if not arguments.draw:
        machine = borrowed("benchmarks/machine.py").describe(threads=1)
        for _ in keep(units(arguments.quick), settings(arguments.quick), results, machine):
            pass
    kept = read(results)
    found = kept["rows"]
    with rc_context(STYLE):
        save(figure(found, kept["settings"]["few"]), (arguments.out or DOCS) / "draws")
    print(table(found))
    if not arguments.out:
        page = DOCS / "draws.md"
        page.write_text(filled(page.read_text(), {"draws": table(found)}))


if __name__ == "__main__":
    main()
