"""The plan of the package in docs/design.md: all folders, no box upon another, drawn anew."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

import kfoc
from documents import script

SOURCE = Path(kfoc.__file__).parent


@pytest.fixture(scope="module")
def plan() -> ModuleType:
    return script("docs/plan.py")


def test_wings_name_the_folders_that_exist(plan: ModuleType) -> None:
    named = [box for wing in plan.WINGS.values() for box in wing]
    folders = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    files = {path.stem for path in SOURCE.glob("*.py")} - {"__init__", "__main__"}
    assert sorted(named) == sorted((folders | files | {"kfoc"}) - plan.FOR_ALL)


def test_the_picture_shows_the_imports_of_today(plan: ModuleType) -> None:
    now = plan.text(plan.direct(plan.imports(SOURCE)))
    with Image.open(plan.PICTURE) as picture:
        drawn = picture.info["Description"]
    assert drawn == now, "run python docs/plan.py, and look at docs/plan.png"


def test_arrows_point_down_and_go_round_boxes(plan: ModuleType) -> None:
    drawn = plan.Plan(plan.imports(SOURCE))
    places = {
        box: (x, drawn.heights[drawn.rows[box]]) for box, x in drawn.columns.items()
    }  # centres
    for (x, y), (to, at) in itertools.combinations(places.values(), 2):
        assert abs(x - to) > plan.WIDE or abs(y - at) > plan.HIGH
    for box, other in drawn.ways:
        points = drawn.points(box, other)
        assert all(b[1] <= a[1] for a, b in itertools.pairwise(points))
        assert points[-1][1] < points[0][1]
        for name, (x, y) in places.items():
            if name not in (box, other):
                for (a, high), (b, low) in itertools.pairwise(points):
                    beside = max(a, b) < x - plan.WIDE / 2 or min(a, b) > x + plan.WIDE / 2
                    over = low > y + plan.HIGH / 2 or high < y - plan.HIGH / 2
                    assert beside or over, f"{box} -> {other} goes through {name}"


def test_imports_are_read_wherever_they_are(plan: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "low").mkdir()
    (tmp_path / "middle").mkdir()
    (tmp_path / "high").mkdir()
    (tmp_path / "errors.py").touch()
    (tmp_path / "__init__.py").write_text("from kfoc.middle.file import low\n")
    (tmp_path / "low" / "file.py").write_text('"""Of\n\nthis."""\n\n# and that\nx = 1\n')
    (tmp_path / "middle" / "file.py").write_text(
        "if TYPE_CHECKING:\n    from kfoc.low import file\nfrom kfoc import errors, high\n"
    )
    (tmp_path / "high" / "file.py").write_text("def f():\n    import kfoc.low.file\n")
    found = plan.imports(tmp_path)
    assert found == {"kfoc": {"middle"}, "low": set(), "middle": {"low", "high"}, "high": {"low"}}
    assert plan.direct(found) == found | {"middle": {"high"}}
    assert plan.lines(plan.files(tmp_path)["low"]) == 1
    (tmp_path / "high" / "other.py").write_text(
        "from kfoc import low\n"
    )  # the name, not the folder
    assert plan.imports(tmp_path)["high"] == {"low", "kfoc"}
