"""Samples that are not what they look like: proved, put in order by owner, or left out.

Blocks are held against derivatives of every sample's outputs within its batch, row by row.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.rnn import pack_padded_sequence

import kfoc
import oracle
from every_layer import check_optimum

OPTIONS: dict = {"likelihood": "gaussian", "fisher": "exact"}


def rows(model: nn.Module, names: tuple[str, ...], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Per-sample gradients (S, N, *shape) of the outputs, from the graph of the whole batch."""
    outputs, parameters = model(*inputs), [model.get_parameter(name) for name in names]
    count = outputs[0].numel()
    found = [
        torch.autograd.grad(output, parameters, retain_graph=True, materialize_grads=True)
        for sample in outputs
        for output in sample.flatten()
    ]
    shape = len(outputs), count
    return [torch.stack(g).unflatten(0, shape).transpose(0, 1) for g in zip(*found, strict=True)]


def expected_of(model: nn.Module, block: kfoc.parameters.layout.Layout, batches: list) -> Tensor:
    """The exact block of all batches."""
    total, count = torch.zeros(()), sum(len(batch[0]) for batch in batches)
    for batch in batches:
        gradients = [g.detach() for g in rows(model, block.names, batch)]
        if block.kind == "matrices":
            gradients, kind = [gradients[0].flatten(2, 3)], "rows"
        else:
            kind = block.kind
        total = total + oracle.fisher_of(gradients, kind) * len(batch[0]) / count
    return total


def check(model: nn.Module, *batches: tuple[Tensor, ...]) -> kfoc.Curvature:
    """Every block against the exact one, by the dense estimator and the optimum of K-FOC."""
    data = [(batch, None) for batch in batches]
    exact = kfoc.fit(model, data, estimator=kfoc.BlockDiagonal(), **OPTIONS)
    optimal = kfoc.fit(model, data, estimator=kfoc.KFOC("exact", rtol=0, passes=60), **OPTIONS)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for names in exact.parameters.values() for name in names} == trained
    for layer, block in exact.items():
        expected = expected_of(model, exact.layouts[layer], list(batches))
        scale = expected.abs().max().item()
        torch.testing.assert_close(block.to_dense(), expected, rtol=1e-9, atol=1e-12 * scale)
        if scale:
            check_optimum(optimal[layer], expected)
    return exact


class Experts(nn.Module):
    """A mixture of experts over the tokens of all samples."""

    def __init__(self, how: str = "top", experts: int = 3, width: int = 4) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(width, experts), nn.Linear(width, 2)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weights = self.router(tokens).softmax(-1)
        mixed = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            if self.how == "choice":  # an expert takes as many tokens as there are samples
                chosen = weights[:, number].topk(len(x)).indices
            else:
                chosen = (weights.argmax(-1) == number).nonzero()[:, 0]
            if self.how == "never empty" and not len(chosen):
                continue
            part = torch.tanh(expert(tokens[chosen])) * weights[chosen, number, None]
            mixed = mixed.index_add(0, chosen, part)
        return self.head(torch.tanh(mixed)).view(len(x), -1, 2).sum(1)


class Fused(nn.Module):
    """Experts in one tensor, chosen by a router that is no layer of torch's."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.gate, self.experts = Router(width), Together(width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        return self.head(self.experts(tokens, self.gate(tokens))).view(len(x), -1, 2).sum(1)


class Router(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = functional.linear(x, self.weight).softmax(-1)
        return weights.max(-1)


class Together(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, width))
        self.down = nn.Parameter(torch.randn(3, width, 5))

    def forward(self, x: Tensor, chosen: tuple[Tensor, Tensor]) -> Tensor:
        found = torch.zeros_like(x)
        for number in chosen[1].unique():
            own = (chosen[1] == number).nonzero()[:, 0]
            hidden = torch.tanh(functional.linear(x[own], self.up[number]))
            found = found.index_add(0, own, functional.linear(hidden, self.down[number]))
        return torch.tanh(found) * chosen[0][:, None]


class Windows(nn.Module):
    """Attention within windows that are folded into the batch, by a projection of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:  # (N, 6, 4) in windows of 3
        folded = x.unflatten(1, (2, 3)).flatten(0, 1)
        q, k, v = self.qkv(self.norm(folded)).chunk(3, -1)
        mixed = torch.softmax(q @ k.mT, -1) @ v
        return torch.tanh(self.out(mixed)).view(len(x), 6, 2).sum(1)


