"""Parameters to matrix and back."""

from __future__ import annotations

import pytest
import torch

from kfoc.parameters.layout import Layout

CASES = [
    Layout(("w", "b"), ((4, 3), (4,))),
    Layout(("w",), ((4, 3, 2, 2),)),
    Layout(("w", "b"), ((3, 4), (4,)), "columns"),
    Layout(("w", "b"), ((6, 2, 3), (4,)), "transposed_convolution", 2),
    Layout(("w", "b"), ((2, 3), (2, 3)), "stacked"),
    Layout(("w", "b", "c"), ((2, 3), (), (4,)), "flat"),
]


@pytest.mark.parametrize("layout", CASES, ids=lambda layout: layout.kind + str(len(layout.names)))
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_joins_and_splits(layout: Layout, lead: tuple[int, ...]) -> None:
    tensors = {
        n: torch.randn((*lead, *s)) for n, s in zip(layout.names, layout.shapes, strict=True)
    }
    matrix = layout.join(tensors)
    assert matrix.shape == (*lead, *layout.shape)
    again = layout.split(matrix)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=0)


def test_a_transposed_convolution_goes_by_outputs() -> None:
    weight = torch.randn(6, 2, 3)  # (in, out / groups, kernel), two groups
    layout = Layout(("w",), ((6, 2, 3),), "transposed_convolution", 2)
    matrix = layout.join({"w": weight})
    assert torch.equal(matrix[3], weight[3:, 1].flatten())


def test_refuses_what_does_not_fit() -> None:
    layout = CASES[0]
    with pytest.raises(ValueError, match="no tensor for the parameter 'b'"):
        layout.join({"w": torch.ones(4, 3)})
    with pytest.raises(ValueError, match=r"'w' must end in its shape \(4, 3\), found \(4, 2\)"):
        layout.join({"w": torch.ones(4, 2), "b": torch.ones(4)})
    with pytest.raises(ValueError, match="different leading dimensions"):
        layout.join({"w": torch.ones(2, 4, 3), "b": torch.ones(4)})
    with pytest.raises(ValueError, match=r"must end in the shape \(4, 4\)"):
        layout.split(torch.ones(4, 3))
    with pytest.raises(ValueError, match="layout must be one of"):
        Layout(("w",), ((4, 3),), "diagonal")
