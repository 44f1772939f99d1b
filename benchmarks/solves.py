"""Products and seconds of exact solves, by preconditioner.

    python benchmarks/solves.py [--quick] [--only PROBLEM ...]

`kfoc.Fisher.solve` of the loss gradients of single test samples, as influence scores need them,
down to a residual of 0.1 and of 0.01, preconditioned by nothing, the diagonal, and each of the
Kronecker factored curvatures (`kfoc.fit` with its defaults, whose seconds stand beside). Of one
gradient, and of four at once: a product is then a pass over the data for all of them. The damping
is 1e-2 for each label of a sample (one; a sequence has as many as tokens).

A residual weighs the directions that F is large in. Scores are inner products of the solution with
gradients, so a second table has its error e after some products, against a solution in float64:
`e^T (F + damping) e`, the root of it relative to the solution's own, of a single gradient.

Seconds are the processor's, on one thread: those of a clock where nothing else runs, and nearly the
same where something does. Writes results/solves.md and .json (`--quick`: results/solves-quick.*).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfoc
from kfoc.reproduce.results import distinct, markdown, rounded, where, write
from machine import describe
from networks import GPT, lenet, mlp
from workloads import Workload, digits, trained

RESULTS = Path(__file__).parent / "results"
PRECONDITIONERS: dict[str, kfoc.Estimator | None] = {
    "none": None,
    "diagonal": kfoc.Diagonal(),
    "K-FAC": kfoc.KFAC(),
    "K-FOC": kfoc.KFOC(),
    "EKFAC": kfoc.EigenCorrected(kfoc.KFAC()),
    "EK-FOC": kfoc.EigenCorrected(kfoc.KFOC()),
}
RESIDUALS = (0.1, 0.01)
COUNTS = (1, 4)  # right-hand sides at once
DAMPING = 1e-2  # for each label
MAX_PRODUCTS = 50
ERRORS_AFTER = (1, 3, 10, 30)  # products


@dataclass
class Problem:
    """A network, and how to train it: on a pool of which it is then given the first samples."""

    name: str
    build: Callable[[], nn.Module]
    pool: Callable[[], tuple[Tensor, Tensor]]
    samples: int
    batch: int
    labels: int = 1  # of a sample
    options: dict[str, Any] = field(default_factory=dict)  # of `trained`

    def workload(self) -> Workload:
        torch.manual_seed(0)
        made = trained(self.build(), self.pool(), self.samples, **self.options)
        ((x, y),) = made.batches
        made.batches = list(zip(x.split(self.batch), y.split(self.batch), strict=True))
        return made


def images() -> tuple[Tensor, Tensor]:
    x, y = digits()
    return x.view(-1, 1, 28, 28), y


def sequences() -> tuple[Tensor, Tensor]:
    """The next token is the present one plus a random step, as in the workload `gpt-8`."""
    tokens = torch.randint(1, 9, (1024, 33)).cumsum(1) % 64
    return tokens[:, :-1], tokens[:, 1:]


PROBLEMS = (
    Problem("MLP 784-128-128-10, digits", lambda: mlp(784, 128, 128, 10), digits, 500, 250),
    Problem("LeNet-5, digits", lenet, images, 128, 64),
    Problem(
        "GPT, 2 layers of width 32",
        lambda: GPT(64, 32, width=32, heads=4, depth=2),
        sequences,
        32,
        16,
        32,
        {"steps": 200, "size": 32},
    ),
)


def gradients(problem: Problem, made: Workload, count: int) -> dict[str, Tensor]:
    """Of the losses of the pool's last samples, which are not among those that F is of."""
    x, y = problem.pool()
    rows = []
    for n in range(1, count + 1):
        outputs = made.model(x[-n:][:1])
        loss = F.cross_entropy(outputs.flatten(0, -2), y[-n:][:1].flatten(), reduction="sum")
        rows.append(torch.autograd.grad(loss, made.model.parameters()))
    names = [name for name, _ in made.model.named_parameters()]
    columns = zip(*rows, strict=True)
    return {name: torch.stack(parts) for name, parts in zip(names, columns, strict=True)}


