"""What the documentation site takes from outside docs/, and its formulas, at build time."""

from __future__ import annotations

import json
import re
import sys
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent
sys.path.append(str(ROOT / "benchmarks"))

from report import page as report  # noqa: E402  (of benchmarks/)
from targets import checks  # noqa: E402

# Images that pages show, and that other commands of the repository draw.
DRAWN = ("benchmarks/results/optimizer.png", "benchmarks/growth.png")

OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)]*)\)")
NAMED = re.compile(r"<mo>([a-z]+)</mo>")  # which latex2mathml takes for infix
FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.S)


def on_files(files: Files, config: Any) -> Files:
    for path in DRAWN:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links out of docs/, which work in the repository: to images here, or to a file's name."""
    name = page.file.src_uri
    if name == "benchmarks.md":
        for place, text in measured().items():
            markdown = markdown.replace(f"<!-- {place} -->", text)
    return markdown if "/" in name else OUTSIDE.sub(_link, markdown)


def _link(match: re.Match[str]) -> str:
    text, path = match.groups()
    return f"[{text}]({path})" if path in DRAWN else f"{text} (`{path}`)"


def measured() -> dict[str, str]:
    """The parts of the page of benchmarks, by their places."""
    document = json.loads((ROOT / "benchmarks/results/benchmark.json").read_text())
    growth = json.loads((ROOT / "benchmarks/growth.json").read_text())
    return {
        "targets": _targets(document),
        "growth": _growth(growth["exponents"]),
        "table": _rows(document),
    }


def _rows(document: dict[str, Any]) -> str:
    """The table of all rows, without the column of targets, which has a table of its own."""
    rows, _, circumstances = report(document).strip().split("\n\n")
    cut = [line.rsplit("|", 2)[0] + "|" for line in rows.splitlines()]
    return "\n".join(cut) + f"\n\n{circumstances}"


def _targets(document: dict[str, Any]) -> str:
    """How many checks each figure has, and how many of them were met."""
    found = checks(document["rows"])
    met = sum(check.verdict == "met" for check in found)
    lines = [f"**{met} of {len(found)} are met.** {len(found) - met} are not:", ""]
    lines += ["| figure | checks | met | not met, by workload |", "|---|---:|---:|---|"]
    for figure in dict.fromkeys(check.figure for check in found):
        of = [check for check in found if check.figure == figure]
        missed = [c for c in of if c.verdict != "met"]
        names = [
            f"{c.workload} {c.method}: {c.value:.3g} > {c.limit:g}, {c.verdict}" for c in missed
        ]
        lines.append(f"| {figure} | {len(of)} | {len(of) - len(missed)} | {'<br>'.join(names)} |")
    return "\n".join(lines)


def _growth(exponents: dict[str, Any]) -> str:
    """Exponents of time and memory."""
    lines = ["| exponent of time; of memory | gradient | K-FAC | K-FOC |", "|---|---|---|---|"]
    for name, methods in exponents.items():
        cells = [
            f"{m['milliseconds']:.2f}; {m['peak_bytes']:.2f}"
            for m in (methods[key] for key in ("gradient", "kfac", "kfoc"))
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def on_page_content(html: str, **_: Any) -> str:
    return FORMULA.sub(_mathml, html)


def _mathml(match: re.Match[str]) -> str:
    """A formula as MathML, which browsers draw without any script."""
    block = match[1] == "div"
    formula = convert(unescape(match[2]).strip(), display="block" if block else "inline")
    formula = NAMED.sub(r"<mi>\1</mi>", formula)
    for sign in ("&#x02AB0;", "&#x0007E;"):  # and \succeq and \sim, for names
        formula = formula.replace(f"<mi>{sign}</mi>", f"<mo>{sign}</mo>")
    return f'<div class="formula">{formula}</div>' if block else formula
