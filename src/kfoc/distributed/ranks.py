"""One fit by the processes of a `torch.distributed` group, each with its share of the data.

The ranks go from batch to batch in step. Before a batch's derivatives, they tell each other how
many samples it has, which gives every sample its number in the whole data set; a rank whose data
has ended takes part with none. What is summed over ranks is summed at the end of a pass, and, for
estimators that need it, between two batches, when a rank has said that it is due.

Every exchange begins with a small message from each rank on whether it is well, so that an error on
one ends the others too. A rank that dies ends them by what the group's transport says, or by its
timeout.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from kfoc.estimators.pooling import Gather, Largest, Pooling, Request, Sum, together

T = TypeVar("T")

# A rank's state in an exchange.
_FAILED, _BATCH, _ENDED, _SECTION = range(4)
# Bytes that are reduced together: enough to make latency small, and little beside the factors.
BUCKET_BYTES = 25 * 2**20


class RanksError(RuntimeError):
    """Another rank failed, or does not answer any more."""


@dataclass
class Traffic:
    """What one rank put into collective operations, in bytes, and how many operations.

    Attributes:
        status_bytes, statuses: all-gathers of the message that begins every exchange, 32 bytes.
        sum_bytes, sums: all-reduces of sums and maxima. A ring sends each byte `2 (W - 1) / W`
            times from every one of W ranks.
        gather_bytes, gathers: all-gathers of tensors and descriptions.
    """

    status_bytes: int = 0
    statuses: int = 0
    sum_bytes: int = 0
    sums: int = 0
    gather_bytes: int = 0
    gathers: int = 0

    @property
    def total_bytes(self) -> int:
        """Of all operations."""
        return sum(getattr(self, f.name) for f in fields(self) if f.name.endswith("bytes"))


class Ranks:
    """This process among those of a group; `fit(..., group=...)` takes one, or the group itself.

    Attributes:
        rank: this process's number in the group.
        world: how many there are.
        traffic: what was sent so far, over all fits with this object.
        samples: of all ranks, in this pass so far.
        steps: from batch to batch, likewise.
        asking: whether this rank asks for something to be done by all after its next step.
        asked: whether any rank did so in the last one.
    """

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        if not (distributed.is_available() and distributed.is_initialized()):
            raise ValueError(
                "group: torch.distributed is not initialised in this process: call "
                'torch.distributed.init_process_group("gloo") (or "nccl") first'
            )
        self.group = distributed.group.WORLD if group is None else group
        self.rank, self.world = distributed.get_rank(self.group), distributed.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group: this process is no member of it")
        backend = str(distributed.get_backend(self.group))
        self._on_gpu = backend == "nccl"
        self.traffic = Traffic()
        self._message = ""  # of this rank's own error
        self.start()

    @classmethod
    def of(cls, group: Any) -> Ranks | None:
        """From what `fit` takes for `group`: None, a process group, or such an object."""
        if group is None or isinstance(group, Ranks):
            return group
        if not isinstance(group, distributed.ProcessGroup):
            raise ValueError(
                "group must be a torch.distributed process group, such as "
                f"torch.distributed.group.WORLD, or kfoc.distributed.Ranks, found {group!r}"
            )
        return cls(group)

    def start(self) -> None:
        """Begin a pass."""
        self.samples = self.steps = 0
        self.asking = self.asked = False

    def first_index(self, count: int) -> int:
        """The number in the whole data set of the first of this rank's next `count` samples."""
        return self._step(_BATCH, count)[0]

    def others_go_on(self) -> bool:
        """Take part, without data, in a step that others may have left; whether any had."""
        return self._step(_ENDED, 0)[1]

    def _step(self, kind: int, count: int) -> tuple[int, bool]:
        told = self._tell(kind, count)
        if {row[0] for row in told} - {_BATCH, _ENDED}:
            raise RanksError(f"the ranks are at different places: {told}")
        counts = [row[1] for row in told]
        first = self.samples + sum(counts[: self.rank])
        going = any(row[0] == _BATCH for row in told)
        self.samples += sum(counts)
        self.steps += going
        self.asked = any(row[3] for row in told)
        return first, going

    def section(self, mark: int = 0) -> bool:
        """Begin something that all ranks do together; whether all came with the same mark."""
        told = self._tell(_SECTION, mark)
        if any(row[0] != _SECTION for row in told):
            raise RanksError(f"the ranks are at different places: {told}")
        return all(row[1] == mark for row in told)

    def objects(self, own: Any) -> list[Any]:
        """Every rank's object, pickled."""
        self.section()
        found = self._each(own)
        self.traffic.gathers += 1
        # Sizes are not told: that of the text form stands for them.
        self.traffic.gather_bytes += len(repr(own))
        return found

    def pooled(self, poolings: Sequence[Pooling[T]]) -> list[T]:
        """Meet the requests of estimators, in rounds over all of them together."""
        rounds = together(poolings)
        while True:
            try:
                requests = next(rounds)
            except StopIteration as end:
                return end.value
            if not self.section(_mark(requests)):
                raise RanksError(
                    "the ranks ask for different sums: their layers or their numbers differ "
                    "(different devices, or versions of torch?)"
                )
            self._meet(requests)

    def _meet(self, requests: list[Request]) -> None:
        largest = [request for request in requests if isinstance(request, Largest)]
        if largest:
            values = torch.tensor([v for r in largest for v in r.values], dtype=torch.float64)
            values = self._reduced(values, distributed.ReduceOp.MAX)
            found = iter(values.tolist())
            for one in largest:
                one.values = [next(found) for _ in one.values]
        self.sum([t for r in requests if isinstance(r, Sum) for t in r.tensors])
        for request in requests:
            if isinstance(request, Gather):
                each = [self._gathered(tensor) for tensor in request.tensors]
                request.found = [list(parts) for parts in zip(*each, strict=True)]

    def sum(self, tensors: list[Tensor]) -> None:
        """All-reduce tensors in place: small ones of a kind together, large ones as they are."""
        kinds: dict[Any, list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            kinds[tensor.dtype, tensor.device].append(tensor)
        for alike in kinds.values():
            for bucket in _buckets(alike):
                flat = torch.cat([t.reshape(-1) for t in bucket]) if len(bucket) > 1 else bucket[0]
                parts = self._reduced(flat, distributed.ReduceOp.SUM).reshape(-1)
                for tensor, part in zip(
                    bucket, parts.split([t.numel() for t in bucket]), strict=True
                ):
                    if part.data_ptr() != tensor.data_ptr():
                        tensor.copy_(part.view_as(tensor))

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        sent = self._sendable(tensor.contiguous())
        self._called(lambda: distributed.all_reduce(sent, operation, self.group))
        self.traffic.sums += 1
        self.traffic.sum_bytes += sent.nbytes
        return sent.to(tensor.device)

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        sent = self._sendable(tensor.contiguous())
        found = [torch.empty_like(sent) for _ in range(self.world)]
        self._called(lambda: distributed.all_gather(found, sent, self.group))
        self.traffic.gathers += 1
        self.traffic.gather_bytes += sent.nbytes
        return [part.to(tensor.device) for part in found]

    def _each(self, own: Any) -> list[Any]:
        found: list[Any] = [None] * self.world
        self._called(lambda: distributed.all_gather_object(found, own, self.group))
        return found

    def _sendable(self, tensor: Tensor) -> Tensor:
        return tensor.cuda() if self._on_gpu else tensor

    def _tell(self, kind: int, number: int) -> list[list[int]]:
        """Every rank's message; raises where one says that it failed."""
        own = self._sendable(torch.tensor([kind, number, self.steps, self.asking]))
        found = [torch.empty_like(own) for _ in range(self.world)]
        self._called(lambda: distributed.all_gather(found, own, self.group))
        self.traffic.statuses += 1
        self.traffic.status_bytes += own.nbytes
        told = [part.tolist() for part in found]
        if any(row[0] == _FAILED for row in told):
            messages = self._each(self._message)
            which = next(r for r, row in enumerate(told) if row[0] == _FAILED)
            raise RanksError(f"rank {which} of {self.world} failed: {messages[which]}")
        return told

    @contextmanager
    def telling(self) -> Iterator[None]:
        """An error inside is told to the other ranks, which raise a `RanksError` that says it."""
        try:
            yield
        except RanksError:
            raise
        except Exception as error:
            self._message = f"{type(error).__name__}: {error}"
            with suppress(RanksError):  # that is what the others raise
                self._tell(_FAILED, 0)
            raise
        self.section()

    def _called(self, operation: Callable[[], Any]) -> None:
        """One collective operation, whose failure is another rank's."""
        try:
            operation()
        except RuntimeError as error:
            raise RanksError(
                f"rank {self.rank} of {self.world}: a rank has died, or did not answer within the "
                f"timeout of the process group ({error})"
            ) from error


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _mark(requests: list[Request]) -> int:
    """A number that tells different rounds of requests apart."""
    shapes = []
    for request in requests:
        if isinstance(request, Largest):
            shapes.append(("largest", len(request.values)))
        else:
            kind = type(request).__name__
            shapes += [(kind, str(t.dtype), *t.shape) for t in request.tensors]
    return zlib.crc32(repr(shapes).encode())
