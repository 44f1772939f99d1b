"""Steps and seconds to the same training loss: AdamW, and natural gradients by K-FAC and K-FOC.

    python benchmarks/optimizer.py [--quick] [--only PROBLEM ...]

Every method has four values of one number here, and everything else at one setting for all
problems. The settings of the natural gradients were found by about 18 trials before, on the two
digit networks; AdamW had its usual ones. For AdamW the number is the learning rate; for the natural
gradients `kl_clip`, which sets the length of their steps (lr 0.1, damping 0.01, the curvature from
at most 128 samples every 10 steps).
All runs of a problem take the same batches from the same start. The target is the training loss
that the best run of AdamW ends with; of each method those runs count that reach it in the fewest
steps, and in the least time. Losses are those of the batches before the step, the mean of five.

Seconds are the processor's, on one thread: those of a clock where nothing else runs, and nearly the
same where something does. Writes results/optimizer.md, .json, .png and .svg (`--quick`:
results/optimizer-quick.*).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor, nn
from torch.nn import functional as F

import kfoc
from kfoc.compare.looks import COLUMN, STYLE, look
from kfoc.reproduce.results import markdown, read, save, write
from machine import describe
from networks import GPT, lenet, mlp
from workloads import digits

RESULTS = Path(__file__).parent / "results"
METHODS = ("AdamW", "K-FAC", "K-FOC")
GRIDS = {
    "AdamW": (3e-4, 1e-3, 3e-3, 1e-2),
    "K-FAC": (1e-4, 3e-4, 1e-3, 3e-3),
    "K-FOC": (1e-4, 3e-4, 1e-3, 3e-3),
}
SMOOTHING = 5  # steps


@dataclass
class Problem:
    """A network, its data and how long to train it."""

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    batch: int
    steps: int
    options: dict[str, Any] = field(default_factory=dict)  # of NaturalGradient


@dataclass
class Run:
    problem: str
    method: str
    setting: float  # of `GRIDS`
    losses: list[float]
    seconds: list[float]  # of the processor, from the start to after each step

    def smoothed(self) -> list[float]:
        """The mean of the last few losses, at each step."""
        windows = (self.losses[max(0, k + 1 - SMOOTHING) : k + 1] for k in range(len(self.losses)))
        return [sum(window) / len(window) for window in windows]

    def reached(self, target: float) -> int | None:
        """The number of steps after which the smoothed loss is at the target."""
        return next((k + 1 for k, v in enumerate(self.smoothed()) if v <= target), None)


def images() -> tuple[Tensor, Tensor]:
    x, y = digits()
    return x.view(-1, 1, 28, 28), y


def sequences() -> tuple[Tensor, Tensor]:
    """As the workload `gpt-8` has them: the next token is the present one plus a random step."""
    tokens = torch.randint(1, 9, (1024, 65)).cumsum(1) % 128
    return tokens[:, :-1], tokens[:, 1:]


PROBLEMS = (
    Problem("MLP 784-256-256-10, digits", lambda: mlp(784, 256, 256, 10), digits, 500, 100),
    Problem("LeNet-5, digits", lenet, images, 500, 100),
    Problem(
        "GPT, 2 layers of width 128",
        lambda: GPT(128, 64, width=128, heads=4, depth=2),
        sequences,
        16,
        100,
        {"scale": 1 / 64, "samples": 4, "layers": ["blocks.*", "head", "norm"]},
    ),
)


def batches(data: tuple[Tensor, Tensor], size: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches, the same for every run."""
    generator = torch.Generator().manual_seed(1)
    order: list[Tensor] = []
    for _ in range(steps):
        if not order:
            order = list(torch.randperm(len(data[0]), generator=generator).split(size))[:-1]
        chosen = order.pop()
        yield data[0][chosen], data[1][chosen]


def made(problem: Problem, method: str, model: nn.Module, setting: float) -> torch.optim.Optimizer:
    if method == "AdamW":
        return torch.optim.AdamW(model.parameters(), setting, weight_decay=0.0)
    estimator = kfoc.KFAC() if method == "K-FAC" else kfoc.KFOC()
    return kfoc.NaturalGradient(model, estimator=estimator, kl_clip=setting, **problem.options)


def trained(problem: Problem, method: str, setting: float) -> Run:
    """One training run, timed."""
    torch.manual_seed(0)
    data, model = problem.data(), problem.build()
    optimizer = made(problem, method, model, setting)
    losses: list[float] = []
    seconds: list[float] = []
    start = time.process_time()
    for inputs, targets in batches(data, problem.batch, problem.steps):
        if isinstance(optimizer, kfoc.NaturalGradient):
            optimizer.observe(inputs)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
        loss.backward()
        optimizer.step()
        there = loss.item() < 1e3
        losses.append(loss.item() if there else 1e3)
        seconds.append(time.process_time() - start)
        if not there:  # diverged, and the rest would be NaN
            break
    return Run(problem.name, method, setting, losses, seconds)


