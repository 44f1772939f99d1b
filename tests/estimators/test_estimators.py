"""Every estimator against the dense block of the whole data set."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kfoc
import oracle
from head_and_tail import Recursion
from kfoc.estimators import head
from kfoc.likelihoods.draws import Draws
from kfoc.nearest.pair import PRECISION, combined, products, singular
from models import FEW_PASSES, batches, convolutional, images, trained

ESTIMATORS = {
    "kfac": kfoc.KFAC(),
    "diagonal": kfoc.Diagonal(),
    "block-diagonal": kfoc.BlockDiagonal(),
    **{f"kfoc-{a}": kfoc.KFOC(a) for a in ("online", "running", "approx", "exact")},
    "kfoc-streamed": kfoc.KFOC("online", buffer=0),
    "kfoc-exact-streamed": kfoc.KFOC("exact", buffer=0),
}
LAYERS = ("0", "3", "5")


def cotangents(model: nn.Module, x: Tensor, y: Tensor, fisher: str) -> Tensor:
    outputs = model(x).detach()
    if fisher == "exact":
        return oracle.categorical_exact(outputs)
    return oracle.categorical_observed(outputs, y)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("size", [1, 5, 8, 20])
@pytest.mark.parametrize("buffer", [0, 2000])
def test_exact_aggregation_is_the_optimum_of_the_whole_data_set(
    fisher: str, size: int, buffer: int
) -> None:
    model, (x, y) = convolutional(), images(20)
    estimator = kfoc.KFOC("exact", rtol=0, passes=400, buffer=buffer)
    curvature = kfoc.fit(model, batches(x, y, size), fisher=fisher, estimator=estimator)
    for layer in LAYERS:
        expected = oracle.fisher_block(model, layer, x, cotangents(model, x, y, fisher))
        block = curvature[layer]
        best, _, error = oracle.optimum(expected, *block.shape)
        assert block.report.converged
        torch.testing.assert_close(
            block.to_dense(), best, rtol=1e-6, atol=1e-8 * best.abs().max().item()
        )
        assert oracle.relative_error(expected, block.to_dense()) == pytest.approx(error, rel=1e-8)


@pytest.mark.parametrize("aggregation", ["online", "running", "approx", "exact"])
def test_a_single_batch_gets_its_optimum(aggregation: str) -> None:
    model, (x, y) = convolutional(), images(20)
    curvature = kfoc.fit(model, [(x, y)], fisher="exact", estimator=kfoc.KFOC(aggregation, rtol=0))
    for layer in LAYERS:
        expected = oracle.fisher_block(model, layer, x, cotangents(model, x, y, "exact"))
        best, _, error = oracle.optimum(expected, *curvature[layer].shape)
        torch.testing.assert_close(
            curvature[layer].to_dense(), best, rtol=1e-6, atol=1e-8 * best.abs().max().item()
        )
        found = curvature[layer].relative_error
        if found is not None:
            assert found == pytest.approx(error, abs=1e-7)
            assert curvature[layer].relative_error_standard_error == 0.0
    assert curvature["3"].relative_error is not None  # free for plain linear layers


def test_drawn_labels_are_an_inverse_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """With known uniforms, the label of "mc-plain" is where the cumulative sum passes them."""
    model, (x, y) = convolutional(), images(12)
    uniforms = torch.rand(12, 1)

    def uniform(self: Draws, count: int, places: int, device: torch.device) -> Tensor:
        return uniforms[self.first_index : self.first_index + count]

    monkeypatch.setattr(Draws, "uniform", uniform)
    curvature = kfoc.fit(model, batches(x, y, 5), fisher="mc-plain", estimator=kfoc.BlockDiagonal())
    outputs = model(x).detach()
    p = outputs.softmax(-1)
    labels = torch.tensor(
        [next(c for c in range(3) if p[n, : c + 1].sum() >= uniforms[n]) for n in range(12)]
    )
    for layer in LAYERS:
        drawn = oracle.categorical_observed(outputs, labels)
        expected = oracle.fisher_block(model, layer, x, drawn)
        torch.testing.assert_close(curvature[layer].to_dense(), expected)


def test_mc_samples_are_scaled_to_a_mean() -> None:
    model, (x, y) = convolutional(), images(6)
    exact = kfoc.fit(model, [(x, y)], fisher="exact", estimator=kfoc.BlockDiagonal())
    drawn = kfoc.fit(model, [(x, y)], fisher="mc", mc_samples=400, estimator=kfoc.BlockDiagonal())
    for layer in LAYERS:
        assert oracle.relative_error(exact[layer].to_dense(), drawn[layer].to_dense()) < 0.1


@pytest.mark.parametrize("size", [3, 20])
def test_diagonal_and_block_diagonal_are_exact(size: int) -> None:
    model, (x, y) = convolutional(), images(20)
    data = batches(x, y, size)
    dense = kfoc.fit(model, data, fisher="exact", estimator=kfoc.BlockDiagonal())
    diagonal = kfoc.fit(model, data, fisher="exact", estimator=kfoc.Diagonal())
    for layer in LAYERS:
        expected = oracle.fisher_block(model, layer, x, cotangents(model, x, y, "exact"))
        torch.testing.assert_close(dense[layer].to_dense(), expected)
        torch.testing.assert_close(diagonal[layer].to_dense(), torch.diag(expected.diagonal()))
        assert dense[layer].shape == diagonal[layer].shape


def test_block_diagonal_refuses_large_layers() -> None:
    model, (x, y) = convolutional(), images(4)
    with pytest.raises(ValueError, match=r"layer '3' has 6 x 65 = 390 parameters.*max_size=390"):
        kfoc.fit(model, [(x, y)], estimator=kfoc.BlockDiagonal(max_size=389))


@pytest.mark.parametrize("size", [4, 20])
def test_kfac_is_what_its_papers_say(size: int) -> None:
    model, (x, y) = convolutional(), images(20)
    curvature = kfoc.fit(model, batches(x, y, size), fisher="exact", estimator=kfoc.KFAC())
    # The layers' inputs and output gradients, by autograd through a copy of the forward pass.
    hidden = model[0](x).detach().requires_grad_()
    features = torch.relu(hidden).flatten(1)
    outputs = model[5](torch.tanh(model[3](features)))
    directions = oracle.categorical_exact(outputs.detach())
    grads = torch.stack(
        [torch.autograd.grad(outputs, hidden, d, retain_graph=True)[0] for d in directions]
    )
    patches = functional.unfold(x, 3, padding=1, stride=2)
    patches = torch.cat([patches, torch.ones_like(patches[:, :1])], 1)
    right = torch.einsum("nit,njt->ij", patches, patches) / 20
    left = torch.einsum("snoxy,snpxy->op", grads, grads) / (20 * 16)
    torch.testing.assert_close(curvature["0"].right, right)
    torch.testing.assert_close(curvature["0"].left, left)
    inputs = torch.cat([features, torch.ones(20, 1)], 1)
    torch.testing.assert_close(curvature["3"].right, inputs.mT @ inputs / 20)


def test_approx_averages_the_factors_of_the_batches() -> None:
    model, (x, y) = convolutional(), images(20)
    size = 8  # 8, 8, 4
    found = kfoc.fit(
        model, batches(x, y, size), fisher="empirical", estimator=kfoc.KFOC("approx", rtol=0)
    )
    for layer in LAYERS:
        left, right = 0.0, 0.0
        for part, labels in batches(x, y, size):
            fisher = oracle.fisher_block(
                model, layer, part, cotangents(model, part, labels, "empirical")
            )
            o, i = found[layer].shape
            u, s, v = torch.linalg.svd(oracle.rearranged(fisher, o, i), full_matrices=False)
            sign = u[:, 0].view(o, o).diagonal().sum().sign()
            left = left + len(part) / 20 * sign * s[0] * u[:, 0].view(o, o)
            right = right + len(part) / 20 * sign * v[0].view(i, i)
        torch.testing.assert_close(
            found[layer].to_dense(), torch.kron(left, right), rtol=1e-6, atol=1e-9
        )


def test_running_is_algorithm_1_on_estimate_and_batch() -> None:
    model, (x, y) = convolutional(), images(20)
    found = kfoc.fit(
        model, batches(x, y, 8), fisher="empirical", estimator=kfoc.KFOC("running", rtol=0)
    )
    for layer in LAYERS:
        o, i = found[layer].shape
        estimate, count = torch.zeros(o * i, o * i), 0
        for part, labels in batches(x, y, 8):
            fisher = oracle.fisher_block(
                model, layer, part, cotangents(model, part, labels, "empirical")
            )
            batch, _, _ = oracle.optimum(fisher, o, i)
            mixed = (count * estimate + len(part) * batch) / (count + len(part))
            estimate, count = oracle.optimum(mixed, o, i)[0], count + len(part)
        torch.testing.assert_close(found[layer].to_dense(), estimate, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0])
@pytest.mark.parametrize("kind", ["generic", "parallel", "nearly parallel", "orthogonal"])
def test_the_sum_of_two_products_in_closed_form(kind: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(4, 5, 5, dtype=torch.float64, generator=generator)
    first, left, second, right = roots @ roots.mT
    if kind == "orthogonal":
        eye = torch.eye(5, dtype=torch.float64)
        first, left, second, right = (torch.diag(eye[k]) for k in (0, 1, 2, 3))
    elif kind != "generic":
        slight = 1e-6 if kind == "nearly parallel" else 0.0
        left, right = first + slight * left, second + slight * right
    lefts, rights = [first / first.norm(), left / left.norm()], [second, right]
    rights = [each / each.norm() for each in rights]
    total = 3.0 * torch.kron(lefts[0], rights[0]) + scale * torch.kron(lefts[1], rights[1])
    stacks = torch.stack(lefts), torch.stack(rights)
    grams = [products([stack]) for stack in stacks]
    found = singular(grams, torch.tensor([3.0, scale]), [1, 1], PRECISION)
    sigma, shares = found.sigmas[0].item(), [each[:1] for each in found.shares]
    factors = [combined([s], share)[0] for s, share in zip(stacks, shares, strict=True)]
    best = oracle.optimum(total, 5, 5)[0]
    assert sigma == pytest.approx(best.norm().item(), rel=1e-12)
    assert [each.norm().item() for each in factors] == pytest.approx([1, 1], rel=1e-9)
    assert all((share >= 0).all() for share in shares)
    torch.testing.assert_close(sigma * torch.kron(*factors), best, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("size", [1, 10, 100, 300])
def test_a_data_set_within_the_buffer_gets_its_optimum_in_one_pass(size: int) -> None:
    model, x, y = trained()
    exact = kfoc.fit(model, batches(x, y, size), estimator=kfoc.BlockDiagonal())
    online = kfoc.fit(model, batches(x, y, size), estimator=kfoc.KFOC("online", rtol=0))
    for layer, block in online.items():
        fisher = exact[layer].to_dense()
        _, _, best = oracle.optimum(fisher, *block.shape)
        assert oracle.relative_error(fisher, block.to_dense()) == pytest.approx(best, rel=1e-8)
        if block.relative_error is not None:
            assert block.relative_error == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("size", [1, 10, 100, 300])
def test_online_is_within_a_hundredth_of_the_optimum(size: int) -> None:
    model, x, y = trained(1500, noise=2.0)
    kfac = kfoc.fit(model, batches(x, y, size), estimator=kfoc.KFAC())
    exact = kfoc.fit(model, batches(x, y, size), estimator=kfoc.BlockDiagonal())
    online = kfoc.fit(model, batches(x, y, size), estimator=kfoc.KFOC("online", buffer=0))
    for layer in online:
        fisher = exact[layer].to_dense()
        _, _, best = oracle.optimum(fisher, *online[layer].shape)
        error = oracle.relative_error(fisher, online[layer].to_dense())
        assert best - 1e-9 <= error <= best + 0.01
        assert error <= oracle.relative_error(fisher, kfac[layer].to_dense())


@pytest.mark.parametrize("decay", [None, 0.6])
@pytest.mark.parametrize("size", [4, 1, 0])
def test_online_is_head_and_tail(
    size: int, decay: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `Recursion` has them, where no half steps are left out."""
    monkeypatch.setattr(head, "NEGLIGIBLE", -1.0)
    model, (x, y) = convolutional(), images(36)
    estimator = kfoc.KFOC(buffer=0, head=size, decay=decay)
    found = kfoc.fit(model, batches(x, y, 4), fisher="empirical", estimator=estimator)
    for layer in LAYERS:
        recursion, weight = Recursion(*found[layer].shape, size), 0.0
        for part, labels in batches(x, y, 4):
            recursion.scale(decay or 1.0)
            weight = (decay or 1.0) * weight + len(part)
            fisher = oracle.fisher_block(
                model, layer, part, cotangents(model, part, labels, "empirical")
            )
            recursion.add(oracle.rearranged(fisher, *found[layer].shape) * len(part))
        expected = recursion.product() / weight
        torch.testing.assert_close(found[layer].to_dense(), expected, rtol=1e-5, atol=1e-8)
        assert found[layer].report.head == size


