"""Class labels, drawn by what they contribute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kfoc.likelihoods.base import Likelihood, by_sample, described, probit
from kfoc.likelihoods.draws import Draws
from kfoc.likelihoods.options import tensor_option
from kfoc.likelihoods.softmax import drawn_by_weight, residuals


@dataclass(frozen=True, eq=False)
class Categorical(Likelihood):
    """Class labels; the outputs are logits.

    Labels are integers, or probabilities of the classes in the shape of the outputs (soft labels,
    which must add up to one). With t those of a label, one-hot or soft, smoothed if so asked, and w
    the classes' weights, the loss is that of `nn.CrossEntropyLoss` with the same arguments and
    `reduction="sum"`, `-sum_c w_c t_c ln p_c` for each label. F is

    - "exact", "mc", "mc-plain": the second derivative of the loss by the outputs,
      `W (diag(p) - p p^T)` with `W = sum_c w_c t_c`. Without weights W is 1, F the Fisher
      information, and smoothing and soft labels change nothing. With them a label counts W times as
      it was observed, whatever is drawn: labels are needed.
    - "empirical": of the gradients of the samples' own losses, minus `w t - W p` by the outputs:
      weights enter it squared, and it vanishes where p is t, however uncertain both are.

    Attributes:
        class_dim: the dimension of the classes. None: the last one for outputs of two or three
            dimensions (sequences: (N, T, C)), dimension 1 for more (images: (N, C, H, W)), and
            whichever fits where integer labels are given. The first batch settles it.
        ignore_index: labels of this value have no influence, as in `nn.CrossEntropyLoss`.
        weight: (C,), of the classes, not negative.
        label_smoothing: the share, from 0 to 1, of a label that goes to all classes alike.
    """

    class_dim: int | None = None
    ignore_index: int = -100
    weight: Tensor | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.weight is not None:
            weight = tensor_option("Categorical", "weight", self.weight)
            object.__setattr__(self, "weight", weight)
            if weight.ndim != 1:
                raise ValueError(
                    "weight of Categorical must have the shape (C,), a number for each class, "
                    f"found {tuple(weight.shape)}"
                )
        smoothing = tensor_option("Categorical", "label_smoothing", self.label_smoothing)
        if smoothing.numel() != 1 or smoothing > 1:
            raise ValueError(
                "label_smoothing of Categorical must be a number from 0 to 1, found "
                f"{self.label_smoothing!r}"
            )
        object.__setattr__(self, "label_smoothing", smoothing.item())
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
        dim = self._dim(outputs, targets)
        classes = outputs.shape[dim]
        if classes == 1:
            raise ValueError(
                f"categorical outputs of shape {tuple(outputs.shape)} have a single class, whose "
                'probability is always 1: for a single logit, likelihood="bernoulli"'
            )
        if self.weight is not None and len(self.weight) != classes:
            raise ValueError(
                f"weight of Categorical has {len(self.weight)} numbers, for outputs of {classes} "
                "classes"
            )
        labels = _labels(targets)
        if labels is None:
            if fisher == "empirical" or self.weight is not None:
                what = 'fisher="empirical"' if fisher == "empirical" else "a weight of the classes"
                _check_soft(outputs, targets, dim, what)
            return
        wrong = (labels != self.ignore_index) & ((labels < 0) | (labels >= classes))
        if wrong.any():
            raise ValueError(
                f"label {labels[wrong][0].item()} is out of range for {classes} classes "
                f"(ignore_index is {self.ignore_index})"
            )

    def settled(self, outputs: Tensor, targets: object) -> Categorical:
        if self.class_dim is not None or outputs.ndim < 3:
            return self
        dim = self._dim(outputs, targets)
        return replace(self, class_dim=1 if dim == 1 else -1)

    def _dim(self, outputs: Tensor, targets: object) -> int:
        """The class dimension, settled by the labels where they are given."""
        labels = _labels(targets)
        if self.class_dim is not None:
            dim = self.class_dim % outputs.ndim
            if labels is not None and tuple(labels.shape) != _without(outputs.shape, dim):
                raise self._misfit(outputs, labels)
            return dim
        candidates = sorted({1, outputs.ndim - 1})
        if labels is None:
            soft = _soft(outputs, targets) if len(candidates) > 1 else None
            fitting = [] if soft is None else [d for d in candidates if _adds_up(soft, d)]
            if not fitting:
                return outputs.ndim - 1 if outputs.ndim <= 3 else 1
        else:
            shape = tuple(labels.shape)
            fitting = [d for d in candidates if shape == _without(outputs.shape, d)]
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
        """Probabilities (N, P, C), how many times each label counts (N, P), and the class dim."""
        dim = self._dim(outputs, targets)
        probabilities = _flat(outputs, dim, len(outputs)).softmax(-1)
        return probabilities, self._counts(targets, probabilities, dim), dim

    def _counts(self, targets: object, p: Tensor, dim: int) -> Tensor:
        """How many times each label counts, (N, P), for anything like probabilities."""
        if self.weight is not None:
            return self._shares(targets, p, dim).sum(-1)
        if _labels(targets) is None:
            return p.new_ones(p.shape[:2])
        return self._chosen(targets, p)[1]

    def _chosen(self, targets: Any, p: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (N, P, 1), zero for those that do not count, and which do (N, P)."""
        labels = targets.reshape(len(p), -1).long()
        counts = labels != self.ignore_index
        return torch.where(counts, labels, 0)[..., None], counts.to(p)

    def _shares(self, targets: Any, p: Tensor, dim: int) -> Tensor:
        """`w_c t_c` (N, P, C): what of the loss is `-ln p_c`."""
        if _labels(targets) is None:
            shares = _flat(targets.to(p), dim, len(p)) * (1 - self.label_smoothing)
            shares = shares + self.label_smoothing / p.shape[-1]
        else:
            chosen, counts = self._chosen(targets, p)
            uniform = torch.full_like(p, self.label_smoothing / p.shape[-1])
            shares = uniform.scatter_add_(
                -1, chosen, torch.full_like(p[..., :1], 1 - self.label_smoothing)
            )
            shares *= counts[..., None]
        return shares if self.weight is None else shares * self.weight.to(p)

    def _shaped(self, values: Tensor, outputs: Tensor, dim: int) -> Tensor:
        """From (N, P, C) back to the shape of the outputs."""
        return values.view(outputs.movedim(dim, -1).shape).movedim(-1, dim)

    def drawn(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        probabilities, counts, dim = self._probabilities(outputs, targets)
        cumulative = probabilities.double().cumsum(-1)
        count, places, _ = probabilities.shape
        uniform = draws.uniform(count, places, outputs.device)[..., None]
        labels = torch.searchsorted(cumulative, uniform * cumulative[..., -1:])
        cotangent = residuals(probabilities, labels)
        return self._shaped(cotangent * counts.sqrt()[..., None], outputs, dim)

    def weighted(self, outputs: Tensor, targets: object, draws: Draws) -> Tensor:
        dim = self._dim(outputs, targets)
        logits = _flat(outputs, dim, len(outputs))
        count, places, _ = logits.shape
        counts = self._counts(targets, logits, dim).double()
        points = draws.spread(count, places, outputs.device)
        signs = draws.signs(count, places, outputs.device) * counts.sqrt()
        found = drawn_by_weight(logits.flatten(0, 1), points.flatten(), signs.flatten())
        return self._shaped(found, outputs, dim)

    def exact(self, outputs: Tensor, targets: object) -> Iterator[Tensor]:
        probabilities, counts, dim = self._probabilities(outputs, targets)
        _, places, classes = probabilities.shape
        for place in range(places):
            for c in range(classes):
                p = probabilities[:, place]
                direction = residuals(p, torch.full_like(p[:, :1], c, dtype=torch.long))
                cotangent = torch.zeros_like(probabilities)
                weight = (p[:, c] * counts[:, place]).sqrt()
                cotangent[:, place] = direction * weight[:, None]
                yield self._shaped(cotangent, outputs, dim)

    def fisher_product(self, outputs: Tensor, targets: object, vectors: Tensor) -> Tensor:
        """`p (v - <p, v>)`, with v from the likeliest class's, so that sure models keep digits."""
        p, counts, dim = self._probabilities(outputs, targets)
        v = vectors.movedim(dim + 1, -1).reshape(len(vectors), *p.shape)
        likeliest = p.argmax(-1, keepdim=True).expand(len(v), *p.shape[:2], 1)
        v = v - v.gather(-1, likeliest)
        found = p * (v - (p * v).sum(-1, keepdim=True)) * counts[..., None]
        moved = outputs.movedim(dim, -1).shape
        return found.view(len(vectors), *moved).movedim(-1, dim + 1)

    def observed(self, outputs: Tensor, targets: object) -> Tensor:
        p, _, dim = self._probabilities(outputs, targets)
        if _labels(targets) is None or self.label_smoothing:
            shares = self._shares(targets, p, dim)
            return self._shaped(shares - shares.sum(-1, keepdim=True) * p, outputs, dim)
        chosen, counts = self._chosen(targets, p)
        if self.weight is not None:
            counts = counts * self.weight.to(p)[chosen[..., 0]]
        return self._shaped(residuals(p, chosen) * counts[..., None], outputs, dim)

    def log_likelihood(self, outputs: Tensor, targets: Any) -> Tensor:
        dim = self._dim(outputs, targets)
        logs = _flat(outputs, dim, len(outputs)).log_softmax(-1)
        if self.weight is None and not self.label_smoothing and _labels(targets) is not None:
            chosen, counts = self._chosen(targets, logs)
            return by_sample(logs.gather(-1, chosen)[..., 0] * counts)
        return by_sample(self._shares(targets, logs, dim) * logs)

    def num_labels(self, outputs: Tensor, targets: Any) -> Tensor:
        return by_sample(self._probabilities(outputs, targets)[1])

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Of every class, in the shape of the outputs."""
        return outputs.softmax(self._dim(outputs, None))

    def moderated(self, mean: Tensor, variance: Tensor) -> Tensor:
        return probit(mean, variance)


def _flat(values: Tensor, dim: int, count: int) -> Tensor:
    """(N, P, C), from values in the shape of the outputs."""
    moved = values.movedim(dim, -1)
    return moved.reshape(count, -1, moved.shape[-1])


def _labels(targets: object) -> Tensor | None:
    """Integer labels, or None where the targets are something else, which "mc" can do without."""
    if isinstance(targets, Tensor) and not (targets.is_floating_point() or targets.is_complex()):
        return targets
    return None


def _soft(outputs: Tensor, targets: object) -> Tensor | None:
    """Targets that may be probabilities of the classes: real numbers in the outputs' shape."""
    if isinstance(targets, Tensor) and targets.is_floating_point():
        return targets if targets.shape == outputs.shape else None
    return None


def _adds_up(soft: Tensor, dim: int) -> bool:
    near = 1e-3 if soft.element_size() > 2 else 1e-2
    return bool(((soft.float().sum(dim) - 1).abs() < near).all())


def _check_soft(outputs: Tensor, targets: object, dim: int, needed: str) -> None:
    soft = _soft(outputs, targets)
    if soft is None:
        raise ValueError(
            f"{needed} needs integer class labels, or probabilities of the classes in the shape "
            f"{tuple(outputs.shape)} of the outputs, found {described(targets)}"
        )
    if not soft.isfinite().all() or (soft < 0).any() or not _adds_up(soft, dim):
        raise ValueError(
            f"{needed} needs class labels, and targets of real numbers are probabilities of the "
            f"classes: they must be finite, not negative, and add up to one over dimension {dim} "
            "(kfoc.Categorical(class_dim=...) sets another)"
        )


def _without(shape: torch.Size, dim: int) -> tuple[int, ...]:
    return tuple(shape[:dim]) + tuple(shape[dim + 1 :])
