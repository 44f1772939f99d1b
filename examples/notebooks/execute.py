"""Run the notebooks of this folder again, in place, each in a kernel of its own.

What would differ from one run or machine to the next without saying anything (times, versions,
the kernel's name) is taken out, so that a diff shows what has changed in code and outputs.

    python examples/notebooks/execute.py               all of them
    python examples/notebooks/execute.py start laplace
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def executed(path: Path) -> nbformat.NotebookNode:
    """A notebook with the outputs of a run, in one thread and in a directory that goes away.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        client = NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources=resources, coalesce_streams=True
        )
        manager = client.create_kernel_manager()
        if os.name != "nt":  # sockets in the folder: ports are open to all users of the machine
            manager.transport, manager.ip = "ipc", f"{folder}/kernel"
        # Without these, IPython and Matplotlib keep files in the home directory.
        files = {"IPYTHONDIR": folder, "MPLCONFIGDIR": folder, "JUPYTER_RUNTIME_DIR": folder}
        client.execute(env=os.environ | files | {"OMP_NUM_THREADS": "1"})
    return cleaned(notebook)


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without what is particular to a run: changed in place, and returned."""
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    )
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = nbformat.from_dict({})
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="such as start; without any, all of them")
    names = parser.parse_args().names
    paths = [FOLDER / f"{name}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb"))
    for path in paths:
        notebook = executed(path)
        nbformat.validate(notebook)
        nbformat.write(notebook, path)
        print(path.name, flush=True)


if __name__ == "__main__":
    main()
