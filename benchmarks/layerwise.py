"""Peak memory of a fit whose factors are four times the budget: python benchmarks/layerwise.py

Each row runs in a process of its own. Writes benchmarks/results/layerwise.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import memory
from kfoc.reproduce.results import markdown, write

RESULTS = Path(__file__).parent / "results"
WIDTH, DEPTH, BATCH, BATCHES = 1024, 16, 64, 8  # more samples than KFOC buffers


def run(estimator: str, share: float, storage: bool) -> dict[str, Any]:
    """One fit; the budget is `share` of the factors' bytes, 0 for none."""
    import torch

    import kfoc

    torch.set_num_threads(2)
    torch.manual_seed(0)
    layers = [m for _ in range(DEPTH) for m in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh())]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, 10))
    x, y = torch.randn(BATCHES * BATCH, WIDTH), torch.randint(10, (BATCHES * BATCH,))
    data = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    sizes = [m.weight.shape for m in model if isinstance(m, torch.nn.Linear)]
    factors = sum(4 * (o * o + (i + 1) ** 2) for o, i in sizes)
    # A budget of a quarter of all factors has no room for a head of several.
    chosen = kfoc.KFOC(head=1) if estimator == "KFOC" else kfoc.KFAC()
    options: dict[str, Any] = {"estimator": chosen}
    if share:
        options["memory_budget"] = int(share * factors)
    small = kfoc.fit(model[-1:], [(x[:8], y[:8])])  # what is loaded once
    del small
    with tempfile.TemporaryDirectory(dir=".") as folder:
        if storage:
            options["storage"] = Path(folder) / "blocks"
        start = time.perf_counter()
        peak = memory.peak_above(lambda: kfoc.fit(model, data, **options))
        seconds = time.perf_counter() - start
    return {
        "estimator": estimator,
        "budget": options.get("memory_budget"),
        "storage": storage,
        "factors": factors,
        "peak": peak,
        "seconds": seconds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    header = ["estimator", "budget, MB", "factors / budget", "blocks in files"]
    header += ["peak above the model, MB", "peak / factors", "seconds"]
    lines = []
    for row in rows:
        budget, peak = row["budget"], row["peak"]
        share = (
            [f"{budget / 2**20:.0f}", f"{row['factors'] / budget:.1f}"] if budget else ["none", ""]
        )
        found = [f"{peak / 2**20:.0f}", f"{peak / row['factors']:.2f}", f"{row['seconds']:.1f}"]
        lines.append([row["estimator"], *share, "yes" if row["storage"] else "no", *found])
    return markdown(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3, metavar=("ESTIMATOR", "SHARE", "STORAGE"))
    arguments = parser.parse_args()
    if arguments.one:
        estimator, share, storage = arguments.one
        print(json.dumps(run(estimator, float(share), storage == "yes")))
        return
    rows = []
    for estimator in ("KFAC", "KFOC"):
        for share, storage in (("0", "no"), ("0", "yes"), ("0.25", "yes")):
            command = [sys.executable, __file__, "--one", estimator, share, storage]
            environment = os.environ | memory.ENVIRONMENT
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            rows.append(json.loads(done.stdout))
    sizes = f"{DEPTH} layers of {WIDTH} x {WIDTH}, {BATCHES} batches of {BATCH}, float32."
    shown = f"{sizes}\n\n" + table(rows)
    print(shown)
    (RESULTS / "layerwise.md").write_text(shown + "\n")
    write(RESULTS / "layerwise.json", {"machine": machine.describe(2), "rows": rows})


if __name__ == "__main__":
    main()
