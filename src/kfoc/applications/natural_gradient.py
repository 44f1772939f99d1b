"""An optimizer whose steps are natural gradients by an online curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kfoc.applications.preconditioner import Preconditioner
from kfoc.blocks import METHODS, Damping
from kfoc.common.ambient import Plain, callers
from kfoc.common.arguments import check_model, one_of, whole
from kfoc.files.encoding import decoded, encoded
from kfoc.files.hints import check_all
from kfoc.model.batches import mapped
from kfoc.tracker import Tracker

OTHERS = ("adamw", "sgd")
Schedule = Callable[[int], float]
_KEY = "curvature"  # of a state_dict, and what lies there
_STATE = {
    "steps": "int",
    "observed": "int",
    "inverted": "int",
    "tracker": "dict",
    "preconditioner": "dict | None",
}


class NaturalGradient(Plain, torch.optim.Optimizer):
    """Natural gradient descent by K-FOC, or any other estimator of one pass.

    Parameters of layers that the curvature covers move along `d = (scale * F + damping * I)^-1 g`,
    all others (skipped layers, and layers of which a parameter has no gradient or is not among
    `params`) by AdamW or SGD. Data reaches the curvature by `observe`, in every iteration:

        optimizer = kfoc.NaturalGradient(model, lr=0.1)
        for inputs, targets in loader:
            optimizer.observe(inputs)  # by default with labels drawn from the model: no targets
            optimizer.zero_grad()
            loss(model(inputs), targets).backward()
            optimizer.step()

    F is the mean over samples of a sample's Fisher. Where the loss is also a mean over something
    within the sample, such as the T tokens of a sequence, `scale=1/T` puts both on one footing.

    Gradients are read from `.grad` as they are at `step`: clipped, unscaled, averaged over ranks.
    Schedulers change `lr`. Parameter groups may have their own lr, momentum, weight_decay and
    other_scale.

    Args:
        model: whose parameters are trained.
        lr: factor of the step; natural gradients of a mean loss take values near 0.1 to 1.
        params: parameters of the model, or groups of them; None: all that require gradients.
        damping: a number, or a function of the number of steps taken so far.
        method: "pi", factored Tikhonov damping (Martens & Grosse 2015), inverted by Cholesky; or
            "exact", by eigendecompositions: about three times the inversion, twice the solve.
        scale: of F against the loss, see above.
        update_every: steps from one batch that is taken into the curvature to the next. Within the
            first interval, in which all changes fast, the steps 1, 2, 4, ... have one too.
        invert_every: steps from one inversion to the next, likewise; None: `update_every`.
        samples: at most so many samples of a batch, its first, go into the curvature; None: all.
        kl_clip: d is scaled down to `sum lr^2 <g, d> <= kl_clip` (Ba, Grosse & Martens 2017), about
            twice the KL divergence that the step may cause; None: never.
        momentum: of the (clipped) steps d, and of "sgd".
        weight_decay: decoupled: parameters shrink by `lr * weight_decay` at each step.
        other: "adamw" (betas 0.9 and 0.999) or "sgd", for parameters that no block covers.
        other_scale: their learning rate is `other_scale * lr`.
        tracking: the arguments of `kfoc.Tracker`: likelihood, estimator, decay (here 0.95 unless it
            is given, and per update), fisher, mc_samples, layers, predict, seed.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        *,
        params: Iterable[Any] | None = None,
        damping: float | Schedule = 1e-2,
        method: str = "pi",
        scale: float = 1.0,
        update_every: int = 10,
        invert_every: int | None = None,
        samples: int | None = 128,
        kl_clip: float | None = 3e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        other: str = "adamw",
        other_scale: float = 0.01,
        **tracking: Any,
    ) -> None:
        update_every = whole("update_every", update_every, 1)
        invert_every = update_every if invert_every is None else invert_every
        one_of("method", method, METHODS)
        one_of("other", other, OTHERS)
        whole("invert_every", invert_every, 1)
        if samples is not None:
            whole("samples", samples, 1)
        _check_numbers(lr=lr, momentum=momentum, weight_decay=weight_decay, other_scale=other_scale)
        if kl_clip is not None and not 0 < kl_clip < math.inf:
            raise ValueError(f"kl_clip must be positive, or None for no limit, found {kl_clip}")
        check_model(model)
        if not callable(damping):
            Damping(damping, scale, method)  # says what is wrong with any of them
        chosen = [p for p in model.parameters() if p.requires_grad] if params is None else params
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(chosen, defaults | {"other_scale": other_scale})
        self.model = model
        estimator_decay = getattr(tracking.get("estimator"), "decay", None)
        default_decay = {} if estimator_decay is not None else {"decay": 0.95}
        self.tracker = Tracker(model, **(default_decay | tracking))
        self.damping, self.method, self.scale = damping, method, scale
        self.update_every, self.invert_every, self.samples = update_every, invert_every, samples
        self.kl_clip, self.other = kl_clip, other
        self.steps = 0
        self._observed = -1  # the step before which a batch was last taken in
        self._inverted = -1
        self._preconditioner: Preconditioner | None = None

    def observe(self, inputs: Any, targets: Any = None) -> None:
        """Take a batch into the curvature, if one is due before the coming step.

        Call it in every iteration, before or after the backward pass: it returns at once between
        updates, and leaves the model and its gradients as they are.

        Args:
            inputs: what the model (or `predict`) is called with.
            targets: for `fisher="empirical"` alone.
        """
        begun = self.tracker.num_batches > 0
        due = _due(self.steps, self.update_every) and self._observed != self.steps
        if begun and not due:
            return
        if self.samples is not None:
            inputs, targets = _first(inputs, self.samples), _first(targets, self.samples)
        self.tracker.update(inputs, targets)
        self._observed = self.steps
        if not begun:
            self._preconditioner = None  # there is one where the tracker has been reset

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step from the gradients; with a closure, after calling it once, returning its value.

        Raises:
            ValueError: no batch has been observed yet, gradients that are sparse, or parameters
                that are not the model's.
        """
        loss = None
        if closure is not None:
            with callers(), torch.enable_grad():
                loss = closure()
        owners = self._owners()
        gradients = {name: _gradient(name, p) for name, (p, _) in owners.items()}
        directions = self._current().solve(gradients)
        shrink = self._kl_factor(directions, gradients, owners)
        for name, (parameter, group) in owners.items():
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            if name in directions:
                moved = self._with_momentum(parameter, directions[name] * shrink, group)
                parameter.add_(moved, alpha=-group["lr"])
            elif self.other == "sgd":
                moved = self._with_momentum(parameter, gradients[name], group)
                parameter.add_(moved, alpha=-group["lr"] * group["other_scale"])
            else:
                self._adam(parameter, gradients[name], group["lr"] * group["other_scale"])
        self.steps += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As of every optimizer, and all that the curvature needs to go on bit by bit."""
        own = {
            "steps": self.steps,
            "observed": self._observed,
            "inverted": self._inverted,
            "tracker": self.tracker.state_dict(),
            "preconditioner": encoded(self._preconditioner),
        }
        return super().state_dict() | {_KEY: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where an optimizer of the same model and settings was.

        Raises:
            ValueError: a state of another optimizer, of other settings or of another version.
        """
        if _KEY not in state_dict:
            raise ValueError(
                f"the state has no {_KEY!r}: it is one of another optimizer, not of "
                "kfoc.NaturalGradient"
            )
        own = state_dict[_KEY]
        check_all(own, _STATE)
        device = next(self.model.parameters()).device
        preconditioner = decoded(own["preconditioner"], device)
        if not isinstance(preconditioner, Preconditioner | None):
            raise ValueError("'preconditioner' must be one, or None")
        self.tracker.load_state_dict(own["tracker"])
        super().load_state_dict({k: v for k, v in state_dict.items() if k != _KEY})
        self._preconditioner = preconditioner
        self.steps, self._observed = own["steps"], own["observed"]
        self._inverted = own["inverted"]

    def _owners(self) -> dict[str, tuple[Tensor, dict[str, Any]]]:
        """Parameter name -> the parameter and its group, of those that have a gradient."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        owners = {}
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if id(parameter) not in names:
                    raise ValueError(
                        f"params: group {number} has a parameter of shape "
                        f"{tuple(parameter.shape)} that is not the model's"
                    )
                if parameter.grad is not None:
                    owners[names[id(parameter)]] = parameter, group
        return owners

    def _current(self) -> Preconditioner:
        """The inverse, formed anew where it is due."""
        if not self.tracker.num_batches:
            raise ValueError(
                "there is no curvature yet: call optimizer.observe(inputs) in every iteration, "
                "before optimizer.step()"
            )
        due = _due(self.steps, self.invert_every) and self._inverted != self.steps
        if self._preconditioner is None or due:
            damping = self.damping(self.steps) if callable(self.damping) else self.damping
            self._preconditioner = Preconditioner.of(
                self.tracker.curvature(), damping, method=self.method, scale=self.scale
            )
            self._inverted = self.steps
        return self._preconditioner

    def _kl_factor(
        self,
        directions: dict[str, Tensor],
        gradients: dict[str, Tensor],
        owners: dict[str, tuple[Tensor, dict[str, Any]]],
    ) -> float:
        """What the directions are multiplied with to keep to `kl_clip`; at most 1."""
        if self.kl_clip is None or not directions:
            return 1.0
        terms = [
            owners[name][1]["lr"] ** 2 * (direction * gradients[name]).sum().double()
            for name, direction in directions.items()
        ]
        size = torch.stack([term.to(terms[0].device) for term in terms]).sum().item()
        return min(1.0, math.sqrt(self.kl_clip / size)) if size > 0 else 1.0

    def _with_momentum(self, parameter: Tensor, direction: Tensor, group: dict[str, Any]) -> Tensor:
        if not group["momentum"]:
            return direction
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = direction.clone(memory_format=torch.preserve_format)
        else:
            state["momentum"].mul_(group["momentum"]).add_(direction)
        return state["momentum"]

    def _adam(self, parameter: Tensor, gradient: Tensor, lr: float) -> None:
        """Adam (Kingma & Ba 2015) with its usual numbers; the decay of weights is done before."""
        state = self.state[parameter]
        if "mean" not in state:
            state["steps"] = 0
            state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        state["steps"] += 1
        state["mean"].lerp_(gradient, 0.1)
        state["square"].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        mean = state["mean"] / (1 - 0.9 ** state["steps"])
        root = (state["square"] / (1 - 0.999 ** state["steps"])).sqrt_().add_(1e-8)
        parameter.addcdiv_(mean, root, value=-lr)


def _due(step: int, every: int) -> bool:
    """At every so many steps; in the first interval, in which all changes fast, at 1, 2, 4, ..."""
    return step % every == 0 or (step < every and step & (step - 1) == 0)


def _gradient(name: str, parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    if gradient is None or gradient.is_sparse:
        raise ValueError(f"the gradient of {name!r} is sparse: build its layer with sparse=False")
    return gradient


def _first(value: Any, count: int) -> Any:
    """The first `count` samples of the tensors in a batch."""
    return mapped(value, lambda tensor: tensor[:count] if tensor.ndim else tensor)


def _check_numbers(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 <= number < math.inf:
            raise ValueError(f"{name} must be finite and not negative, found {number}")
