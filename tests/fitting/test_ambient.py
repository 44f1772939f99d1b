"""What a caller sets for all of torch is for the caller's model: our numbers are those without."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfoc
from models import ESTIMATORS

Predict = Callable[[nn.Module, Any], Tensor]
Job = Callable[[Predict | None], Any]


@contextmanager
def defaults() -> Iterator[None]:
    """A dtype and a device that nothing of ours is in or on."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


bfloat16 = partial(torch.autocast, "cpu", torch.bfloat16)
CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": bfloat16,
    "defaults": defaults,
    "inference_mode": torch.inference_mode,
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten()]
    layers += [nn.LayerNorm(36), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 3)]
    return nn.Sequential(*layers).float()


torch.manual_seed(1)
X, Y, REAL = torch.randn(12, 2, 6, 6), torch.randint(3, (12,)), torch.randn(12, 3)
DATA = [(X[:7], Y[:7]), (X[7:], Y[7:])]
MODEL = network()
FITS = {
    **ESTIMATORS,
    "eigen": kfoc.EigenCorrected(),
    "eigen of kfoc": kfoc.EigenCorrected(kfoc.KFOC()),
}
FITTED = {
    name: kfoc.fit(MODEL, DATA, estimator=estimator, fisher="exact")
    for name, estimator in FITS.items()
}
MOVED = copy.deepcopy(MODEL)
with torch.no_grad():
    for each in MOVED.parameters():
        each.mul_(1.1)
VECTOR = {
    name: torch.randn(3, *p.shape)
    for name, p in MODEL.named_parameters()
    if any(name in names for names in FITTED["kfoc"].parameters.values())
}


def numbers(value: Any) -> list[Any]:
    """All tensors and numbers in a result."""
    if isinstance(value, kfoc.Curvature):
        return [tensor for block in value.values() for tensor in block.tensors()]
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, (tuple, list)):
        return [number for item in value for number in numbers(item)]
    return [value]


def check(job: Job, context: str) -> None:
    """The same as without the context, or with it in the model's forward pass alone."""

    def predict(model: nn.Module, inputs: Any) -> Tensor:
        with bfloat16():
            return model(inputs)

    expected = numbers(job(predict if context == "autocast" else None))
    with CONTEXTS[context]():
        found = numbers(job(None))
        enabled = torch.is_autocast_enabled("cpu"), torch.get_default_device().type
    assert enabled == (context == "autocast", "meta" if context == "defaults" else "cpu")
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if not isinstance(one, Tensor):
            assert one == other
            continue
        assert (one.dtype, one.device) == (other.dtype, other.device)
        assert not one.is_inference()
        assert torch.equal(one, other)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("estimator", FITS)
def test_fits(estimator: str, context: str) -> None:
    def job(predict: Predict | None) -> kfoc.Curvature:
        return kfoc.fit(MODEL, DATA, estimator=FITS[estimator], predict=predict, probes=2)

    check(job, context)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("estimator", ["kfoc", "kfac", "dense"])
def test_training(estimator: str, context: str) -> None:
    def tracked(predict: Predict | None) -> kfoc.Curvature:
        tracker = kfoc.Tracker(MODEL, estimator=FITS[estimator], predict=predict, decay=0.9)
        for batch in DATA:
            tracker.update(*batch)
        return tracker.curvature()

    def steps(predict: Predict | None) -> list[Tensor]:
        with torch.inference_mode(False):
            model = copy.deepcopy(MODEL)
        tracking = {"estimator": FITS[estimator], "predict": predict}
        methods = {"update_every": 1, "method": "exact" if estimator == "kfac" else "pi"}
        optimizer = kfoc.NaturalGradient(model, **methods, **tracking)
        for inputs, _ in DATA:
            optimizer.observe(inputs)
            for place, parameter in enumerate(model.parameters()):
                parameter.grad = torch.linspace(
                    -1, 1 + place, parameter.numel(), dtype=torch.float32, device="cpu"
                ).view_as(parameter)
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    check(tracked, context)
    check(steps, context)


