"""What is timed: each method as a function that sets up calls on a workload.

A method returns a `Setup`, which runs before every call and is not timed; the call that it hands
out is. That returns what the method computed, so that memory measurements see the result too.
Each import sits with its method: a process that times one never loads another's library.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from workloads import Workload

Call = Callable[[], Any]
Setup = Callable[[], Call]


def gradient(workload: Workload) -> Setup:
    """Forward and full backward of the mean loss, batch by batch, summed as training would."""
    parameters = list(workload.model.parameters())

    def call() -> list[Tensor]:
        for x, y in workload.batches:
            workload.loss(workload.model(x), y).backward()
        grads = [p.grad for p in parameters if p.grad is not None]
        for p in parameters:
            p.grad = None
        return grads

    return lambda: call


def kfoc_fit(workload: Workload, estimator: Any, **options: Any) -> Any:
    """The call that users make; every method of ours goes through it."""
    import kfoc

    return kfoc.fit(
        workload.model,
        workload.batches,
        workload.likelihood,
        estimator=estimator,
        fisher="mc",
        seed=0,
        layers=workload.layers,
        **options,
    )


def kfac(workload: Workload) -> Setup:
    import kfoc

    return lambda: lambda: kfoc_fit(workload, kfoc.KFAC())


def kfoc_with(**options: Any) -> Callable[[Workload], Setup]:
    """K-FOC with these options, and its defaults for the rest."""

    def prepare(workload: Workload) -> Setup:
        import kfoc

        return lambda: lambda: kfoc_fit(workload, kfoc.KFOC(**options))

    return prepare


class ClassesSecond(nn.Module):
    """A model whose classes come in dimension 1, where curvlinops looks for them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).movedim(-1, 1)


def curvlinops_operator(workload: Workload) -> Any:
    """curvlinops' K-FAC of the same layers, joint in weight and bias, its factors not computed.

    Its counts of samples and labels are passed in: it would run over the data to find them.
    """
    from curvlinops import KFACLinearOperator

    _, y = workload.batches[0]
    sequence = workload.likelihood == "categorical" and y.ndim > 1
    layers = [workload.model.get_submodule(name) for name in workload.layers]
    return KFACLinearOperator(
        ClassesSecond(workload.model) if sequence else workload.model,
        nn.MSELoss() if workload.likelihood == "gaussian" else nn.CrossEntropyLoss(),
        [p for layer in layers for p in layer.parameters()],
        workload.batches,
        check_deterministic=False,
        fisher_type="mc",
        mc_samples=1,
        separate_weight_and_bias=False,
        num_per_example_loss_terms=y[0].numel() if sequence else 1,
        num_data=workload.num_samples,
    )


def curvlinops_kfac(workload: Workload) -> Setup:
    """The computation of its factors alone; a fresh operator each time, since factors add up."""

    def setup() -> Call:
        operator = curvlinops_operator(workload)

        def call() -> Any:
            operator.compute_kronecker_factors()
            return operator

        return call

    return setup


METHODS: dict[str, Callable[[Workload], Setup]] = {
    "gradient": gradient,
    "kfac": kfac,
    "kfoc": kfoc_with(),
    "kfoc-1e-6": kfoc_with(rtol=1e-6),
    "kfoc-online": kfoc_with(aggregation="online"),
    "kfoc-running": kfoc_with(aggregation="running"),
    "kfoc-approx": kfoc_with(aggregation="approx"),
    "kfoc-exact": kfoc_with(aggregation="exact"),
    "curvlinops-kfac": curvlinops_kfac,
}

OURS = tuple(name for name in METHODS if name.startswith("kf"))
ONE_BATCH = ("gradient", "kfac", "kfoc", "kfoc-1e-6", "curvlinops-kfac")
DATA_SET = (
    "gradient",
    "kfac",
    "kfoc-online",
    "kfoc-running",
    "kfoc-approx",
    "kfoc-exact",
    "curvlinops-kfac",
)


def in_place_product(_: object, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    """Flops of `addmm_` and `baddbmm_`, from the shapes of their two factors."""
    return 2 * math.prod(a) * b[-1]


def multiply_adds(call: Call) -> int:
    """Multiply-adds of the matrix products and convolutions that the call dispatches."""
    from torch.utils.flop_counter import FlopCounterMode

    # PyTorch's counter knows the products, but not all forms that write in place.
    aten = torch.ops.aten
    in_place = dict.fromkeys((aten.addmm_, aten.baddbmm_), in_place_product)
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        call()
    return counter.get_total_flops() // 2


def set_threads(count: int) -> None:
    torch.set_num_threads(count)
    torch.set_default_dtype(torch.float32)
