"""What is to be fitted: all that a fit's numbers depend on, but the data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kfoc.common.arguments import check_model, check_predict, whole
from kfoc.estimators import Estimator
from kfoc.likelihoods.base import Likelihood
from kfoc.likelihoods.named import check_fisher, resolved
from kfoc.model.batches import Predict


@dataclass(frozen=True)
class Task:
    """What is to be fitted, as `fit` is told it, checked.

    Attributes:
        layers: names and patterns; None: all that can be treated.
        probes: how many for each block.
        verify: whether the layers' samples are checked, see `kfoc.model.proof`.
    """

    model: nn.Module
    likelihood: Likelihood
    estimator: Estimator
    fisher: str
    mc_samples: int
    layers: tuple[str, ...] | None
    predict: Predict | None
    probes: int
    seed: int
    verify: bool

    @staticmethod
    def checked(
        model: nn.Module,
        likelihood: str | Likelihood,
        estimator: Estimator,
        fisher: str,
        mc_samples: int,
        layers: str | Iterable[str] | None,
        predict: Predict | None,
        probes: int,
        seed: int,
        verify: bool,
    ) -> Task:
        """The task, of arguments as users give them.

        Raises:
            ValueError: an argument that makes no sense.
        """
        check_model(model)
        if not isinstance(estimator, Estimator):
            raise ValueError(
                f"estimator must be an instance such as kfoc.KFOC(), found {estimator!r}"
            )
        estimator.check()
        check_fisher(fisher)
        check_predict(predict)
        seed = whole("seed", seed, -(2**63))
        if seed >= 2**63:
            raise ValueError(f"seed must fit 64 bits, found {seed}")
        return Task(
            model,
            resolved(likelihood),
            estimator,
            fisher,
            whole("mc_samples", mc_samples, 1),
            (layers,) if isinstance(layers, str) else None if layers is None else tuple(layers),
            predict,
            whole("probes", probes, 0),
            seed,
            verify,
        )

    @property
    def drawn(self) -> bool:
        """Whether F is one of drawn labels, which others could have been."""
        return self.fisher.startswith("mc")


def check_independent(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raises ValueError for a module by name whose outputs depend on other samples."""
    for name, module in modules:
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"layer {name!r} normalises by the statistics of the batch, so samples are not "
                "independent and have no gradients of their own: call model.eval() (and keep "
                "track_running_stats=True)"
            )
