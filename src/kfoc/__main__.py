"""``python -m kfoc`` is the ``kfoc`` command."""

from kfoc.reproduce.cli import app

if __name__ == "__main__":
    app(prog_name="kfoc")
