"""The study runs, part by part, and its page says what its results say."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from documents import ROOT
from kfoc.reproduce.results import Row, Unit, keep

STUDY = ROOT / "study"
PARTS = ("errors", "inverse", "laplace", "optimizer", "continual", "influence", "pruning")


def run(*arguments: str) -> None:
    """A script of the study, in a process of its own."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a quick run of all parts."""
    folder = tmp_path_factory.mktemp("study")
    run(str(STUDY / "run.py"), "--quick", "--out", str(folder))
    return folder


@pytest.mark.parametrize("part", PARTS)
def test_part_writes_complete_results_and_a_plot(part: str, quick: Path) -> None:
    content = json.loads((quick / f"{part}.json").read_text())
    assert content["complete"]
    committed = json.loads((STUDY / "results" / f"{part}.json").read_text())
    assert committed["complete"]
    assert set(content) == set(committed)
    assert set(content["settings"]) == set(committed["settings"])
    assert {key for row in content["rows"] for key in row} == {
        key for row in committed["rows"] for key in row
    }
    assert (quick / f"{part}.png").stat().st_size > 5000
    assert (quick / f"{part}.svg").stat().st_size > 5000


def test_quick_run_writes_every_table_and_no_half_file(quick: Path) -> None:
    assert (quick / "study.md").read_text().count("## ") == 20
    assert not list(quick.glob(".*"))
    assert (quick / "gain.svg").stat().st_size > 5000


def test_the_short_table_has_every_headline(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(STUDY)
    summary = importlib.import_module("summary")
    results = {path.stem: json.loads(path.read_text()) for path in quick.glob("*.json")}
    names = [measure.name for measure in summary.measures(results)]
    headlines = set(summary.HEADLINES) - {"pruning, OBS, accuracy with 70% gone"}  # half, in haste
    assert headlines <= set(names)
    assert len(names) == len(set(names))


def test_tables_of_the_page_are_those_of_the_results() -> None:
    run(str(STUDY / "report.py"), "--page", str(ROOT / "docs" / "study.md"), "--check")


def test_draws_run_and_their_page_has_the_table_of_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(STUDY)  # in this process: importing takes longer than the rest
    draws = importlib.import_module("draws")
    torch.set_default_dtype(torch.float32)  # for this test: the networks are trained in it
    monkeypatch.setattr(sys, "argv", ["draws.py", "--quick", "--out", str(tmp_path)])
    draws.main()
    assert json.loads((tmp_path / "draws.json").read_text())["complete"]
    assert (tmp_path / "draws.png").stat().st_size > 5000
    kept = json.loads((STUDY / "results" / "draws.json").read_text())
    page = (ROOT / "docs" / "draws.md").read_text()
    assert kept["complete"]
    assert draws.table(kept["rows"]) in page
    assert draws.filled(page, {"draws": draws.table(kept["rows"])}) == page


def test_the_page_shows_every_table_and_plot_once() -> None:
    page = (ROOT / "docs" / "study.md").read_text()
    plots = {plot.name for plot in (ROOT / "docs" / "study").glob("*.png")} - {"gain.png"}
    assert all(page.count(f"(study/{plot})") == 1 for plot in plots), plots
    for front, folder in (("README.md", "docs/study"), ("docs/index.md", "study")):
        assert (ROOT / front).read_text().count(f"{folder}/gain.png") == 1, front
    names = re.findall(r'^    "([\w-]+)": \(', (STUDY / "report.py").read_text(), re.M)
    assert len(names) == 20
    assert all(page.count(f"<!-- table {name} -->") == 1 for name in names)


def test_what_was_measured_stays_when_a_part_is_interrupted_and_is_not_measured_again(
    tmp_path: Path,
) -> None:
    path, measured = tmp_path / "part.json", []

    def units(stop: bool, seeds: tuple[int, ...] = (0, 1)) -> Iterator[Unit]:
        for seed in seeds:

            def make(seed: int = seed) -> Iterator[Row]:
                measured.append(seed)
                yield {"a": 1.23456789}
                if stop and seed == 1:
                    raise KeyboardInterrupt
                yield {"a": 2.0}

            yield {"seed": seed}, make

    with pytest.raises(KeyboardInterrupt):
        list(keep(units(stop=True), {"steps": (1, 2)}, path, {}))
    there = [{"seed": 0, "a": 1.23457}, {"seed": 0, "a": 2.0}]
    content = json.loads(path.read_text())
    assert not content["complete"]
    assert content["rows"] == there
    assert list(keep(units(stop=False), {"steps": (1, 2)}, path, {}))[:2] == there
    assert measured == [0, 1, 1]
    assert json.loads(path.read_text())["complete"]
    assert len(json.loads(path.read_text())["rows"]) == 4
    list(keep(units(stop=False, seeds=(0, 1, 2)), {"steps": (1, 2)}, path, {}))
    assert measured == [0, 1, 1, 2]
    assert json.loads(path.read_text())["complete"]
    list(keep(units(stop=False), {"steps": (1, 3)}, path, {}))
    assert measured == [0, 1, 1, 2, 0, 1]
