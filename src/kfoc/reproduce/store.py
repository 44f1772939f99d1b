"""The results folder: what is finished, under which settings, and nothing half written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kfoc.files.writing import write_text
from kfoc.reproduce.experiment import Record, Unit


class StoreError(RuntimeError):
    """A results folder that this run must not, or cannot, add to."""


class Store:
    """Records in results.json, and beside it settings.json: experiment name -> its settings."""

    def __init__(self, folder: Path, records: list[Record], settings: dict[str, Any]) -> None:
        self.folder = folder
        self.records = records
        self.settings = settings

    @staticmethod
    def open(folder: Path, settings: dict[str, Any]) -> Store:
        """The folder's results, to be added to by experiments with these settings.

        Refused when it holds results of the same experiment made under others.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"--out {folder} cannot be made: {error.strerror}") from None
        records = _read_records(folder / "results.json")
        kept = _read_json(folder / "settings.json", dict) or {}
        for name in sorted({record["dataset"] for record in records}):
            if name not in kept:
                raise StoreError(
                    f"{folder} holds results of {name} without their settings.json;"
                    " give another --out"
                )
            if name in settings:
                _require_same(folder, name, kept[name], settings[name])
        store = Store(folder, records, {**kept, **settings})
        write_text(folder / "settings.json", json.dumps(store.settings, indent=2) + "\n")
        return store

    def done(self) -> set[Unit]:
        return {Unit(r["dataset"], r["seed"], r["method"], r["batch_size"]) for r in self.records}

    def add(self, records: Iterable[Record]) -> None:
        """Keep the records of one finished unit."""
        self.records = [*self.records, *records]
        lines = ",\n".join(json.dumps(record) for record in self.records)
        write_text(self.folder / "results.json", f"[\n{lines}\n]\n")


def _read_json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise StoreError(
            f"{path} cannot be read ({error}); move it away or give another --out"
        ) from None
    if not isinstance(content, kind):
        raise StoreError(f"{path} is not one of kfoc's; move it away or give another --out")
    return content


def _read_records(path: Path) -> list[Record]:
    records = _read_json(path, list) or []
    if not all(isinstance(r, dict) and r.keys() == Record.__annotations__.keys() for r in records):
        raise StoreError(f"{path} is not one of kfoc's; move it away or give another --out")
    return records


def _require_same(folder: Path, name: str, kept: dict[str, Any], now: dict[str, Any]) -> None:
    # Through JSON, as the kept ones have been.
    now = json.loads(json.dumps(now))
    differing = [key for key in now.keys() | kept.keys() if now.get(key) != kept.get(key)]
    if differing:
        changes = "; ".join(
            f"{key}: {kept.get(key)} there, {now.get(key)} now" for key in sorted(differing)
        )
        raise StoreError(
            f"{folder} holds results of {name} made under other settings ({changes});"
            " give another --out, or delete that folder to start again"
        )
