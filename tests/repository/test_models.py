"""The models of examples/: every treated layer against plain autograd, the rest with a reason."""

from __future__ import annotations

import fnmatch
import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import kfoc
import oracle
from documents import script

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES))

# Layers that may be left out, with a reason in `skipped`: an empty tuple means full coverage.
MAY_BE_SKIPPED: dict[str, tuple[str, ...]] = {
    "gpt2": ("lm_head",),  # whose weight is in the block of the embedding
    "bert": (),
    "vit": (),
    "resnet": (),
    "llama": (),
    "moe": (),
    "swin": (),
    "video": (),
    "unet": (),
    "mobilenet": (),
    "autoencoder": (),
}
# LlamaRMSNorm and the rotary embedding compute in float32 whatever the model is in.
TOLERANCE = {"llama": 1e-5, "moe": 1e-5}

_built: dict[str, Any] = {}


def example(name: str) -> Any:
    """The small example of a module of examples/, trained once, in float64."""
    if name not in _built:
        _built[name] = importlib.import_module(name).build(small=True)
    return _built[name]


def split(batch: Any) -> tuple[Any, Tensor]:
    """Inputs and targets, as the examples have them."""
    if isinstance(batch, Mapping):
        return {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
    return batch[0], batch[1]


def log_likelihood(example: Any, inputs: Any, targets: Tensor) -> Tensor:
    """Summed over the labels of the samples given."""
    if example.predict is not None:
        outputs = example.predict(example.model, inputs)
    else:
        named = isinstance(inputs, Mapping)
        outputs = example.model(**inputs) if named else example.model(inputs)
    outputs = getattr(outputs, "logits", outputs)
    if example.likelihood == "gaussian":
        return -0.5 * (outputs - targets).pow(2).sum()
    logits = outputs.mT if outputs.ndim == 3 else outputs
    return -cross_entropy(logits, targets, reduction="sum")


def sample_gradients(example: Any) -> dict[str, Tensor]:
    """Parameter name -> (N, *parameter): the derivative of each sample's log-likelihood."""
    names, parameters = zip(*example.model.named_parameters(), strict=True)
    rows = []
    for batch in example.batches:
        inputs, targets = split(batch)
        for n in range(len(targets)):
            each = {k: v[n : n + 1] for k, v in inputs.items()} if isinstance(inputs, dict) else 0
            one = each or inputs[n : n + 1]
            value = log_likelihood(example, one, targets[n : n + 1])
            rows.append(torch.autograd.grad(value, parameters, materialize_grads=True))
    return {name: torch.stack(g) for name, g in zip(names, zip(*rows, strict=True), strict=True)}


def matrices(model: nn.Module, layer: str, kind: str, gradients: list[Tensor]) -> Tensor:
    """Per-sample gradients of a layer's parameters, each (N, ...), as (N, o, i)."""
    if kind == "matrices":  # of experts, whose optimum is that of each
        return gradients[0].flatten(1, 2)
    module = model.get_submodule(layer)
    if kind == "stacked":
        return torch.stack([gradient.flatten(1) for gradient in gradients], -1)
    if kind == "flat":
        return torch.cat([gradient.flatten(1) for gradient in gradients], -1)[..., None]
    weight = gradients[0].mT if kind == "columns" else gradients[0]
    matrix = oracle.rows_of_outputs(module, weight[None])[0]
    return torch.cat([matrix, *(bias[..., None] for bias in gradients[1:])], -1)


@pytest.mark.parametrize("name", MAY_BE_SKIPPED)
def test_every_treated_layer_is_exact(name: str) -> None:
    built = example(name)
    exact = built.fit(built.batches, kfoc.BlockDiagonal(), fisher="empirical")
    gradients = sample_gradients(built)
    # A tied parameter may be called by any of its names.
    first = {id(p): n for n, p in built.model.named_parameters()}
    canonical = {n: first[id(p)] for n, p in built.model.named_parameters(remove_duplicate=False)}
    for layer, block in exact.items():
        layout = exact.layouts[layer]
        parts = [gradients[canonical[parameter]] for parameter in layout.names]
        rows = matrices(built.model, layer, layout.kind, parts).flatten(1)
        expected = rows.mT @ rows / len(rows)
        assert expected.norm() > 0, layer
        difference = oracle.relative_error(expected, block.to_dense())
        assert difference < TOLERANCE.get(name, 1e-9), layer


@pytest.mark.parametrize("name", MAY_BE_SKIPPED)
def test_coverage_is_complete_or_has_a_reason(name: str) -> None:
    built = example(name)
    curvature = built.fit(built.batches, kfoc.KFAC())
    allowed = MAY_BE_SKIPPED[name]
    for layer, reason in curvature.skipped.items():
        assert any(fnmatch.fnmatchcase(layer, pattern) for pattern in allowed), (layer, reason)
        assert len(reason) > 10
    coverage = curvature.coverage
    assert coverage.treated + coverage.skipped == sum(p.numel() for p in built.model.parameters())
    assert coverage.fraction == 1.0
    for layer in coverage.layers:
        assert layer.reason or not layer.skipped, layer
        inside = any(block.startswith(f"{layer.layer}.") for block in curvature)  # experts
        assert layer.layer in curvature or layer.reason or inside, layer


@pytest.mark.parametrize("name", ["bert", "unet"])
def test_optimum_of_the_data(name: str) -> None:
    """K-FOC's relative errors are those of the singular value decomposition of the exact blocks."""
    built = example(name)
    exact = built.fit(built.batches, kfoc.BlockDiagonal())
    best = built.fit(built.batches, kfoc.KFOC("exact", rtol=1e-12, passes=40))
    compared = 0
    for layer, block in best.items():
        if not isinstance(block, kfoc.KroneckerBlock):
            continue
        dense = exact[layer].to_dense()
        _, _, error = oracle.optimum(dense, *block.shape)
        found = oracle.relative_error(dense, block.to_dense())
        assert found == pytest.approx(error, abs=1e-6), layer
        compared += 1
    assert compared > 5


@pytest.mark.parametrize("estimator", [kfoc.KFOC(), kfoc.BlockDiagonal(), kfoc.Diagonal()])
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_padding_has_no_influence(fisher: str, estimator: kfoc.Estimator) -> None:
    """Neither what stands at padded positions, nor how many there are."""
    built = example("bert")
    options = {"fisher": fisher}
    expected = built.fit(built.batches, estimator, **options)
    changed, cut = [], []
    for batch in built.batches:
        padded = batch["attention_mask"] == 0
        assert padded.any()
        other = transformers.BatchEncoding(dict(batch))
        other["input_ids"] = torch.where(padded, 7, batch["input_ids"])
        changed.append(other)
        used = int(batch["attention_mask"].sum(1).max())
        sequences = {k: v[:, :used] for k, v in batch.items() if k != "labels"}
        cut.append({**sequences, "labels": batch["labels"]})
    for data in (changed, cut):
        found = built.fit(data, estimator, **options)
        assert list(found) == list(expected)
        for layer, block in expected.items():
            torch.testing.assert_close(
                found[layer].to_dense(), block.to_dense(), rtol=1e-7, atol=1e-10
            )


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_ignored_labels_have_no_influence(fisher: str) -> None:
    """Tokens behind the last label may be anything: attention is causal."""
    built = example("gpt2")
    expected = built.fit(built.batches, kfoc.KFOC(), fisher=fisher)
    changed = []
    for inputs, labels in built.batches:
        ignored = torch.cat([torch.zeros(len(labels), 1, dtype=torch.bool), labels == -100], 1)
        assert ignored.any()
        ids = torch.where(ignored, 7, inputs["input_ids"])
        changed.append(({**inputs, "input_ids": ids}, labels))
    found = built.fit(changed, kfoc.KFOC(), fisher=fisher)
    counted = [(inputs, labels.clamp_min(0)) for inputs, labels in built.batches]
    other = built.fit(counted, kfoc.KFOC(), fisher=fisher)
    for layer, block in expected.items():
        torch.testing.assert_close(found[layer].to_dense(), block.to_dense(), rtol=1e-7, atol=1e-10)
        assert oracle.relative_error(block.to_dense(), other[layer].to_dense()) > 1e-3


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch.func, of attention
def test_labels_of_the_next_token_are_not_shifted_in_silence() -> None:
    built = example("gpt2")
    inputs, _ = built.batches[0]
    batch = {**inputs, "labels": inputs["input_ids"]}
    with pytest.raises(ValueError, match=r"batch 0: GPT2LMHeadModel predicts the next token"):
        kfoc.fit(built.model, [batch])
    with pytest.raises(ValueError, match="predicts the next token"):
        kfoc.fit(built.model, [transformers.BatchEncoding(batch)])
    found = kfoc.fit(built.model, [inputs], estimator=kfoc.KFAC())
    query = {"input_ids": inputs["input_ids"][:1]}
    for use in (
        lambda **how: kfoc.influence(
            built.model, found, [batch], (query, query["input_ids"]), damping=0.1, **how
        ),
        lambda **how: kfoc.self_influence(built.model, found, [batch], damping=0.1, **how),
        lambda **how: kfoc.Laplace(built.model, found, **how).data_fit([batch]),
        lambda **how: kfoc.Fisher(built.model, [batch], **how).matvec(found.vector(built.model)),
    ):
        with pytest.raises(ValueError, match="predicts the next token"):
            use()
        use(predict=kfoc.next_token)
    # Without labels, with pairs, or with a predict there is nothing to be mistaken.
    kfoc.fit(built.model, [inputs])
    kfoc.fit(built.model, [(inputs, inputs["input_ids"])])
    kfoc.fit(built.model, [batch], predict=lambda model, inputs: model(**inputs))


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_batches_of_tokens_as_a_language_model_is_trained_on_them(fisher: str) -> None:
    built = example("gpt2")
    plain = {"fisher": fisher, "estimator": kfoc.KFAC()}
    cut = {"predict": lambda model, inputs: model(**inputs).logits[:, :-1]}
    batches, pairs, masked = [], [], []
    for inputs, labels in built.batches:
        ids = inputs["input_ids"]
        whole = torch.cat([ids[:, :1], labels], 1)
        batches.append(transformers.BatchEncoding({**inputs, "labels": whole}))
        pairs.append((inputs, labels))
        mask = torch.ones_like(ids)
        mask[:, -2:] = 0
        behind = torch.where(mask == 0, -100, ids)[:, 1:]
        masked.append(({**inputs, "attention_mask": mask}, behind))
    found = kfoc.fit(built.model, batches, predict=kfoc.next_token, **plain)
    expected = kfoc.fit(built.model, pairs, **cut, **plain)
    without = [inputs for inputs, _ in masked]
    found_masked = kfoc.fit(built.model, without, predict=kfoc.next_token, **plain)
    expected_masked = kfoc.fit(built.model, masked, **cut, **plain)
    tracker = kfoc.Tracker(built.model, predict=kfoc.next_token, **plain)
    for batch in batches:
        tracker.update({k: v for k, v in batch.items() if k != "labels"}, batch["labels"])
    for one, other in (
        (found, expected),
        (found_masked, expected_masked),
        (tracker.curvature(), expected),
    ):
        for layer, block in other.items():
            assert torch.equal(one[layer].to_dense(), block.to_dense())
    assert (
        oracle.relative_error(
            found_masked["transformer.wte"].to_dense(), found["transformer.wte"].to_dense()
        )
        > 1e-3
    )
    ids = built.batches[0][0]["input_ids"]
    for batch, message in (
        ((ids, ids[:, 1:]), r"labels itself: they must be \(N, T\).*found \(3, "),
        ((ids.double(), None), "needs .input_ids. .* found Tensor"),
        ({"inputs_embeds": ids}, "found NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            kfoc.fit(built.model, [batch], predict=kfoc.next_token, **plain)
    flat = nn.Sequential(nn.Embedding(50, 9), nn.Flatten(1), nn.Linear(27, 9))
    with pytest.raises(ValueError, match=r"outputs or .logits .* found \(4, 9\)"):
        kfoc.fit(flat, [(torch.randint(50, (4, 3)), None)], predict=kfoc.next_token)


def test_batch_encodings_stay_as_they_are() -> None:
    built = example("bert")
    batch = built.batches[0]
    before = {name: (value, value._version) for name, value in batch.items()}
    seen: list[Any] = []

    def predict(model: nn.Module, inputs: Any) -> Any:
        seen.append(inputs)
        return model(inputs.input_ids, attention_mask=inputs.attention_mask)

    found = kfoc.fit(built.model, [batch], predict=predict)
    expected = kfoc.fit(built.model, [batch])
    assert isinstance(seen[0], transformers.BatchEncoding)
    assert "labels" not in seen[0]
    assert {name: (value, value._version) for name, value in batch.items()} == before
    for layer, block in expected.items():
        assert torch.equal(block.to_dense(), found[layer].to_dense())


def test_examples_print_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """In float32, as the command runs; the examples' own output goes into it."""
    torch.set_default_dtype(torch.float32)
    # By path: the tests have a module of that name.
    table = script("examples/models.py")
    assert set(table.EXAMPLES) == set(MAY_BE_SKIPPED)
    rows = table.main(small=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(rows) > 2 + len(MAY_BE_SKIPPED)  # some have several rows
    assert {line.count("|") for line in lines} == {8}
    for row in rows:
        assert all(value > 0 for value in row.milliseconds.values())
        if row.name not in ("GPT-2",):
            assert row.errors["K-FOC"] < row.errors["K-FAC"], row


def test_an_example_prints_coverage_errors_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("unet").main(small=True)
    text = capsys.readouterr().out
    assert "100.0% of the trained parameters are treated" in text
    assert "up1" in text
    assert "milliseconds for one batch: gradient" in text
