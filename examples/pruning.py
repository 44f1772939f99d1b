"""Which weights a network can do without, by magnitude and by curvature.

An MLP trained on scikit-learn's 8 x 8 digits loses most of its weights at once, without training
again, in the order of what their loss is expected to cost:

- magnitude: w^2;
- optimal brain damage (LeCun et al. 1990): `F_ii w^2`, the rest stays as it is;
- optimal brain surgeon (Hassibi & Stork 1993): `w^2 / [(F + damping I)^-1]_ii`, the rest adjusts.

    python examples/pruning.py      two minutes
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

import kfoc

CURVATURES = {
    "diagonal": kfoc.Diagonal(),
    "K-FAC": kfoc.KFAC(),
    "K-FOC": kfoc.KFOC(),
    "EKFAC": kfoc.EigenCorrected(kfoc.KFAC()),
    "EK-FOC": kfoc.EigenCorrected(kfoc.KFOC()),
    "exact blocks": kfoc.BlockDiagonal(max_size=5000),
}
SPARSITIES = 0.5, 0.7, 0.8, 0.9
SEEDS = 5
DECAY = 1e-4
DAMPING = 1e-4
STEPS = 100  # of conjugate gradients

Weights = dict[str, Tensor]


def digits() -> tuple[Tensor, Tensor]:
    """All 1,797, (N, 64) and their labels, in a fixed random order."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return torch.as_tensor(images).float()[order] / 16, torch.as_tensor(labels).long()[order]


def trained(seed: int, inputs: Tensor, labels: Tensor, epochs: int = 60) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=DECAY)
    for _ in range(epochs):
        for part in torch.randperm(len(inputs)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[part]), labels[part]).backward()
            optimizer.step()
    return model


def saliencies(weights: Weights, curvatures: Mapping[str, kfoc.Curvature]) -> dict[str, Weights]:
    """Method -> what each weight is worth, by parameter name."""
    found = {"magnitude": {name: value.square() for name, value in weights.items()}}
    for label, curvature in curvatures.items():
        diagonal = curvature.diagonal()
        found[f"OBD, {label}"] = {k: diagonal[k] * w.square() for k, w in weights.items()}
    for label, curvature in curvatures.items():
        variances = curvature.damped(DAMPING).inverse_diagonal()
        found[f"OBS, {label}"] = {k: w.square() / variances[k] for k, w in weights.items()}
    return found


def kept(saliency: Weights, sparsity: float) -> Weights:
    """1 for the weights that stay, 0 for the share with the smallest saliencies; biases stay."""
    every = torch.cat([s.flatten() for name, s in saliency.items() if "weight" in name])
    bound = every.kthvalue(int(sparsity * len(every))).values
    return {
        k: (s > bound).to(s) if "weight" in k else torch.ones_like(s) for k, s in saliency.items()
    }


def adjusted(
    weights: Weights, mask: Weights, curvature: kfoc.Curvature, damping: float = DAMPING
) -> Weights:
    """The weights that stay, moved to where a quadratic loss of this curvature is least.

    `c^T (F + damping I) c` with the changes c of what goes given: conjugate gradients in the rest.
    """

    def product(change: Weights) -> Weights:
        found = curvature.matvec(change)
        return {k: found[k] + damping * change[k] for k in change}

    gone = product({k: (1 - mask[k]) * -w for k, w in weights.items()})
    residual = {k: -mask[k] * g for k, g in gone.items()}
    change = {k: torch.zeros_like(w) for k, w in weights.items()}
    direction, size = dict(residual), _dot(residual, residual)
    for _ in range(STEPS):
        image = {k: mask[k] * p for k, p in product(direction).items()}
        step = size / _dot(direction, image)
        change = {k: change[k] + step * direction[k] for k in change}
        residual = {k: residual[k] - step * image[k] for k in residual}
        before, size = size, _dot(residual, residual)
        if size < 1e-10 * _dot(gone, gone):
            break
        direction = {k: residual[k] + size / before * direction[k] for k in direction}
    return {k: mask[k] * (w + change[k]) for k, w in weights.items()}


def _dot(first: Weights, second: Weights) -> Tensor:
    return torch.stack([(first[k] * second[k]).sum() for k in first]).sum()


def accuracy(model: nn.Module, weights: Weights, inputs: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        outputs = functional_call(model, weights, (inputs,))
    return (outputs.argmax(1) == labels).double().mean().item()


def main(
    seeds: int = SEEDS, epochs: int = 60, estimators: Mapping[str, kfoc.Estimator] = CURVATURES
) -> dict[str, list[float]]:
    """Prints and returns the mean accuracies by method and sparsity."""
    inputs, labels = digits()
    train, test = slice(0, 1200), slice(1200, None)
    totals: dict[str, Tensor] = {}
    for seed in range(seeds):
        model = trained(seed, inputs[train], labels[train], epochs)
        data = list(zip(inputs[train].split(200), labels[train].split(200), strict=True))
        curvatures = {
            label: kfoc.fit(model, data, fisher="exact", estimator=estimator)
            for label, estimator in estimators.items()
        }
        weights = next(iter(curvatures.values())).vector(model)
        rows = {
            "dense": torch.full(
                (len(SPARSITIES),), accuracy(model, weights, inputs[test], labels[test])
            )
        }
        for method, saliency in saliencies(weights, curvatures).items():
            masks = [kept(saliency, sparsity) for sparsity in SPARSITIES]
            pruned = [{k: mask[k] * w for k, w in weights.items()} for mask in masks]
            rows[method] = torch.tensor(
                [accuracy(model, p, inputs[test], labels[test]) for p in pruned]
            )
            label = method.removeprefix("OBS, ")
            if label in curvatures and label != "diagonal":
                moved = [adjusted(weights, mask, curvatures[label]) for mask in masks]
                rows[f"{method}, adjusted"] = torch.tensor(
                    [accuracy(model, p, inputs[test], labels[test]) for p in moved]
                )
        for method, row in rows.items():
            totals[method] = totals.get(method, torch.zeros(len(SPARSITIES))) + row / seeds
    print(f"{'accuracy at sparsity':24}" + "".join(f"{s:>8.0%}" for s in SPARSITIES))
    for method, row in totals.items():
        print(f"{method:24}" + "".join(f"{value:8.3f}" for value in row.tolist()))
    return {method: row.tolist() for method, row in totals.items()}


if __name__ == "__main__":
    main()
