"""A model of 100 million parameters: seconds and memory of every step, in GPT-2's shape.

    python benchmarks/large.py [--depth 12] [--methods K-FAC K-FOC ...] [--out FILE]

12 layers of width 768, a vocabulary of 50,257, random weights, made by `transformers` from a
configuration; one batch of 4 sequences of 64 tokens. Treated are the 4 matrices of every layer (85
million parameters), whose factors have 768 to 3,073 rows: curvatures of 326 million numbers. Each
method has a process of its own: fits, and then what one does with them, a step at a time. A step's
memory is the highest resident memory during it, above what there was before it.

The peers know no `Conv1D`: what they say is recorded, and they are given the same model with
`nn.Linear` in its place. kronfluence factorises one layer, with its default of float64; its
seconds times the depth stand in the table. Writes results/large.json and .md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import memory
from kfoc.reproduce import results
from machine import busy_cores, describe, matrix_product_rate, said, wait_until_quiet
from methods import curvlinops_operator, gradient, kfoc_fit, set_threads
from targets import LARGE_TO_KFAC, Check
from workloads import Workload

RESULTS = Path(__file__).resolve().parent / "results" / "large.json"
SEQUENCES, TOKENS, VOCABULARY, WIDTH = 4, 64, 50_257, 768
DAMPING = 1e-3
REPEATS = 3  # of what takes seconds: the median counts
GRADIENT, FIT = "forward and backward", "fit"
PI = "factored damping: Cholesky and a solve"
FACTORISE = "eigendecompositions"
SOLVE = "a solve with exact damping after them"
SAVE, LOAD = "save", "load"
SAVE_ALL, LOAD_ALL = "save with the eigendecompositions", "load with them"
EIGENVALUES = "eigenvalues of EKFAC"
STEPS = (GRADIENT, FIT, PI, FACTORISE, SOLVE, SAVE, LOAD, SAVE_ALL, LOAD_ALL, EIGENVALUES)

Record = dict[str, Any]


class Logits(nn.Module):
    """A model of `transformers`, with logits alone for outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits


@dataclass
class Large(Workload):
    """GPT-2's shape and a batch, of which the matrices of the layers are treated."""

    @property
    def layers(self) -> list[str]:
        kinds = ("Linear", "Conv1D")
        named = self.model.named_modules()
        return [name for name, m in named if ".h." in name and type(m).__name__ in kinds]