def target(runs: list[Run], steps: int) -> float:
    """The lowest smoothed loss that a complete run of AdamW ends with."""
    ends = [r.smoothed()[-1] for r in runs if r.method == "AdamW" and len(r.losses) == steps]
    return min(ends)


def row(problem: Problem, method: str, runs: list[Run], goal: float) -> dict[str, Any]:
    """Steps and seconds of a method's best runs, to the loss `goal`."""
    mine = [run for run in runs if run.method == method]
    there = [(count, run) for run in mine if (count := run.reached(goal)) is not None]
    found: dict[str, Any] = {"problem": problem.name, "method": method, "loss": goal}
    found["ms per step"] = 1e3 * min(run.seconds[-1] / len(run.losses) for run in mine)
    found["lowest loss"] = min(min(run.smoothed()) for run in mine)
    if there:
        count, best = min(there, key=lambda pair: pair[0])
        soonest = min(run.seconds[count - 1] for count, run in there)
        found |= {"setting": best.setting, "steps": count, "seconds": soonest}
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for r in rows:
        there = ("", "not reached", "")
        if "steps" in r:
            there = f"{r['setting']:g}", str(r["steps"]), f"{r['seconds']:.2f}"
        ends = f"{r['ms per step']:.1f}", f"{r['lowest loss']:.4f}"
        lines.append([r["problem"], f"{r['loss']:.4f}", r["method"], *there, *ends])
    header = ["problem", "training loss", "method", "lr or kl_clip", "steps", "seconds"]
    return markdown([*header, "ms per step", "lowest loss"], lines, words=(0, 2)) + "\n"


def draw(runs: list[Run], targets: dict[str, float], path: Path) -> None:
    """Best run of each method: loss against steps, and against seconds; a row a problem."""
    with rc_context(STYLE):
        figure = Figure(figsize=(COLUMN, 1.45 * len(targets) + 0.5), layout="constrained")
        axes = figure.subplots(len(targets), 2, sharey="row", squeeze=False)
        for row, (problem, goal) in zip(axes, targets.items(), strict=True):
            for method in METHODS:
                mine = [run for run in runs if (run.problem, run.method) == (problem, method)]
                best = min(mine, key=lambda run: (run.reached(goal) or 10**9, min(run.smoothed())))
                values = best.smoothed()
                line = look(method) | {"label": method, "markevery": max(1, len(values) // 6)}
                row[0].plot(range(1, len(values) + 1), values, **line)
                row[1].plot(best.seconds, values, **line)
            for axis, name in zip(row, ("steps", "processor seconds"), strict=True):
                axis.axhline(goal, color="black", lw=0.8, ls=":", label="to be reached")
                axis.set(yscale="log", xlabel=name, xlim=(0, None))
            low, high = row[0].get_ylim()
            digits = (1,) if high > 10 * low else range(1, 10)
            ticks = [d * 10.0**power for power in range(-9, 9) for d in digits]
            shown = [tick for tick in ticks if low <= tick <= high]
            row[0].set_yticks(shown, [f"{tick:g}" for tick in shown])
            row[0].yaxis.set_minor_locator(NullLocator())
            row[0].set_ylabel("training loss")
            row[0].set_title(problem, loc="left")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        save(figure, path)


def goals(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Problem -> the loss that is to be reached."""
    return {row["problem"]: row["loss"] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, two settings")
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names of problems")
    parser.add_argument("--draw", action="store_true", help="of the results that are there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name = "optimizer-quick" if arguments.quick else "optimizer"
    runs: list[Run] = []
    rows: list[dict[str, Any]] = []
    if arguments.draw:
        kept = read(RESULTS / f"{name}.json")
        draw([Run(**run) for run in kept["runs"]], goals(kept["rows"]), RESULTS / f"{name}.png")
        return
    for problem in PROBLEMS:
        if not any(part in problem.name for part in arguments.only):
            continue
        if arguments.quick:
            problem.steps = 20
        trained(problem, "AdamW", 1e-3)  # what is slow once is slow for none of them
        for method in METHODS:
            for setting in GRIDS[method][1:3] if arguments.quick else GRIDS[method]:
                runs.append(trained(problem, method, setting))
        mine = [run for run in runs if run.problem == problem.name]
        goal = target(mine, problem.steps)
        rows += [row(problem, method, mine, goal) for method in METHODS]
        print(table(rows[-len(METHODS) :]), flush=True)
        content = {"machine": describe(threads=1), "rows": rows}
        content["runs"] = [asdict(run) for run in runs]
        write(RESULTS / f"{name}.json", content)
        (RESULTS / f"{name}.md").write_text(table(rows))
    draw(runs, goals(rows), RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
