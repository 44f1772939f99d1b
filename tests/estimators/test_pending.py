"""Pending batches: copies, joined as they would be by themselves, wherever they lie."""

from __future__ import annotations

import copy

import pytest
import torch

from kfoc.estimators.pending import Pending, joined
from kfoc.files.encoding import decoded, encoded
from kfoc.samples.inputs import Rows
from kfoc.samples.linear import Samples


def batch(count: int, *, positions: int = 1, directions: int = 1) -> Samples:
    inputs = Rows(torch.randn(count, positions, 4), 1.0)
    return Samples(inputs, torch.randn(directions, count, positions, 3))


def assert_same(found: list[Samples], expected: list[Samples]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.inputs.tensor, b.inputs.tensor)
        assert a.inputs.size == b.inputs.size
        assert torch.equal(a.grads, b.grads)
        assert a.inputs.tensor.is_contiguous()
        assert a.grads.is_contiguous()


@pytest.mark.parametrize(
    "batches",
    [
        [batch(5), batch(5), batch(2)],
        [batch(5), batch(20)],  # more than there is room for
        [batch(5), batch(3, positions=2), batch(4)],  # of two kinds
        [batch(5, directions=2), batch(5, directions=2)],
        [batch(0), batch(5)],
    ],
)
def test_joined_as_by_themselves(batches: list[Samples]) -> None:
    pending = Pending(100)
    for _ in range(2):  # the second time in memory that has been used
        for one in batches:
            pending.add(one)
        assert pending.numel == sum(one.numel for one in batches)
        assert pending.num_samples == sum(one.num_samples for one in batches)
        assert_same(pending.taken(), joined(batches))
        assert not pending.parts


def test_a_loader_may_write_over_its_batches() -> None:
    pending, one = Pending(100), batch(5)
    kept = one.detached_copy()
    pending.add(one)
    one.inputs.tensor.zero_()
    one.grads.zero_()
    assert_same(pending.taken(), [kept])


def test_goes_on_from_a_saved_state_and_from_a_copy() -> None:
    first, second = batch(5), batch(4)
    pending = Pending(100)
    pending.add(first)
    for other in (decoded(encoded(pending), "cpu"), copy.deepcopy(pending)):
        other.add(second)
        assert_same(other.taken(), joined([first, second]))
    pending.add(second)  # and what was copied is not disturbed by its copies
    assert_same(pending.taken(), joined([first, second]))
