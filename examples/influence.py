"""Training samples that harm: mislabelled digits found by influence, and retraining as a check.

An MLP is trained to the end, with weight decay, on 600 of scikit-learn's 8 x 8 digits, of which a
tenth got a wrong label. For the test digits that it does worst on, the most harmful training digits
by each curvature should be the mislabelled ones; and the predicted changes of loss should be those
that training again without a sample brings.

    python examples/influence.py      half a minute
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import kfoc

ESTIMATORS = {
    "diagonal": kfoc.Diagonal(),
    "K-FAC": kfoc.KFAC(),
    "K-FOC": kfoc.KFOC(),
    "EKFAC": kfoc.EigenCorrected(kfoc.KFAC()),
    "EK-FOC": kfoc.EigenCorrected(kfoc.KFOC()),
    "exact blocks": kfoc.BlockDiagonal(),
}
DECAY = 5e-3
TOP = 10
LEFT_OUT = 40


def digits(count: int) -> tuple[Tensor, Tensor]:
    """In a fixed random order, (count, 64), and their labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    return torch.as_tensor(images)[order] / 16, torch.as_tensor(labels).long()[order]


def mislabelled(labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Labels of which a share is wrong, and which those are."""
    generator = torch.Generator().manual_seed(1)
    wrong = torch.rand(len(labels), generator=generator) < share
    shift = torch.randint(1, 10, labels.shape, generator=generator)
    return torch.where(wrong, (labels + shift) % 10, labels), wrong


def train(model: nn.Module, inputs: Tensor, labels: Tensor, weights: Tensor, steps: int) -> None:
    """Minimise the weighted mean loss with weight decay, by L-BFGS from where the model is."""
    parameters = list(model.parameters())
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=steps, history_size=30, tolerance_grad=1e-7, tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = nn.functional.cross_entropy(model(inputs), labels, reduction="none")
        loss = weights @ losses / len(inputs)
        loss = loss + DECAY / 2 * sum(p.square().sum() for p in parameters)
        loss.backward()
        return loss

    optimizer.step(closure)
    model.zero_grad(set_to_none=True)


def changes_by_retraining(
    model: nn.Module, inputs: Tensor, labels: Tensor, query: tuple[Tensor, Tensor], chosen: Tensor
) -> Tensor:
    """(queries, chosen): what the query's losses change by when a sample is left out."""

    def losses() -> Tensor:
        with torch.no_grad():
            return nn.functional.cross_entropy(model(query[0]), query[1], reduction="none")

    state = {key: value.clone() for key, value in model.state_dict().items()}
    before, columns = losses(), []
    for n in chosen:
        weights = torch.ones(len(inputs))
        weights[n] = 0
        train(model, inputs, labels, weights, 100)
        columns.append(losses() - before)
        model.load_state_dict(state)
    return torch.stack(columns, 1)


def main() -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    images, truth = digits(1000)
    inputs, (labels, wrong) = images[:600], mislabelled(truth[:600], 0.1)
    model = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))
    train(model, inputs, labels, torch.ones(600), 1000)
    with torch.no_grad():
        losses = nn.functional.cross_entropy(model(images[600:]), truth[600:], reduction="none")
    worst = 600 + losses.argsort(descending=True)[:20]
    query = images[worst], truth[worst]
    chosen = torch.arange(0, 600, 600 // LEFT_OUT)
    actual = changes_by_retraining(model, inputs, labels, query, chosen)
    data = list(zip(inputs.split(100), labels.split(100), strict=True))
    print(f"{wrong.double().mean():.0%} of the training digits are mislabelled")
    print(f"{'curvature':14}{'mislabelled among the most harmful':>36}{'correlation':>14}")
    for name, estimator in ESTIMATORS.items():
        curvature = kfoc.fit(model, data, estimator=estimator, fisher="exact")
        found = kfoc.influence(model, curvature, data, query, damping=DECAY, top=None)
        hits = wrong[found.harmful.indices[:, :TOP]].double().mean()
        predicted = -found.scores[:, chosen] / len(inputs)
        pair = torch.stack([predicted.flatten(), actual.flatten()])
        print(f"{name:14}{hits.item():>36.0%}{torch.corrcoef(pair)[0, 1].item():>14.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
