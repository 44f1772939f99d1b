"""Part b: what becomes of a closer fit once it is damped and inverted, and why.

On layers of which the exact block F can be formed. A is an approximation, d a damping, g a vector:

- "solve": `|(F + d)^-1 g - (A + d)^-1 g| / |(F + d)^-1 g|`;
- "gain": how far one step along `(A + d)^-1 g`, of the best length, lowers the quadratic model
  `x^T (F + d) x / 2 - g^T x`, by what the exact step lowers it: 1 is as good as F itself, whatever
  the scale of A;
- "solve, factored", "gain, factored": of a single product with factored damping (method "pi");
- "solve, random", "gain, random": for Gaussian g, the means over some; without: for the mean
  gradient of the loss;
- "logdet": `(ln det (A + d) - ln det (F + d)) / parameters`;
- "overshoot": the largest eigenvalue of `(A + d)^-1 (F + d)`: how much too long the step along
  `(A + d)^-1 g` can be in some direction, since A has less of it than F;
- by bands of F's eigenvectors from the largest eigenvalue on: the share of trace F in each, for F,
  and for A along the same directions; and the share of `|g|^2`, for the mean gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import kfoc
from estimators import ESTIMATORS
from kfoc.reproduce.results import Row, Unit
from networks import SEEDS
from subjects import SMALL, Subject, loss, small_layers, trained

SAMPLES, DIRECTIONS = 512, 8
SEQUENCES = 512  # of 32 labels each
DAMPINGS = tuple(10.0**k for k in range(-6, 2))  # times the mean eigenvalue of F
OVERSHOOT_AT = (1e-4, 1e-2, 1.0)
BANDS = {"top 1 %": (0.0, 0.01), "next 9 %": (0.01, 0.1), "other 90 %": (0.1, 1.0)}
LARGEST = 1100


def settings(quick: bool) -> dict[str, Any]:
    return {
        "samples": 64 if quick else SAMPLES,
        "sequences": 16 if quick else SEQUENCES,
        "seeds": [0] if quick else list(SEEDS),
        "dampings, by the mean eigenvalue": DAMPINGS[::3] if quick else DAMPINGS,
        "overshoot at": OVERSHOOT_AT,
        "random directions": DIRECTIONS,
        "bands": BANDS,
        "largest layer": 120 if quick else LARGEST,
    }


def units(quick: bool) -> Iterator[Unit]:
    for subject in SMALL[2:] if quick else SMALL:
        for seed in settings(quick)["seeds"]:
            unit = {"network": subject.name, "seed": seed}
            yield unit, functools.partial(of_network, subject, seed, quick)


def of_network(subject: Subject, seed: int, quick: bool) -> Iterator[Row]:
    chosen = settings(quick)
    count = chosen["sequences" if "GPT" in subject.name else "samples"]
    inputs, targets = (part[:count] for part in subject.data())
    if inputs.is_floating_point():
        inputs = inputs.double()
    for stage, model in trained(subject, seed, quick):
        if stage != "init":
            for row in of_model(model.double(), (inputs, targets), subject, chosen, seed):
                yield {"stage": stage} | row


def of_model(
    model: torch.nn.Module,
    data: tuple[Tensor, Tensor],
    subject: Subject,
    chosen: dict[str, Any],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Rows by method and layer. One batch holds all data: every fit is the optimum of its kind."""
    names = small_layers(model, chosen["largest layer"])
    dampings = chosen["dampings, by the mean eigenvalue"]
    arguments: dict[str, Any] = {"fisher": subject.fisher, "layers": names, "seed": seed}
    exact = kfoc.fit(model, [data], estimator=kfoc.BlockDiagonal(), **arguments)
    fits = {
        method: kfoc.fit(model, [data], estimator=estimator, **arguments)
        for method, estimator in ESTIMATORS.items()
    }
    model.zero_grad(set_to_none=True)
    loss(model, *data).backward()
    generator = torch.Generator().manual_seed(seed)
    for layer in names:
        block = exact[layer]
        if not block.frobenius_norm():
            continue
        gradients = torch.randn(
            DIRECTIONS + 1, *block.shape, generator=generator, dtype=block.dtype
        )
        gradients[0] = extended_gradient(model.get_submodule(layer))
        spectrum = torch.linalg.eigh(block.to_dense())
        along = gradient_bands(spectrum, gradients[0])
        for method, curvature in fits.items():
            row: dict[str, Any] = {
                "layer": layer,
                "gradient": along,
                "method": method,
                "parameters": len(spectrum[0]),
            }
            dense = curvature[layer].to_dense()
            row["error"] = ((dense - block.to_dense()).norm() / block.to_dense().norm()).item()
            row["bands"] = bands(spectrum, dense)
            row["overshoot"] = [overshoot(spectrum, curvature[layer], d) for d in OVERSHOOT_AT]
            found = [solves(spectrum, curvature[layer], gradients, d) for d in dampings]
            yield row | {key: [each[key] for each in found] for key in found[0]}


