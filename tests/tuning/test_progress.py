"""What is said while a sweep runs, on a terminal and elsewhere."""

import io
from typing import Any

import pytest
from rich.console import Console

from fashionclip_tune.tuning.progress import Progress, seconds_left, time_left


def row(number: int, state: str, *, stop_reason: str | None = None, duration_s: float = 10.0, **more: Any) -> dict[str, Any]:
    return {
        "trial_id": f"{number:04d}",
        "state": state,
        "stop_reason": stop_reason,
        "message": "",
        "config": {"clip_model": "tiny-clip", "loss_function": "siglip", "training.learning_rate": 3e-4},
        "examples_seen": 64,
        "recall_at_10": 0.5,
        "recall_change": 0.125,
        "samples_per_second": 1234.4,
        "duration_s": duration_s,
        **more,
    }


def shown(rows: list[dict[str, Any]], *, terminal: bool) -> str:
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=160, color_system=None)
    with Progress(console, num_trials=4, side_by_side=2, budget_examples=320, stage_examples=32) as progress:
        for _ in range(2):
            progress.show({"name": "sweep-001", "trials": rows})
    return written.getvalue()


ROWS = [
    row(0, "COMPLETE", stop_reason="budget", examples_seen=320, duration_s=30.0),
    row(1, "PRUNED", stop_reason="rung_2", duration_s=10.0),
    row(2, "RUNNING", duration_s=5.0),
]


def test_a_terminal_shows_a_table_with_speed_change_stage_and_time_left() -> None:
    text = shown(ROWS, terminal=True)
    assert "sweep-001: 2 of 4 trials ended, about 18 s left" in text
    for part in ("sigmoid", "3.0e-4", "2/10", "10/10", "0.5000", "+0.1250", "1,234", "running"):
        assert part in text
    assert "stopped at rung 2: others of its model were ahead after 64 photos" in text


def test_elsewhere_each_event_is_one_plain_line() -> None:
    lines = shown(ROWS, terminal=False).splitlines()
    assert len(lines) == 3, "nothing is said twice"
    assert "recall_at_10 0.5000 (+0.1250)  1,234 photos/s" in lines[2]
    assert lines[1].endswith(
        "stopped at rung 2: others of its model were ahead after 64 photos  (2 of 4 ended, about 18 s left)"
    )


def test_a_failure_is_said_with_its_message() -> None:
    failed = row(0, "FAIL", stop_reason="bad_data", message="12 samples", recall_at_10=None, recall_change=None)
    assert "FAIL bad_data: 12 samples" in shown([failed], terminal=False)


def test_time_left_counts_what_runs_and_what_has_not_begun() -> None:
    assert seconds_left([row(0, "RUNNING")], 4, 2) is None
    assert seconds_left(ROWS, 4, 2) == pytest.approx(((20 - 5) + 20) / 2)
    assert seconds_left([*ROWS, row(3, "FAIL", duration_s=0.0)], 4, 1) == pytest.approx(20 - 5)
    assert [time_left(seconds) for seconds in (None, 0.0, 18.0, 600.0, 9000.0)] == [
        "",
        "",
        ", about 18 s left",
        ", about 10 min left",
        ", about 2.5 h left",
    ]
