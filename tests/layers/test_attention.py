"""nn.MultiheadAttention and the transformers made of it: every layer, exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kfoc
from every_layer import check_every_block


class Attending(nn.Module):
    """Attention over (N, T, E), called as `how` says, with a nonlinearity around it."""

    def __init__(self, attention: nn.MultiheadAttention, how: str) -> None:
        super().__init__()
        self.attention, self.how = attention, how
        if attention.in_proj_bias is not None:
            nn.init.normal_(attention.in_proj_bias)
            nn.init.normal_(attention.out_proj.bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = torch.sin(x), torch.sin(y)
        if not self.attention.batch_first:
            x, y = x.transpose(0, 1), y.transpose(0, 1)
        options: dict = {"need_weights": False}
        keys = values = x
        if self.how == "cross":
            keys = values = y
        elif self.how == "three":
            keys, values = y, torch.cos(y)
        elif self.how == "causal":
            mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=x.dtype)
            options |= {"attn_mask": mask, "is_causal": True}
        elif self.how == "masks":
            batch_first = x if self.attention.batch_first else x.transpose(0, 1)
            options["key_padding_mask"] = batch_first[..., 1] > batch_first[..., 0].amax(1, True)
            options["attn_mask"] = torch.eye(3, dtype=torch.bool).roll(1, 0)
        elif self.how == "weights":
            options = {"attn_mask": torch.eye(3, dtype=torch.bool).roll(1, 0)}
        elif self.how == "by head":
            heads = self.attention.num_heads * x.shape[0 if self.attention.batch_first else 1]
            options["attn_mask"] = torch.linspace(-1, 1, 9).view(1, 3, 3).expand(heads, -1, -1)
            options["need_weights"] = True
        z, _ = self.attention(x, keys, value=values, **options)
        z = z if self.attention.batch_first else z.transpose(0, 1)
        return torch.tanh(z).sum(1)[:, :3]


@pytest.mark.parametrize("how", ["self", "cross", "three", "causal", "masks", "weights", "by head"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention(how: str, batch_first: bool) -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, bias=how != "three")
    x, y = torch.randn(5, 3, 4), torch.randn(5, 2, 4)
    found = check_every_block(Attending(attention, how), x, y)
    assert found.layers == ("attention", "attention.out_proj")
    optimal = kfoc.fit(Attending(attention, how), [((x, y), None)], "gaussian")
    grouped = how in ("cross", "three")
    assert isinstance(optimal["attention"], kfoc.GroupedBlock if grouped else kfoc.KroneckerBlock)


def test_as_many_steps_as_samples() -> None:
    attention = nn.MultiheadAttention(4, 2)
    x = torch.randn(3, 3, 4)
    check_every_block(Attending(attention, "self"), x, torch.randn(3, 2, 4))


class Encoder(nn.Module):
    def __init__(self, norm_first: bool, padded: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        self.head, self.padded = nn.Linear(4, 2), padded

    def forward(self, x: Tensor) -> Tensor:
        mask = (x[..., 0] > 1) if self.padded else None
        return self.head(self.encoder(x, src_key_padding_mask=mask).mean(1))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder(norm_first: bool, padded: bool) -> None:
    model = Encoder(norm_first, padded).eval()
    x = torch.randn(4, 3, 4)
    x[:, 0, 0] = 0
    found = check_every_block(model, x, size=2)
    assert not found.skipped
    assert len(found.layers) == 2 * 6 + 1


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(4, 2, 5)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=x.dtype)
        y = self.layer(x.transpose(0, 1), memory.transpose(0, 1), tgt_mask=mask)
        return y[-1, :, :2]


def test_transformer_decoder_layer() -> None:
    found = check_every_block(Decoder().eval(), torch.randn(4, 3, 4), torch.randn(4, 2, 4), size=2)
    assert not found.skipped


FALLBACKS = {
    "sizes": {"kdim": 3, "vdim": 2},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
}


class General(nn.Module):
    def __init__(self, options: dict) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sin(x)
        z = self.attention(y, y[..., : self.attention.kdim], y[..., : self.attention.vdim])[0]
        return torch.tanh(z[:, 0, :2])


@pytest.mark.parametrize("case", FALLBACKS)
def test_other_attention_sample_by_sample_or_skipped(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = General(FALLBACKS[case]), torch.randn(4, 3, 4)
    found = check_every_block(model, x, size=2)
    assert {found.layouts[name].kind for name in found} == {"flat"}
    monkeypatch.setattr("kfoc.layers.selection.LOOSE_LIMIT", 0)
    model = nn.Sequential(model, nn.Linear(2, 2))
    skipped = kfoc.fit(model, [(x, None)], "gaussian").skipped
    assert "too many for per-sample gradients" in skipped["0.attention"]
    assert "used outside" in skipped["0.attention.out_proj"]


def test_dropout_and_changed_outputs_are_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kfoc.layers.selection.LOOSE_LIMIT", 0)
    x, y = torch.randn(5, 3, 4), torch.randn(5, 2, 4)
    model = nn.Module()
    attention = nn.MultiheadAttention(4, 2, batch_first=True, dropout=0.5)
    model = Attending(attention, "self")
    with pytest.raises(ValueError, match="it draws dropout masks"):
        kfoc.fit(model, [((x, y), None)], "gaussian")
    model.eval()
    handle = attention.register_forward_hook(lambda m, a, out: (out[0] * 2, out[1]))
    with pytest.raises(ValueError, match="not what its parameters give"):
        kfoc.fit(model, [((x, y), None)], "gaussian")
    handle.remove()
    assert len(kfoc.fit(model, [((x, y), None)], "gaussian")) == 2


def test_self_and_cross_attention_by_the_same_layer() -> None:
    class Both(Attending):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            first = super().forward(x, y)
            self.how = "cross"
            return first + super().forward(x, y)

    model = Both(nn.MultiheadAttention(4, 2, batch_first=True), "self")
    data = [((torch.randn(5, 3, 4), torch.randn(5, 2, 4)), None)]
    found = kfoc.fit(model, data, "gaussian")
    assert found.layouts["attention"].kind == "flat"  # exact, sample by sample


def test_frozen_projections() -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    attention.in_proj_weight.requires_grad_(False)
    x, y = torch.randn(5, 3, 4), torch.randn(5, 2, 4)
    for how in ("self", "cross"):
        found = check_every_block(Attending(attention, how), x, y)
        assert found.parameters["attention"] == ("attention.in_proj_bias",)
        assert found["attention"].shape == (12, 1)
    attention.in_proj_bias.requires_grad_(False)
    found = check_every_block(Attending(attention, "self"), x, y)
    assert "frozen" in found.skipped["attention"]
