"""Fit a model's curvature to data."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from kfoc.common.ambient import plainly
from kfoc.curvature.curvature import Curvature
from kfoc.distributed import Ranks
from kfoc.estimators import KFOC, Estimator
from kfoc.fitting.task import Task
from kfoc.likelihoods.base import Likelihood
from kfoc.model.batches import Predict
from kfoc.model.sharding import unwrapped
from kfoc.running.checkpointed import Checkpoint
from kfoc.running.chosen import chosen
from kfoc.running.progress import Progress, reporter


@plainly
def fit(
    model: nn.Module,
    data: Iterable[Any],
    likelihood: str | Likelihood = "categorical",
    *,
    estimator: Estimator | None = None,
    fisher: str = "mc",
    mc_samples: int = 1,
    layers: str | Iterable[str] | None = None,
    predict: Predict | None = None,
    probes: int = 0,
    seed: int = 0,
    progress: bool | Callable[[Progress], Any] = False,
    group: Any = None,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
    resume: bool = False,
    memory_budget: int | None = None,
    storage: str | Path | None = None,
    verify: bool = True,
) -> Curvature:
    """Estimate the Fisher information of a model, one block per layer, from a pass over data.

    The model runs in the mode it is in (call `model.eval()` first, as a rule) and comes back as it
    was; so does the global random state. Dropout in train mode draws masks that depend on `seed`
    and the batch's number alone.

    Every layer's samples are checked on the first few samples, in a forward pass of their own and
    two backward passes: that each row belongs to one sample, and that they add up to autograd's
    gradient (docs/proof.md). Layers whose rows are not the samples in order (windows, sequences
    first, experts) are gathered by sample.

    Parameters that no layer's treatment covers (class tokens, scales, recurrent layers, layers
    whose rows mix samples or that are used in other ways) get a block by module, from per-sample
    gradients by `torch.func`: exact, up to 65,536 parameters in all, and a dense or diagonal block.
    That costs a forward and backward pass of single samples, or up to one backward pass per sample
    and direction. What has no block is in `Curvature.skipped`.

    Args:
        model: any module whose outputs have the samples first, each dependent on its own inputs.
        data: batches `(inputs, targets)`, or mappings (dict, transformers' BatchEncoding),
            dataclasses or NamedTuples with their targets under "labels", which the model does not
            get: the loss is formed here. Inputs are a tensor, a tuple or list that the model is
            called with in order, a mapping, dataclass or NamedTuple that it is called with by
            name, or whatever `predict` takes; tensors in them are moved to the model's device.
            Targets may be missing or None but for `fisher="empirical"`. Labels are compared
            with the outputs as they stand: for a model of the next token, whose labels are the
            tokens, pass `predict=kfoc.next_token`. Batches without samples are passed over,
            and do not count.
        likelihood: "categorical" (logits), "gaussian" (unit variance), "bernoulli" (logits), or a
            `Likelihood`.
        estimator: KFOC() by default; KFAC(), Diagonal(), BlockDiagonal().
        fisher: "mc" (labels drawn by what they contribute, and weighted for it), "mc-plain" (drawn
            from the model; noisier), "exact" (expectation over the model's labels) or "empirical"
            (the observed labels).
        mc_samples: draws per sample, for "mc" and "mc-plain".
        layers: names or patterns (`fnmatch`) of the layers to treat; None: all that can be. One
            that is named and cannot be treated is an error. What matches no layer is matched
            against the parameters, which then have blocks of their own: `"fc.weight"` leaves the
            bias out, and all names of `model.named_parameters()` have weights and biases apart.
        predict: `(model, inputs) -> outputs`, a tensor or an object with `.logits`. None: the
            model is called with the inputs; it must return one or the other. If it has a method
            `targets(inputs, targets)`, that gives the labels.
        probes: how many Gaussian probes certify each block; 16 is plenty. They give
            `relative_error`, against the F of the very labels that were drawn, and `fisher_error`,
            against the Fisher itself, each with its standard error. The second takes two more
            draws of every label in the first pass, which no block sees: two more backward
            passes, `4 * probes` weights' memory per layer instead of 2, and three times the
            probes' time (a K-FAC fit of LeNet-5 with 16 probes took 0.9 s for 0.5 s, one of
            256-wide linear layers, where probes are nearly all, 1.6 s for 0.6 s). Without drawn
            labels the two errors are the same number, at no such cost.
        seed: of the draws and probes; the same seed gives the same draws for any batch size.
        progress: True: passes, samples, rate, and the time left where the data has a length, on
            standard error; or a callable that gets a `Progress` after every batch.
        group: a process group of `torch.distributed` (or `kfoc.distributed.Ranks`), whose ranks
            all call this with the same model and options, and each with its share of the data,
            of any length. All get the same curvature, that of the data of all.
        checkpoint: a directory, or a `Checkpoint` of one, to save the state of the fit to: every
            minute and after every pass. It stays when the fit has ended. With a group, every rank
            saves below it, and all at the same moment.
        resume: go on from the checkpoint, if there is one, to the same bits: the batches that it
            had taken in are read and dropped, so data must yield the same ones in the same order.
        memory_budget: bytes that all layers' states and finished blocks may take together in
            memory. Where they would take more, the layers are fitted in groups, one after the
            other, each with sweeps of its own over the same data. See docs/memory.md for what is
            beside it (model, batches, the work on one layer). With a group, of each rank.
        storage: a directory, new or empty, for the finished blocks: their tensors then lie in
            files there, mapped to memory, and do not count against the budget. The files are
            yours, and must stay as they are while the curvature is in use.
        verify: False leaves out the check of docs/proof.md, that every layer's samples are what
            the model's gradients are made of: for models that have passed it, and whose rows are
            the samples in order.

    Returns:
        The blocks by layer name, of the mean Fisher over the samples. A RuntimeWarning names the
        layers whose iteration ended at its limit of passes or steps.

    Raises:
        ValueError: bad arguments, data or values; the message names the layer and the batch.
        kfoc.distributed.RanksError: another rank failed, died, or passes other arguments.
    """
    ranks = Ranks.of(group)
    with ranks.telling() if ranks else nullcontext():
        task = Task.checked(
            unwrapped(model) if ranks else model,
            likelihood,
            KFOC() if estimator is None else estimator,
            fisher,
            mc_samples,
            layers,
            predict,
            probes,
            seed,
            verify,
        )
        runner = chosen(ranks, checkpoint, resume, memory_budget, storage)
        curvature = runner.run(task, data, reporter(progress))
    if not (ranks and ranks.rank):
        _warn_unsettled(task.estimator, curvature)
    return curvature


def _warn_unsettled(estimator: Estimator, curvature: Curvature) -> None:
    """Tell the caller of `fit` which layers' iterations ended before they had converged."""
    reports = {name: block.report for name, block in curvature.items()}
    unsettled = {name: each.change for name, each in reports.items() if not each.converged}
    if not unsettled:
        return
    worst = sorted(unsettled, key=lambda name: -(unsettled[name] or 0.0))
    shown = []
    for name in worst[:5]:
        change = unsettled[name]
        known = "" if change is None else f" (its last pass still changed sigma by {change:.1e})"
        shown.append(f"{name!r}{known}")
    more = f" and {len(worst) - 5} more" if len(worst) > 5 else ""
    warnings.warn(
        f"{estimator} did not converge in {len(worst)} layers: {', '.join(shown)}{more}. Their "
        "blocks are not yet the closest ones (report.converged is False): allow more passes, or "
        "more max_steps where batches are solved, or a larger rtol",
        RuntimeWarning,
        stacklevel=4,  # of `plainly` too
    )
