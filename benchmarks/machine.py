"""What the numbers were measured on: versions, cores, and the rate of a plain matrix product."""

from __future__ import annotations

import os
import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kfoc.reproduce.results import read

STAT = Path("/proc/stat")
QUIET = 0.1  # cores


def processor() -> str:
    """The processor's model as the kernel names it."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe(threads: int) -> dict[str, Any]:
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "curvlinops": installed("curvlinops-for-pytorch"),
        "kfoc": installed("kfoc"),
    }


def earlier(file: Path, **same: Any) -> dict[str, Any]:
    """The results that are there, if they have the same entries; {} otherwise."""
    found = read(file) if file.exists() else {}
    return found if all(found.get(key) == value for key, value in same.items()) else {}


def said(machine: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None)


def busy_cores(seconds: float = 0.5) -> float | None:
    """How many cores others keep busy while this process sleeps (Linux; None elsewhere)."""
    if not STAT.exists():
        return None
    before, start = busy_ticks(), time.perf_counter()
    time.sleep(seconds)
    ticks = busy_ticks() - before
    return ticks / os.sysconf("SC_CLK_TCK") / (time.perf_counter() - start)


def busy_ticks() -> int:
    """Clock ticks that all cores spent on anything but idling and waiting for disks."""
    user, nice, system, _, _, *interrupts = map(int, STAT.read_text().split("\n")[0].split()[1:9])
    return user + nice + system + sum(interrupts)


def wait_until_quiet(patience: float) -> float | None:
    """Wait until others leave the cores alone, or `patience` seconds; what is busy at the end."""
    end = time.perf_counter() + patience
    while (busy := busy_cores()) is not None and busy > QUIET and time.perf_counter() < end:
        time.sleep(2)
    return busy


def matrix_product_rate(size: int = 1024, repeats: int = 15) -> float:
    """GFLOP/s (a multiply-add counts as two) of `torch.mm` on float32 squares, median."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[2:]) / 1e9
