"""A curvature that is kept up to date batch by batch, as training needs it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kfoc.common.ambient import Plain
from kfoc.curvature.curvature import Curvature
from kfoc.estimators import KFOC, Estimator
from kfoc.files.hints import check_all
from kfoc.fitting.saved import checked, load, state_of
from kfoc.fitting.session import Session
from kfoc.fitting.task import Task, check_independent
from kfoc.layers.rule import own_parameters
from kfoc.likelihoods.base import Likelihood
from kfoc.model.batches import Predict, empty


class Tracker(Plain):
    """The curvature of a stream of batches: `fit`, one batch at a time.

    Between calls the model carries no hooks, and each call leaves it, its gradients and the global
    random state as they were. The model may be in train mode; `BatchNorm` layers are then run by
    their running statistics, as in eval mode, for samples have gradients of their own only so. The
    curvature is in that one respect not that of the function that is being trained.

    Args:
        model: as for `fit`, and so are likelihood, fisher, mc_samples, layers, predict and seed.
        likelihood: "categorical", "gaussian", "bernoulli", or a `Likelihood`.
        estimator: KFOC() by default; any that takes one pass. `KFOC(decay=d)` means `decay=d`.
        decay: what all batches so far count before each new one, in (0, 1]. 1 weighs all samples
            alike, as `fit` does; the parameters change in training, and old batches mislead.
        fisher: "mc", "mc-plain", "exact" or "empirical".
        mc_samples: draws per sample, for "mc" and "mc-plain".
        layers: names or patterns of the layers to treat; None: all that can be.
        predict: `(model, inputs) -> outputs`.
        seed: of the draws; they depend on it and on the number of samples seen so far.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood = "categorical",
        *,
        estimator: Estimator | None = None,
        decay: float = 1.0,
        fisher: str = "mc",
        mc_samples: int = 1,
        layers: str | Iterable[str] | None = None,
        predict: Predict | None = None,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.likelihood = likelihood
        self.estimator = KFOC() if estimator is None else estimator
        self.decay = decay
        self.fisher = fisher
        self.mc_samples = mc_samples
        self.layers = layers
        self.predict = predict
        self.seed = seed
        self._session: Session | None = None
        self._trained: dict[str, bool] = {}  # by parameter, when the layers were selected
        self._failure = ""

    @property
    def num_batches(self) -> int:
        """How many batches have been taken in."""
        return 0 if self._session is None else self._session.batches

    def update(self, inputs: Any, targets: Any = None) -> None:
        """Take in one batch; targets are needed for `fisher="empirical"` alone.

        A batch without samples changes nothing, and does not count.

        Raises:
            ValueError: as `fit` does, and where layers have been replaced, frozen or unfrozen since
                the first batch: see `reset`. Where the model's outputs are at fault, nothing has
                changed; where a layer is, others may have taken the batch in by then, and the
                tracker can be used no more until it is reset or a state is loaded into it.
        """
        self._check_usable()
        self._check_unchanged()
        session, decay = self._begun(), self._decay()
        if empty((inputs, targets)):
            return
        before = session.updates
        with _running_statistics(self.model):
            check_independent(self.model.named_modules())
            try:
                with session.watching():
                    session.take((inputs, targets))
                # Now and not before the next batch, which may turn out to be no good.
                if decay != 1:
                    session.decay(decay)
            except BaseException as error:
                if session.updates != before:
                    self._failure = str(error) or type(error).__name__
                raise

    def reset(self) -> None:
        """Forget all batches, and select the model's layers anew with the next one."""
        self._session = None
        self._failure = ""

    def curvature(self) -> Curvature:
        """The curvature of what has been seen so far; updates may go on afterwards.

        Its `num_samples` is the (rounded) sum of the samples' weights: with decay, how many recent
        samples it is in effect the mean over.
        """
        self._check_usable()
        session = self._session
        if session is None or not session.batches:
            raise ValueError("there is no curvature before the first batch: call update(...)")
        return session.snapshot(max(1, round(session.weight / self._decay())))

    def state_dict(self) -> dict[str, Any]:
        """All that has been collected, in dicts, lists, numbers, strings and tensors."""
        self._check_usable()
        return {"settings": self._settings(), **state_of(self._begun())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where another tracker of the same model and settings was, bit by bit.

        Raises:
            ValueError: a state of other settings, of another model, or of another version.
        """
        check_all(state, {"settings": "str"} | dict.fromkeys(state, "object"))
        if state["settings"] != self._settings():
            raise ValueError(
                f"the state is one of {state['settings']}, and this tracker has {self._settings()}"
            )
        session, trained = self._new(), _trained(self.model)
        device = next(self.model.parameters()).device
        inside = {key: value for key, value in state.items() if key != "settings"}
        load(session, checked(inside, session, device))
        self._session, self._trained, self._failure = session, trained, ""

    def _settings(self) -> str:
        return (
            f"{self.likelihood!r}, {self.estimator}, decay={self._decay()}, fisher={self.fisher!r},"
            f" mc_samples={self.mc_samples}, seed={self.seed}"
        )

    def _decay(self) -> float:
        """The decay, given here or by the estimator."""
        decay = self.decay
        if isinstance(self.estimator, KFOC) and self.estimator.decay is not None:
            if decay not in (1.0, self.estimator.decay):
                raise ValueError(
                    f"decay is {decay} and that of {self.estimator} is another: give one of them"
                )
            decay = self.estimator.decay
        if not 0 < decay <= 1 or not math.isfinite(decay):
            raise ValueError(f"decay must lie in (0, 1], found {decay}")
        return decay

    def _begun(self) -> Session:
        if self._session is None:
            self._session, self._trained = self._new(), _trained(self.model)
        return self._session

    def _new(self) -> Session:
        estimator, decay = self.estimator, self._decay()
        if isinstance(estimator, KFOC) and estimator.decay is not None:
            estimator.check()
            estimator = replace(estimator, decay=None)
        task = Task.checked(
            self.model,
            self.likelihood,
            estimator,
            self.fisher,
            self.mc_samples,
            self.layers,
            self.predict,
            probes=0,
            seed=self.seed,
            verify=True,
        )
        if estimator.pass_limit > 1:
            raise ValueError(
                f"{estimator} needs several passes over the data, and a stream has one: use "
                "kfoc.KFOC(), kfoc.KFAC() or kfoc.Diagonal()"
            )
        return Session(replace(task, estimator=estimator.streaming()) if decay < 1 else task)

    def _check_unchanged(self) -> None:
        """A layer that is another, or trained or frozen by now, has not seen the same batches."""
        if self._session is None:
            return
        held = {k: m for k, m in self.model.named_modules() if own_parameters(m)}
        known, trained = self._session.selection.candidates, _trained(self.model)
        changed = [f"layer {k!r}" for k in [*held, *known] if held.get(k) is not known.get(k)]
        changed += [
            f"requires_grad of {name!r}"
            for name in trained
            if trained[name] != self._trained.get(name, trained[name])
        ]
        if not changed:
            return
        if not self.num_batches:
            self.reset()
            return
        raise ValueError(
            f"{changed[0]} has changed since the first batch, so that its curvature would be of "
            "other batches than the rest: call reset() (optimizer.tracker.reset() of a "
            "NaturalGradient) to begin anew, or leave the model's layers as they are"
        )

    def _check_usable(self) -> None:
        if self._failure:
            raise ValueError(
                "an update failed half-way, so that layers may have seen different data "
                f"({self._failure}): load an earlier state_dict, or begin with a new Tracker"
            )


def _trained(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@contextmanager
def _running_statistics(model: nn.Module) -> Iterator[None]:
    """`BatchNorm` layers in eval mode, where they have statistics to run by."""
    changed = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.training and module.running_mean is not None
    ]
    try:
        for module in changed:
            module.training = False
        yield
    finally:
        for module in changed:
            module.training = True
