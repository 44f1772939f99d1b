#!/bin/sh
# The suite against the built wheel, from outside the repository.
#     sh tests/wheel.sh [TORCH [PYTHON]]      such as torch==2.6.0 python3.11
set -eu
torch=${1:-$(grep '^torch' "$(dirname "$0")/../requirements-torch.txt")}
python=${2:-python3.11}
root=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

"$python" -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet build "$torch"
"$place/venv/bin/python" -m build --outdir "$place/dist" "$root" > "$place/build.log" 2>&1 ||
    { cat "$place/build.log"; exit 1; }
wheel=$(ls "$place"/dist/*.whl)
# The torch that is asked for, and no other for the sake of some dependency.
"$place/venv/bin/python" -c '
from importlib.metadata import version  # torch.__version__ may have a suffix that pip does not know
print("torch==" + version("torch"))
' > "$place/torch.txt"
"$place/venv/bin/pip" install --quiet "$wheel[test]" -c "$place/torch.txt"

mkdir "$place/outside"
cd "$root"
cp -r tests docs examples benchmarks study README.md CHANGELOG.md pyproject.toml mkdocs.yml site_hooks.py "$place/outside"
cd "$place/outside"
"$place/venv/bin/python" -c '
import kfoc, torch
assert "site-packages" in kfoc.__file__, kfoc.__file__
print("kfoc", kfoc.__version__, "from its wheel, torch", torch.__version__)'
"$place/venv/bin/python" -m pytest -p no:cacheprovider tests
