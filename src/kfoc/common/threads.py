"""State that all threads share: global generators, torch.compile, and how products are rounded.

Fits in several threads must not see each other's, so whoever changes it holds a lock meanwhile.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# Reentrant: a model's forward may fit another model.
_RANDOM = threading.RLock()


class random_state_kept:  # noqa: N801  (a context, used as contextlib's are)
    """The global generators of the CPU and these GPUs are left as they are found.

    With fits in several threads, as one of them finds them.
    """

    def __init__(self, gpus: Sequence[int]) -> None:
        self.gpus = gpus

    def __enter__(self) -> None:
        with _RANDOM:
            self.state = torch.default_generator.get_state()
            self.on_gpus = [torch.cuda.get_rng_state(gpu) for gpu in self.gpus]

    def __exit__(self, *error: object) -> None:
        with _RANDOM:
            torch.default_generator.set_state(self.state)
            for gpu, state in zip(self.gpus, self.on_gpus, strict=True):
                torch.cuda.set_rng_state(state, gpu)


def seed_of(seed: int, number: int) -> int:
    """Of what the forward pass of a batch draws: of the user's seed, and the batch's number."""
    return (seed * 1_000_003 + number) % 2**63


@contextmanager
def seeded(seed: int, cuda: bool) -> Iterator[None]:
    """What is drawn inside is a function of the seed; the CPU's generator then goes on as before.

    One thread at a time.
    """
    generator = torch.default_generator
    with _RANDOM:
        state = generator.get_state()
        # By generator: torch.manual_seed queues a traceback per call where there is no GPU.
        generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            generator.set_state(state)


Undo = Callable[[], object]


class _Shared:
    """Something set for all threads, from the first of its users' entry to the last one's exit.

    Args:
        begin: sets it, and returns what undoes that; None where there is nothing to set.
    """

    def __init__(self, begin: Callable[[], Undo | None]) -> None:
        self.begin = begin
        self.lock = threading.RLock()
        self.users = 0
        self.undo: Undo | None = None

    def __enter__(self) -> None:
        with self.lock:
            self.users += 1
            if self.undo is None:
                self.undo = self.begin()

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.users -= 1
            if not self.users and self.undo is not None:
                undo, self.undo = self.undo, None
                undo()


def _force_eager() -> Undo | None:
    if "torch._dynamo" not in sys.modules:  # nothing can have been compiled
        return None
    stance = torch.compiler.set_stance("force_eager")  # from here on
    return partial(stance.__exit__, None, None, None)


def _multiply_in_full() -> Undo | None:
    try:
        found = torch.get_float32_matmul_precision()
    except RuntimeError:  # they are set one by one
        backends: list[Any] = [torch.backends.cuda, torch.backends.mkldnn]
        backends = [each.matmul for each in backends]
        before = [each.fp32_precision for each in backends]
        _set_precisions(backends, ["ieee"] * len(backends))
        return partial(_set_precisions, backends, before)
    if found == "highest":
        return None
    torch.set_float32_matmul_precision("highest")
    return partial(torch.set_float32_matmul_precision, found)


def _set_precisions(backends: Sequence[Any], values: Sequence[str]) -> None:
    for each, value in zip(backends, values, strict=True):
        each.fp32_precision = value


def _unfuse() -> Undo | None:
    stack = ExitStack()
    stack.callback(
        torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
    )
    torch.backends.mha.set_fastpath_enabled(False)
    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    return stack.close


# Compiled modules run as they were written: a compiled region has no layers to watch.
UNCOMPILED = _Shared(_force_eager)
# Products of float32 matrices are not of TF32 or bfloat16 numbers.
FULL_PRODUCTS = _Shared(_multiply_in_full)
# Attention as plain products: its fused kernels have no forward mode, and no second derivatives.
UNFUSED = _Shared(_unfuse)
