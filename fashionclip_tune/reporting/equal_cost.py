"""What each architecture of a sweep had reached with the same device time: what is paid for is time, not examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from fashionclip_tune.evaluation.metric import Metric
from fashionclip_tune.reporting.sweep_files import TrialRow, figure_or_nothing, start_of
from fashionclip_tune.training.history import Row, read_whole_rows


@dataclass(frozen=True)
class ArchitectureAtCost:
    """Of one architecture's trials, as far as they come within the time."""

    clip_model: str
    recall: float | None
    """The best trial's, at its last stage within the time; None: no stage came to its end."""
    trial_id: str | None
    num_trials: int
    """Begun within the time."""
    spent_s: float
    """Device seconds of all its trials, those beyond the time included."""

    def cells(self) -> list[str]:
        """Below ``headers``."""
        recall = figure_or_nothing(self.recall, ".4f")
        return [self.clip_model, recall, self.trial_id or "", str(self.num_trials), f"{self.spent_s:,.0f} s"]


def headers(metric: Metric) -> tuple[str, ...]:
    return ("model", metric.short, "trial", "trials", "spent in all")


def architectures_at_equal_cost(
    rows: Sequence[TrialRow], histories: Mapping[str, Sequence[Row]], metric: Metric
) -> tuple[float, list[ArchitectureAtCost]]:
    """The device seconds that each architecture gets, those of the one that spent least, and the architectures, best first.

    An architecture's trials are counted one after the other in the order in which they started, side by side or not, so
    that earlier ones are whole. Zero-shot weights are no result, though evaluating them takes time.

    Args:
        rows: a sweep's trials, as in its ``sweep.json``.
        histories: each one's evaluations by ``trial_id``, as ``read_whole_rows`` gives them; ``device_s`` of each counts from
            the trial's start.
    """
    by_model: dict[str, list[TrialRow]] = {}
    for row in sorted((row for row in rows if histories.get(row["trial_id"])), key=lambda row: str(row["trial_id"])):
        by_model.setdefault(start_of(row), []).append(row)
    spent = {model: sum(histories[row["trial_id"]][-1]["device_s"] for row in trials) for model, trials in by_model.items()}
    limit_s = min(spent.values(), default=0.0)
    found = [_within(limit_s, model, trials, histories, metric, spent[model]) for model, trials in by_model.items()]
    return limit_s, sorted(found, key=lambda each: -1.0 if each.recall is None else each.recall, reverse=True)


def _within(
    limit_s: float,
    model: str,
    trials: Sequence[TrialRow],
    histories: Mapping[str, Sequence[Row]],
    metric: Metric,
    spent_s: float,
) -> ArchitectureAtCost:
    started_s, num_trials = 0.0, 0
    scores: dict[str, float] = {}
    for row in trials:
        if started_s >= limit_s:
            break
        history = histories[row["trial_id"]]
        reached = [stage for stage in history if started_s + stage["device_s"] <= limit_s and stage["examples_seen"] > 0]
        if reached and row["state"] != "FAIL":
            # A trial that is whole has the score that it ended with: 0 if it diverged.
            scores[row["trial_id"]] = metric.score(row if reached[-1] is history[-1] else reached[-1])
        started_s, num_trials = started_s + history[-1]["device_s"], num_trials + 1
    best = max(scores, key=lambda trial_id: scores[trial_id], default=None)
    return ArchitectureAtCost(model, None if best is None else scores[best], best, num_trials, spent_s)


def equal_cost_table(sweep_dir: Path, rows: Sequence[TrialRow], metric: Metric) -> Table | None:
    """For people; None where there is one architecture only."""
    histories = {row["trial_id"]: _recorded(sweep_dir, row) for row in rows}
    limit_s, found = architectures_at_equal_cost(rows, histories, metric)
    if len(found) < 2:
        return None
    table = Table(title=f"best of each model,\nwithin the same {limit_s:,.0f} device seconds", caption=metric.legend)
    for header in headers(metric):
        table.add_column(header, justify="left" if header == "model" else "right")
    for each in found:
        table.add_row(*map(escape, each.cells()))
    return table


def _recorded(sweep_dir: Path, row: TrialRow) -> list[dict[str, Any]]:
    """A trial's evaluations, those that its row knows of."""
    for folder in sweep_dir.glob(f"trials/{row['trial_id']}-*"):
        return [stage for stage in read_whole_rows(folder)[0] if stage["examples_seen"] <= row["examples_seen"]]
    return []