def test_half_steps_that_are_taken_count_for_those_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where all is quiet and nothing moves the best pair: of every second, then every fourth.

    And batches have one triple of their own, not two, as soon as that is known.
    """
    for name, value in (("NEGLIGIBLE", 1.0), ("LOUD", 1e9)):
        monkeypatch.setattr(head, name, value)
    model, (x, y) = convolutional(), images(36)
    found = kfoc.fit(
        model, batches(x, y, 4), fisher="empirical", estimator=kfoc.KFOC(buffer=0, head=1)
    )
    for layer in LAYERS:
        recursion = Recursion(*found[layer].shape, 1)
        shares, triples = (0, 1, 1, 0, 2, 0, 0, 0, 4), (2, 2, 2, 1, 1, 1, 1, 1, 1)
        for (part, labels), share, count in zip(batches(x, y, 4), shares, triples, strict=True):
            fisher = oracle.fisher_block(
                model, layer, part, cotangents(model, part, labels, "empirical")
            )
            a = oracle.rearranged(fisher, *found[layer].shape) * len(part)
            recursion.add(a, share=share, triples=count)
        expected = recursion.product() / 36
        torch.testing.assert_close(found[layer].to_dense(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("decay", [None, 0.5])
def test_decay_counts_batches_whatever_their_size(
    decay: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of more samples than a small layer takes in at once, with dense matrices beside."""
    monkeypatch.setattr(head, "NEGLIGIBLE", -1.0)
    model, o, i = nn.Linear(3, 2), 2, 4
    x, y = torch.randn(1600, 3), torch.randn(1600, 2)
    estimator = kfoc.KFOC(decay=decay, buffer=0)
    data = batches(x, y, 200 if decay is None else 400)
    found = kfoc.fit(model, data, "gaussian", fisher="empirical", estimator=estimator)[""]
    recursion, weight = Recursion(o, i), 0.0
    for part, targets in data:
        directions = (targets - model(part).detach())[None]
        fisher = oracle.fisher_block(model, "", part, directions)
        recursion.scale(decay or 1.0)
        recursion.add(oracle.rearranged(fisher, o, i) * len(part))
        weight = (decay or 1.0) * weight + len(part)
    torch.testing.assert_close(found.to_dense(), recursion.product() / weight)


