"""Part a: how close each curvature is to the exact blocks, by network, stage and Fisher type.

The Fisher is that of the labels that a model expects, exactly, or of the observed ones.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from typing import Any

import kfoc
from estimators import ESTIMATORS
from kfoc.reproduce.results import Row, Unit
from networks import NETWORKS, SEEDS
from subjects import STAGES, Data, Subject, layers, trained

SAMPLES, BATCH, PROBES = 512, 128, 64
SEQUENCES = 32  # of 16 letters each, so as many labels
SUBJECTS = {
    name: Subject(name, network.build, network.everything, STAGES, "exact")
    for name, network in NETWORKS.items()
}


def settings(quick: bool) -> dict[str, Any]:
    return {
        "samples": 64 if quick else SAMPLES,
        "sequences": SEQUENCES,
        "batch": BATCH,
        "probes": PROBES,
        "seeds": [0] if quick else list(SEEDS),
        "stages (steps of Adam)": STAGES,
    }


def units(quick: bool) -> Iterator[Unit]:
    for name in ("tokens", "ResNet") if quick else SUBJECTS:
        for seed in settings(quick)["seeds"]:
            unit = {"network": name, "seed": seed}
            yield unit, functools.partial(of_network, SUBJECTS[name], seed, quick)


def of_network(subject: Subject, seed: int, quick: bool) -> Iterator[Row]:
    count = settings(quick)["sequences" if subject.name == "GPT" else "samples"]
    inputs, targets = (part[:count] for part in subject.data())
    data = list(zip(inputs.split(BATCH), targets.split(BATCH), strict=True))
    for stage, model in trained(subject, seed, quick):
        for fisher in (subject.fisher, "empirical"):
            for method in ESTIMATORS:
                row = {"stage": stage, "fisher": fisher, "method": method}
                yield row | errors(model, data, subject, fisher, method, seed)


def errors(
    model: Any, data: list[Data], subject: Subject, fisher: str, method: str, seed: int
) -> dict[str, Any]:
    """Relative errors by layer and their mean; the probes are the same for all methods."""
    curvature = kfoc.fit(
        model, data, estimator=ESTIMATORS[method], fisher=fisher, layers=layers(model),
        probes=PROBES, seed=seed,
    )  # fmt: skip
    # A layer that no sample moves (F = 0) has no relative error.
    found = {k: b.relative_error for k, b in curvature.items() if b.frobenius_norm() > 0}
    deviations = [curvature[layer].relative_error_standard_error or 0.0 for layer in found]
    return {
        "error": statistics.fmean(found.values()),
        "worst standard error": max(deviations),
        "layers": found,
    }
