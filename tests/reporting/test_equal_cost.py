"""Architectures at equal device time, on sweeps made by hand."""

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from fashionclip_tune.evaluation.metric import DEFAULT_METRIC
from fashionclip_tune.reporting.equal_cost import ArchitectureAtCost, architectures_at_equal_cost, equal_cost_table


def trial(number: int, model: str, *stages: tuple[float, float], **row: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """``stages``: device seconds since the trial's start, and recall; the first is of the zero-shot weights."""
    history = [
        {"step": index, "examples_seen": 100 * index, "device_s": seconds, "recall_at_10": recall}
        for index, (seconds, recall) in enumerate(stages)
    ]
    last = history[-1]
    whole = {
        "trial_id": f"{number:04d}",
        "state": "COMPLETE",
        "config": {"clip_model": model},
        "examples_seen": last["examples_seen"],
        "recall_at_10": last["recall_at_10"],
        **row,
    }
    return whole, history


def ranked(*trials: tuple[dict[str, Any], list[dict[str, Any]]]) -> tuple[float, list[ArchitectureAtCost]]:
    return architectures_at_equal_cost(
        [row for row, _ in trials], {row["trial_id"]: history for row, history in trials}, DEFAULT_METRIC
    )


def test_the_dear_model_is_ahead_by_examples_and_behind_by_time() -> None:
    """The cheap one spends 30 s in all; by then the dear one has come to its second trial's first stage."""
    limit_s, found = ranked(
        trial(0, "cheap", (1, 0.2), (6, 0.5), (10, 0.6)),
        trial(1, "dear", (2, 0.3), (12, 0.4), (20, 0.55)),
        trial(2, "cheap", (1, 0.2), (11, 0.4), (20, 0.65)),
        trial(3, "dear", (2, 0.3), (10, 0.58), (20, 0.9)),
        trial(4, "dear", (2, 0.3), (10, 0.95)),
    )
    assert limit_s == 30
    assert found == [
        ArchitectureAtCost("cheap", 0.65, "0002", 2, 30),
        ArchitectureAtCost("dear", 0.58, "0003", 2, 50),
    ]


def test_a_trials_score_is_its_last_stage_within_the_time_not_its_best() -> None:
    _, found = ranked(trial(0, "a", (1, 0.2), (5, 0.9), (10, 0.4)), trial(1, "b", (1, 0.2), (10, 0.5)))
    assert [(each.clip_model, each.recall) for each in found] == [("b", 0.5), ("a", 0.4)]


def test_untouched_weights_are_no_result_and_a_model_without_any_comes_last() -> None:
    _, found = ranked(trial(0, "slow", (9, 0.7), (100, 0.9)), trial(1, "quick", (1, 0.1), (10, 0.2)))
    assert found == [ArchitectureAtCost("quick", 0.2, "0001", 1, 10), ArchitectureAtCost("slow", None, None, 1, 100)]


def test_a_diverged_trial_scores_nothing_and_a_failed_one_costs_its_time_only() -> None:
    _, found = ranked(
        trial(0, "a", (1, 0.2), (5, 0.9), recall_at_10=0.0, state="PRUNED"),
        trial(1, "a", (1, 0.2), (5, 0.95), state="FAIL"),
        trial(2, "a", (1, 0.2), (5, 0.3)),
        trial(3, "b", (1, 0.2), (15, 0.4)),
    )
    assert found == [ArchitectureAtCost("b", 0.4, "0003", 1, 15), ArchitectureAtCost("a", 0.3, "0002", 3, 15)]


def test_a_sweep_without_evaluations_ranks_nothing() -> None:
    assert architectures_at_equal_cost([trial(0, "a", (1, 0.2))[0]], {}, DEFAULT_METRIC) == (0.0, [])


def written(folder: Path, *trials: tuple[dict[str, Any], list[dict[str, Any]]]) -> str | None:
    for row, history in trials:
        evaluations = folder / "trials" / f"{row['trial_id']}-{row['config']['clip_model']}-contrastive" / "evaluations"
        evaluations.mkdir(parents=True)
        for stage in history:
            (evaluations / f"step_{stage['step']:08d}.json").write_text(json.dumps(stage))
    table = equal_cost_table(folder, [row for row, _ in trials], DEFAULT_METRIC)
    if table is None:
        return None
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_is_read_from_the_trials_folders_as_far_as_their_rows_know(tmp_path: Path) -> None:
    ahead = trial(
        1, "b", (1, 0.2), (5, 0.3), (9, 0.8), examples_seen=100, recall_at_10=0.3
    )  # its last file is not recorded yet
    text = written(tmp_path, trial(0, "a", (1, 0.2), (8, 0.4)), ahead)
    assert text is not None
    assert "within the same 5 device seconds" in text
    (line,) = (line for line in text.splitlines() if line.startswith("│ b"))
    assert "0.3000" in line
    assert "0001" in line


def test_no_table_where_there_is_nothing_to_compare(tmp_path: Path) -> None:
    assert written(tmp_path, trial(0, "a", (1, 0.2), (8, 0.4)), trial(1, "a", (1, 0.2), (8, 0.4))) is None