def test_decay_forgets_old_batches() -> None:
    model, (x, y) = convolutional(), images(40)
    small = [(x * 1e-3, y)] * 3
    data = small + [(x, y)] * 12
    plain = kfoc.fit(model, data, fisher="empirical")
    decayed = kfoc.fit(model, data, fisher="empirical", estimator=kfoc.KFOC(decay=0.3))
    recent = kfoc.fit(model, [(x, y)], fisher="empirical")
    for layer in LAYERS[:2]:
        target = recent[layer].to_dense()
        near = oracle.relative_error(target, decayed[layer].to_dense())
        assert near < 0.03
        assert near < oracle.relative_error(target, plain[layer].to_dense())
    constant = kfoc.fit(model, [(x, y)] * 3, fisher="empirical", estimator=kfoc.KFOC(decay=1.0))
    for layer in LAYERS:
        assert oracle.relative_error(recent[layer].to_dense(), constant[layer].to_dense()) < 0.03


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_are_symmetric_psd_and_of_the_models_dtype(name: str, dtype: torch.dtype) -> None:
    model, (x, y) = convolutional(dtype), images(20, dtype)
    curvature = kfoc.fit(model, batches(x, y, 6), estimator=ESTIMATORS[name])
    for block in curvature.values():
        dense = block.to_dense()
        assert dense.dtype == dtype
        oracle.assert_psd_and_symmetric(dense)
        if isinstance(block, kfoc.KroneckerBlock):
            oracle.assert_psd_and_symmetric(block.left)
            oracle.assert_psd_and_symmetric(block.right)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_zero_gradients_give_zero_blocks(name: str) -> None:
    model, (x, _) = convolutional(), images(6)
    ignored = torch.full((6,), -100)
    curvature = kfoc.fit(model, batches(x, ignored, 3), estimator=ESTIMATORS[name], probes=4)
    for block in curvature.values():
        assert not block.to_dense().any()
        assert block.relative_error == 0.0


