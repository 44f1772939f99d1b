"""Imports point one way (design): read from the source, not from what happens to work."""

import ast
import subprocess
import sys
from pathlib import Path

import kfoc

SOURCE = Path(kfoc.__file__).parent
# Folders, and files at the top, from the lowest floor to the highest: what each may import from
# the package. A folder may import itself; a file of another one is named where it alone is meant.
ALLOWED = {
    # All may import these two: what callers set for all of torch reaches everywhere.
    "common": set(),
    "errors": set(),
    # The mathematics: tensors in, tensors out.
    "linalg": set(),
    "nearest": {"linalg"},
    "samples": {"linalg"},
    "plans": {"linalg", "nearest", "samples"},
    "blocks": {"linalg"},
    "parameters": set(),
    "likelihoods": set(),
    # What probes draw is a function of the seed and of the sample, as labels are.
    "estimators": {
        "blocks", "likelihoods.draws", "linalg", "nearest", "parameters", "plans", "samples",
    },
    # The model: modules, hooks, autograd.
    "layers": {"parameters", "samples"},
    "model": {"layers", "linalg", "parameters", "samples"},
    # The result. Adding two Kronecker products is Algorithm 1 on two terms.
    "files": set(),
    "curvature": {"blocks", "files", "nearest", "parameters"},
    # A fit, and the ways to run it.
    "distributed": {"curvature", "estimators", "files", "parameters"},
    "fitting": {
        "blocks", "curvature", "estimators", "files", "layers", "likelihoods", "linalg", "model",
        "parameters", "samples",
    },
    "running": {
        "blocks", "curvature", "distributed", "files", "fitting", "layers", "model", "parameters",
        "samples",
    },
    "fit": {
        "curvature", "distributed", "estimators", "fitting", "likelihoods", "model", "running",
    },
    "tracker": {
        "curvature", "estimators", "files", "fitting", "layers", "likelihoods", "model",
    },
    # Products and solves with what a curvature approximates.
    "fisher": {
        "curvature", "distributed", "fitting", "layers", "likelihoods", "linalg", "model",
        "parameters", "running",
    },
    # What people do with a curvature knows of curvatures, not of how they are fitted; the optimizer
    # has one that follows its model.
    "applications": {
        "blocks", "curvature", "files", "fisher", "likelihoods", "model", "parameters", "tracker",
    },
    "interop": {
        "blocks", "curvature", "estimators", "fit", "layers", "linalg", "model", "nearest",
        "parameters", "samples",
    },
    # As a user's code would: by public names.
    "compare": {"kfoc"},
    "reproduce": {"compare", "files.writing", "kfoc"},
}  # fmt: skip
FOR_ALL = {"common", "errors"}
TOP = {"__init__", "__main__", "errors", "fit", "tracker"}


def module_of(path: Path) -> str:
    parts = ("kfoc", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in sorted(SOURCE.rglob("*.py"))}
# Names of the package that are functions, where there are modules of the same name.
FUNCTIONS = {f"kfoc.{name}" for name in kfoc.__all__}


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports: at its top, in functions, or for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} imports relatively"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                inside = whole in MODULES and whole not in FUNCTIONS
                found.add(whole if inside else node.module or "")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys()


def test_every_folder_keeps_to_the_direction() -> None:
    for module, path in MODULES.items():
        if module in ("kfoc", "kfoc.__main__"):
            continue
        own = module.split(".")[1]
        for other in imported(path):
            inside = other.removeprefix("kfoc.")
            allowed = ALLOWED[own] | FOR_ALL | {own}
            assert {inside, inside.split(".")[0]} & allowed, f"{module} imports {other}"


def test_floors_are_in_order() -> None:
    """No folder may import one that is above it in the table."""
    seen: set[str] = {"kfoc"}
    for name, below in ALLOWED.items():
        seen.add(name)
        assert {other.split(".")[0] for other in below} <= seen, name


def likelihood_classes() -> set[str]:
    """The likelihoods of the library, and whatever they are derived from."""
    tops = [ast.parse(path.read_text()).body for path in (SOURCE / "likelihoods").glob("*.py")]
    classes = [node for top in tops for node in top if isinstance(node, ast.ClassDef)]
    found = {"Likelihood"}
    for _ in classes:
        found |= {c.name for c in classes if found & {ast.unparse(base) for base in c.bases}}
    return found


def test_no_likelihood_is_asked_for_its_class() -> None:
    """What differs between them is a method, so that one of the user's own has it too."""
    concrete = likelihood_classes() - {"Likelihood"}
    assert {"Bernoulli", "Categorical", "Gaussian"} <= concrete
    for module, path in MODULES.items():
        if module == "kfoc" or module.startswith("kfoc.likelihoods"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            named = {getattr(node, key, None) for key in ("id", "attr", "name")}
            assert not named & concrete, f"{module} names a likelihood in line {node.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "type"):
                asked = ast.unparse(node)
                assert "Likelihood" not in asked, f"{module} asks {asked}"


def test_few_files_are_at_the_top() -> None:
    assert {path.stem for path in SOURCE.glob("*.py")} == TOP


def circles(imports: dict[str, set[str]]) -> list[set[str]]:
    """Sets of files each of which imports, by way of others, each."""
    reached = {module: set(others) for module, others in imports.items()}
    for middle in imports:
        for others in reached.values():
            if middle in others:
                others |= reached[middle]
    found = []
    for module, others in reached.items():
        circle = {other for other in others if module in reached[other]}
        if module in others and circle not in found:
            found.append(circle)
    return found


def test_no_files_import_each_other_in_a_circle() -> None:
    found = circles({module: imported(path) - {module} for module, path in MODULES.items()})
    assert not found


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


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
