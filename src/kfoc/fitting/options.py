"""What a fit is told, checked."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kfoc.common.arguments import check_model, whole
from kfoc.estimators import Estimator
from kfoc.likelihoods.named import check_fisher
from kfoc.model.batches import Predict


def check_options(
    model: nn.Module, estimator: Estimator, fisher: str, predict: Predict | None
) -> None:
    check_model(model)
    if not isinstance(estimator, Estimator):
        raise ValueError(f"estimator must be an instance such as kfoc.KFOC(), found {estimator!r}")
    estimator.check()
    check_fisher(fisher)
    if predict is not None and not callable(predict):
        raise ValueError(
            f"predict must be a function (model, inputs) -> outputs, found {predict!r}"
        )


def counts(mc_samples: int, probes: int, seed: int) -> tuple[int, int, int]:
    seed = whole("seed", seed, -(2**63))
    if seed >= 2**63:
        raise ValueError(f"seed must fit 64 bits, found {seed}")
    return whole("mc_samples", mc_samples, 1), whole("probes", probes, 0), seed


def check_independent(modules: Iterable[tuple[str, nn.Module]]) -> None:
    for name, module in modules:
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"layer {name!r} normalises by the statistics of the batch, so samples are not "
                "independent and have no gradients of their own: call model.eval() (and keep "
                "track_running_stats=True)"
            )
