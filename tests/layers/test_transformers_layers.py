"""Every layer of a small GPT-2, as the transformers library has it, against plain autograd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfoc
import oracle
from every_layer import check_every_block
from kfoc.samples import one_hot as tokens

transformers = pytest.importorskip("transformers")

CONFIG = {"vocab_size": 11, "n_positions": 5, "n_embd": 4, "n_layer": 1, "n_head": 2}


@pytest.fixture(scope="module")
def case() -> Iterator[tuple[nn.Module, dict[str, Tensor], Tensor]]:
    """Model, inputs by name, and labels."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    config = transformers.GPT2Config(**CONFIG, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    words = torch.randint(11, (6, 4))
    positions = torch.arange(4).expand(6, 4)
    yield model, {"input_ids": words, "position_ids": positions}, torch.randint(11, (6, 4))
    torch.set_default_dtype(before)


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs, use_cache=False).logits


def gradients(
    model: nn.Module, parameters: list[Tensor], inputs: dict[str, Tensor], cotangents: Tensor
) -> list[Tensor]:
    """Per-sample gradients, (N, *parameter) each, by a backward pass per sample."""
    rows = []
    for n in range(len(cotangents)):
        output = logits(model, {key: value[n : n + 1] for key, value in inputs.items()})
        rows.append(torch.autograd.grad(output, parameters, cotangents[n : n + 1]))
    return [torch.stack(each) for each in zip(*rows, strict=True)]


def matrix(module: nn.Module, name: str, grads: list[Tensor], large: bool) -> Tensor:
    """The gradients of a module's parameters as X, (N, o, i), written out by hand."""
    if isinstance(module, nn.LayerNorm):
        return torch.stack(grads, 2)
    if isinstance(module, nn.Embedding):  # wte is tied with the head, in whose rows it is if small
        return grads[0].mT if name.endswith("wpe") or large else grads[0]
    return torch.cat([grads[0].mT, grads[1][:, :, None]], 2)  # Conv1D


def diagonal_optimum(fisher: Tensor, o: int, i: int) -> Tensor:
    kept = oracle.rearranged(fisher, o, i)[:, torch.arange(i) * (i + 1)]
    u, s, v = torch.linalg.svd(kept, full_matrices=False)
    return s[0] * torch.kron(u[:, 0].view(o, o), torch.diag(v[0]))


@pytest.mark.parametrize("limit", [1024, 4])
def test_every_layer_of_gpt2(
    case: tuple[nn.Module, dict[str, Tensor], Tensor], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a full factor over the vocabulary and the positions, and with a diagonal one."""
    monkeypatch.setattr(tokens, "FULL_VOCABULARY", limit)
    model, inputs, labels = case
    data = [({k: v[s] for k, v in inputs.items()}, labels[s]) for s in (slice(4), slice(4, 6))]
    options: dict[str, Any] = {"fisher": "empirical", "predict": logits}
    exact = kfoc.fit(model, data, estimator=kfoc.BlockDiagonal(), **options)
    diagonal = kfoc.fit(model, data, estimator=kfoc.Diagonal(), **options)
    optimum = kfoc.fit(model, data, estimator=kfoc.KFOC(rtol=0), **options)
    assert exact.skipped == {"lm_head": "its parameters are in the block of 'transformer.wte'"}
    modules = dict(model.named_modules())
    holders = [n for n, m in modules.items() if next(m.parameters(recurse=False), None) is not None]
    assert set(exact.layers) == set(holders) - {"lm_head"}
    values = logits(model, inputs).detach()
    cotangents = nn.functional.one_hot(labels, 11) - values.softmax(-1)
    for name in exact.layers:
        module = modules[name]
        parameters = list(module.parameters(recurse=False))
        grads = gradients(model, parameters, inputs, cotangents)
        layout = exact.layouts[name]
        x = matrix(module, name, grads, limit == 4)
        named = dict(zip(layout.names, grads, strict=True))
        torch.testing.assert_close(layout.join(named), x)
        fisher = x.flatten(1).mT @ x.flatten(1) / len(x)
        torch.testing.assert_close(exact[name].to_dense(), fisher, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(diagonal[name].diagonal.flatten(), fisher.diagonal())
        if isinstance(module, nn.LayerNorm):
            continue
        if isinstance(module, nn.Embedding) and limit == 4:
            best = diagonal_optimum(fisher, *x.shape[1:])
        else:
            best, _, _ = oracle.optimum(fisher, *x.shape[1:])
        torch.testing.assert_close(
            optimum[name].to_dense(), best, rtol=1e-6, atol=1e-8 * best.abs().max().item()
        )
    everything = sum(p.numel() for p in model.parameters())
    assert sum(torch.tensor(b.shape).prod().item() for b in exact.values()) == everything


def test_a_subclass_of_conv1d_is_found_out() -> None:
    class Other(transformers.pytorch_utils.Conv1D):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) ** 2

    model = nn.Sequential(Other(3, 4), nn.Linear(3, 2))
    assert check_every_block(model, torch.randn(5, 4)).layouts["0"].kind == "flat"


def test_frozen_bias_of_conv1d() -> None:
    model = nn.Sequential(transformers.pytorch_utils.Conv1D(3, 4), nn.Tanh(), nn.Linear(3, 2))
    model[0].bias.requires_grad_(False)
    curvature = kfoc.fit(model, [(torch.randn(5, 4), None)], "gaussian")
    assert curvature.parameters["0"] == ("0.weight",)
    assert curvature["0"].shape == (3, 4)


def test_transformers_is_not_imported_by_kfoc() -> None:
    import subprocess
    import sys

    code = "import sys, kfoc; print('transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
