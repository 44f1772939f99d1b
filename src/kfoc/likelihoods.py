"""Likelihood and Fisher type to output cotangents, formed from the model's outputs alone.

A cotangent is a derivative of `ln p(y | x)` by the outputs, per sample and not reduced, so the
reduction of the user's loss never enters. Draws are a function of the seed and of the sample's
index in the data set, so they do not depend on batch size, pass, rank or the global generator.

Of a sure model nearly all of the Fisher comes from labels that are hardly ever drawn. "mc" draws
by what a label contributes and weights it for that (docs/draws.md); "mc-plain" from the model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

FISHER_TYPES = ("mc", "mc-plain", "exact", "empirical")

Integers = TypeVar("Integers", Tensor, "np.ndarray[Any, Any]")


@dataclass(frozen=True)
class Draws:
    """Random numbers that depend on (seed, sample index, direction, place) alone.

    Attributes:
        seed: of the draws.
        first_index: the first sample's position in the data set.
        direction: which of the draws of a sample.
        total: the draws of a sample, `mc_samples`.
    """

    seed: int
    first_index: int
    direction: int = 0
    total: int = 1

    def uniform(self, count: int, places: int, device: torch.device) -> Tensor:
        """(count, places), float64 in (0, 1), for the samples from `first_index` on."""
        key = _mix(_mix(self.seed) + self.direction)
        first, last = self.first_index, self.first_index + count
        # In the middle of their interval: never 0, never 1.
        if device.type == "cpu":  # NumPy starts on a few numbers in a fraction of torch's time
            counted = np.arange(first, last, dtype=np.uint64)
            numbers = _bits(counted, np.arange(places, dtype=np.uint64), key).astype(np.float64)
            numbers += 0.5
            numbers /= 2**53
            return torch.tensor(numbers)  # in memory of torch's: NumPy's lies anywhere
        indices = torch.arange(first, last, device=device)
        bits = _bits(indices, torch.arange(places, device=device), key)
        return bits.double().add_(0.5).div_(2**53)

    def signs(self, count: int, places: int, device: torch.device) -> Tensor:
        """(count, places), float64: 1 or -1, by the halves of `uniform`."""
        return 1 - 2 * self.uniform(count, places, device).mul_(2).floor_().clamp_(max=1)

    def spread(self, count: int, places: int, device: torch.device) -> Tensor:
        """(count, places), float64 in (0, 1]: this direction's point of systematic sampling.

        The points of a place are `1 / total` apart. Where they begin is in the bits of the first
        direction's `uniform` that its sign leaves over: independent of all signs.
        """
        step = self.direction % self.total
        first = replace(self, direction=self.direction - step).uniform(count, places, device)
        # Not 0, where a search finds the first class whatever its probability.
        return first.mul_(2).remainder_(1).neg_().add_(1 + step).div_(self.total)


# SplitMix64 (Steele, Lea & Flood 2014): a counter in steps of gamma, through a finaliser that
# spreads every bit. For Python's integers, NumPy's unsigned and torch's signed ones, which wrap.
_GAMMA = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _bits(indices: Integers, places: Integers, key: int) -> Integers:
    """53 bits each, (count, places). Every index starts a sequence of its own, in `places` steps.

    Works in the memory of its arguments.
    """
    indices *= _wrapped(_GAMMA, indices)
    indices += _wrapped(key, indices)
    values = _mixed(indices)[:, None]
    if places.shape[0] != 1:
        places *= _wrapped(_GAMMA, places)
        values = values + places
    values = _mixed(values)
    values >>= 11
    if isinstance(values, Tensor):
        values &= 2**53 - 1
    return values


def _mixed(values: Integers) -> Integers:
    values = _folded(values, 30)
    values *= _wrapped(_FIRST, values)
    values = _folded(values, 27)
    values *= _wrapped(_SECOND, values)
    return _folded(values, 31)


def _mix(value: int) -> int:
    value = (value + _GAMMA) % 2**64
    value = (value ^ value >> 30) * _FIRST % 2**64
    value = (value ^ value >> 27) * _SECOND % 2**64
    return value ^ value >> 31


def _wrapped(value: int, like: Integers) -> int:
    """An unsigned number of 64 bits, as torch has it."""
    return value - 2**64 if value >= 2**63 and isinstance(like, Tensor) else value


def _folded(values: Integers, bits: int) -> Integers:
    """`values ^ (values >> bits)` with a logical shift; torch shifts signed integers by sign."""
    shifted = values >> bits
    if isinstance(shifted, Tensor):
        shifted &= 2 ** (64 - bits) - 1
    shifted ^= values
    return shifted


class Likelihood(ABC):
    """What the outputs mean. Subclass it for a likelihood of your own.

    All cotangents have the shape of the outputs, whose first dimension is the samples.
    """

    @abstractmethod
    def check(self, outputs: Tensor, targets: object, fisher: str) -> None:
        """Raise ValueError where outputs or targets do not fit."""

    @abstractmethod
    def drawn(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        """The cotangent at labels drawn from the model."""

    def weighted(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        """A random cotangent of mean zero and of the covariance of `drawn`, for less variance.

        `drawn` where a likelihood has no better one.
        """
        return self.drawn(outputs, targets, draws)

    @abstractmethod
    def exact(self, outputs: Tensor, targets: object) -> Iterator[Tensor]:
        """Cotangents whose outer products add up to the expectation over the model's labels."""

    @abstractmethod
    def observed(self, outputs: Tensor, targets: object) -> Tensor:
        """The cotangent at the observed labels."""

    def settled(self, outputs: Tensor, targets: object) -> Likelihood:
        """The likelihood for this batch and those after it, where a batch leaves something open."""
        return self

    def cotangents(
        self, outputs: Tensor, targets: object, fisher: str, mc_samples: int, seed: int, index: int
    ) -> Iterator[Tensor]:
        """All directions of a Fisher type (design of kfoc, section 1), one at a time.

        Args:
            outputs: (N, ...), detached.
            targets: the batch's labels; may be None but for "empirical".
            fisher: "mc" (of `weighted`), "mc-plain" (of `drawn`), "exact" or "empirical".
            mc_samples: directions of the first two, each scaled by `1 / sqrt(mc_samples)`.
            seed: of the draws.
            index: of the draws: the first sample's position in the data set.
        """
        self.check(outputs, targets, fisher)
        if fisher in ("mc", "mc-plain"):
            draw = self._weighted() if fisher == "mc" else self.drawn
            for direction in range(mc_samples):
                cotangent = draw(outputs, targets, Draws(seed, index, direction, mc_samples))
                yield cotangent if mc_samples == 1 else cotangent / math.sqrt(mc_samples)
        elif fisher == "exact":
            yield from self.exact(outputs, targets)
        else:
            yield self.observed(outputs, targets)

    def _weighted(self) -> Callable[[Tensor, object, Draws], Tensor]:
        """`weighted`; of a subclass that has only `drawn` anew, that: it may mean other labels."""
        own = next(c for c in type(self).__mro__ if {"weighted", "drawn"} & vars(c).keys())
        return self.weighted if "weighted" in vars(own) else self.drawn


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Class labels; the outputs are logits.

    Attributes:
        class_dim: the dimension of the classes. None: the last one for outputs of two or three
            dimensions (sequences: (N, T, C)), dimension 1 for more (images: (N, C, H, W)), and
            whichever fits where integer labels are given. The first batch settles it.
        ignore_index: labels of this value have no influence, as in `nn.CrossEntropyLoss`.
    """

    class_dim: int | None = None
    ignore_index: int = -100

    def __post_init__(self) -> None:
        for name in ("class_dim", "ignore_index"):
            value = getattr(self, name)
            allowed = value is None and name == "class_dim"
            if not allowed and (isinstance(value, bool) or not hasattr(value, "__index__")):
                raise ValueError(f"{name} of Categorical must be a whole number, found {value!r}")

    def check(self, outputs: Tensor, targets: object, fisher: str) -> None:
        if outputs.ndim < 2:
            raise ValueError(
                "categorical outputs must be logits of shape (N, C), (N, T, C) or (N, C, ...), "
                f"found {tuple(outputs.shape)}"
            )
        if self.class_dim is not None and not 0 < self.class_dim % outputs.ndim == (
            self.class_dim + (outputs.ndim if self.class_dim < 0 else 0)
        ):
            raise ValueError(
                f"class_dim is {self.class_dim}, and must be a dimension of the outputs of shape "
                f"{tuple(outputs.shape)}, and not the first, which is the samples'"
            )
        labels = _labels(targets)
        if outputs.shape[self._dim(outputs, labels)] == 1:
            raise ValueError(
                f"categorical outputs of shape {tuple(outputs.shape)} have a single class, whose "
                'probability is always 1: for a single logit, likelihood="bernoulli"'
            )
        if labels is None:
            if fisher == "empirical":
                raise ValueError(
                    f'fisher="empirical" needs integer class labels, found {_described(targets)}'
                )
            return
        classes = outputs.shape[self._dim(outputs, labels)]
        wrong = (labels != self.ignore_index) & ((labels < 0) | (labels >= classes))
        if wrong.any():
            raise ValueError(
                f"label {labels[wrong][0].item()} is out of range for {classes} classes "
                f"(ignore_index is {self.ignore_index})"
            )

    def settled(self, outputs: Tensor, targets: object) -> Categorical:
        if self.class_dim is not None or outputs.ndim < 3:
            return self
        dim = self._dim(outputs, _labels(targets))
        return replace(self, class_dim=1 if dim == 1 else -1)

    def _dim(self, outputs: Tensor, labels: Tensor | None) -> int:
        """The class dimension, settled by the labels' shape where they are given."""
        if self.class_dim is not None:
            dim = self.class_dim % outputs.ndim
            if labels is not None and tuple(labels.shape) != _without(outputs.shape, dim):
                raise self._misfit(outputs, labels)
            return dim
        if labels is None:
            return outputs.ndim - 1 if outputs.ndim <= 3 else 1
        fitting = [
            dim
            for dim in sorted({1, outputs.ndim - 1})
            if tuple(labels.shape) == _without(outputs.shape, dim)
        ]
        if not fitting:
            raise self._misfit(outputs, labels)
        if len(fitting) > 1:
            raise ValueError(
                f"outputs of shape {tuple(outputs.shape)} have their classes in dimension 1 or in "
                "the last one: say which by likelihood=kfoc.Categorical(class_dim=...)"
            )
        return fitting[0]

    def _misfit(self, outputs: Tensor, labels: Tensor) -> ValueError:
        return ValueError(
            f"labels of shape {tuple(labels.shape)} do not fit categorical outputs of shape "
            f"{tuple(outputs.shape)}: they must lack the class dimension"
            + (f" ({self.class_dim}, given or that of earlier batches)" if self.class_dim else "")
            + " and nothing else"
        )

    def _probabilities(self, outputs: Tensor, targets: object) -> tuple[Tensor, Tensor, int]:
        """Probabilities (N, P, C), the mask (N, P) of labels that count, and the class dim."""
        labels = _labels(targets)
        dim = self._dim(outputs, labels)
        moved = outputs.movedim(dim, -1)
        probabilities = moved.softmax(-1).reshape(len(outputs), -1, moved.shape[-1])
        if labels is None:
            return probabilities, probabilities.new_ones(probabilities.shape[:2]), dim
        counts = (labels != self.ignore_index).reshape(len(outputs), -1)
        return probabilities, counts.to(probabilities), dim

    def _shaped(self, values: Tensor, outputs: Tensor, dim: int) -> Tensor:
        """From (N, P, C) back to the shape of the outputs."""
        return values.view(outputs.movedim(dim, -1).shape).movedim(-1, dim)

    def drawn(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        probabilities, counts, dim = self._probabilities(outputs, targets)
        cumulative = probabilities.double().cumsum(-1)
        count, places, _ = probabilities.shape
        uniform = draws.uniform(count, places, outputs.device)[..., None]
        labels = torch.searchsorted(cumulative, uniform * cumulative[..., -1:])
        cotangent = _residuals(probabilities, labels)
        return self._shaped(cotangent * counts[..., None], outputs, dim)

    def weighted(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        """`s r / |r| sqrt(1 - |p|^2)` with r = e_c - p, the class c drawn by p_c |r|^2."""
        p, counts, dim = self._probabilities(outputs.double(), targets)
        count, places, _ = p.shape
        likeliest, top = p.max(-1, keepdim=True)
        others = p.scatter(-1, top, 0)
        # 1 - p of the likeliest class and what follows from it as sums: 1 - p loses all digits.
        rest, squares = others.sum(-1, keepdim=True), others.square_().sum(-1, keepdim=True)
        norms = torch.sub(1 + likeliest.square() + squares, p, alpha=2)  # |e_c - p|^2
        norms.scatter_(-1, top, rest.square() + squares)
        size = rest * (1 + likeliest) - squares  # 1 - |p|^2
        points = draws.spread(count, places, outputs.device)[..., None]
        cumulative = norms.mul_(p).cumsum_(-1)  # in place: (N, P, C) is large for a vocabulary
        labels = torch.searchsorted(cumulative, points * cumulative[..., -1:])
        cotangent = _residuals(p, labels)
        length = cotangent.norm(dim=-1, keepdim=True)
        signs = draws.signs(count, places, outputs.device) * counts
        # Where p is one-hot both may be zero, and there is nothing to draw.
        cotangent *= size.sqrt() / length.clamp_min(torch.finfo(p.dtype).tiny) * signs[..., None]
        return self._shaped(cotangent.to(outputs), outputs, dim)

    def exact(self, outputs: Tensor, targets: object) -> Iterator[Tensor]:
        probabilities, counts, dim = self._probabilities(outputs, targets)
        _, places, classes = probabilities.shape
        for place in range(places):
            for c in range(classes):
                p = probabilities[:, place]
                direction = _residuals(p, torch.full_like(p[:, :1], c, dtype=torch.long))
                cotangent = torch.zeros_like(probabilities)
                weight = p[:, c].sqrt() * counts[:, place]
                cotangent[:, place] = direction * weight[:, None]
                yield self._shaped(cotangent, outputs, dim)

    def observed(self, outputs: Tensor, targets: object) -> Tensor:
        probabilities, counts, dim = self._probabilities(outputs, targets)
        labels = _labels(targets)
        assert labels is not None
        chosen = labels.reshape(len(outputs), -1).long().clamp_min(0)
        chosen = torch.where(counts.bool(), chosen, 0)
        cotangent = _residuals(probabilities, chosen[..., None])
        return self._shaped(cotangent * counts[..., None], outputs, dim)


def _residuals(p: Tensor, labels: Tensor) -> Tensor:
    """e_c - p (..., C) at the labels c (..., 1); its 1 - p_c, as a sum, keeps its digits."""
    others = p.scatter(-1, labels, 0)
    return others.neg().scatter_(-1, labels, others.sum(-1, keepdim=True))


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Real targets with unit variance around the outputs, of any shape (N, ...).

    `-ln p` is half the summed squared error, up to a constant.
    """

    def check(self, outputs: Tensor, targets: object, fisher: str) -> None:
        if fisher == "empirical":
            _check_targets("gaussian", outputs, targets)

    def drawn(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        count = outputs.shape[0]
        uniform = draws.uniform(count, outputs.numel() // count, outputs.device)
        return torch.special.ndtri(uniform).to(outputs).view(outputs.shape)

    def weighted(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        """A random sign for each output: the size of normal draws is all they vary in."""
        signs = draws.signs(len(outputs), outputs[0].numel(), outputs.device)
        return signs.to(outputs).view(outputs.shape)

    def exact(self, outputs: Tensor, targets: object) -> Iterator[Tensor]:
        return _unit_directions(outputs, torch.ones_like(outputs))

    def observed(self, outputs: Tensor, targets: object) -> Tensor:
        assert isinstance(targets, Tensor)
        return targets.to(outputs) - outputs


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Independent binary labels of any shape (N, ...); the outputs are logits."""

    def check(self, outputs: Tensor, targets: object, fisher: str) -> None:
        if fisher != "empirical":
            return
        labels = _check_targets("bernoulli", outputs, targets)
        wrong = (labels < 0) | (labels > 1)
        if wrong.any():
            raise ValueError(
                f"label {labels[wrong][0].item()} is out of range for a bernoulli likelihood, "
                "whose labels lie between 0 and 1"
            )

    def drawn(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        uniform = draws.uniform(len(outputs), outputs[0].numel(), outputs.device)
        probabilities = outputs.sigmoid()
        labels = uniform.view(outputs.shape) < probabilities
        return torch.where(labels, (-outputs).sigmoid(), -probabilities)

    def weighted(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        """A random sign for each output, times its standard deviation."""
        signs = draws.signs(len(outputs), outputs[0].numel(), outputs.device)
        return signs.to(outputs).view(outputs.shape) * self._deviations(outputs)

    def exact(self, outputs: Tensor, targets: object) -> Iterator[Tensor]:
        return _unit_directions(outputs, self._deviations(outputs))

    def _deviations(self, outputs: Tensor) -> Tensor:
        """sqrt(p (1 - p)); 1 - sigmoid(z) is sigmoid(-z), which keeps its digits."""
        return outputs.sigmoid().sqrt() * (-outputs).sigmoid().sqrt()

    def observed(self, outputs: Tensor, targets: object) -> Tensor:
        assert isinstance(targets, Tensor)
        labels = targets.to(outputs)  # y - p, with p near 1 too
        return labels * (-outputs).sigmoid() - (1 - labels) * outputs.sigmoid()


def _unit_directions(outputs: Tensor, weights: Tensor) -> Iterator[Tensor]:
    """One cotangent per output, which has that output's weight there and zeros elsewhere."""
    flat = weights.reshape(len(outputs), -1)
    for c in range(flat.shape[1]):
        cotangent = torch.zeros_like(flat)
        cotangent[:, c] = flat[:, c]
        yield cotangent.view(outputs.shape)


def _labels(targets: object) -> Tensor | None:
    """Integer labels, or None where the targets are something else, which "mc" can do without."""
    if isinstance(targets, Tensor) and not (targets.is_floating_point() or targets.is_complex()):
        return targets
    return None


def _check_targets(likelihood: str, outputs: Tensor, targets: object) -> Tensor:
    if not isinstance(targets, Tensor) or targets.shape != outputs.shape:
        raise ValueError(
            f'fisher="empirical" with a {likelihood} likelihood needs targets of the shape '
            f"{tuple(outputs.shape)} of the outputs, found {_described(targets)}"
        )
    if targets.is_complex():
        raise ValueError(f"the targets of a {likelihood} likelihood are complex ({targets.dtype})")
    if not targets.isfinite().all():
        raise ValueError("the targets have values that are not finite")
    return targets


def _described(targets: object) -> str:
    if isinstance(targets, Tensor):
        return f"a tensor of {targets.dtype} of shape {tuple(targets.shape)}"
    return type(targets).__name__


def _without(shape: torch.Size, dim: int) -> tuple[int, ...]:
    return tuple(shape[:dim]) + tuple(shape[dim + 1 :])


LIKELIHOODS: dict[str, Likelihood] = {
    "categorical": Categorical(),
    "gaussian": Gaussian(),
    "bernoulli": Bernoulli(),
}


# What others call them, in small letters alone; of losses the class names too.
_OTHER_NAMES = {
    "categorical": "ce crossentropy crossentropyloss nll nllloss softmax multinomial categorical "
    "classification",
    "gaussian": "mse mseloss l2 squarederror regression normal gaussiannllloss gaussian",
    "bernoulli": "bce bcewithlogits bcewithlogitsloss binarycrossentropy bernoulli binary sigmoid "
    "binarycrossentropywithlogits logistic",
}
_OTHER_FISHERS = {
    "mc": "mc montecarlo sampled weighted mcweighted",
    "mc-plain": "mcplain plain plainmc",
    "exact": "typei typeii type true expected ggn exact",
    "empirical": "ef emp observed empirical",
}


def _known_as(value: object, names: dict[str, str]) -> str | None:
    """The name here of what goes by other names: a string, a loss or its class or function."""
    text = value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)
    small = "".join(letter for letter in text.lower() if letter.isalpha())
    return next((name for name, others in names.items() if small in others.split()), None)


def check_fisher(fisher: object) -> None:
    """Raises ValueError for what is no Fisher type, with the one that was meant if it is known."""
    if isinstance(fisher, str) and fisher in FISHER_TYPES:
        return
    meant = _known_as(fisher, _OTHER_FISHERS)
    hint = f': for {fisher!r}, fisher="{meant}"' if meant else ""
    if isinstance(fisher, str) and fisher.lower().startswith("forward"):
        hint = ": K-FAC without a backward pass has no equivalent here"
    raise ValueError(f"fisher must be one of {', '.join(FISHER_TYPES)}, found {fisher!r}{hint}")


def resolved(likelihood: str | Likelihood) -> Likelihood:
    """The likelihood of a name, or the one given.

    Raises:
        ValueError: a name that is not known, or a loss; with the likelihood that was meant if that
            is known.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, str) and likelihood in LIKELIHOODS:
        return LIKELIHOODS[likelihood]
    meant, fisher = _known_as(likelihood, _OTHER_NAMES), _known_as(likelihood, _OTHER_FISHERS)
    hint = f': for it, likelihood="{meant}" (its outputs are logits or means)' if meant else ""
    if fisher and not meant:
        hint = f': that is a kind of Fisher, fisher="{fisher}"'
    raise ValueError(
        f"likelihood must be one of {', '.join(LIKELIHOODS)} or a kfoc.Likelihood, found "
        f"{likelihood!r}{hint}"
    )
