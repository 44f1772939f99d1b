"""Class labels, drawn by what they contribute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfoc.likelihoods.base import Likelihood, described
from kfoc.likelihoods.draws import Draws


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
                    f'fisher="empirical" needs integer class labels, found {described(targets)}'
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


def _labels(targets: object) -> Tensor | None:
    """Integer labels, or None where the targets are something else, which "mc" can do without."""
    if isinstance(targets, Tensor) and not (targets.is_floating_point() or targets.is_complex()):
        return targets
    return None


def _without(shape: torch.Size, dim: int) -> tuple[int, ...]:
    return tuple(shape[:dim]) + tuple(shape[dim + 1 :])
