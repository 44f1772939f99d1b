"""The code blocks of Markdown pages, and scripts outside the package."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent


def code_blocks(page: str) -> list[str]:
    """The Python blocks of a page, named from the root of the repository."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


def executed(page: str) -> dict[str, Any]:
    """What a page's blocks, run one after the other, have defined."""
    scope: dict[str, Any] = {}
    for code in code_blocks(page):
        exec(code, scope)
    return scope


def script(path: str) -> ModuleType:
    """A script as a module, from the root of the repository."""
    spec = importlib.util.spec_from_file_location(f"script {path}", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
