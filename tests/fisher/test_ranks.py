"""Products and solves over two processes, each with a share of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dense_fisher import dense
from fisher_worker import problem
from ranks import started


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory: Path = tmp_path_factory.mktemp("fisher")
    assert not any(started("fisher_worker.py", 2, directory, 120.0))
    return [torch.load(directory / f"found-{rank}.pt") for rank in range(2)]


def test_sums_are_over_the_data_of_all_ranks(found: list[dict[str, Any]]) -> None:
    model, data, v = problem()
    matrix = dense(model, data, "categorical")
    rows = torch.cat([part.flatten(1) for part in v.values()], 1)
    solved = torch.linalg.solve(matrix + 1e-2 * torch.eye(len(matrix)), rows.mT).mT
    for each in found:
        for name, expected in {
            "product": rows @ matrix,
            "alone": rows @ matrix,
            "solution": solved,
        }.items():
            flat = torch.cat([part.flatten(1) for part in each[name].values()], 1)
            torch.testing.assert_close(flat, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(each["form"], (rows @ matrix * rows).sum(1))
        assert each["samples"] == 13
    for name in ("product", "solution"):
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=0)


def test_an_error_on_one_rank_ends_the_others(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert "data has no batches" in each["none"]
        assert "the ranks have other parameters, vectors" in each["other vectors"]
        assert "batch 0: the model's outputs are not finite" in each["bad data"]
    assert found[0]["bad data"].startswith("RanksError: rank 1 of 2 failed")
