"""Posteriors of a last linear layer: `python benchmarks/last_linear.py`, as a markdown table.

In closed form, and by the Jacobians of single samples, which are taken where the outputs are
changed after the layer: here by `predict`, which multiplies them by one. Each with the processor
time of the second of two calls, and the peak of resident memory above what there was before.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memory import peak_above


def changed(model: nn.Module, inputs: Any) -> torch.Tensor:
    return model(inputs) * 1.0


def row(what: str, way: str, samples: int, call: Callable[[], Any]) -> str:
    call()
    start = time.process_time()
    call()
    seconds = time.process_time() - start
    return f"| {what} | {way} | {samples} | {seconds:.3f} | {peak_above(call) / 1e6:.0f} |"


def main() -> None:
    import kfoc

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, arguments.features),
        nn.ReLU(),
        nn.Linear(arguments.features, arguments.classes),
    )
    x, y = torch.randn(256, 32), torch.randint(arguments.classes, (256,))
    curvature = kfoc.fit(model, [(x, y)], layers="2")
    closed = kfoc.Laplace(model, curvature)
    general = kfoc.Laplace(model, curvature, predict=changed)
    print("| | way | samples | CPU s | peak MB |\n|---|---|---|---|---|")
    for way, laplace, sizes in (("closed form", closed, (1, 64)), ("Jacobians", general, (1,))):
        for count in sizes:
            some = x[:count]
            for what, call in (
                ("probabilities", lambda of=laplace, some=some: of.probabilities(some)),
                ("covariances", lambda of=laplace, some=some: of.linearised(some)),
            ):
                print(row(what, way, count, call), flush=True)


if __name__ == "__main__":
    main()