def measured(problem: Problem, quick: bool) -> Iterator[dict[str, Any]]:
    made = problem.workload()
    data = made.batches[:1] if quick else made.batches
    fisher, damping = kfoc.Fisher(made.model, data), DAMPING * problem.labels
    every = gradients(problem, made, max(COUNTS))
    single = {name: part[:1] for name, part in every.items()}
    distance = None if quick else Distance.of(made, single, damping)
    for name, estimator in PRECONDITIONERS.items():
        start, curvature = time.process_time(), None
        if estimator is not None:
            curvature = kfoc.fit(made.model, data, estimator=estimator)
        shared = {"problem": problem.name, "preconditioner": name, "damping": damping}
        shared["fit seconds"] = time.process_time() - start
        for count, rtol in itertools.product(COUNTS[:1] if quick else COUNTS, RESIDUALS):
            start = time.process_time()
            found = fisher.solve(
                {key: part[:count] for key, part in every.items()},
                damping,
                preconditioner=curvature,
                rtol=rtol,
                max_products=MAX_PRODUCTS,
            )
            yield shared | {
                "vectors": count,
                "rtol": rtol,
                "seconds": time.process_time() - start,
                "products": found.products,
                "residual": found.residual.max().item(),
                "converged": found.converged,
            }
        for k in ERRORS_AFTER if distance else ():
            found = fisher.solve(
                single, damping, preconditioner=curvature, rtol=None, max_products=k
            )
            yield shared | {"products": k, "error": distance(found.vector)}


@dataclass
class Distance:
    """How far a solution is from that in float64, in the norm of the matrix."""

    fisher: kfoc.Fisher
    solution: dict[str, Tensor]
    damping: float

    @classmethod
    def of(cls, made: Workload, right: dict[str, Tensor], damping: float) -> Distance:
        model = copy.deepcopy(made.model).double()
        data = [(x.double() if x.is_floating_point() else x, y) for x, y in made.batches]
        fisher = kfoc.Fisher(model, data)
        wide = {name: part.double() for name, part in right.items()}
        curvature = kfoc.fit(model, data, estimator=kfoc.EigenCorrected(kfoc.KFOC()))
        solution = fisher.solve(
            wide, damping, preconditioner=curvature, rtol=1e-4, max_products=400
        )
        return cls(fisher, solution.vector, damping)

    def norm(self, vector: dict[str, Tensor]) -> float:
        squares = sum(part.square().sum() for part in vector.values())
        return (self.fisher.quadratic_form(vector) + self.damping * squares).sqrt().item()

    def __call__(self, found: dict[str, Tensor]) -> float:
        off = {name: found[name].double() - part for name, part in self.solution.items()}
        return self.norm(off) / self.norm(self.solution)


def page(rows: list[dict[str, Any]]) -> str:
    """A table of the solves for each problem, and one of all errors."""
    parts = [NOTE]
    for problem in distinct(rows, "problem"):
        solves = [row for row in where(rows, problem=problem) if "rtol" in row]
        keys = list(dict.fromkeys((row["vectors"], row["rtol"]) for row in solves))
        header = ["preconditioner", "fit, s", *(f"{count}, to {rtol:g}" for count, rtol in keys)]
        lines = []
        for name in distinct(solves, "preconditioner"):
            here = where(solves, preconditioner=name)
            fit = "" if name == "none" else f"{here[0]['fit seconds']:.2f}"
            lines.append([name, fit, *map(cell, here)])
        parts.append(f"### {problem}\n\n{markdown(header, lines)}")
    return "\n\n".join([*parts, "### Errors", errors(rows)]) + "\n"


def errors(rows: list[dict[str, Any]]) -> str:
    """Of every problem after some products, a line for each preconditioner."""
    found = [row for row in rows if "error" in row]
    columns = list(dict.fromkeys((row["problem"], row["products"]) for row in found))
    header = ["error after"]
    header += [f"{problem.replace(',', ' ').split()[0]}, {k}" for problem, k in columns]
    lines = [
        [name, *(f"{row['error']:.2f}" for row in where(found, preconditioner=name))]
        for name in distinct(found, "preconditioner")
    ]
    return markdown(header, lines)


def cell(row: dict[str, Any]) -> str:
    if not row["converged"]:
        return f"{row['residual']:.2f} after {row['products']}"
    return f"{row['products']} ({row['seconds']:.1f} s)"


NOTE = (
    "Products with the true Fisher, and processor seconds of the solve, by preconditioner. Columns "
    "say how many gradients are solved for at once, and the residual that all are to come to. "
    "At the end, the relative error of the solution of one, in the norm of the matrix."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one batch, one gradient")
    parser.add_argument("--only", nargs="*", help="parts of problems' names")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "conjugate gradients came to", RuntimeWarning)
    chosen = arguments.only or [""]
    path = RESULTS / ("solves-quick.json" if arguments.quick else "solves.json")
    settings = {"max products": MAX_PRODUCTS, "samples": {p.name: p.samples for p in PROBLEMS}}
    rows: list[dict[str, Any]] = []
    for problem in PROBLEMS:
        if any(part in problem.name for part in chosen):
            for row in measured(problem, arguments.quick):
                rows.append(rounded(row))
                write(path, {"machine": describe(1), "settings": settings, "rows": rows})
    shown = page(rows)
    path.with_suffix(".md").write_text(shown)
    print(shown)


if __name__ == "__main__":
    main()
