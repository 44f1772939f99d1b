"""Imports point one way (design): read from the source, not from what happens to work."""

import ast
import subprocess
import sys
from pathlib import Path

import kfoc

SOURCE = Path(kfoc.__file__).parent
# What each module may import from the package; names are relative to it.
ALLOWED = {
    "ambient": {"threads"},  # which all may: what callers set for all of torch reaches everywhere
    "kronecker": {"scales"},
    # What estimators ask of other ranks, and how it is sent.
    "pooling": {"kronecker"},
    "distributed": {"pooling"},
    "agreement": {
        "batches", "certificate", "checkpoint", "distributed", "estimators", "fingerprint",
        "pooling", "samples",
    },
    "scales": set(),
    "pending": {"samples"},
    "samples": {"memory", "scales"},
    "tokens": {"samples"},
    "tied": {"samples", "scales"},
    "likelihoods": set(),
    "blocks": {"blocks"},  # a package of kinds, which know of nothing else
    "products": set(),
    "layout": set(),
    "batches": set(),
    "coverage": {"layout"},
    "plans": {"kronecker", "plans", "products", "samples"},  # a package of them
    "solver": {"kronecker", "scales"},
    "sketch": {"kronecker", "planner", "plans", "products", "samples", "solver"},
    "token_plan": {"kronecker", "products", "samples", "tied", "tokens"},
    "planner": {"kronecker", "plans", "products", "samples", "tied", "token_plan"},
    "certificate": {"blocks", "likelihoods", "plans", "pooling", "samples", "token_plan"},
    "layers": {"samples", "tokens"},
    "embedding": {"layers", "samples", "tied", "tokens"},
    "interop": {
        "blocks", "buffers", "curvature", "estimators", "fit", "interop", "kronecker", "layers",
        "layout", "products", "samples", "vectors",
    },
    "graph": set(),
    "progress": set(),
    "memory": set(),
    "offload": {"batches", "blocks", "memory"},
    "threads": set(),
    "attention": {"layers"},
    "watched": {"layers"},
    "selection": {"attention", "embedding", "layers", "layout", "watched"},
    "record": {"graph", "layers", "samples"},
    "checks": {"graph", "record"},
    # Whose rows a call's are, the samples made of them, and how both are proved.
    "ownership": {"record"},
    "assembly": {"embedding", "layers", "ownership", "record", "samples", "tokens"},
    "sums": {
        "assembly", "layout", "ownership", "record", "samples", "scales", "selection", "tokens",
    },
    "proof": {"assembly", "ownership", "record", "selection", "sums"},
    "uncovered": {"batches", "forward", "jacobians", "layers", "record"},
    "capture": {
        "assembly", "attention", "layers", "ownership", "proof", "record", "samples", "selection",
        "watched",
    },
    "vectors": {"layout"},
    "flat": {"layout", "vectors"},
    "subspace": {"kronecker"},
    # Adding two Kronecker products is Algorithm 1 on two terms.
    "merge": {"blocks", "kronecker", "subspace"},
    "damped": {"arguments", "blocks", "flat", "layout", "vectors"},
    "files": set(),
    "storage": {"blocks", "files", "layout"},
    "curvature": {"blocks", "coverage", "damped", "flat", "layout", "merge", "storage", "vectors"},
    "estimators": {
        "arguments", "kronecker", "samples", "plans", "planner", "products", "blocks",
        "estimators", "subspace", "scales", "sketch", "solver", "tied", "token_plan", "tokens",
        "memory", "pending", "pooling",
    },
    "arguments": set(),
    "buffers": set(),
    "forward": {"arguments", "batches", "buffers"},
    "jacobians": {"arguments", "batches", "forward"},
    # What people do with a curvature knows of curvatures, not of how they are fitted.
    "laplace": {
        "arguments", "batches", "blocks", "curvature", "damped", "forward", "jacobians", "laplace",
        "likelihoods", "vectors",
    },
    "influence": {
        "arguments", "batches", "curvature", "damped", "forward", "likelihoods", "jacobians",
    },
    "sharding": {"curvature", "distributed", "files", "vectors"},
    "fingerprint": {"encoding"},
    "folder": {"files"},
    "hints": set(),
    "checkpoint": {
        "attention", "batches", "buffers", "certificate", "folder", "hints",
        "samples", "encoding", "fingerprint", "selection",
    },
    "fit": {
        "agreement", "arguments", "assembly", "batches", "blocks", "buffers", "capture",
        "certificate", "checkpoint",
        "checks", "coverage", "curvature", "distributed", "estimators", "graph", "layers",
        "forward", "likelihoods", "memory", "offload", "ownership", "progress", "proof", "record",
        "samples", "uncovered",
        "scales", "selection", "threads", "vectors",
    },
    "encoding": {"hints"},
    "tracker": {
        "batches", "curvature", "encoding", "estimators", "fit", "hints", "layers", "likelihoods",
        "samples",
    },
    "preconditioner": {"blocks", "curvature", "damped", "layout", "vectors"},
    "natural_gradient": {
        "arguments", "batches", "blocks", "encoding", "hints", "preconditioner", "tracker",
    },
    "consolidation": {"curvature", "files", "vectors"},
    # As a user's code would: by public names.
    "compare": {"compare", *kfoc.__all__},
}  # fmt: skip


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, by their first name below it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kfoc":
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {(name[1] if len(name) > 1 else "kfoc") for name in names if name[0] == "kfoc"}
    return found


def test_every_module_keeps_to_the_direction() -> None:
    for path in SOURCE.rglob("*.py"):
        part = path.relative_to(SOURCE).with_suffix("").parts
        if part[0] in ("__init__", "__main__", "reproduce"):
            continue
        others = imported(path) - {"ambient"}
        assert others <= ALLOWED[part[0]], f"{path.name} imports {others}"


def test_the_reproduction_uses_public_names_only() -> None:
    for path in (SOURCE / "reproduce").rglob("*.py"):
        others = imported(path) - {"kfoc", "reproduce", "compare", "files"}
        assert others <= set(kfoc.__all__), f"{path.name} imports {others}"


def test_public_names_are_documented() -> None:
    for name in kfoc.__all__:
        assert (getattr(kfoc, name).__doc__ or "").strip(), f"{name} has no docstring"


def test_core_imports_torch_and_little_else() -> None:
    heavy = [
        "scipy",
        "pandas",
        "torchvision",
        "tqdm",
        "matplotlib",
        "rich",
        "typer",
        "mlxtend",
        "sklearn",
        "safetensors",
        "laplace",
        "linear_operator",
    ]
    code = f"import sys, kfoc; print([m for m in {heavy} if m in sys.modules])"
    # torch may import some of them by itself where they are installed: compare with torch alone.
    loaded = [
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True).stdout
        for c in (code, code.replace("kfoc;", "torch;"))
    ]
    assert loaded[0] == loaded[1]