def algebra(curvature: kfoc.Curvature, folder: Path) -> dict[str, Callable[[], Any]]:
    first = {name: VECTOR[name][0] for name in VECTOR}

    def penalty(anchors: str) -> Tensor:
        held = kfoc.Consolidation(anchors=anchors)
        held.add(MODEL, curvature)
        if anchors == "each" or "Eigen" not in curvature.estimator:
            held.add(MODEL, curvature)
        return held.penalty(MOVED)

    def stored() -> kfoc.Curvature:
        curvature.save(folder / "curvature")
        return kfoc.Curvature.load(folder / "curvature")

    def blocks() -> list[Any]:
        found: list[Any] = []
        for layer, block in curvature.items():
            vectors = curvature.layouts[layer].join(first)
            found += [block.matvec(vectors), block.to_dense(), block.trace(), block.inner(block)]
            found += [block.frobenius_norm(), block.scaled(2.0).to_dense()]
        return found

    return {
        "matvec": lambda: curvature.matvec(VECTOR),
        "quadratic_form": lambda: curvature.quadratic_form(VECTOR),
        "norms": lambda: [curvature.trace(), curvature.frobenius_norm()],
        "solve": lambda: curvature.solve(VECTOR, 0.1),
        "pi": lambda: curvature.solve(VECTOR, 0.1, method="pi"),
        "roots": lambda: [
            curvature.sqrt_matvec(VECTOR, 0.1),
            curvature.inverse_sqrt_matvec(VECTOR, 0.1),
        ],
        "logdet": lambda: curvature.logdet(0.1),
        "sample": lambda: curvature.sample(2, 0.1),
        "damped": lambda: curvature.damped(0.2).redamped(0.1).inverse_quadratic_form(VECTOR),
        "compare": lambda: [
            [each.cosine, each.relative_distance]
            for each in curvature.compare(FITTED["kfac"]).values()
        ],
        "sum": lambda: curvature if "Eigen" in curvature.estimator else curvature + 2 * curvature,
        "vectors": lambda: curvature.unflatten(curvature.flatten(first)),
        "penalties": lambda: [penalty("latest"), penalty("each")],
        "stored": stored,
        "blocks": blocks,
        "copy": lambda: curvature.to(dtype=torch.float64),
    }


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("estimator", FITTED)
def test_algebra(estimator: str, context: str, tmp_path: Path) -> None:
    for job in algebra(FITTED[estimator], tmp_path).values():
        check(lambda predict, job=job: job(), context)  # type: ignore[misc]


@pytest.mark.filterwarnings("ignore:the best prior precision is the")
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("estimator", ["kfoc", "rank", "eigen", "dense"])
def test_influence_and_laplace(estimator: str, context: str) -> None:
    curvature = FITTED[estimator]

    def scores(predict: Predict | None) -> Tensor:
        found = kfoc.influence(
            MODEL, curvature, DATA, (X[:2], Y[:2]), damping=0.1, top=None, predict=predict
        )
        assert found.scores is not None
        return found.scores

    def posterior(predict: Predict | None, likelihood: str = "categorical") -> kfoc.Laplace:
        return kfoc.Laplace(MODEL, curvature, 2.0, likelihood, predict=predict)

    def probabilities(predict: Predict | None) -> list[Tensor]:
        methods = ("probit", "logits", "weights")
        return [posterior(predict).probabilities(X[:3], each, num=3) for each in methods]

    def regression(predict: Predict | None) -> list[Any]:
        found = posterior(predict, "gaussian")
        return [found.predictive(X[:3], method, num=3) for method in ("linearised", "weights")]

    def evidence(predict: Predict | None) -> list[Any]:
        found = posterior(predict)
        tuned = found.tuned(DATA, per_layer=True)
        chosen = found.tuned_by_validation(DATA, (3.0, 10.0))
        prior = [tuned.prior_precision, chosen.prior_precision]
        return [found.log_marginal_likelihood(DATA), *prior, found.sample(2)]

    for job in (scores, probabilities, regression, evidence):
        check(job, context)


