"""Training samples that harm: mislabelled digits found by influence, and retraining as a check.

An MLP is trained to the end, with weight decay, on 600 of scikit-learn's 8 x 8 digits, of which a
tenth got a wrong label. For the test digits that it does worst on, the most harmful training digits
by each curvature should be the mislabelled ones; and the predicted changes of loss should be those
that training again without a sample brings, the more so after a few products with the true Fisher.
And a sample's influence on itself should tell the mislabelled ones, at least as well as its loss.

    python examples/influence.py      two minutes
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

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
PRODUCTS = (1, 3, 10)
MEMORIES = ((12, DECAY), (32, 1e-5))  # width and weight decay


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


def train(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    weights: Tensor,
    steps: int,
    decay: float = DECAY,
) -> None:
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
        loss = loss + decay / 2 * sum(p.square().sum() for p in parameters)
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


def gradient_norms(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Of each sample's loss, by all parameters."""

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        outputs = functional_call(model, parameters, (image[None],))
        return nn.functional.cross_entropy(outputs, label[None])

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    rows = vmap(grad(loss), (None, 0, 0))(parameters, inputs, labels)
    return torch.cat([part.flatten(1) for part in rows.values()], 1).norm(dim=1)


def suspicion(
    model: nn.Module, inputs: Tensor, labels: Tensor, decay: float
) -> Iterator[tuple[str, Tensor]]:
    """What a training sample may be suspected by: the usual measures, and its self-influence."""
    with torch.no_grad():
        yield "loss", nn.functional.cross_entropy(model(inputs), labels, reduction="none")
    yield "gradient norm", gradient_norms(model, inputs, labels)
    data = list(zip(inputs.split(100), labels.split(100), strict=True))
    for name, estimator in ESTIMATORS.items():
        curvature = kfoc.fit(model, data, estimator=estimator, fisher="exact")
        yield name, kfoc.self_influence(model, curvature, data, damping=decay)


def found(scores: Tensor, wrong: Tensor) -> float:
    """The share of mislabelled samples among as many with the largest scores as there are."""
    return wrong[scores.argsort(descending=True)[: int(wrong.sum())]].double().mean().item()


def find_mislabelled(inputs: Tensor, labels: Tensor, wrong: Tensor) -> None:
    """Print how many each measure finds, of a small network and of one that knows all by heart."""
    columns: list[dict[str, float]] = []
    for width, decay in MEMORIES:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))
        train(model, inputs, labels, torch.ones(len(inputs)), 1000, decay)
        fitted = (model(inputs).argmax(1) == labels).double().mean()
        measures = suspicion(model, inputs, labels, decay)
        columns.append({"labels fitted": fitted.item()})
        columns[-1] |= {name: found(scores, wrong) for name, scores in measures}
    print(f"{'mislabelled found by':22}" + "".join(f"{w:>4} wide, {d:g}" for w, d in MEMORIES))
    for name in columns[0]:
        print(f"{name:22}" + "".join(f"{column[name]:>16.0%}" for column in columns))


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
    print(f"{'curvature':14}{'mislabelled among the most harmful':>36}{'correlation':>14}", end="")
    print("".join(f"{f'{k} products':>14}" for k in PRODUCTS))
    for name, estimator in ESTIMATORS.items():
        curvature = kfoc.fit(model, data, estimator=estimator, fisher="exact")
        shown = []
        for k in (0, *PRODUCTS):
            scores = kfoc.influence(
                model, curvature, data, query, damping=DECAY, products=k, top=None
            )
            predicted = -scores.scores[:, chosen] / len(inputs)
            pair = torch.stack([predicted.flatten(), actual.flatten()])
            shown.append(f"{torch.corrcoef(pair)[0, 1].item():>14.3f}")
            if not k:
                hits = wrong[scores.harmful.indices[:, :TOP]].double().mean()
        print(f"{name:14}{hits.item():>36.0%}{''.join(shown)}")
    print()
    find_mislabelled(inputs, labels, wrong)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
