"""The documentation site: built without a warning, loads nothing from elsewhere, its code runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import kfoc
from documents import ROOT, code_blocks, executed

# Pages whose code runs in a test of its own, which looks at what it gives.
ELSEWHERE = {
    "checkpoints.md": "test_checkpoint.py",
    "compare.md": "test_compare.py",
    "continual.md": "test_documents.py",
    "curvature.md": "test_documents.py",
    "interop.md": "test_documents.py",
    "laplace.md": "test_laplace_documents.py",
    "memory.md": "test_documents.py",
    "training.md": "test_documents.py",
}
PAGES = sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))
HERE = [page for page in PAGES if page not in ELSEWHERE and code_blocks(f"docs/{page}")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(place)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return place


class Resources(HTMLParser):
    """What a browser loads with a page, and the page's formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.classes: set[str] = set()
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.classes.update((found.get("class") or "").split())
        self.anchors.add(found.get("id") or "")
        if tag == "link" and found.get("rel") in ("canonical", "prev", "next", "alternate"):
            return
        name = "href" if tag == "link" else "src" if tag != "a" else ""
        self.loaded += [value for value in (found.get(name), found.get("srcset")) if value]


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)  # and one for what is not found
    for page in pages:
        resources = Resources()
        resources.feed(page.read_text())
        assert resources.loaded
        for value in resources.loaded:
            assert not value.startswith(("http:", "https:", "//")), (page.name, value)
            target = site / value.lstrip("/") if value[0] == "/" else page.parent / value
            assert value.startswith("data:") or target.exists(), (page.name, value)
        assert "arithmatex" not in resources.classes, f"{page.name}: a formula was not converted"
    for sheet in site.rglob("*.css"):
        assert "url(http" not in sheet.read_text().replace('"', "").replace("'", ""), sheet.name


def test_every_page_is_there(site: Path) -> None:
    for page in PAGES:
        assert (site / page).with_suffix(".html").is_file()


def test_every_public_name_is_documented(site: Path) -> None:
    resources = Resources()
    for page in (site / "api").glob("*.html"):
        resources.feed(page.read_text())
    for name in kfoc.__all__:  # a function may be in a module of its own name
        assert {f"kfoc.{name}", f"kfoc.{name}.{name}"} & resources.anchors, name


def test_benchmarks_are_those_of_the_committed_run(site: Path) -> None:
    page = (site / "benchmarks.html").read_text()
    committed = (ROOT / "benchmarks" / "results" / "benchmark.md").read_text()
    found = re.search(r"(\d+) of (\d+) targets met", committed)
    assert found is not None
    assert f"{found[1]} of {found[2]} are met." in page
    assert "<!--" not in page.split("<article", 1)[1].split("</article", 1)[0]


def test_lines_of_code_fit_the_page() -> None:
    for page in ["README.md", *(f"docs/{page}" for page in PAGES)]:
        for code in code_blocks(page):
            long = [line for line in code.splitlines() if len(line) > 88]  # as in docs/site.css
            assert not long, (page, long)


def test_pages_that_run_elsewhere_do() -> None:
    for page, test in ELSEWHERE.items():
        assert page in PAGES
        (path,) = (ROOT / "tests").rglob(test)
        assert page in path.read_text()


@pytest.fixture
def group() -> Iterator[None]:
    """A group of this process alone, for the page about many."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("page", HERE)
def test_code_of_a_page(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    executed(f"docs/{page}")
