"""The true Fisher: what products and solves with it are asked of."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from kfoc.common.ambient import Plain
from kfoc.common.arguments import check_model, number, one_of, whole
from kfoc.curvature.curvature import Curvature
from kfoc.curvature.damped import DampedCurvature
from kfoc.distributed import Ranks
from kfoc.fisher.passes import Batch, Passes
from kfoc.fisher.preconditioner import Preconditioner
from kfoc.fitting.task import check_independent
from kfoc.layers.select import chosen_parameters
from kfoc.likelihoods.base import Likelihood
from kfoc.likelihoods.named import resolved
from kfoc.linalg.conjugate_gradients import conjugate_gradients
from kfoc.model.batches import Predict
from kfoc.model.functional import Forward
from kfoc.model.sample_gradients import chunks
from kfoc.model.sharding import is_sharded, unwrapped
from kfoc.model.trace import coarsest, tolerance
from kfoc.parameters.flat import flattened, scipy_operator, unflattened
from kfoc.parameters.layout import Layout, covered
from kfoc.parameters.vectors import Vector
from kfoc.running.progress import Progress, reporter

FISHER_TYPES = ("exact", "empirical")


@dataclass(frozen=True)
class Solution:
    """What `Fisher.solve` found.

    Attributes:
        vector: `(F + damping * I)^-1 v`, by parameter name, as v was given.
        residual: `|v - (F + damping * I) vector| / |v|` as the iteration counts it, of the leading
            dimensions of v.
        products: how many products with F it took, each a pass over the data for all of v.
        converged: whether all residuals are within the tolerance, if there was one.
    """

    vector: dict[str, Tensor]
    residual: Tensor
    products: int
    converged: bool


class Fisher(Plain):
    """The Fisher of all parameters together, which is never formed: products and solves with it.

    `F = 1/N sum_n J_n^T H_n J_n` over N samples, with J_n the derivative of a sample's outputs by
    the parameters and H_n the Fisher by the outputs: the generalised Gauss-Newton matrix. A
    `Curvature` approximates its diagonal blocks. Each product is a pass over the data, in forward
    and reverse mode (reverse mode twice, vector by vector, where a model has no forward mode).

    The model is read as it is at each product, in the mode that it is in (call `model.eval()`
    first, as a rule), and comes back as it was; so does the global random state. Dropout in train
    mode draws masks that depend on `seed` and the batch's number alone.

    Vectors are dicts of exactly the covered parameters (`parameters`), name -> tensor of the
    parameter's shape, or of any leading dimensions before it that all share. They come back in
    their own dtypes, on their own devices.

    Args:
        model: as of `kfoc.fit`.
        data: as of `kfoc.fit`. It is read once for every product, and must yield the same batches
            each time.
        likelihood: as of `kfoc.fit`.
        fisher: "exact" (expectation over the model's labels) or "empirical" (the observed ones).
        layers: names or patterns (`fnmatch`) of the modules whose own parameters are covered, or
            a `Curvature`, for those that it covers; None: all that are trained.
        predict: as of `kfoc.fit`.
        seed: of dropout in train mode.
        chunk_size: vectors that go through the model at once; None: as 128 MiB allow.
        progress: True, for a line on standard error, or a callable that gets a `Progress` after
            every batch; a pass is a product.
        group: a process group of `torch.distributed` (or `kfoc.distributed.Ranks`), whose ranks
            all do the same with the same model and vectors, and each with its share of the data.

    Raises:
        ValueError: bad arguments; the message names the argument.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        likelihood: str | Likelihood = "categorical",
        *,
        fisher: str = "exact",
        layers: str | Iterable[str] | Curvature | None = None,
        predict: Predict | None = None,
        seed: int = 0,
        chunk_size: int | None = None,
        progress: bool | Callable[[Progress], Any] = False,
        group: Any = None,
    ) -> None:
        ranks = Ranks.of(group)
        model = unwrapped(model) if ranks else model
        check_model(model)
        one_of("fisher", fisher, FISHER_TYPES)
        if isinstance(data, Iterator):
            raise ValueError(
                "data is an iterator, which can be read once, and every product is a pass over "
                "it: pass a list or a DataLoader"
            )
        if is_sharded(model):
            raise ValueError("model: there are no products with parameters that are sharded")
        check_independent(model.named_modules())
        forward = Forward(model, predict)
        self._layouts = {"": _layout(model, layers)}
        self._chunk_size = None if chunk_size is None else whole("chunk_size", chunk_size, 1)
        chosen, seed = resolved(likelihood), whole("seed", seed, -(2**63))
        self._passes = Passes(
            forward, self.parameters, data, chosen, fisher, seed, reporter(progress), ranks
        )

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the covered parameters, in the order of `flatten`."""
        return self._layouts[""].names

    @property
    def num_samples(self) -> int | None:
        """How many samples the mean is over; None before the first product has counted them."""
        return self._passes.num_samples or None

    def matvec(self, vector: Vector) -> dict[str, Tensor]:
        """`F v`."""
        rows, lead = self._rows(vector)
        with self._passes.together(rows):
            product = self._product(rows)
        return self._returned(product, lead, vector)

    def quadratic_form(self, vector: Vector) -> Tensor:
        """`v^T F v`, of the leading dimensions of v."""
        rows, lead = self._rows(vector)
        total = rows.new_zeros(len(rows))

        def take(batch: Batch) -> None:
            for part in self._chunks(batch, len(rows)):
                total[part] += self._of_batch(batch, rows[part])[1]

        with self._passes.together(rows):
            self._passes.average(total, take)
        return total.view(lead).to(next(iter(vector.values())).device)

    def solve(
        self,
        vector: Vector,
        damping: float = 1e-2,
        *,
        preconditioner: Curvature | DampedCurvature | None = None,
        rtol: float | None = 1e-3,
        max_products: int = 20,
    ) -> Solution:
        """`(F + damping * I)^-1 v` by conjugate gradients, of any stack of vectors at once.

        The vectors of a stack share their search directions (block conjugate gradients, O'Leary
        1980), and a pass over the data serves all of them: many take fewer products than one.

        Args:
            damping: a positive number.
            preconditioner: an approximation, such as K-FOC's, whose inverse with the same damping
                the iteration starts from; or a damped one. The better it is, the fewer products;
                the solution is the same. Parameters without a block in it are divided by the
                damping.
            rtol: the residual to come to; None: as far as the products go.
            max_products: stop after so many passes, with a RuntimeWarning where a residual is
                larger then.

        Raises:
            ValueError: bad arguments, data or values, or a preconditioner of another model.
        """
        check_solve(damping, rtol)
        max_products = whole("max_products", max_products, 1)
        rows, lead = self._rows(vector)
        prepared, done = None, 0
        if preconditioner is not None:
            model = self._passes.forward.model
            prepared = Preconditioner.of(preconditioner, model, self._layouts, damping)

        def matrix(directions: Tensor) -> Tensor:
            nonlocal done
            done += 1
            return self._product(directions, done, max_products).add_(directions, alpha=damping)

        with self._passes.together(rows):
            found = conjugate_gradients(
                matrix, rows, prepared or _same, rtol=rtol or 0.0, max_products=max_products
            )
        residual = found.residuals.view(lead).to(next(iter(vector.values())).device)
        converged = rtol is None or bool((residual <= rtol).all())
        if not converged:
            _warn(residual, found.products, rtol, prepared)
        solution = self._returned(found.solutions, lead, vector)
        return Solution(solution, residual, found.products, converged)

    def flatten(self, vector: Vector) -> Tensor:
        """One vector (..., P) from a dict: parameter by parameter, in the model's order."""
        return flattened(vector, self._layouts)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """The dict of a vector (..., P): the inverse of `flatten`."""
        return unflattened(vector, self._layouts)

    def to_linear_operator(self) -> Any:
        """F as a `scipy.sparse.linalg.LinearOperator`, (P, P), over vectors as `flatten` gives.

        It takes and gives NumPy arrays, in the parameters' dtype (`pip install scipy`).
        """
        like = self._like
        return scipy_operator(self.matvec, self._layouts, {"": (like.device, like.dtype)})

    def __repr__(self) -> str:
        (size, _) = self._layouts[""].shape
        return f"Fisher ({self._passes.fisher}) of {size} parameters: {', '.join(self.parameters)}"

    @property
    def _like(self) -> Tensor:
        """A tensor of the dtype and on the device of the computation."""
        values = list(self._passes.forward.parameters(self.parameters).values())
        dtype = reduce(torch.promote_types, (value.dtype for value in values), torch.float32)
        return torch.empty(0, dtype=dtype, device=values[0].device)

    def _rows(self, vector: Vector) -> tuple[Tensor, torch.Size]:
        """The vectors as rows (k, P), and their leading dimensions."""
        flat = flattened({k: _placed(v, self._like) for k, v in vector.items()}, self._layouts)
        if not flat.isfinite().all():
            raise ValueError("the vector has values that are not finite")
        return flat.reshape(-1, flat.shape[-1]), flat.shape[:-1]

    def _returned(self, rows: Tensor, lead: torch.Size, like: Vector) -> dict[str, Tensor]:
        found = unflattened(rows.view(*lead, rows.shape[-1]), self._layouts)
        return {name: found[name].to(like[name]) for name in like}

    def _product(self, rows: Tensor, number: int = 1, limit: int = 1) -> Tensor:
        """F times rows (k, P)."""
        total = torch.zeros_like(rows)

        def take(batch: Batch) -> None:
            for part in self._chunks(batch, len(rows)):
                total[part] += self._of_batch(batch, rows[part])[0]

        self._passes.average(total, take, number, limit)
        return total

    def _of_batch(self, batch: Batch, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The batch's sum of `F v` and of `v^T F v`, of rows (k, P)."""
        there = batch.map.there(unflattened(rows, self._layouts))
        weighed = batch.weigh(there)
        back = flattened(batch.map.back(weighed), self._layouts).to(rows)
        dtypes = [there.dtype, *(value.dtype for value in batch.map.at.values())]
        terms = (there * weighed).flatten(1)
        if batch.map.modes.forward and not _same_sums(terms, rows * back, coarsest(dtypes)):
            # Forward and reverse mode are not each other's: where a hook changes gradients, or a
            # function's are not its derivatives. Two passes in reverse mode always are.
            batch.map.modes.forward = False
            return self._of_batch(batch, rows)
        return back, terms.sum(1).to(rows)

    def _chunks(self, batch: Batch, count: int) -> Iterator[slice]:
        """So many vectors at once that their derivatives fit in memory."""
        numbers = 0
        if count > 1 and self._chunk_size is None:
            numbers = 2 * self._layouts[""].shape[0] + batch.map.numbers()
        return chunks(count, numbers, self._chunk_size)


def _layout(model: nn.Module, layers: str | Iterable[str] | Curvature | None) -> Layout:
    """All covered parameters, one after the other."""
    if isinstance(layers, Curvature):
        parameters: dict[str, Any] = dict(Forward(model).parameters(covered(layers.layouts)))
    else:
        parameters = dict(chosen_parameters(model, layers))
    shapes = tuple(tuple(value.shape) for value in parameters.values())
    return Layout(tuple(parameters), shapes, "flat")


def _same_sums(first: Tensor, second: Tensor, precision: float) -> bool:
    """Whether terms (k, ...) add up to the same k sums, to rounding."""
    one, other = (terms.flatten(1).double() for terms in (first, second))
    size = one.abs().sum(1) + other.abs().sum(1)
    allowed = tolerance(precision, first.device) * size
    return bool(((one.sum(1) - other.sum(1)).abs() <= allowed).all())


def _placed(value: Any, like: Tensor) -> Any:
    real = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().to(like) if real else value  # others are errors of their own


def _same(rows: Tensor) -> Tensor:
    return rows


def check_solve(damping: Any, rtol: Any) -> None:
    """Raise where they are no numbers, or none that make sense."""
    for name, value, least, most in (("damping", damping, 0.0, math.inf), ("rtol", rtol, -1, 1)):
        if value is None and name == "rtol":
            continue
        number(name, value)
        if not least < value < most or value < 0:
            raise ValueError(f"{name} must be positive and below {most}, found {value}")


def _warn(
    residual: Tensor, products: int, rtol: float | None, prepared: Preconditioner | None
) -> None:
    advice = "a closer preconditioner"
    if prepared is None:
        advice = "preconditioner=kfoc.fit(...) of the same model"
    elif prepared.missing:
        names = prepared.missing
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        advice = f"a preconditioner that has a block for {', '.join(names[:5])}{more} too"
    warnings.warn(
        f"conjugate gradients came to a residual of {residual.max().item():.2g} in {products} "
        f"products, and rtol is {rtol:g}: allow more (max_products), or take more damping, or "
        f"{advice}",
        RuntimeWarning,
        stacklevel=4,  # of `plainly` too
    )
