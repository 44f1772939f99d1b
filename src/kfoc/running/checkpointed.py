"""Fits that can be interrupted at any moment: their state in a file, and on from there."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kfoc.estimators.certificate import Probes
from kfoc.files.encoding import decoded, encoded, written
from kfoc.files.folder import claimed, read, write
from kfoc.files.hints import check_all, check_states
from kfoc.layers.attention import part_name
from kfoc.layers.selection import Selection
from kfoc.model.buffers import put
from kfoc.running.fingerprint import Trail, described, differences, of_model
from kfoc.running.marks import Mark
from kfoc.samples.base import LayerSamples

FILE = "fit.checkpoint"
_END = object()
# What a fit's state is made of: attributes of the run, and nothing else of it.
_FIELDS = {
    "states": "dict[str, object]",
    "settled": "set[str]",
    "probes": "dict[str, Probes]",
    "shapes": "dict[str, LayerSamples]",
    "scales": "dict[str, tuple[float, float]]",
    "num_samples": "int",
    "passes": "int",
    "marks": "list[Mark]",
    "by_graph": "bool",
}
_SELECTION = {
    "modules": "list[str]",
    "twins": "list[str]",
    "loose": "dict[str, list[str]]",
    "skipped": "dict[str, str]",
}
# Of the file; what the run is made of, beside it, in plain terms.
_CONTENT = {
    "fingerprint": "dict[str, str]",
    "run": "dict",
    "selection": "dict",
    "buffers": "dict[str, Tensor | None]",
    "samples": "int",
    "batches": "int",
    "trail": "str",
    "seconds": "float",
    "done": "bool",
}
_SCOPE = {"Mark": Mark, "Probes": Probes, "LayerSamples": LayerSamples}


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often `fit` saves its state.

    The state is saved after the first batch (so that a folder that cannot be written to, or a state
    that cannot be saved, shows at once), then at the given intervals, and at the end of every pass.
    An interval is counted from the end of a save, so that saving never takes most of the time.

    Attributes:
        directory: of one fit's checkpoint; made if it is not there.
        seconds: save when so many have gone by; None: not by time.
        batches: save when so many batches have been taken in; None: not by their number.
    """

    directory: str | os.PathLike[str]
    seconds: float | None = 60.0
    batches: int | None = None

    def check(self) -> None:
        """Raises ValueError for what makes no sense."""
        if self.seconds is not None and not self.seconds >= 0:
            raise ValueError(f"checkpoint: seconds must not be negative, found {self.seconds}")
        if self.batches is not None and self.batches < 1:
            raise ValueError(f"checkpoint: batches must be at least 1, found {self.batches}")
        if Path(self.directory).exists() and not Path(self.directory).is_dir():
            raise ValueError(
                f"checkpoint: {str(self.directory)!r} is a file, and must be a directory"
            )

    @property
    def path(self) -> Path:
        """The file. A fit by several processes would need one for each, told apart here."""
        return Path(self.directory) / FILE


class Run(Protocol):
    """What is read here of a fit between two batches."""

    model: nn.Module
    likelihood: Any
    estimator: Any
    fisher: str
    mc_samples: int
    predict: Any
    num_probes: int
    seed: int
    verify: bool
    selection: Selection
    passes: int


