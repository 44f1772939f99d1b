"""The code in docs/laplace.md and in the Laplace and influence examples runs as it stands."""

from __future__ import annotations

import re
from types import ModuleType

import pytest
import torch

import kfoc
from documents import executed, script


def example(name: str) -> ModuleType:
    return script(f"examples/{name}.py")


def test_documents(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    scope = executed("docs/laplace.md")
    assert capsys.readouterr().out.startswith("Laplace of 2 layers, prior precision all: ")
    assert scope["prior"].grad is not None
    assert scope["last"].sample().keys() == {"2.weight", "2.bias"}


def test_scores_of_the_laplace_example() -> None:
    module = example("laplace")
    inside, outside = torch.randn(40), torch.randn(30).round()
    inside[:5] = 1.0
    pairs = [float(b > a) + 0.5 * float(a == b) for a in inside for b in outside]
    assert module.auroc(inside, outside) == pytest.approx(sum(pairs) / len(pairs))
    confident = torch.tensor([[0.99, 0.01]] * 8 + [[0.31, 0.69]] * 4)
    labels = torch.tensor([0] * 6 + [1] * 2 + [1] * 3 + [0])
    expected = (8 * abs(6 / 8 - 0.99) + 4 * abs(3 / 4 - 0.69)) / 12
    assert module.calibration_error(confident, labels) == pytest.approx(expected)


# Of a network of two epochs, the prior that predicts best is the largest there is.
@pytest.mark.filterwarnings("ignore:.*largest candidate", "ignore:.*than the network by itself")
def test_laplace_example_on_letters_in_place_of_digits() -> None:
    torch.set_default_dtype(torch.float32)
    module = example("laplace")
    images = module.letters(40, 0)
    assert images.shape == (40, 1, 14, 14)
    assert 0 <= images.min() <= images.max() <= 1
    labels = torch.arange(40) % 10
    splits = [(images[a:b], labels[a:b]) for a, b in ((0, 20), (20, 30), (30, 40))]
    rows = module.compare(
        module.cnn, {"diagonal": kfoc.Diagonal(), "K-FOC": kfoc.KFOC()}, splits, images[:7], 2, 0
    )
    table = module.table("CNN", [rows, rows])
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == list(rows)
    assert all(0 <= row["ECE"] <= 1 and 0 <= row["AUROC"] <= 1 for row in rows.values())


def test_influence_example(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = example("influence")
    few = module.digits(700)
    assert few[0].shape == (700, 64)
    monkeypatch.setattr(module, "digits", lambda count: few)
    monkeypatch.setattr(module, "LEFT_OUT", 4)
    monkeypatch.setattr(module, "PRODUCTS", (3,))
    monkeypatch.setattr(module, "ESTIMATORS", {"K-FOC": kfoc.KFOC()})
    module.main()
    shown, mislabelled = capsys.readouterr().out.split("mislabelled found by")
    ((share, _, after),) = re.findall(r"K-FOC +(\d+)% +(-?\d\.\d+) +(-?\d\.\d+)", shown)
    assert int(share) > 30  # 9% by chance
    assert float(after) > 0.3  # of 4 samples left out
    measures = dict(re.findall(r"(\w[\w -]*\w) +(\d+)% ", mislabelled))
    assert measures.keys() == {"labels fitted", "loss", "gradient norm", "K-FOC"}
    assert all(int(value) > 50 for value in measures.values())
