"""What the speed benchmarks share: a fresh process each, rounds in which all take turns, medians of the rounds' ratios."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Measured = TypeVar("Measured")


def in_own_process(script: str, *flags: object, environment: Mapping[str, str] | None = None) -> Any:
    """Starts a benchmark again, by its file, with other flags; what it prints last is JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", Path(script).stem, *map(str, flags)],
        env={**os.environ, "PYTHONWARNINGS": "ignore", **(environment or {})},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(names: Iterable[str], rounds: int, measure: Callable[[str], Measured]) -> dict[str, list[Measured]]:
    """Each round measures all of them, one after the other: what else the machine does is the same for all."""
    found: dict[str, list[Measured]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, measured in found.items():
            measured.append(measure(name))
    return found


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def spread(values: Sequence[float], form: str) -> str:
    """Three cells of a table: median, lowest, highest."""
    return " | ".join(format(value, form) for value in (statistics.median(values), min(values), max(values)))
