"""Every example in one table, as markdown: `python examples/models.py [--quick]`.

Coverage is of the trained parameters; the errors are means over the layers whose blocks are
Kronecker products; the times are of one batch, each estimator's whole fit against forward and full
backward (ratio: K-FOC to that).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import sys

from common import Row, run

EXAMPLES = (
    "gpt2",
    "bert",
    "vit",
    "swin",
    "resnet",
    "llama",
    "moe",
    "unet",
    "mobilenet",
    "video",
    "autoencoder",
)
HEADER = (
    "model",
    "parameters",
    "coverage %",
    "layers treated / skipped",
    "mean relative error K-FAC / K-FOC",
    "ms gradient / K-FAC / K-FOC",
    "ratio",
)


def cells(row: Row) -> tuple[str, ...]:
    times = row.milliseconds
    return (
        row.name,
        f"{row.parameters:,}",
        f"{100 * row.coverage.fraction:.1f}",
        f"{row.treated} / {row.skipped}",
        " / ".join(_number(row.errors[name]) for name in ("K-FAC", "K-FOC")),
        " / ".join(f"{times[name]:.0f}" for name in ("gradient", "K-FAC", "K-FOC")),
        f"{times['K-FOC'] / times['gradient']:.1f}",
    )


def _number(error: float) -> str:
    return "-" if math.isnan(error) else f"{error:.3f}"


def markdown(rows: list[Row]) -> str:
    lines = [HEADER, ("---",) * len(HEADER), *map(cells, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(small: bool = False) -> list[Row]:
    rows: list[Row] = []
    for name in EXAMPLES:
        print(name, file=sys.stderr, flush=True)
        with contextlib.redirect_stdout(io.StringIO()):
            found = importlib.import_module(name).main(small)
            rows += found if isinstance(found, list) else [found]
    print(markdown(rows))
    return rows


if __name__ == "__main__":
    run(main, __doc__)