class Frames(nn.Module):
    """A convolutional network over the frames of all samples, and a layer over time."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 2, groups=groups), nn.GroupNorm(2, 4)
        self.time, self.head = nn.GRU(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, 2, 3, 3)
        frames = torch.tanh(self.norm(self.conv(x.flatten(0, 1)))).mean((2, 3))
        return self.head(self.time(frames.view(len(x), -1, 4))[0][:, -1])


class SequenceFirst(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.embed(x.transpose(0, 1)))).sum(0))


class Packed(nn.Module):
    """Sequences of different lengths, packed one step after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        lengths = (tokens[:, 0] % tokens.shape[1] + 1).cpu()
        packed = pack_padded_sequence(tokens, lengths, batch_first=True, enforce_sorted=False)
        y = torch.tanh(self.layer(self.embed(packed.data)))
        owners = torch.cat(
            [packed.sorted_indices[:size] for size in packed.batch_sizes.tolist()]  # type: ignore
        )
        return self.head(y.new_zeros(len(tokens), 4).index_add(0, owners, y))


class Steps(nn.Module):
    """A loop over single samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.tanh(self.layer(sample)).sum(0) for sample in x])


def tokens_of(*sizes: int) -> list[tuple[Tensor, ...]]:
    return [(torch.randn(size, 6, 4),) for size in sizes]


# model, batches
OWNERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[tuple[Tensor, ...]]]]] = {
    "experts": (Experts, lambda: tokens_of(9, 2)),
    "experts of single tokens": (
        lambda: Experts("never empty"),
        lambda: [(torch.randn(n, 4),) for n in (9, 4, 1, 8)],
    ),
    "expert choice": (lambda: Experts("choice"), lambda: tokens_of(9, 3)),
    "expert choice, single tokens": (
        lambda: Experts("choice"),
        lambda: [(torch.randn(8, 4),), (torch.randn(3, 4),)],
    ),
    "fused experts": (Fused, lambda: tokens_of(9, 2, 1)),
    "windows": (Windows, lambda: tokens_of(8, 3)),
    "frames": (Frames, lambda: [(torch.randn(n, 3, 2, 3, 3),) for n in (7, 2)]),
    "frames, depthwise": (
        lambda: Frames(2),
        lambda: [(torch.randn(n, 3, 2, 3, 3),) for n in (7, 2)],
    ),
    "sequence first": (SequenceFirst, lambda: tokens_of(9, 6, 2)),
    "packed": (Packed, lambda: [(torch.randint(9, (n, 5)),) for n in (8, 3)]),
    "samples in a loop": (Steps, lambda: tokens_of(8, 3)),
}


@pytest.mark.parametrize("case", OWNERS)
def test_rows_with_owners_are_layers(case: str) -> None:
    build, data = OWNERS[case]
    found = check(build(), *data())
    loose = [name for name in found if found.layouts[name].kind == "flat"]
    assert loose == (["time"] if "frames" in case else [])


class Contrastive(nn.Module):
    """A logit for every image and text of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.image(x)) @ torch.tanh(self.text(y)).mT


class Graph(nn.Module):
    """A convolution over a graph whose nodes are the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)
        self.register_buffer("edges", torch.rand(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.edges @ self.second(torch.tanh(self.edges @ self.first(x)))


class Forces(nn.Module):
    """Outputs that are derivatives by the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.last(torch.tanh(self.first(x))).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def hooked() -> nn.Module:
    model = plain()
    model[0].register_forward_hook(lambda module, args, output: 2 * output.roll(1, -1))
    return model


def patched() -> nn.Module:
    model = plain()
    layer = model[0]
    layer.forward = lambda x: functional.linear(2 * x, layer.weight**3, layer.bias)
    return model


class Normalised(nn.Sequential):
    """Normalises over the batch by itself."""

    def forward(self, x: Tensor) -> Tensor:
        y = self[0](x)
        return self[2](torch.tanh((y - y.mean(0)) / y.std(0)))


class Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return grad / grad.norm()


