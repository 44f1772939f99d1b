"""laplace-torch's numbers with its own Kronecker factors and with K-FOC's, as a markdown table.

    pip install --no-deps -r tests/requirements-laplace.txt
    python benchmarks/laplace_torch.py [--seeds 3] [--models mlp cnn]

The same trained networks and data for every row: 2,000 digits of MNIST to fit on, 1,000 to test on.
The prior's precision is what maximises each row's own marginal likelihood; predictions are those of
the linearised model with the probit approximation. laplace-torch's full matrix is what they all
approximate: the closer to its marginal likelihood at the same prior, the better.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import kfoc
from kfoc.reproduce.data import Dataset, digits
from kfoc.reproduce.networks import train
from kfoc.reproduce.results import markdown, spread, values

with warnings.catch_warnings():  # of the packages that it imports
    warnings.simplefilter("ignore")
    from laplace import Laplace
    from laplace.curvature import CurvlinopsGGN
from kfoc.interop.laplace_torch import KFOCBackend

TRAIN, TEST, BATCH = 2000, 1000, 100
PRIOR = 1.0

Options = dict[str, Any]
Fit = Callable[[nn.Module, DataLoader], Options]


def small() -> nn.Module:
    """49 - 16 - 10, on digits averaged to 7 x 7."""
    return nn.Sequential(
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 16), nn.Tanh(), nn.Linear(16, 10)
    )


def convolutional() -> nn.Module:
    """Two 3 x 3 convolutions of 4 and 6 channels on digits averaged to 7 x 7, and 96 - 10."""
    return nn.Sequential(
        nn.AvgPool2d(4),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 10),
    )


NETWORKS = {"mlp": (small, 30), "cnn": (convolutional, 20)}


def of_backend(**options: Any) -> Fit:
    return lambda model, data: {"backend": KFOCBackend, "backend_kwargs": options}


def finished(estimator: kfoc.Estimator) -> Fit:
    def fit(model: nn.Module, data: DataLoader) -> Options:
        apart = [name for name, _ in model.named_parameters()]
        curvature = kfoc.fit(model, data, estimator=estimator, fisher="exact", layers=apart)
        return {"backend": KFOCBackend, "backend_kwargs": {"curvature": curvature}}

    return fit


ROWS: dict[str, Fit] = {
    "laplace-torch, full": lambda *_: {"backend": CurvlinopsGGN, "hessian_structure": "full"},
    "laplace-torch, its K-FAC": lambda *_: {"backend": CurvlinopsGGN},
    "`KFOCBackend`, K-FAC": of_backend(estimator=kfoc.KFAC()),
    "`KFOCBackend`, K-FOC by batch": of_backend(),
    "`KFOCBackend`, K-FOC fitted before (online)": finished(kfoc.KFOC()),
    "`KFOCBackend`, K-FOC fitted before (exact)": finished(kfoc.KFOC("exact")),
}


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: |confidence - accuracy| over equal bins, weighted by counts."""
    confidence, predicted = probabilities.max(-1)
    right = (predicted == labels).double()
    place = (confidence * bins).long().clamp_max(bins - 1)
    gaps = torch.zeros(bins, dtype=torch.double)
    gaps.index_add_(0, place, confidence.double() - right)
    return gaps.abs().sum().item() / len(labels)


def scores(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    rows = probabilities.gather(1, labels[:, None]).clamp_min(1e-12)
    return {
        "NLL": -rows.log().mean().item(),
        "ECE": calibration_error(probabilities, labels),
        "accuracy": (probabilities.argmax(-1) == labels).double().mean().item(),
    }


def measured(model: nn.Module, data: DataLoader, test: Dataset, fit: Fit) -> dict[str, float]:
    """One row's numbers for one trained network."""
    start = time.perf_counter()
    options = {"hessian_structure": "kron", "prior_precision": PRIOR} | fit(model, data)
    approximation = Laplace(model, "classification", subset_of_weights="all", **options)
    approximation.fit(data)
    seconds = time.perf_counter() - start
    fixed = approximation.log_marginal_likelihood().item()
    approximation.optimize_prior_precision(method="marglik", n_steps=100)
    with torch.no_grad():
        parts = [approximation(x) for x in test.inputs.split(10)]  # its cost is quadratic
    return {
        "log marginal likelihood, prior 1": fixed,
        "log marginal likelihood, best prior": approximation.log_marginal_likelihood().item(),
        **scores(torch.cat(parts), test.targets),
        "fit, s": seconds,
    }


def table(name: str, seeds: int) -> str:
    everything = digits()
    train_set = everything.subset(TRAIN)
    test = slice(TRAIN, TRAIN + TEST)
    test_set = Dataset(everything.inputs[test], everything.targets[test], "")
    pairs = TensorDataset(train_set.inputs, train_set.targets)
    data = DataLoader(pairs, batch_size=BATCH)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        build, epochs = NETWORKS[name]
        model = train(build, functional.cross_entropy, train_set, seed, epochs, BATCH, 3e-3)
        with torch.no_grad():
            point = scores(model(test_set.inputs).softmax(-1), test_set.targets)
        found.setdefault("the network alone", []).append(point)
        for row, fit in ROWS.items():
            found.setdefault(row, []).append(measured(model, data, test_set, fit))
    columns = list(found["laplace-torch, its K-FAC"][0])
    lines = [[row, *(cell(each, column) for column in columns)] for row, each in found.items()]
    return markdown(["", *columns], lines)


def cell(each: list[dict[str, float]], column: str) -> str:
    """Mean and standard deviation over the seeds."""
    digits_shown = 1 if "likelihood" in column else 2 if column == "fit, s" else 4
    return spread(values(each, column), digits_shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.models:
        print(f"\n{name}, {TRAIN:,} digits, {arguments.seeds} trained networks\n")
        print(table(name, arguments.seeds), flush=True)


if __name__ == "__main__":
    main()
