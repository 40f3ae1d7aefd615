"""What a sweep takes beside its trials' own training and evaluation: Ray, the processes, the time between two trials."""

import hashlib
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from optuna.trial import FrozenTrial

from fashionclip_tune.files import cache_dir, write_json
from fashionclip_tune.machine.hardware import available_cores


@dataclass(frozen=True)
class Overhead:
    """Seconds."""

    sweep_s: float
    """Once: the start and the end of Ray, the export of the winner."""
    process_s: float
    """Of the first trial of each slot: its process starts and imports torch."""
    trial_s: float
    """Of each further trial: what comes between its evaluations and the next trial's on the same process."""
    source: str


NO_OVERHEAD = Overhead(0.0, 0.0, 0.0, "left out")
# See results/README.md, "The plan against what came": two cores without other work.
_ELSEWHERE = Overhead(4.7, 5.4, 0.5, "measured on another machine")


def known_overhead(slots: int, device: str) -> Overhead:
    """Of the last whole sweep with as many trials side by side on this machine's CPU or card, else of another machine's.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    path = _path(slots, device)
    if not path.is_file():
        return _ELSEWHERE
    return Overhead(**json.loads(path.read_text()), source="measured in an earlier sweep")


def keep_overhead(
    trials: Sequence[FrozenTrial], durations_s: Mapping[int, float], elapsed_s: float, slots: int, device: str
) -> Overhead | None:
    """Measures it in a sweep that ran from its start to its end in one go, for the plans of later ones.

    Args:
        durations_s: of the trials by number, as they count themselves.
        elapsed_s: of the whole sweep.

    Returns:
        None where too few trials have ended to tell.
    """
    found = measured_overhead(trials, durations_s, elapsed_s, slots)
    if found is not None:
        costs = {name: value for name, value in asdict(found).items() if name != "source"}
        write_json(_path(slots, device), costs)
    return found


def measured_overhead(
    trials: Sequence[FrozenTrial], durations_s: Mapping[int, float], elapsed_s: float, slots: int
) -> Overhead | None:
    """As ``keep_overhead``, without keeping it."""
    spans = [
        (trial.datetime_start, trial.datetime_complete, durations_s[trial.number])
        for trial in sorted(trials, key=lambda trial: trial.number)
        if trial.datetime_start is not None and trial.datetime_complete is not None and durations_s.get(trial.number)
    ]
    if len(spans) <= slots:
        return None
    beside = [max(0.0, (end - start).total_seconds() - duration_s) for start, end, duration_s in spans]
    whole_s = (max(end for _, end, _ in spans) - min(start for start, _, _ in spans)).total_seconds()
    sweep_s = max(0.0, elapsed_s - whole_s)
    return Overhead(sweep_s, statistics.median(beside[:slots]), statistics.median(beside[slots:]), "measured now")


def _path(slots: int, device: str) -> Path:
    if device != "cpu":  # a plan may be for a card that is not here
        device = torch.cuda.get_device_properties(0).name if torch.cuda.is_available() else "no card"
    parts = [platform.machine(), available_cores(), device, torch.__version__, slots]
    return cache_dir() / "rates" / f"overhead-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]}.json"
