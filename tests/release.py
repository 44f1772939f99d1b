"""What of a release can be checked by itself, see RELEASING.md.

python tests/release.py DIST     the versions, the changelog, and what was built into DIST
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEADING = re.compile(r"^## \[([^\]]+)\](?: - (\d{4}-\d{2}-\d{2}))?$", re.M)
IN_SDIST = ("CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "tests/oracle.py")


def versions(root: Path = ROOT) -> tuple[str, str]:
    """That of pyproject.toml, and that of the package."""
    project = re.search(r'^version = "(.+)"$', (root / "pyproject.toml").read_text(), re.M)
    package = re.search(
        r'^__version__ = "(.+)"$', (root / "src" / "kfoc" / "__init__.py").read_text(), re.M
    )
    if project is None or package is None:
        raise ValueError("pyproject.toml or kfoc/__init__.py has no line with the version")
    return project[1], package[1]


def version_problems(project: str, package: str, changelog: str) -> list[str]:
    """What must hold at any time: `[Unreleased]` first, or the version itself, released or not."""
    problems = []
    if project != package:
        problems.append(f"pyproject.toml has version {project}, kfoc.__version__ is {package}")
    headings = HEADING.findall(changelog)
    if len(headings) != len(re.findall(r"^## ", changelog, re.M)) or not headings:
        problems.append("CHANGELOG.md: its headings are [Unreleased] or [VERSION] - YYYY-MM-DD")
        return problems
    names = [name for name, _ in headings]
    if len(set(names)) != len(names):
        problems.append("CHANGELOG.md has a heading twice")
    if "Unreleased" in names[1:]:
        problems.append("CHANGELOG.md: [Unreleased] comes first")
    if names[0] not in ("Unreleased", project):
        problems.append(f"CHANGELOG.md begins with {names[0]}, pyproject.toml has {project}")
    dates = [date for name, date in headings if name != "Unreleased"]
    if not all(dates) or dates != sorted(dates, reverse=True):
        problems.append("CHANGELOG.md: every release has a date, the latest first")
    return problems


def release_problems(project: str, changelog: str) -> list[str]:
    """What must hold besides when the version is tagged."""
    first = HEADING.search(changelog)
    if first is None or first[1] != project or first[2] is None:
        return [f"CHANGELOG.md: its first heading must be ## [{project}] - YYYY-MM-DD"]
    return []


def wheel_problems(wheel: Path, project: str, root: Path = ROOT) -> list[str]:
    """Missing and foreign files, and the metadata."""
    information = f"kfoc-{project}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = f"{information}/METADATA"
        text = archive.read(metadata).decode() if metadata in names else ""
    source = root / "src"
    wanted = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    wanted |= {metadata, f"{information}/licenses/LICENSE"}
    problems = [f"{wheel.name} lacks {name}" for name in sorted(wanted - names)]
    foreign = {name for name in names - wanted if not name.startswith(f"{information}/")}
    problems += [f"{wheel.name} has {name}, which is not the library's" for name in sorted(foreign)]
    if f"\nVersion: {project}\n" not in text:
        problems.append(f"{wheel.name}: its metadata do not say version {project}")
    return problems


def sdist_problems(sdist: Path, project: str) -> list[str]:
    with tarfile.open(sdist) as archive:
        names = set(archive.getnames())
    wanted = [f"kfoc-{project}/{name}" for name in IN_SDIST]
    return [f"{sdist.name} lacks {name}" for name in wanted if name not in names]


def main() -> None:
    dist = Path(sys.argv[1])
    project, package = versions()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    problems = version_problems(project, package, changelog)
    problems += release_problems(project, changelog)
    wheels, sdists = sorted(dist.glob("*.whl")), sorted(dist.glob("*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        problems.append(f"{dist} must hold one wheel and one sdist: run make dist")
    for wheel in wheels:
        problems += wheel_problems(wheel, project)
    for sdist in sdists:
        problems += sdist_problems(sdist, project)
    if problems:
        sys.exit("\n".join(problems))
    print(f"kfoc {project}: versions, changelog and files agree")


if __name__ == "__main__":
    main()
