"""Versions and changelog agree, and the checks of a release see what is wrong."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest

import kfoc
import release

RELEASED = "# Changelog\n\n## [1.1.0] - 2026-02-01\n\n## [1.0.0] - 2026-01-01\n"


def test_versions_agree() -> None:
    if not (release.ROOT / "src").exists():
        pytest.skip("not in the repository")
    project, package = release.versions()
    assert package == kfoc.__version__
    changelog = (release.ROOT / "CHANGELOG.md").read_text()
    assert release.version_problems(project, package, changelog) == []


def test_good_changelogs() -> None:
    assert release.version_problems("1.1.0", "1.1.0", RELEASED) == []
    assert release.release_problems("1.1.0", RELEASED) == []
    going_on = RELEASED.replace("## [1.1.0]", "## [Unreleased]\n\n## [1.1.0]")
    assert release.version_problems("1.2.0", "1.2.0", going_on) == []
    assert release.release_problems("1.2.0", going_on)


@pytest.mark.parametrize(
    ("project", "package", "changelog", "words"),
    [
        ("1.1.0", "1.0.0", RELEASED, "kfoc.__version__"),
        ("1.2.0", "1.2.0", RELEASED, "begins with 1.1.0"),
        ("1.1.0", "1.1.0", "# Changelog\n", "headings"),
        ("1.1.0", "1.1.0", RELEASED.replace("## [1.0.0]", "## 1.0.0"), "headings"),
        ("1.1.0", "1.1.0", RELEASED.replace("1.0.0", "1.1.0"), "twice"),
        ("1.1.0", "1.1.0", RELEASED + "\n## [Unreleased]\n", "comes first"),
        ("1.1.0", "1.1.0", RELEASED.replace(" - 2026-01-01", ""), "date"),
        ("1.1.0", "1.1.0", RELEASED.replace("2026-01", "2026-03"), "latest first"),
    ],
)
def test_bad_versions_and_changelogs(
    project: str, package: str, changelog: str, words: str
) -> None:
    assert any(words in each for each in release.version_problems(project, package, changelog))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A root with a package of two files."""
    package = tmp_path / "src" / "kfoc"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "1.1.0"\n')
    (package / "py.typed").touch()
    return tmp_path


def wheel(folder: Path, *names: str, version: str = "1.1.0") -> Path:
    path = folder / "kfoc-1.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
        archive.writestr("kfoc-1.1.0.dist-info/licenses/LICENSE", "")
        archive.writestr("kfoc-1.1.0.dist-info/METADATA", f"Name: kfoc\nVersion: {version}\n")
    return path


def test_wheels(repository: Path) -> None:
    good = ("kfoc/__init__.py", "kfoc/py.typed", "kfoc-1.1.0.dist-info/RECORD")
    found = release.wheel_problems(wheel(repository, *good), "1.1.0", repository)
    assert found == []
    (lacks,) = release.wheel_problems(wheel(repository, good[0]), "1.1.0", repository)
    assert "lacks kfoc/py.typed" in lacks
    (foreign,) = release.wheel_problems(wheel(repository, *good, "tests/a.py"), "1.1.0", repository)
    assert "tests/a.py" in foreign
    (old,) = release.wheel_problems(wheel(repository, *good, version="1.0"), "1.1.0", repository)
    assert "version 1.1.0" in old


def test_sdists(tmp_path: Path) -> None:
    path = tmp_path / "kfoc-1.1.0.tar.gz"
    (tmp_path / "file").touch()
    with tarfile.open(path, "w:gz") as archive:
        for name in release.IN_SDIST[1:]:
            archive.add(tmp_path / "file", f"kfoc-1.1.0/{name}")
    (lacks,) = release.sdist_problems(path, "1.1.0")
    assert lacks.endswith("lacks kfoc-1.1.0/CHANGELOG.md")
