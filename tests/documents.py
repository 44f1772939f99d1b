"""The code blocks of Markdown pages."""

from __future__ import annotations

import re
from pathlib import Path
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