def workload(depth: int, linear: bool = False) -> Large:
    """The same in every process.

    Args:
        linear: `nn.Linear` in place of `Conv1D`, whose weight is its transpose.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=depth, n_embd=WIDTH, n_head=12, vocab_size=VOCABULARY, n_positions=TOKENS
    )
    model = Logits(GPT2LMHeadModel(config)).eval()
    made = Large(model, [])
    for name in made.layers if linear else ():
        old = model.get_submodule(name)
        new = nn.Linear(*old.weight.shape)
        new.load_state_dict({"weight": old.weight.mT, "bias": old.bias})
        model.set_submodule(name, new)
    tokens = torch.randint(VOCABULARY, (SEQUENCES, TOKENS + 1))
    made.batches = [(tokens[:, :-1], tokens[:, 1:])]
    return made


def step(name: str, call: Callable[[], Any], repeats: int = 1) -> tuple[Any, Record]:
    """What the last call gives, and the record of all: median seconds, and the highest peak."""
    seconds, peaks, found = [], [], None
    for _ in range(repeats):
        del found
        memory.give_back()
        before = memory.resident()
        memory.reset_peak()
        start = time.perf_counter()
        found = call()
        seconds.append(time.perf_counter() - start)
        peaks.append(memory.resident("VmHWM") - before)
    record = {"step": name, "seconds": statistics.median(seconds), "peak_bytes": max(peaks)}
    return found, record | {"repeats": seconds}


def kfac(depth: int, folder: Path) -> Iterator[Record]:
    import kfoc

    made = workload(depth)
    yield step(GRADIENT, gradient(made)(), REPEATS)[1]
    curvature, record = step(FIT, lambda: kfoc_fit(made, kfoc.KFAC()), REPEATS)
    yield record
    yield from of_curvature(curvature, made, folder, eigen=False)


def kfoc_(depth: int, folder: Path) -> Iterator[Record]:
    import kfoc

    made = workload(depth)
    curvature, record = step(FIT, lambda: kfoc_fit(made, kfoc.KFOC()), REPEATS)
    yield record
    yield from of_curvature(curvature, made, folder, eigen=True)


def of_curvature(curvature: Any, made: Large, folder: Path, eigen: bool) -> Iterator[Record]:
    """What is done with a curvature. K-FAC's factors have the shapes of K-FOC's, and its costs."""
    import kfoc

    vector = curvature.vector(made.model)
    yield step(PI, lambda: curvature.solve(vector, DAMPING, method="pi"))[1]
    file = folder / "plain.safetensors"
    yield sized(step(SAVE, lambda: curvature.save(file))[1], file)
    yield step(LOAD, lambda: kfoc.Curvature.load(file))[1]
    file.unlink()
    if not eigen:
        return
    _, record = step(FACTORISE, lambda: curvature.damped(DAMPING))
    yield record
    solved, record = step(SOLVE, lambda: curvature.solve(vector, DAMPING), REPEATS)
    yield record
    yield sized(step(SAVE_ALL, lambda: curvature.save(file, factorised=True))[1], file)
    again, record = step(LOAD_ALL, lambda: kfoc.Curvature.load(file))
    yield record
    for name, part in again.solve(vector, DAMPING).items():
        torch.testing.assert_close(part, solved[name], rtol=1e-3, atol=1e-5)


def sized(record: Record, file: Path) -> Record:
    return record | {"file_bytes": file.stat().st_size}


def curvlinops(depth: int, _: Path) -> Iterator[Record]:
    from curvlinops.inverse import KFACInverseLinearOperator

    def factors(made: Large) -> Any:
        operator = curvlinops_operator(made)
        operator.compute_kronecker_factors()
        return operator

    yield refused(lambda: factors(workload(depth)))
    made = workload(depth, linear=True)
    operator, record = step(FIT, lambda: factors(made), REPEATS)
    yield record
    vector = [
        p.detach() for name in made.layers for p in made.model.get_submodule(name).parameters()
    ]

    def solve() -> Any:
        inverse = KFACInverseLinearOperator(operator, DAMPING, use_heuristic_damping=True)
        return inverse @ vector

    yield attempted(PI, solve)


def kronfluence(depth: int, folder: Path) -> Iterator[Record]:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.task import Task

    class Language(Task):
        def __init__(self, tracked: list[str]) -> None:
            self.tracked = tracked

        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
            tokens, labels = batch
            logits = model(tokens).flatten(0, 1)
            if sample:
                with torch.no_grad():
                    labels = torch.multinomial(logits.detach().softmax(-1), 1)
            return nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")

        def compute_measurement(self, batch: Any, model: Any) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return self.tracked

    def analyzer(made: Large, name: str, tracked: list[str]) -> tuple[Any, Record]:
        task = Language(tracked)
        prepared = prepare_model(made.model, task)
        found = Analyzer(name, prepared, task, cpu=True, disable_tqdm=True, output_dir=str(folder))
        return found, {"dataset": torch.utils.data.TensorDataset(*made.batches[0])}

    made = workload(depth)
    yield refused(lambda: analyzer(made, "refused", made.layers))
    made = workload(depth, linear=True)
    every, data = analyzer(made, "all", made.layers)
    data |= {"per_device_batch_size": SEQUENCES, "overwrite_output_dir": True}
    yield step(FIT, lambda: every.fit_covariance_matrices("k", **data), REPEATS)[1]
    made = workload(depth, linear=True)
    one, rest = analyzer(made, "one", [name for name in made.layers if ".h.0." in name])
    data |= rest
    one.fit_covariance_matrices("k", **data)
    record = step(FACTORISE, lambda: one.perform_eigendecomposition("k"))[1]
    note = f"{record['seconds']:.1f} s for one layer, in float64"
    yield record | {"seconds": record["seconds"] * depth, "peak_bytes": None, "note": note}
    record = step(EIGENVALUES, lambda: one.fit_lambda_matrices("k", **data))[1]
    yield record | {"note": "of one layer, with the whole forward and backward pass"}


def refused(call: Callable[[], Any]) -> Record:
    """What a library says of the model as it is."""
    return {"step": "the model with Conv1D", "error": attempted("", call).get("error", "it runs")}


def attempted(name: str, call: Callable[[], Any]) -> Record:
    try:
        return step(name, call)[1]
    except Exception as error:  # whatever a library raises is the result
        return {"step": name, "error": f"{type(error).__name__}: {error}".strip()[:300]}


METHODS: dict[str, Callable[[int, Path], Iterator[Record]]] = {
    "K-FAC": kfac,
    "K-FOC": kfoc_,
    "curvlinops K-FAC": curvlinops,
    "kronfluence EKFAC": kronfluence,
}


def measured(method: str, options: argparse.Namespace) -> list[Record]:
    """The steps of a method, in a process of its own; the last is its error where it had one."""
    busy = wait_until_quiet(options.patience)
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", method]
    command += ["--depth", str(options.depth), "--threads", str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        records.append({"step": "the rest", "error": done.stderr.strip()[-600:]})
    return [{"method": method, "busy_cores": busy, **record} for record in records]


def cell(record: Record | None) -> str:
    if record is None:
        return ""
    peak, size = record["peak_bytes"], record.get("file_bytes")
    parts = [
        f"{record['seconds']:.2g} s" if record["seconds"] < 10 else f"{record['seconds']:.0f} s"
    ]
    parts += [] if peak is None else [f"{peak / 1e9:.2f} GB"]
    parts += [] if size is None else [f"file of {size / 1e9:.2f} GB"]
    return ", ".join(parts)


def checks(rows: list[Record]) -> list[Check]:
    """The targets of this model: time and memory of the fits."""
    fits = {row["method"]: row for row in rows if row["step"] == FIT}
    found = []
    for other, key, figure, limit in (
        ("K-FAC", "seconds", "K-FOC/K-FAC", LARGE_TO_KFAC),
        ("curvlinops K-FAC", "peak_bytes", "memory/curvlinops", 1.0),
    ):
        if "K-FOC" in fits and other in fits:
            value = fits["K-FOC"][key] / fits[other][key]
            found.append(Check(figure, "gpt2-shape", "kfoc", value, limit))
    return found


def page(document: Record) -> str:
    rows = document["rows"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    done = {(row["method"], row["step"]): row for row in rows if "error" not in row}
    table = [
        [name, *(cell(done.get((method, name))) for method in methods)]
        for name in STEPS
        if any((method, name) in done for method in methods)
    ]
    body = results.markdown(["", *methods], table, words=tuple(range(len(methods) + 1)))
    notes = [f"- {row['method']}, {row['step']}: {row['note']}." for row in rows if "note" in row]
    notes += [
        f"- {row['method']}, {row['step']}: `{row['error'].splitlines()[-1].replace('`', '')}`"
        for row in rows
        if "error" in row
    ]
    notes += [f"- {check}" for check in checks(rows)]
    about = said(document["machine"])
    conditions = (
        f"Seconds, and peak memory above what there was before the step. {about}. "
        f"{document['depth']} layers. A float32 matrix product of 1024 cubed reached "
        f"{document['gflops_of_mm']:.0f} GFLOP/s; others kept up to {document['busy_cores']:.2f} "
        "cores busy before a method."
    )
    return "\n\n".join([body, "\n".join(notes), conditions]) + "\n"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for idle cores")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", choices=list(METHODS), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    set_threads(options.threads)
    if options.worker:
        warnings.simplefilter("ignore")
        with tempfile.TemporaryDirectory() as folder:
            for record in METHODS[options.worker](options.depth, Path(folder)):
                print(json.dumps(record), flush=True)
        return 0
    document: Record = {
        "machine": describe(options.threads),
        "depth": options.depth,
        "gflops_of_mm": matrix_product_rate(),
        "busy_cores": busy_cores() or 0.0,
        "rows": [],
    }
    for method in options.methods:
        document["rows"] += measured(method, options)
        busy = [row["busy_cores"] or 0.0 for row in document["rows"]]
        document["busy_cores"] = max(busy, default=0.0)
        document["targets"] = [check.record() for check in checks(document["rows"])]
        results.write(options.out, document)
        options.out.with_suffix(".md").write_text(page(document))
    print(page(document))
    ours = [row for row in document["rows"] if row["method"] in ("K-FAC", "K-FOC")]
    return int(any("error" in row for row in ours))


if __name__ == "__main__":
    sys.exit(main())