@pytest.mark.parametrize("name", ESTIMATORS)
@FEW_PASSES
def test_float32_at_extreme_scales_agrees_with_float64(name: str) -> None:
    if name in ("kfac", "diagonal", "block-diagonal"):
        pytest.skip("products of float32 values at their own scale, not rescaled")
    estimator = replace(ESTIMATORS[name], rtol=0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    x = torch.randn(12, 5)
    x[6:] *= 1e9  # later batches of another scale altogether
    targets = torch.randn(12, 3) * 1e-9
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1e-9

    def run(dtype: torch.dtype) -> kfoc.Curvature:
        data = batches(x.to(dtype), targets.to(dtype), 3)
        return kfoc.fit(model.to(dtype), data, "gaussian", fisher="empirical", estimator=estimator)

    wide, narrow = run(torch.float64), run(torch.float32)
    for layer in wide:
        dense = wide[layer].to_dense()
        found = torch.kron(narrow[layer].left.double(), narrow[layer].right.double())
        assert oracle.relative_error(dense, found) < 1e-3


def test_options_are_checked_when_used() -> None:
    model, (x, y) = convolutional(), images(4)
    for estimator, match in (
        (kfoc.KFOC("sometimes"), "aggregation must be one of online, running, approx, exact"),
        (kfoc.KFOC(rtol=-1.0), "rtol must not be negative"),
        (kfoc.KFOC(rtol=math.nan), "rtol must not be negative"),
        (kfoc.KFOC(max_steps=0), "max_steps must be at least 1"),
        (kfoc.KFOC("exact", decay=0.5), "goes with aggregation"),
        (kfoc.KFOC(decay=1.5), r"decay must lie in \(0, 1\]"),
        (kfoc.KFOC(plan="magic"), "plan must be one of"),
    ):
        with pytest.raises(ValueError, match=match):
            kfoc.fit(model, [(x, y)], estimator=estimator)


def test_exact_reports_when_its_passes_do_not_suffice() -> None:
    model, (x, y) = convolutional(), images(20)
    estimator = kfoc.KFOC("exact", rtol=0, passes=2, buffer=0)
    with pytest.warns(RuntimeWarning, match="did not converge in 3 layers: .*'3'.*more passes"):
        short = kfoc.fit(model, batches(x, y, 5), estimator=estimator)
    assert not short["3"].report.converged
    assert short["3"].report.steps == 1


UNSETTLED = {
    "exact": kfoc.KFOC("exact", rtol=1e-12, passes=4, buffer=0),
    "exact, rank 2": kfoc.KFOC("exact", rank=2, rtol=1e-12, passes=4, buffer=0),
    "eigen-corrected": kfoc.EigenCorrected(kfoc.KFOC("exact", rtol=1e-12, passes=4, buffer=0)),
    "one batch": kfoc.KFOC(rtol=0, max_steps=1, buffer=0),
    "running": kfoc.KFOC("running", rtol=0, max_steps=1),
    "approx": kfoc.KFOC("approx", rtol=0, max_steps=1),
}


@pytest.mark.parametrize("case", UNSETTLED)
@pytest.mark.parametrize("sweeps", [False, True])
def test_what_did_not_converge_is_told_once(case: str, sweeps: bool, tmp_path: Path) -> None:
    """With the layers, of all sweeps, and with what the last of several passes still changed."""
    model, (x, y) = convolutional(), images(20)
    data = batches(x, y, 20 if case == "one batch" else 5)
    groups: dict[str, Any] = {}
    if sweeps:  # the largest layer by itself, and the others in another one
        bytes_held = {"exact, rank 2": 617_000, "eigen-corrected": 208_000}.get(case, 205_000)
        groups = {"memory_budget": bytes_held, "storage": tmp_path / "blocks"}
    with pytest.warns(RuntimeWarning, match="did not converge") as caught:
        found = kfoc.fit(model, data, estimator=UNSETTLED[case], **groups)
    (warning,) = caught
    assert warning.filename == __file__
    text = str(warning.message)
    unsettled = [name for name, block in found.items() if not block.report.converged]
    assert f"in {len(unsettled)} layers" in text
    assert all(repr(name) in text for name in unsettled)
    if "exact" in case or case == "eigen-corrected":
        changes = [float(part.split(")")[0]) for part in text.split("changed sigma by ")[1:]]
        assert len(changes) == len(unsettled)
        assert all(0 < change < 1 for change in changes)


@pytest.mark.filterwarnings("ignore:.* did not converge in:RuntimeWarning")
@pytest.mark.parametrize("passes", [2, 3])
def test_exact_of_few_passes_is_a_half_step(passes: int) -> None:
    """Which is a projection: what is left of F is orthogonal to it, converged or not."""
    model, (x, y) = convolutional(), images(20)
    estimator = kfoc.KFOC("exact", passes=passes, buffer=0, rtol=1e-12)
    found = kfoc.fit(model, batches(x, y, 5), fisher="empirical", estimator=estimator)
    for layer in LAYERS:
        fisher = oracle.fisher_block(model, layer, x, cotangents(model, x, y, "empirical"))
        block = found[layer].to_dense()
        assert (fisher * block).sum().item() == pytest.approx(block.norm().item() ** 2, rel=1e-9)


def test_exact_of_one_pass_is_that_of_online() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    data = [(torch.randn(8, 5), torch.randint(3, (8,))) for _ in range(5)]
    with pytest.warns(RuntimeWarning, match="did not converge in 2 layers: '0', '2'\\. Their"):
        found = kfoc.fit(model, data, estimator=kfoc.KFOC("exact", passes=1, buffer=0))
    expected = kfoc.fit(model, data, estimator=kfoc.KFOC("online", buffer=0))
    for name, block in expected.items():
        assert block.left.norm() > 0
        assert torch.equal(found[name].to_dense(), block.to_dense())
        assert not found[name].report.converged