class Keeper:
    """Saves a fit's state as it goes, or goes on from a saved one; nothing without a checkpoint.

    Attributes:
        batches, samples: taken in in this pass before it went on from a checkpoint.
        spent: seconds that this pass took before that.
    """

    def __init__(
        self, checkpoint: Checkpoint | str | os.PathLike[str] | None, resume: bool, run: Run
    ) -> None:
        """
        Raises:
            ValueError: options that make no sense.
        """
        self.batches = self.samples = 0
        self.spent = 0.0
        self._trail = Trail()
        self._saved: dict[str, Any] | None = None
        if checkpoint is None:
            if resume:
                raise ValueError("resume=True needs the checkpoint=... to go on from")
            self._settings = None
            return
        own = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
        own.check()
        self._settings = own
        self._fingerprint = fingerprint(run)
        self._run, self._resume = run, resume
        self._since, self._last = time.monotonic(), 0
        self._start = time.monotonic()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Make the directory and claim it, and read the checkpoint that is to be resumed.

        Raises:
            ValueError: another fit is using the directory, or it has a checkpoint that is not to
                be resumed, or one of another fit, or damaged.
        """
        if self._settings is None:
            yield
            return
        path = self._settings.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with claimed(path.parent):
            if path.exists():
                if not self._resume:
                    raise ValueError(
                        f"checkpoint: {str(path)!r} is there already: pass resume=True to go on "
                        "from it (at once, if that fit has ended), or remove it"
                    )
                self._saved = self._opened(path)
            yield

    def _opened(self, path: Path) -> dict[str, Any]:
        content = read(path)
        try:
            check_all(content, _CONTENT, _SCOPE)
        except ValueError as error:
            raise _forged(path, error) from error
        found = differences(content["fingerprint"], self._fingerprint)
        if found:
            shown = "; ".join(found[:4]) + ("; and more" if len(found) > 4 else "")
            raise ValueError(
                f"checkpoint: {str(path)!r} is of another fit: {shown}. Fit as then, or remove it "
                "to begin anew"
            )
        try:
            _check_inside(content, self._run)
        except ValueError as error:
            raise _forged(path, error) from error
        return content

    def restored(self, run: Run, data: Iterable[Any]) -> bool:
        """Put the run where the checkpoint was taken; True where no batch is to be taken in.

        Raises:
            ValueError: the checkpoint is of a fit that had ended, of other data.
        """
        if self._saved is None:
            return False
        saved = self._saved
        for name in _FIELDS:
            setattr(run, name, saved["run"][name])
        _restore_selection(run, saved["selection"])
        _restore_buffers(run.model, saved["buffers"])
        if not saved["done"]:
            return False
        batches = iter(data)
        self.begun(batches)
        if next(batches, _END) is not _END:
            raise ValueError(self._other_data("has more"))
        return True

    def begun(self, batches: Iterator[Any]) -> tuple[int, int]:
        """At the start of a pass, drop what it had taken in before: (samples, batches).

        Raises:
            ValueError: it is not what had been taken in.
        """
        saved, self._saved = self._saved, None
        self._trail = Trail()
        self._start, self.spent = time.monotonic(), 0.0
        self.samples = self.batches = 0
        if saved is not None:
            self.samples, self.batches = saved["samples"], saved["batches"]
            self.spent = saved["seconds"]
            for number in range(self.batches):
                batch = next(batches, _END)
                if batch is _END:
                    raise ValueError(self._other_data(f"ends after {number}"))
                self._trail.add(batch)
            if self._trail.digest != saved["trail"]:
                raise ValueError(self._other_data("has others"))
            self._start = time.monotonic()
            self._since = self._start
        self._last = self.batches
        return self.samples, self.batches

    def _other_data(self, how: str) -> str:
        return (
            f"the checkpoint had taken in {self.batches} batches of the pass, and data {how}: "
            "resume=True needs the same batches in the same order (DataLoader: shuffle=False, or a "
            "generator with the same seed; an iterator from its beginning)"
        )

    def saw(self, batch: Any) -> None:
        """A batch that is about to be taken in."""
        if self._settings is not None:
            self._trail.add(batch)

    def after_batch(self, run: Run, samples: int, batches: int) -> None:
        """Save if it is time; so many samples and batches of this pass have been taken in."""
        if self._settings is None:
            return
        seconds, number = self._settings.seconds, self._settings.batches
        late = seconds is not None and time.monotonic() - self._since >= seconds
        many = number is not None and batches - self._last >= number
        first = batches == 1 and not run.passes
        if first or late or many:
            self._save(run, samples, batches, done=False)

    def after_pass(self, run: Run, samples: int, batches: int, done: bool) -> None:
        """Save; `done` where no further pass is needed."""
        if self._settings is None:
            return
        if done:
            self._save(run, samples, batches, done=True)
        else:
            self._trail = Trail()
            self._start, self.spent = time.monotonic(), 0.0
            self._save(run, 0, 0, done=False)

    def _save(self, run: Run, samples: int, batches: int, done: bool) -> None:
        if self._settings is None:
            return
        content = {
            "fingerprint": self._fingerprint,
            "run": encoded({name: getattr(run, name) for name in _FIELDS}, written),
            "selection": _selection_of(run),
            "buffers": _buffers(run.model),
            "samples": samples,
            "batches": batches,
            "trail": self._trail.digest,
            "seconds": self.spent + time.monotonic() - self._start,
            "done": done,
        }
        write(self._settings.path, content)
        self._since, self._last = time.monotonic(), batches


def fingerprint(run: Run) -> dict[str, str]:
    """All that the numbers of a fit depend on, but the data."""
    package = importlib.import_module(__name__.partition(".")[0])
    return {
        "kfoc": package.__version__,
        "torch": str(torch.__version__),
        "estimator": described(run.estimator),
        "likelihood": described(run.likelihood),
        "fisher": run.fisher,
        "mc_samples": str(run.mc_samples),
        "probes": str(run.num_probes),
        "seed": str(run.seed),
        "verify": str(run.verify),
        "predict": described(run.predict),
        "layers": ", ".join(map(repr, run.selection.blocks)),
        "layers asked for by name": ", ".join(map(repr, sorted(run.selection.named))),
    } | of_model(run.model)


def _forged(path: Path, error: ValueError) -> ValueError:
    return ValueError(
        f"checkpoint: {str(path)!r} does not hold what a fit saves: {error}. Remove it to begin "
        "anew"
    )


def _check_inside(content: dict[str, Any], run: Run) -> None:
    """Rebuild the run's state in `content`.

    Raises:
        ValueError: it is not of this form, or names what the model does not have.
    """
    content["run"] = decoded(content["run"], None)
    check_all(content["run"], _FIELDS, _SCOPE)
    check_all(content["selection"], _SELECTION)
    counts = [content[name] for name in ("samples", "batches", "seconds")]
    if min(*counts, content["run"]["num_samples"], content["run"]["passes"]) < 0:
        raise ValueError("there is a negative number of samples, batches, passes or seconds")
    selection, names = content["selection"], content["run"]
    parameters = dict(run.model.named_parameters(remove_duplicate=False))
    loose = [name for each in selection["loose"].values() for name in each]
    layers = {*names["states"], *names["settled"], *names["probes"], *names["shapes"]}
    modules = dict(run.model.named_modules(remove_duplicate=False))
    for kind, given, known in (
        (
            "layer",
            {*selection["modules"]},
            run.selection.modules.keys() | run.selection.watched.keys(),
        ),
        ("layer", layers, {*selection["modules"], *selection["loose"]}),
        ("parameter", loose, parameters),
        ("module with a buffer", [n.rpartition(".")[0] for n in content["buffers"]], modules),
    ):
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"there is a {kind} {unknown[0]!r}, which this fit does not have")
    check_states(names["states"], names["shapes"], run.estimator.begin)


def _buffers(model: nn.Module) -> dict[str, Tensor | None]:
    """What forward passes may write to, replace or add."""
    return {
        part_name(prefix, name): None if buffer is None else written(buffer)
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
    }


def _restore_buffers(model: nn.Module, saved: dict[str, Tensor | None]) -> None:
    """As in the fit that saved them; afterwards `buffers_kept` puts those of the user back."""
    for full, value in saved.items():
        prefix, _, name = full.rpartition(".")
        held = model.get_submodule(prefix)._buffers
        buffer = held.get(name)
        if buffer is None or value is None or buffer.shape != value.shape:
            held[name] = value
        else:
            put(value, buffer)


def _selection_of(run: Run) -> dict[str, Any]:
    """Which layers are treated by now; the treatments themselves follow from the model."""
    selection = run.selection
    return {
        "modules": list(selection.modules),
        "twins": list(selection.twins),
        "loose": {name: list(parameters) for name, parameters in selection.loose.items()},
        "skipped": dict(selection.skipped),
    }


def _restore_selection(run: Run, saved: dict[str, Any]) -> None:
    """In place: what watches the forward passes watches it as it was at the start of the fit."""
    selection = run.selection
    selection.promote(selection.watched.keys() & set(saved["modules"]))
    selection.unwatch()
    for held in (selection.modules, selection.treatments):
        for name in held.keys() - set(saved["modules"]):
            del held[name]
    for name in selection.twins.keys() - set(saved["twins"]):
        del selection.twins[name]
    loose = {
        name: {key: run.model.get_parameter(key) for key in parameters}
        for name, parameters in saved["loose"].items()
    }
    selection.loose.clear()
    selection.loose.update(loose)
    selection.skipped.clear()
    selection.skipped.update(saved["skipped"])