@pytest.mark.parametrize("context", CONTEXTS)
def test_closest_products(context: str) -> None:
    torch.manual_seed(0)
    lefts, rights = torch.randn(4, 6, 6).float(), torch.randn(4, 5, 5).float()
    lefts, rights = lefts @ lefts.mT, rights @ rights.mT
    inputs, grads = torch.randn(9, 2, 5).float(), torch.randn(9, 2, 6).float()

    def found(predict: Predict | None) -> list[Tensor]:
        terms = kfoc.nearest_kronecker(lefts, rights)
        samples = kfoc.nearest_kronecker_of_samples(inputs, grads)
        return [terms.left, terms.right, samples.left, samples.right]

    check(found, context)


def test_what_the_caller_makes_is_made_as_the_caller_would() -> None:
    """Batches, closures and forward passes; and all is as it was when one of them fails."""
    seen: list[tuple[bool, str]] = []

    def note() -> None:
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_default_device().type))

    def data() -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, targets in DATA:
            note()
            yield inputs, targets

    def predict(model: nn.Module, inputs: Tensor) -> Tensor:
        note()
        if fail:
            raise RuntimeError("a fault of the user's")
        return model(inputs)

    fail, model = False, copy.deepcopy(MODEL)
    optimizer = kfoc.NaturalGradient(model, predict=predict)
    with torch.device("meta"), bfloat16():
        kfoc.fit(MODEL, data(), predict=predict)
        kfoc.influence(MODEL, FITTED["kfac"], data(), (X[:1], Y[:1]), predict=predict)
        kfoc.Laplace(MODEL, FITTED["kfac"], predict=predict).data_fit(data())
        optimizer.observe(X)
        optimizer.step(note)
        fail = True
        with pytest.raises(RuntimeError, match="of the user's"):
            kfoc.fit(MODEL, data(), predict=predict)
        note()
    assert set(seen) == {(True, "meta")}


def test_casts_of_other_passes_are_forgotten() -> None:
    """Autocast keeps cast weights: neither theirs in our pass, nor ours in theirs."""
    model = network()
    with bfloat16():
        first = kfoc.fit(model, DATA, fisher="exact", estimator=kfoc.KFAC())
        model(X)  # casts are kept now
        with torch.no_grad():
            model[5].weight.mul_(2)
        second = kfoc.fit(model, DATA, fisher="exact", estimator=kfoc.KFAC())
        kfoc.Laplace(model, second).data_fit(DATA)
        outputs = model(X)
    assert not torch.equal(first["7"].to_dense(), second["7"].to_dense())
    with bfloat16():
        assert torch.equal(outputs, model(X))
    outputs.float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("one_by_one", [False, True])
def test_products_are_in_full_precision(one_by_one: bool) -> None:
    """But for the model's own, as far as the machine has cheaper ones."""
    backend = getattr(torch.backends.mkldnn, "matmul", None)
    if one_by_one and not hasattr(backend, "fp32_precision"):
        pytest.skip("this torch has one precision for all")

    def precision() -> str:
        return backend.fp32_precision if one_by_one else torch.get_float32_matmul_precision()

    def choose(value: str) -> None:
        if one_by_one:
            backend.fp32_precision = value
        else:
            torch.set_float32_matmul_precision(value)

    def predict(model: nn.Module, inputs: Tensor) -> Tensor:
        seen.append(precision())
        return outputs[: len(inputs)] + 0 * model(inputs)

    seen: list[str] = []
    low, before = "bf16" if one_by_one else "medium", precision()
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 64)).float(), torch.randn(300, 256)
    x, outputs = x.float(), 0.0 * model(x.float()) + torch.randn(300, 64).float()
    vector = {name: torch.randn_like(p) for name, p in model.named_parameters()}

    def found() -> list[Any]:
        curvature = kfoc.fit(model, [(x, None)], "gaussian", predict=predict)
        return numbers([curvature, curvature.solve(vector), curvature.logdet()])

    expected = found()
    try:
        choose(low)
        again = found()
        seen.append(precision())
    finally:
        choose(before)
    assert seen == [before, before, low, low, low]  # each fit with its check
    for one, other in zip(again, expected, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
