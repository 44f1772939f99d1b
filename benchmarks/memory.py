"""Peak memory of a call, above what the process held before it (Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")

# glibc keeps freed blocks and lets its thresholds drift. With these (read at the start of a
# process, hence an environment) every block of 64 KiB or more is mapped on its own and goes back
# at once, so that resident memory follows what is allocated.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
}


def resident(field: str = "VmRSS") -> int:
    """`VmRSS` (now) or `VmHWM` (the highest since the last reset), in bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")


def give_back() -> None:
    """Free what is garbage and return the free heap to the system."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> bool:
    """Start `VmHWM` anew at the present; False where the kernel does not allow it."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


class Sampler(threading.Thread):
    """Samples resident memory, for kernels whose high-water mark cannot be reset."""

    def __init__(self, interval: float = 0.0005) -> None:
        super().__init__(daemon=True)
        self.interval = interval
        self.peak = 0
        self.page = os.sysconf("SC_PAGE_SIZE")
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.is_set():
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.peak = max(self.peak, pages * self.page)
            time.sleep(self.interval)

    def finish(self) -> int:
        self.done.set()
        self.join()
        return self.peak


def peak_above(call: Callable[[], Any]) -> int:
    """Highest resident memory during the call, less the resident memory before it, in bytes."""
    give_back()
    before = resident()
    if reset_peak():
        result = call()
        peak = resident("VmHWM")
    else:
        sampler = Sampler()
        sampler.start()
        result = call()
        peak = sampler.finish()
    del result
    return max(0, peak - before)


def peak_of_tensors(call: Callable[[], Any]) -> int:
    """Highest sum of tensor bytes alive that the call allocated: exact, whatever the kernel does.

    Blind to what libraries allocate beside torch's allocator, which `peak_above` sees.
    """
    from torch.autograd.profiler import profile

    with profile(use_cpu=True, profile_memory=True) as trace:
        result = call()
    del result
    events = [e for e in trace.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
