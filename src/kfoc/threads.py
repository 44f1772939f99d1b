"""State that all threads share: the global generators, and whether torch.compile is in force.

Fits in several threads must not see each other's, so whoever changes it holds a lock meanwhile.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

# Reentrant: a model's forward may fit another model.
_RANDOM, _COMPILER = threading.RLock(), threading.RLock()


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


class _Eager:
    """torch.compile out of force from the first of its users' entry to the last one's exit."""

    def __init__(self) -> None:
        self.users = 0
        self.stance: AbstractContextManager[Any] | None = None

    def enter(self) -> None:
        with _COMPILER:
            self.users += 1
            # Only where anything may have been compiled, and torch can do that.
            loaded = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")
            if self.stance is None and loaded:
                self.stance = torch.compiler.set_stance("force_eager")  # from here on

    def exit(self) -> None:
        with _COMPILER:
            self.users -= 1
            if not self.users and self.stance is not None:
                stance, self.stance = self.stance, None
                stance.__exit__(None, None, None)


_EAGER = _Eager()


class uncompiled:  # noqa: N801  (a context, used as contextlib's are)
    """Compiled modules run as they were written: a compiled region has no layers to watch."""

    def __enter__(self) -> None:
        _EAGER.enter()

    def __exit__(self, *error: object) -> None:
        _EAGER.exit()