# model, batches, the layers that are none
MIXED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "contrastive": (Contrastive, (4, 5), {"text"}),
    "graph": (Graph, (4,), {"first", "second"}),
    "forces": (Forces, (4,), {"first", "last"}),
    "hook": (hooked, (4,), {"0"}),
    "patched forward": (patched, (4,), {"0"}),
    "normalised": (lambda: Normalised(*plain()), (4,), {"0"}),
}


@pytest.mark.parametrize("case", MIXED)
def test_what_is_no_layer_is_exact_or_left_out(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, shapes, none = MIXED[case]
    model, batch = build(), tuple(torch.randn(8, size) for size in shapes)
    found = check(model, batch)
    assert {name for name in found if found.layouts[name].kind == "flat"} == none
    monkeypatch.setattr("kfoc.layers.selection.LOOSE_LIMIT", 0)
    if none == set(found):
        with pytest.raises(ValueError, match="no layer can be treated"):
            kfoc.fit(model, [(batch, None)], **OPTIONS)
    else:
        rest = kfoc.fit(model, [(batch, None)], **OPTIONS)
        assert rest.skipped.keys() == none
        which = "do not add up" if case in ("hook", "patched forward") else "its rows mix samples"
        assert all(which in reason for reason in rest.skipped.values())
    for name in none:
        with pytest.raises(ValueError, match=f"layer {name!r} cannot be treated"):
            kfoc.fit(model, [(batch, None)], layers=[name], **OPTIONS)


def test_a_global_hook_is_found() -> None:
    handle = register_module_forward_hook(
        lambda module, args, output: 2 * output if isinstance(module, nn.Linear) else None
    )
    try:
        found = check(plain(), (torch.randn(8, 4),))
    finally:
        handle.remove()
    assert {layout.kind for layout in found.layouts.values()} == {"flat"}


def test_gradients_that_are_no_derivatives_are_found() -> None:
    class Clipped(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[2](torch.tanh(Normed.apply(self[0](x))))

    found = kfoc.fit(Clipped(*plain()), [(torch.randn(8, 4), None)], **OPTIONS)
    assert found.layers == ("2",)
    assert "do not add up to its gradient" in found.skipped["0"]


@pytest.mark.parametrize("size", [6, 8])
def test_an_expert_with_as_many_rows_as_samples(size: int) -> None:
    """In any order: a rule by shapes would take them for the samples."""
    found = check(Experts("choice", experts=1), (torch.randn(size, 3, 4),))
    assert found.layouts["experts.0"].kind == "rows"


def test_gradients_that_cancel_are_no_fault() -> None:
    """The bias of keys under a softmax has none, but for rounding."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
            self.shift = nn.Linear(4, 1)  # which the normalisation takes out again

        def forward(self, x: Tensor) -> Tensor:
            x = functional.layer_norm(x + self.shift(x), (4,))
            weights = torch.softmax(self.q(x) @ self.k(x).mT, -1)
            return (weights @ self.v(x))[:, 0, :2]

    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model, x = Attention().to(dtype), torch.randn(9, 5, 4, dtype=dtype)
        found = kfoc.fit(model, [(x, None)], **OPTIONS)
        assert {layout.kind for layout in found.layouts.values()} == {"rows"}, dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [Experts, Fused, Windows, SequenceFirst])
def test_owners_in_other_precisions(build: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    model, x = build().to(dtype), torch.randn(9, 6, 4, dtype=dtype)
    found = kfoc.fit(model, [(x, None)], estimator=kfoc.Diagonal(), **OPTIONS)
    assert not found.skipped
    assert all(layout.kind != "flat" for layout in found.layouts.values())
    wide = model.double()
    expected = kfoc.fit(wide, [(x.double(), None)], estimator=kfoc.Diagonal(), **OPTIONS)
    for name, block in found.items():
        error = oracle.relative_error(expected[name].to_dense(), block.to_dense().double())
        assert error < (0.2 if dtype == torch.bfloat16 else 1e-4), name


WIDE = {
    "sequence first": (lambda: SequenceFirst(300), "embed"),
    "experts": (lambda: Experts(experts=2, width=300), "experts.0"),
    "fused experts": (lambda: Fused(300), "experts.up"),
}


@pytest.mark.parametrize("case", WIDE)
def test_beyond_the_limit_of_single_gradients(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """90,000 parameters: a stationary point, by the gradients of single rows."""
    monkeypatch.setattr("kfoc.layers.selection.LOOSE_LIMIT", 1000)
    build, name = WIDE[case]
    model, x = build(), torch.randn(7, 3, 300) / 5
    found = kfoc.fit(
        model, [((x,), None)], layers=[name.split(".up")[0]], estimator=kfoc.KFOC(rtol=0), **OPTIONS
    )
    block = found[name]
    weight = rows(model, found.parameters[name], (x,))
    gradients = torch.cat([weight[0], *(g[..., None] for g in weight[1:])], -1).flatten(0, 1)
    if case == "fused experts":
        gradients, block = gradients[:, 0], block.blocks[0]
    scaled = gradients / len(x) ** 0.5
    left = (scaled @ block.right @ scaled.mT).sum(0)
    right = (scaled.mT @ block.left @ scaled).sum(0)
    left_norm, right_norm = block.left.norm(), block.right.norm()
    torch.testing.assert_close(left, block.left * right_norm**2, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(right, block.right * left_norm**2, rtol=1e-5, atol=1e-8)


class Changing(nn.Module):
    """What is asked of its first layer depends on the number of samples."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if len(x) == 5:
            if self.how == "twice":
                y = self.layer(torch.tanh(y))
            elif self.how == "outside":
                y = y @ self.layer.weight
            elif self.how == "mixed":
                y = self.layer(x).cumsum(0)
        elif self.how == "late":
            y = x.clone()
        return self.head(torch.tanh(y))


def test_calls_that_change_are_checked_again() -> None:
    batches = [(torch.randn(n, 4),) for n in (8, 5, 8)]
    for how in ("twice", "late"):
        found = check(Changing(how), *batches)
        assert {layout.kind for layout in found.layouts.values()} == {"rows"}
    for how, reason in (("outside", "do not add up"), ("mixed", "its rows mix samples")):
        with pytest.raises(ValueError, match=f"batch 1: layer 'layer': .*{reason}"):
            kfoc.fit(Changing(how), [(batch, None) for batch in batches], **OPTIONS)


def test_a_layer_first_found_to_be_none_later_is_exact() -> None:
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.layer(x).cumsum(0) if len(x) == 5 else x))

    found = check(Later(), *[(torch.randn(n, 4),) for n in (8, 5, 8)])
    assert found.layouts["layer"].kind == "flat"


