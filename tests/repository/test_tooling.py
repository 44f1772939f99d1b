"""Files that tools read say what the repository says elsewhere."""

from __future__ import annotations

import re

import pytest

import release
from documents import ROOT

yaml = pytest.importorskip("yaml")  # mkdocs needs it

if not (ROOT / "src").exists():
    pytest.skip("not in the repository", allow_module_level=True)


def test_hooks_before_a_commit_are_those_of_make_lint() -> None:
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert recipe is not None
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    assert [hook["entry"] for hook in repo["hooks"]] == commands
    assert all(hook["language"] == "system" for hook in repo["hooks"])
    assert not any(hook["pass_filenames"] for hook in repo["hooks"])


def test_citation_has_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == release.versions()[0]


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_are_forms(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert form.keys() == {"name", "description", "labels", "body"}
    identities = [field["id"] for field in form["body"]]
    assert len(set(identities)) == len(identities)
    assert all(field["attributes"]["label"] for field in form["body"])
