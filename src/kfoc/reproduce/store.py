"""The results folder: what is finished, under which settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kfoc.reproduce.data import DataError
from kfoc.reproduce.experiment import Record, Unit
from kfoc.reproduce.results import read, write


class Store:
    """results.json of a folder: {"settings": experiment -> its settings, "rows": records}.

    Raises:
        DataError: a folder that cannot be added to, as it holds results of the same experiment made
            under other settings, or none of kfoc's.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.path = folder, folder / "results.json"
        self.settings: dict[str, Any] = {}
        self.records: list[Record] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                content = read(self.path)
                self.settings, self.records = content["settings"], content["rows"]
            foreign = [r for r in self.records if r.keys() != Record.__annotations__.keys()]
            kept = {record["dataset"]: self.settings[record["dataset"]] for record in self.records}
        except OSError as error:
            raise DataError(f"--out {folder} cannot be used: {error.strerror}") from None
        except (ValueError, LookupError, TypeError, AttributeError):
            foreign = [{}]  # type: ignore[typeddict-item]
        if foreign:
            raise DataError(
                f"{self.path} is not one of kfoc's, or damaged; move it away or give another --out"
            )
        for name in kept.keys() & settings.keys():
            _require_same(folder, name, kept[name], settings[name])
        self.settings = {**self.settings, **settings}

    def done(self) -> set[Unit]:
        return {Unit(r["dataset"], r["seed"], r["method"], r["batch_size"]) for r in self.records}

    def add(self, records: list[Record]) -> None:
        """Keep the records of one finished unit."""
        self.records = [*self.records, *records]
        write(self.path, {"settings": self.settings, "rows": self.records})


def _require_same(folder: Path, name: str, kept: dict[str, Any], now: dict[str, Any]) -> None:
    now = json.loads(json.dumps(now))  # as the kept ones have been
    changes = "; ".join(
        f"{key}: {kept.get(key)} there, {now.get(key)} now"
        for key in sorted(now.keys() | kept.keys())
        if now.get(key) != kept.get(key)
    )
    if changes:
        raise DataError(
            f"{folder} holds results of {name} made under other settings ({changes});"
            " give another --out, or delete that folder to start again"
        )
