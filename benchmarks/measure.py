"""Runs the workers of one workload and collects their numbers."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import memory
from methods import OURS

HERE = Path(__file__).resolve().parent
SECONDS_OF_A_REPEAT = 0.15
MOST_CALLS_OF_A_REPEAT = 50
PAUSE = 0.03  # lets the threads of the process before go to sleep

Record = dict[str, Any]


class WorkerError(RuntimeError):
    """A worker ended before it answered; the message is the end of what it wrote."""


class Worker:
    """A worker process, from its start to its `quit`."""

    def __init__(
        self, workload: str, method: str, threads: int, environment: dict[str, str] | None = None
    ) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed on exit
        self.process = subprocess.Popen(
            [
                *(sys.executable, str(HERE / "worker.py")),
                *("--workload", workload, "--method", method, "--threads", str(threads)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)} | (environment or {}),
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self.errors.close()

    def answer(self) -> Any:
        assert self.process.stdout is not None  # as Popen was called
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise WorkerError(self.errors.read().strip()[-2000:] or "ended without a word")
        return json.loads(line)

    def ask(self, command: str, number: int = 1) -> Any:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{command} {number}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # answer() tells why
        return self.answer()


def measure(
    workload: str,
    methods: Sequence[str],
    *,
    repeats: int,
    threads: int,
    memory_repeats: int = 3,
    quality: bool = False,
) -> list[Record]:
    """One record a method: times (interleaved), memory, multiply-adds and relative errors."""
    records: dict[str, Record] = {m: {"workload": workload, "method": m} for m in methods}
    time_interleaved(records, repeats, threads)
    for record in records.values():
        if "error" not in record:
            look_closer(record, threads, memory_repeats)
    if quality:
        add_quality(records, workload, threads)
    return list(records.values())


def time_interleaved(records: dict[str, Record], repeats: int, threads: int) -> None:
    """Every method's process is up and warm; they take turns, in another order each round."""
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        calls: dict[str, int] = {}
        for method, record in records.items():
            worker = stack.enter_context(Worker(record["workload"], method, threads))
            try:
                seconds = worker.answer()["seconds"]
            except WorkerError as failure:
                record["error"] = str(failure)
                continue
            workers[method] = worker
            wanted = math.ceil(SECONDS_OF_A_REPEAT / max(seconds, 1e-6))
            calls[method] = min(wanted, MOST_CALLS_OF_A_REPEAT)
        taken: dict[str, list[float]] = {method: [] for method in workers}
        for round_number in range(repeats if workers else 0):
            turn = round_number % len(workers)
            for method in [*list(workers)[turn:], *list(workers)[:turn]]:
                time.sleep(PAUSE)
                seconds_of_calls = workers[method].ask("time", calls[method])
                taken[method].append(statistics.median(seconds_of_calls))
        for method, seconds_of_repeats in taken.items():
            records[method].update(summary(seconds_of_repeats, calls[method]))


def summary(seconds: list[float], calls: int) -> Record:
    """Milliseconds: each repeat's median call, their median and their range."""
    milliseconds = [1e3 * s for s in seconds]
    return {
        "milliseconds": statistics.median(milliseconds),
        "fastest": min(milliseconds),
        "slowest": max(milliseconds),
        "repeats": milliseconds,
        "calls_per_repeat": calls,
    }


def look_closer(record: Record, threads: int, repeats: int) -> None:
    """Peak memory and multiply-adds, in a fresh process outside the timing."""
    arguments = (record["workload"], record["method"], threads)
    try:
        with Worker(*arguments, memory.ENVIRONMENT) as worker:
            worker.answer()
            record["peak_bytes"] = statistics.median(worker.ask("memory", repeats))
            record["peak_tensor_bytes"] = worker.ask("tensors")
            record["multiply_adds"] = worker.ask("count")
    except WorkerError as failure:
        record["error"] = str(failure)


def add_quality(records: dict[str, Record], workload: str, threads: int) -> None:
    """Relative errors of our methods, all from one process that computes the optimum once."""
    ours = [m for m, record in records.items() if m in OURS and "error" not in record]
    if not ours:
        return
    command = [sys.executable, str(HERE / "quality.py"), "--workload", workload]
    command += ["--threads", str(threads), "--methods", *ours]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        for method in ours:
            records[method]["quality_error"] = done.stderr.strip()[-2000:]
        return
    for method, quality in json.loads(done.stdout).items():
        records[method]["quality"] = quality
