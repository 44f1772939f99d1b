"""What the examples share: made-up data, a little training, and a report of what a fit gives."""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import kfoc

ESTIMATORS: dict[str, kfoc.Estimator] = {"K-FAC": kfoc.KFAC(), "K-FOC": kfoc.KFOC()}
# These blocks are F itself, or its diagonal, whatever the estimator: they would flatter a mean.
NO_PRODUCT = (kfoc.DenseBlock, kfoc.DiagonalBlock)


@dataclass(frozen=True)
class Example:
    """A trained model, and all that `kfoc.fit` and a training step need.

    Attributes:
        batches: what `kfoc.fit` takes as its data.
        loss: (model, batch) to a scalar: what the model was trained with.
        likelihood, predict: as `kfoc.fit` takes them.
    """

    name: str
    model: nn.Module
    batches: Sequence[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    likelihood: str | kfoc.Likelihood = "categorical"
    predict: Callable[[nn.Module, Any], Any] | None = None

    def fit(self, data: Sequence[Any], estimator: kfoc.Estimator, **options: Any) -> kfoc.Curvature:
        """`kfoc.fit` as one would write it for this model."""
        return kfoc.fit(
            self.model, data, self.likelihood, estimator=estimator, predict=self.predict, **options
        )


@dataclass(frozen=True)
class Row:
    """What a fit of an example gives: one row of the table in models.py.

    Attributes:
        errors: estimator -> the mean of its Kronecker products' relative errors; nan without any.
        milliseconds: "gradient" or estimator -> of one batch, median.
    """

    name: str
    parameters: int
    coverage: kfoc.Coverage
    treated: int
    skipped: int
    errors: dict[str, float]
    milliseconds: dict[str, float]


def train(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Sequence[Any],
    rate: float = 3e-3,
    steps: int = 40,
) -> nn.Module:
    """A few steps of Adam, then evaluation mode: at an initialiser, curvature says little."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, batches[step % len(batches)]).backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval()


def report(example: Example, repeats: int = 5, probes: int = 16) -> Row:
    """Print an example's coverage, relative errors and cost; returns them as a table's row."""
    print(f"# {example.name}\n")
    fits = {
        name: example.fit(example.batches, estimator, probes=probes)
        for name, estimator in ESTIMATORS.items()
    }
    best = fits["K-FOC"]
    print(f"{best.coverage}\n\nrelative error against the exact block\n")
    print(errors_by_layer(fits))
    milliseconds = cost(example, repeats)
    print("\nmilliseconds for one batch: " + described(milliseconds) + "\n")
    return Row(
        example.name,
        sum(parameter.numel() for parameter in example.model.parameters()),
        best.coverage,
        len(best),
        len(best.skipped),
        {name: mean_error(curvature) for name, curvature in fits.items()},
        milliseconds,
    )


def errors_by_layer(fits: dict[str, kfoc.Curvature]) -> str:
    """A line a layer, a column an estimator; the standard error of the estimate behind it."""
    width = max(len(layer) for layer in fits["K-FOC"])
    lines = ["  ".join(["layer".ljust(width), *(name.ljust(17) for name in fits)]).rstrip()]
    for layer in fits["K-FOC"]:
        cells = []
        for curvature in fits.values():
            block = curvature[layer]
            error, deviation = block.relative_error, block.relative_error_standard_error
            cells.append("" if error is None else f"{error:.4f} +- {deviation or 0.0:.4f}")
        lines.append("  ".join([layer.ljust(width), *(cell.ljust(17) for cell in cells)]).rstrip())
    return "\n".join(lines)


def mean_error(curvature: kfoc.Curvature) -> float:
    """The mean relative error of the blocks that are Kronecker products."""
    errors = [
        block.relative_error
        for block in curvature.values()
        if block.relative_error is not None and not isinstance(block, NO_PRODUCT)
    ]
    return statistics.fmean(errors) if errors else math.nan


def cost(example: Example, repeats: int) -> dict[str, float]:
    """Milliseconds of one batch, medians: forward and full backward, then each estimator's fit."""
    batch = example.batches[0]

    def gradient() -> None:
        example.loss(example.model, batch).backward()
        example.model.zero_grad(set_to_none=True)

    jobs: dict[str, Callable[[], object]] = {"gradient": gradient}
    for name, estimator in ESTIMATORS.items():
        jobs[name] = functools.partial(example.fit, [batch], estimator)
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats + 1):
        for name, job in jobs.items():  # in turns: what slows the machine down slows all of them
            start = time.perf_counter()
            job()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values[1:]) for name, values in seconds.items()}


def described(milliseconds: dict[str, float]) -> str:
    gradient = milliseconds["gradient"]
    return ", ".join(
        f"{name} {value:.1f}" + ("" if name == "gradient" else f" ({value / gradient:.1f} times)")
        for name, value in milliseconds.items()
    )


def images(count: int, channels: int, size: int, classes: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Made-up images, (count, channels, size, size), and labels: a pattern a class, and noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    patterns = torch.randn(classes, channels, size, size, generator=generator)
    noise = torch.randn(count, channels, size, size, generator=generator)
    return (patterns[labels] + noise).to(torch.get_default_dtype()), labels


def tokens(count: int, length: int, vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Made-up sentences, (count, length), of different lengths, and their attention mask.

    Every token has four likely successors; token 0 pads the ends.
    """
    generator = torch.Generator().manual_seed(seed)
    successors = torch.randint(1, vocabulary, (vocabulary, 4), generator=generator)
    sentences = torch.randint(1, vocabulary, (count, length), generator=generator)
    for place in range(1, length):
        choice = torch.randint(4, (count,), generator=generator)
        sentences[:, place] = successors[sentences[:, place - 1], choice]
    lengths = torch.randint(max(length // 2, 2), length + 1, (count,), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).long()
    return sentences * mask, mask


def run(main: Callable[[bool], object], description: str | None) -> None:
    """The command line of an example: `--quick` for small sizes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a small model, in seconds")
    main(parser.parse_args().quick)
