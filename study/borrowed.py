"""Modules of examples/ and benchmarks/, by path: some are called as installed packages are."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent


def borrowed(path: str) -> ModuleType:
    """The module at a path from the root of the repository, such as "examples/laplace.py"."""
    name = "study_" + path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        if spec is None or spec.loader is None:
            raise ImportError(f"no module at {path}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up while it is read
        # After all others: what it imports from beside it, and nothing that is also in study/.
        sys.path.append(str((ROOT / path).parent))
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.pop()
    return sys.modules[name]
