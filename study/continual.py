"""Part e: five tasks one after another, with examples/consolidation.py on fewer digits."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import kfoc
from borrowed import borrowed
from kfoc.reproduce.results import Row, Unit

SIZES, EPOCHS, SEEDS = (200, 50, 100), 10, (0, 1, 2, 3, 4, 5)
STRENGTHS = (30.0, 100.0, 300.0, 1e3, 1e4, 1e5)  # times 1 / (samples of a task)
# The example's names of its methods, and what they are called here.
METHODS = {
    "no penalty": "no penalty",
    "diagonal (EWC)": "diagonal",
    "K-FAC": "K-FAC",
    "K-FOC": "K-FOC",
    "EKFAC": "EKFAC",
    "EK-FOC": "EK-FOC",
}


def settings(quick: bool) -> dict[str, Any]:
    return {
        "train, validation, test of a digit": (20, 5, 10) if quick else SIZES,
        "epochs": 2 if quick else EPOCHS,
        "seeds": [0] if quick else list(SEEDS),
        "strengths": STRENGTHS[1:2] if quick else STRENGTHS,
    }


def units(quick: bool) -> Iterator[Unit]:
    example, chosen = borrowed("examples/consolidation.py"), settings(quick)
    example.METHODS.setdefault("EKFAC", (kfoc.EigenCorrected(kfoc.KFAC()), "each"))
    sequence = example.tasks(*chosen["train, validation, test of a digit"])
    for name, method in METHODS.items():
        strengths = chosen["strengths"] if method != "no penalty" else (0.0,)
        for strength, seed in itertools.product(strengths, chosen["seeds"]):
            unit = {"method": method, "strength": strength, "seed": seed}
            yield unit, functools.partial(of_method, name, strength, sequence, seed, quick)


def of_method(name: str, strength: float, sequence: Any, seed: int, quick: bool) -> list[Row]:
    """Accuracies at the end, and the forgetting."""
    run = borrowed("examples/consolidation.py").run
    return [asdict(run(name, strength, sequence, settings(quick)["epochs"], seed))]