def extended_gradient(module: torch.nn.Module) -> Tensor:
    """The gradient of `[W | b]`, (o, i)."""
    weight = module.weight.grad.flatten(1)  # type: ignore[union-attr, operator]
    if module.bias is None:
        return weight
    return torch.cat([weight, module.bias.grad[:, None]], 1)  # type: ignore[index, union-attr]


def solves(
    spectrum: tuple[Tensor, Tensor], block: kfoc.Block, gradients: Tensor, damping: float
) -> dict[str, float | None]:
    """At one damping. None where the library refuses, as sums of products may be indefinite."""
    values, vectors = spectrum[0].clamp_min(0), spectrum[1]
    damping = damping * values.mean().item()
    damped = values + damping
    flat = gradients.flatten(1)
    exact = ((flat @ vectors) / damped) @ vectors.mT
    names = ("solve", "gain", "solve, random", "gain, random")
    factored = ("solve, factored", "gain, factored")
    try:
        factorised = block.damped(kfoc.blocks.Damping(damping))
        approximate = factorised.power(gradients, -1).flatten(1)
        logdet = factorised.logdet() - damped.log().sum().item()
    except ValueError:
        return dict.fromkeys((*names, *factored, "logdet"))

    def judged(steps: Tensor) -> tuple[Tensor, Tensor]:
        errors = (exact - steps).norm(dim=1) / exact.norm(dim=1)
        quadratic = ((steps @ vectors).square() * damped).sum(1)
        return errors, (flat * steps).sum(1).square() / quadratic / (flat * exact).sum(1)

    errors, gains = judged(approximate)
    numbers = (errors[0], gains[0], errors[1:].mean(), gains[1:].mean())
    row: dict[str, float | None] = dict(zip(names, map(float, numbers), strict=True))
    row |= dict.fromkeys(factored) | {"logdet": logdet / len(values)}
    if isinstance(block, kfoc.KroneckerBlock):
        other = block.damped(kfoc.blocks.Damping(damping, method="pi")).power(gradients, -1)
        row |= dict(
            zip(factored, (float(each[0]) for each in judged(other.flatten(1))), strict=True)
        )
    return row


def overshoot(spectrum: tuple[Tensor, Tensor], block: kfoc.Block, damping: float) -> float | None:
    """The largest eigenvalue of `(A + d)^-1 (F + d)`; None where the library refuses."""
    values, vectors = spectrum[0].clamp_min(0), spectrum[1]
    damping = damping * values.mean().item()
    root = (vectors * (values + damping).sqrt()).mT  # (F + d)^1/2, but for a rotation
    try:
        factorised = block.damped(kfoc.blocks.Damping(damping))
        solved = factorised.power(root.view(-1, *block.shape), -1).flatten(1)
    except ValueError:
        return None
    product = solved @ root.mT
    return torch.linalg.eigvalsh((product + product.mT) / 2)[-1].item()


def slices(size: int) -> dict[str, slice]:
    """The bands of eigenvalues in falling order; the first has one at least."""
    return {
        name: slice(max(round(begin * size), int(begin > 0)), max(round(end * size), 1))
        for name, (begin, end) in BANDS.items()
    }


def gradient_bands(spectrum: tuple[Tensor, Tensor], gradient: Tensor) -> dict[str, float]:
    """Band -> share of the mean gradient's square."""
    squares = (gradient.flatten() @ spectrum[1].flip(1)).square()
    shares = squares / squares.sum()
    return {name: shares[band].sum().item() for name, band in slices(len(shares)).items()}


def bands(spectrum: tuple[Tensor, Tensor], matrix: Tensor) -> dict[str, list[float]]:
    """Band -> shares of trace F: F's own, A's along F's eigenvectors, and A's own largest."""
    values, vectors = spectrum[0].flip(0), spectrum[1].flip(1)
    along = (vectors * (matrix @ vectors)).sum(0)
    own = torch.linalg.eigvalsh(matrix).flip(0)
    return {
        name: [(part[band].sum() / values.sum()).item() for part in (values, along, own)]
        for name, band in slices(len(values)).items()
    }
