"""Fits over 2 and 4 gloo processes, against dense oracles and one process.

Processes take seconds to start, so all checks of a world size run in the same ones
(distributed_worker.py); here they are told apart again.
"""

from __future__ import annotations

import json

import pytest

import kfoc
from distributed_worker import CHECKS
from models import convolutional, images
from ranks import started

LIMIT = 400.0  # seconds for all checks of one world size, where much else runs
# Whose last rank is dead by then.
FATAL = "a_dead_rank_ends_the_others"


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    world, directory = request.param, tmp_path_factory.mktemp("ranks")
    started("distributed_worker.py", world, directory, LIMIT)
    found = []
    for rank in range(world):
        path = directory / f"result-{rank}.json"
        found.append(json.loads(path.read_text()) if path.exists() else {})
    return found


@pytest.mark.parametrize("name", list(CHECKS))
def test_over_ranks(results: list[dict], name: str) -> None:
    concerned = results[:-1] if name == FATAL else results
    for rank, result in enumerate(concerned):
        assert name in result, f"rank {rank} did not come to it"
        if result[name].startswith("skipped: "):
            pytest.skip(result[name])
        assert not result[name], f"rank {rank}:\n{result[name]}"


def test_a_group_needs_torch_distributed() -> None:
    model, data = convolutional(), [images(4)]
    with pytest.raises(ValueError, match="group must be a"):
        kfoc.fit(model, data, group="gloo")
    with pytest.raises(ValueError, match="init_process_group"):
        kfoc.distributed.Ranks()
