"""One method on one workload in a process of its own; measures when it is told to.

Reads a command a line from standard input and answers each with a line of JSON on standard
output: `time N` (seconds of N calls), `memory N` (peak resident bytes of N calls), `tensors`
(peak bytes of tensors), `count` (multiply-adds), `quit`. The first line it writes says that it is
ready, and how long a call took after warm-up.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, TextIO

import memory
from methods import METHODS, Setup, multiply_adds, set_threads
from workloads import load


def timed(setup: Setup) -> float:
    """Seconds of one call; it is set up, and its result freed, outside."""
    call = setup()
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result
    return seconds


def warm_up(setup: Setup, seconds: float = 0.3) -> float:
    """Call for at least this long, and twice unless that takes long; the shortest call."""
    end = time.perf_counter() + seconds
    taken = [timed(setup)]
    while time.perf_counter() < end or (len(taken) == 1 and taken[0] < 2):
        taken.append(timed(setup))
    return min(taken)


def times(setup: Setup, calls: int) -> list[float]:
    gc.collect()
    return [timed(setup) for _ in range(calls)]


def channel() -> TextIO:
    """Standard output for answers alone: whatever a library prints goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", required=True)
    parser.add_argument("--method", required=True, choices=list(METHODS))
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    warnings.simplefilter("ignore")
    answers = channel()
    set_threads(options.threads)
    workload = load(options.workload)
    setup = METHODS[options.method](workload)
    commands: dict[str, Callable[[int], Any]] = {
        "time": lambda n: times(setup, n),
        "memory": lambda n: [memory.peak_above(setup()) for _ in range(n)],
        "tensors": lambda n: memory.peak_of_tensors(setup()),
        "count": lambda n: multiply_adds(setup()),
    }

    def say(answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    say({"seconds": warm_up(setup)})
    for line in sys.stdin:
        command, _, number = line.strip().partition(" ")
        if command == "quit":
            return
        say(commands[command](int(number or 1)))


if __name__ == "__main__":
    main()
