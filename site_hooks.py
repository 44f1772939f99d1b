"""What the documentation site takes from outside docs/, and its formulas, at build time."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent

# Images that pages show, and that other commands of the repository draw.
DRAWN = ("benchmarks/results/optimizer.png", "benchmarks/growth.png")

OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)]*)\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.S)


def on_files(files: Files, config: Any) -> Files:
    for path in DRAWN:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links out of docs/, which work in the repository: to images here, or to a file's name."""
    return OUTSIDE.sub(_link, markdown) if "/" not in page.file.src_uri else markdown


def _link(match: re.Match[str]) -> str:
    text, path = match.groups()
    return f"[{text}]({path})" if path in DRAWN else f"{text} (`{path}`)"


def on_page_content(html: str, **_: Any) -> str:
    return FORMULA.sub(_mathml, html)


def _mathml(match: re.Match[str]) -> str:
    """A formula as MathML, which browsers draw without any script."""
    block = match[1] == "div"
    formula = convert(unescape(match[2]).strip(), display="block" if block else "inline")
    return f'<div class="formula">{formula}</div>' if block else formula
