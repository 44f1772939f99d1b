"""How good the factors are that were timed: relative errors against the exact Fisher blocks.

    python benchmarks/quality.py --workload lenet-256 --methods kfac kfoc

Measured apart from the library, from its own draws: the samples come from hooks of this file, and
for a block `kron(left, right)` of `F = (1/N) sum vec(X) vec(X)^T`

    ||F||^2 = (1/N^2) sum_nm <X_n, X_m>^2        <F, kron> = (1/N) sum_n <X_n, left X_n right>

so that F is never formed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods import METHODS, OURS, kfoc_fit, set_threads
from workloads import Batch, Workload, load


@dataclass
class Samples:
    """A layer's gradients X: whole (N, o, i), or for one position as their two vectors."""

    inputs: Tensor
    grads: Tensor | None

    def squared_norm(self) -> float:
        """`||F||^2`, in float64."""
        products = gram(self.inputs.flatten(1))
        if self.grads is not None:
            products *= gram(self.grads)
        return products.square().mean().item()

    def inner(self, left: Tensor, right: Tensor) -> float:
        """`<F, kron(left, right)>`."""
        if self.grads is None:
            return sum(
                ((left @ x).double() * (x @ right).double()).sum().item() for x in self.inputs
            ) / len(self.inputs)
        by_grad = ((self.grads @ left) * self.grads).sum(1).double()
        by_input = ((self.inputs @ right) * self.inputs).sum(1).double()
        return (by_grad * by_input).mean().item()


def gram(rows: Tensor) -> Tensor:
    """Inner products of all pairs of rows, in float64."""
    rows = rows.double()
    return rows @ rows.T


def positions(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (N, T, i), with the bias column, and output derivatives (N, T, o) of a layer."""
    if isinstance(layer, nn.Conv2d):
        kernel, padding = layer.kernel_size, layer.padding
        assert not isinstance(padding, str)
        x = F.unfold(x, kernel, layer.dilation, padding, layer.stride).mT
        grad = grad.flatten(2).mT
    else:
        x, grad = (v.reshape(len(v), -1, v.shape[-1]) for v in (x, grad))
    return (F.pad(x, (0, 1), value=1.0) if layer.bias is not None else x), grad


def batch_samples(workload: Workload, batch: Batch, index: int) -> dict[str, Samples]:
    """Every layer's samples of one batch, with the labels that the library draws for it."""
    from kfoc.likelihoods.named import LIKELIHOODS

    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        workload.model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (args[0].detach(), out)})
        )
        for name in workload.layers
    ]
    try:
        outputs = workload.model(batch[0])
    finally:
        for handle in handles:
            handle.remove()
    likelihood = LIKELIHOODS[workload.likelihood]
    (cotangent,) = likelihood.cotangents(outputs.detach(), batch[1], "mc", 1, 0, index)
    grads = torch.autograd.grad(outputs, [out for _, out in seen.values()], cotangent)
    found = {}
    for (name, (x, _)), grad in zip(seen.items(), grads, strict=True):
        a, g = positions(workload.model.get_submodule(name), x, grad)
        one = a.shape[1] == 1
        found[name] = Samples(a[:, 0], g[:, 0]) if one else Samples(g.mT @ a, None)
    return found


def all_samples(workload: Workload) -> dict[str, Samples]:
    parts = []
    index = 0
    for batch in workload.batches:
        parts.append(batch_samples(workload, batch, index))
        index += len(batch[0])
    return {
        name: Samples(
            torch.cat([part[name].inputs for part in parts]),
            None
            if parts[0][name].grads is None
            else torch.cat([g for part in parts if (g := part[name].grads) is not None]),
        )
        for name in workload.layers
    }


def relative_error(samples: Samples, left: Tensor, right: Tensor, norm: float) -> float:
    """`||F - kron(left, right)|| / ||F||`, with `norm` for the square of the latter."""
    kron = left.double().square().sum().item() * right.double().square().sum().item()
    squared = 1 + (kron - 2 * samples.inner(left, right)) / norm
    return max(0.0, squared) ** 0.5


def optimum(workload: Workload) -> Any:
    """K-FOC of all samples as one batch, iterated until float32 shows no more change."""
    import kfoc

    x, y = (torch.cat(parts) for parts in zip(*workload.batches, strict=True))
    whole = replace(workload, batches=[(x, y)])
    return kfoc_fit(whole, kfoc.KFOC(rtol=1e-9, max_steps=60))


def compared(samples: Samples, norm: float, block: Any, best: Any) -> dict[str, Any]:
    """A block's relative error, and what it is above the optimum's."""
    error = relative_error(samples, block.left, block.right, norm)
    ideal = relative_error(samples, best.left, best.right, norm)
    return {
        "relative_error": error,
        "optimum": ideal,
        "gap": error - ideal,
        "plan": block.report.plan,
        "steps": block.report.steps,
        "unchecked": block.report.unchecked,
    }


def summary(layers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "layers": layers,
        "mean_relative_error": statistics.mean(v["relative_error"] for v in layers.values()),
        "worst_gap": max(layer["gap"] for layer in layers.values()),
    }


def qualities(workload: Workload, methods: list[str]) -> dict[str, Any]:
    """Of each method of ours: relative errors by layer, beside those of the optimum."""
    curvatures = {method: METHODS[method](workload)()() for method in methods}
    best = optimum(workload)
    layers: dict[str, dict[str, Any]] = {method: {} for method in methods}
    samples = all_samples(workload)
    for name in workload.layers:
        of_layer = samples.pop(name)
        norm = of_layer.squared_norm()
        for method, curvature in curvatures.items():
            layers[method][name] = compared(of_layer, norm, curvature[name], best[name])
    return {method: summary(of_method) for method, of_method in layers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", required=True)
    parser.add_argument("--methods", nargs="+", required=True, choices=[*OURS])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    set_threads(options.threads)
    print(json.dumps(qualities(load(options.workload), options.methods)))


if __name__ == "__main__":
    main()
