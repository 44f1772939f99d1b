"""A checkpoint of a fit over several ranks: a file of each, all of one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kfoc.distributed import Ranks
from kfoc.files.folder import write
from kfoc.running.checkpointed import Checkpoint, Checkpointed


class CheckpointedRanks(Checkpointed):
    """Every rank saves in a directory of its own, below the given one, after the same step.

    Files bear the number of the save, and the one before goes when all ranks have written theirs:
    whenever it is that the ranks end, they have files of one save in common.
    """

    def __init__(
        self, settings: Checkpoint, resume: bool, more: Mapping[str, str], ranks: Ranks
    ) -> None:
        own = Path(settings.directory) / f"rank-{ranks.rank}-of-{ranks.world}"
        super().__init__(replace(settings, directory=own), resume, more)
        self.ranks = ranks
        self._number = 0  # of the last save

    def _found(self) -> Path | None:
        each = [set(numbers) for numbers in self.ranks.objects(sorted(self._numbers()))]
        if not any(each):
            return None
        common = set.intersection(*each)
        if not common:
            lack = [rank for rank, numbers in enumerate(each) if not numbers]
            raise ValueError(
                f"checkpoint: the ranks have no save in common (ranks without any: {lack}) in "
                f"{str(Path(self.settings.directory).parent)!r}: give each the directory that it "
                "had, or remove them to begin anew"
            )
        self._number = max(common)
        return self._path(self._number)

    def _write(self, content: dict[str, Any]) -> None:
        self._number += 1
        write(self._path(self._number), content)
        self.ranks.section()  # when all have written
        for number in self._numbers() - {self._number}:
            self._path(number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return Path(self.settings.directory) / f"fit-{number}.checkpoint"

    def _numbers(self) -> set[int]:
        """Of the saves that are there."""
        names = [file.stem for file in Path(self.settings.directory).glob("fit-*.checkpoint")]
        return {int(number) for name in names if (number := name[len("fit-") :]).isdigit()}

    def _place(self) -> list[int]:
        return [self.ranks.samples, self.ranks.steps]

    def _put(self, place: list[int]) -> None:
        self.ranks.samples, self.ranks.steps = place