def test_rows_without_a_gradient_are_checked_when_one_comes() -> None:
    class Gated(nn.Module):
        """Rows that are out of order, behind a gate that is shut at first."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            order = torch.arange(len(x)).flip(0)
            y = torch.empty_like(x).index_copy(0, order, self.layer(x[order]))
            return self.head(torch.tanh(x + y * (0.0 if len(x) == 8 else 1.0)))

    found = check(Gated(), *[(torch.randn(n, 4),) for n in (8, 5, 8)])
    assert {layout.kind for layout in found.layouts.values()} == {"rows"}


def test_unchecked() -> None:
    x, options = torch.randn(8, 4), {**OPTIONS, "verify": False}
    for model, wrong in ((plain(), False), (hooked(), True)):
        found = kfoc.fit(model, [((x,), None)], estimator=kfoc.BlockDiagonal(), **options)
        expected = expected_of(model, found.layouts["0"], [(x,)])
        assert (oracle.relative_error(expected, found["0"].to_dense()) > 0.1) is wrong
    with pytest.raises(ValueError, match="first dimension is 6 in a batch of 8 samples"):
        kfoc.fit(
            SequenceFirst(300), [((torch.randn(8, 6, 300),), None)], layers=["embed"], **options
        )


def test_the_model_stays_as_it_is() -> None:
    """The check runs it once more."""

    class Counting(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(*plain())
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(functional.dropout(x, 0.5))

    model = Counting()
    state = torch.get_rng_state()
    both = [kfoc.fit(model, [(torch.ones(8, 4), None)], **OPTIONS, verify=v) for v in (True, False)]
    assert torch.equal(torch.get_rng_state(), state)
    for name, block in both[0].items():
        assert torch.equal(block.to_dense(), both[1][name].to_dense())
