"""K-FOC as a curvature backend of laplace-torch.

    la = Laplace(model, "classification", hessian_structure="kron", backend=KFOCBackend)

laplace-torch keeps Kronecker factors per parameter, so weights are fitted without their biases,
and biases get their exact block (`layers` of `kfoc.fit` may be parameters).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kfoc.blocks import Block, DenseBlock, DiagonalBlock, KroneckerBlock
from kfoc.common.ambient import Plain
from kfoc.common.arguments import one_of
from kfoc.curvature.curvature import Curvature
from kfoc.errors import naming
from kfoc.estimators import KFAC, KFOC, Estimator
from kfoc.fit import fit
from kfoc.model.buffers import buffers_kept
from kfoc.nearest.pair import nearest_to_pair
from kfoc.parameters.layout import Layout

try:
    from laplace.curvature import CurvatureInterface
    from laplace.utils.matrix import Kron
except ImportError as error:
    raise ImportError(
        f"kfoc.interop.laplace_torch needs laplace-torch ({error}): pip install laplace-torch. "
        "That may bring another build of torch; docs/interop.md says how to keep the one there is"
    ) from error

LIKELIHOODS = {"classification": "categorical", "regression": "gaussian"}

Factors = list[Tensor]  # [left, right] of a Kronecker product, or [matrix or diagonal]


class KFOCBackend(CurvatureInterface):
    """What laplace-torch asks for Kronecker factors.

    By default each batch is fitted as it comes, and batches are merged by Algorithm 1 (the paper's
    `running`; K-FAC's factors are averaged, which gives those of all batches at once). A curvature
    that was fitted before, with `kfoc.fit`, is closer to the optimum where batches are small, and
    may come from any aggregation and number of passes: hand it in as `curvature`.

    Args:
        estimator: of the weights; KFOC() by default. An aggregation over batches is refused, but
            for `running`, as it has no say here.
        fisher: "exact" by default, which is the generalised Gauss-Newton matrix and what
            laplace-torch's own backends compute; it takes as many backward passes as there are
            outputs. "mc" and "mc-plain" take `mc_samples`, "empirical" one.
        mc_samples: draws per sample, of "mc" and "mc-plain".
        seed: of the draws; each batch draws anew.
        curvature: of the whole data set, to be used in place of fits by batch.

    Other arguments are laplace-torch's. All go through `Laplace(..., backend_kwargs={...})`.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        *,
        estimator: Estimator | None = None,
        fisher: str = "exact",
        mc_samples: int = 1,
        seed: int = 0,
        curvature: Curvature | None = None,
    ) -> None:
        one_of("likelihood", likelihood, LIKELIHOODS)
        if subnetwork_indices is not None:
            raise ValueError("a part of a layer's parameters has no Kronecker factors of its own")
        super().__init__(model, likelihood, last_layer, None, dict_key_x, dict_key_y)
        _check_wide(self.params_dict)
        _check_estimator(estimator, curvature)
        self.estimator, self.fisher, self.mc_samples = estimator, fisher, mc_samples
        self.seed, self.curvature = seed, curvature
        self.batches = 0

    def kron(self, x: Any, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, MergingKron]:
        """Loss and Kronecker factors of one batch, both summed over its samples.

        Args:
            x: the batch's inputs.
            y: its targets.
            N: samples in the whole data set.

        Raises:
            ValueError: a parameter whose block cannot be given per parameter, with its layer and
                the reason; or a curvature of another number of samples.
        """
        if kwargs:
            raise ValueError(
                f"kron takes no further options, found {', '.join(kwargs)}: give them as "
                "backend_kwargs"
            )
        with torch.no_grad(), buffers_kept(self.model.modules()):
            loss = self.factor * self.lossfunc(self.model(x), y)
        if self.curvature is None:
            return loss, self._of_batch(x, y)
        if self.curvature.num_samples != N:
            raise ValueError(
                f"the curvature is of {self.curvature.num_samples} samples, and the data set has "
                f"{N}: fit it on the data that laplace-torch is given"
            )
        # Every batch brings its share of the whole, and the shares add up exactly.
        factors = per_parameter_factors(self.curvature, self._parameters(), len(y))
        return loss, MergingKron(factors, len(y), averaged)

    def full(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: see `diag`."""
        raise ValueError(_OTHER_STRUCTURE.format("full"))

    def diag(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: Kronecker factors are all that this backend has."""
        raise ValueError(_OTHER_STRUCTURE.format("diag"))

    def eig_lowrank(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: see `diag`."""
        raise ValueError(_OTHER_STRUCTURE.format("lowrank"))

    def _of_batch(self, x: Any, y: Tensor) -> MergingKron:
        parameters = self._parameters()
        fitted = fit(
            self._network,
            [(x, y)],
            LIKELIHOODS[self.likelihood],
            estimator=self.estimator,
            fisher=self.fisher,
            mc_samples=self.mc_samples,
            layers=parameters,
            predict=lambda model, inputs: model(inputs),
            seed=(self.seed + 1_000_003 * self.batches) % 2**63,
        )
        self.batches += 1
        factors = per_parameter_factors(fitted, parameters, len(y))
        merge = averaged if isinstance(self.estimator, KFAC) else closest
        return MergingKron(factors, len(y), merge)

    @property
    def _network(self) -> nn.Module:
        """The user's model (a copy of it, in last-layer approximations), without its wrapper."""
        return self.model.model if self.last_layer else self.model

    def _parameters(self) -> list[str]:
        """The names in the user's model of laplace-torch's parameters, in its order."""
        names = {id(p): name for name, p in self._network.named_parameters()}
        return [names[id(parameter)] for parameter in self.params]


_OTHER_STRUCTURE = (
    'KFOCBackend has Kronecker factors, and hessian_structure="{}" asks for another form: use '
    'hessian_structure="kron", kfoc.Laplace with a curvature of kfoc.BlockDiagonal() or '
    "kfoc.Diagonal(), or a backend of laplace-torch's own"
)


def _check_wide(parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        if parameter.element_size() < 4:
            raise ValueError(
                f"the parameter {name!r} is {parameter.dtype}, in which laplace-torch cannot "
                "predict with factors in float32: call model.float() first, or use kfoc.Laplace"
            )


def _check_estimator(estimator: Estimator | None, curvature: Curvature | None) -> None:
    if estimator is None:
        return
    if curvature is not None:
        raise ValueError(
            "the curvature is used in place of fits, so that the estimator makes no difference: "
            "leave out one of them"
        )
    if not isinstance(estimator, KFOC):
        return
    same = KFOC(
        rtol=estimator.rtol,
        max_steps=estimator.max_steps,
        memory_limit=estimator.memory_limit,
        plan=estimator.plan,
        rank=estimator.rank,
    )
    if estimator not in (same, replace(same, aggregation="running")):
        raise ValueError(
            f"each batch is fitted alone and batches are merged, so that aggregation, passes, "
            f"decay and buffer of {estimator} make no difference: leave them out, or fit the "
            "curvature by kfoc.fit and pass curvature=..."
        )


class MergingKron(Plain, Kron):
    """Kronecker factors that know how to be added: factor by factor is wrong but for K-FAC.

    Every product is of a sum over samples.

    Attributes:
        kfacs: a pair `[left, right]` or a single matrix (or diagonal) per parameter.
        num_samples: what the sum is over.
        merge: the product of two sums of samples, from theirs and the sample counts.
    """

    def __init__(self, kfacs: list[Factors], num_samples: int, merge: Merge) -> None:
        super().__init__(kfacs)
        self.num_samples, self.merge = num_samples, merge
        self._norms = [_norm(factors) for factors in kfacs]

    def __add__(self, other: Kron) -> MergingKron:
        if not isinstance(other, MergingKron):
            loaded = self._loaded(other)
            if loaded is not None:
                return loaded + self
            if any(factor.any() for factors in other.kfacs for factor in factors):
                raise ValueError(
                    "Kronecker factors of another origin cannot be added to those of kfoc: a sum "
                    "of products is none. Fit anew, with override=True"
                )
            return self  # the zeros that laplace-torch begins with
        counts = self.num_samples, other.num_samples
        kfacs = []
        for first, second in zip(self._unscaled(), other._unscaled(), strict=True):
            kfacs.append(
                [first[0] + second[0]] if len(first) == 1 else self.merge(first, second, counts)
            )
        return MergingKron(kfacs, sum(counts), self.merge)

    __radd__ = __add__  # a subclass's goes first, also in `zeros + self`

    def __mul__(self, scalar: float | Tensor) -> MergingKron:
        # All on the first factor: `right` stays a mean.
        kfacs = [[factors[0] * scalar, *factors[1:]] for factors in self.kfacs]
        return MergingKron(kfacs, self.num_samples, self.merge)

    __rmul__ = __mul__

    def _loaded(self, other: Kron) -> MergingKron | None:
        """Another's factors as a sum like this one, where laplace-torch has scaled both for it.

        A state that is loaded has lost all but the factors. For a second data set laplace-torch
        multiplies every `right` by the share of its data (see `_unscaled`): by r those of the new
        one, which are known, and so by 1 - r the others.
        """
        shares = [_norm(f) / norm for f, norm in zip(self.kfacs, self._norms, strict=True) if norm]
        if not shares or not 0 < shares[0] < 1 or len(other.kfacs) != len(self.kfacs):
            return None
        new = shares[0]
        kfacs = [[factors[0], *(f / (1 - new) for f in factors[1:])] for factors in other.kfacs]
        return MergingKron(kfacs, round(self.num_samples * (1 - new) / new), self.merge)

    def _unscaled(self) -> list[Factors]:
        """The factors as they were made.

        For a second data set (`fit(override=False)`) laplace-torch multiplies every `right`, in
        place, by the share of its data, for sums that are taken factor by factor. These are not.
        """
        found = []
        for factors, norm in zip(self.kfacs, self._norms, strict=True):
            now = _norm(factors)
            undone = now != norm and now > 0
            found.append([factors[0], factors[1] * (norm / now)] if undone else factors)
        return found


Merge = Callable[[Factors, Factors, tuple[int, int]], Factors]


def closest(first: Factors, second: Factors, counts: tuple[int, int]) -> Factors:
    """The Kronecker product closest to the sum of two: Algorithm 1 on two terms."""
    return list(nearest_to_pair((first[0], first[1]), (second[0], second[1])))


def averaged(first: Factors, second: Factors, counts: tuple[int, int]) -> Factors:
    """As K-FAC adds batches: sums of `left`, means of `right`."""
    total = sum(counts)
    right = first[1] * (counts[0] / total) + second[1] * (counts[1] / total)
    return [first[0] + second[0], right]


def per_parameter_factors(
    curvature: Curvature, parameters: Iterable[str], scale: float
) -> list[Factors]:
    """`scale` times the curvature as laplace-torch's factors: a list per parameter, in order.

    Covariances between the parameters of a layer are left out, as laplace-torch has no place for
    them.

    Raises:
        ValueError: a parameter that has no block, or a block that has no such form.
    """
    found: dict[str, Factors] = {}
    for layer, block in curvature.items():
        with naming(layer):
            factors = _split(block, curvature.layouts[layer])
        found |= {name: [f[0] * scale, *(g.clone() for g in f[1:])] for name, f in factors.items()}
    wanted = list(parameters)
    for name in wanted:
        if name not in found:
            layer = name.rpartition(".")[0]
            skipped = curvature.skipped.get(name, curvature.skipped.get(layer))
            reason = skipped or "the curvature was fitted without it"
            raise ValueError(
                f"laplace-torch asks for the parameter {name!r}, which has no block: {reason}. "
                "Set its requires_grad to False to leave it out"
            )
    return [found[name] for name in wanted]


def _split(block: Block, layout: Layout) -> dict[str, Factors]:
    """The factors of each parameter's part of a layer's block."""
    if isinstance(block, (DenseBlock, DiagonalBlock)):
        return _places(block, layout)
    if isinstance(block, KroneckerBlock) and layout.kind == "stacked":  # a bias alone
        return {layout.names[0]: [block.left * block.right]}
    if not isinstance(block, KroneckerBlock) or layout.kind not in ("rows", "columns"):
        raise ValueError(
            f"a {type(block).__name__} of {layout.kind} has no form per parameter that "
            "laplace-torch can hold: leave the layer out (requires_grad=False), or fit it with "
            "kfoc.BlockDiagonal() or kfoc.Diagonal()"
        )
    left, right = block.left, block.right
    found = {}
    if len(layout.names) > 1:
        corner = right[-1] if right.ndim == 1 else right[-1, -1]
        found[layout.names[1]] = [left * corner]
        right = right[(slice(-1),) * right.ndim]
    found[layout.names[0]] = [left, right] if layout.kind == "rows" else [right, left]
    return found


def _places(block: DenseBlock | DiagonalBlock, layout: Layout) -> dict[str, Factors]:
    """Principal submatrices, in each parameter's own order."""
    o, i = block.shape
    places = layout.split(torch.arange(o * i).view(o, i))
    found = {}
    for name, place in places.items():
        if isinstance(block, DiagonalBlock):
            at = place.flatten().to(block.diagonal.device)
            found[name] = [block.diagonal.flatten()[at]]
        else:
            at = place.flatten().to(block.matrix.device)
            found[name] = [block.matrix[at[:, None], at]]
    return found


def _norm(factors: Factors) -> float:
    """Of `right`, in float64; 0 where there is none."""
    return factors[1].double().norm().item() if len(factors) > 1 else 0.0
