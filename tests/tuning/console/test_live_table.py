"""What is said while a sweep runs, on a terminal and elsewhere."""

import io
from typing import Any

import pytest
from rich.console import Console

from fashionclip_tune.tuning.console.live_table import Progress, time_left


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


def shown(rows: list[dict[str, Any]], *, terminal: bool, width: int = 160, height: int = 40, **sweep: Any) -> str:
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=width, height=height, color_system=None)
    settings = {"budget_examples": 320, "stage_examples": 32, "expected_examples": 100.0}
    with Progress(console, num_trials=4, side_by_side=2, **settings) as progress:
        for _ in range(2):
            progress.show({"name": "sweep-001", "elapsed_s": 45.0, "trials": rows, **sweep})
    return written.getvalue()


def table(rows: list[dict[str, Any]], width: int, height: int = 40, **sweep: Any) -> list[str]:
    """The lines of the last drawing on a terminal."""
    return shown(rows, terminal=True, width=width, height=height, **sweep).rpartition("sweep-001: ")[2].splitlines()


ROWS = [
    row(0, "COMPLETE", stop_reason="budget", examples_seen=320, duration_s=30.0),
    row(1, "PRUNED", stop_reason="rung_2", duration_s=10.0),
    row(2, "RUNNING", duration_s=5.0),
]


def test_a_terminal_shows_a_table_with_speed_change_stage_and_time_left() -> None:
    text = shown(ROWS, terminal=True)
    assert "sweep-001: 2 of 4 trials ended, 45 s so far, about 7 s left" in text
    for part in ("sigmoid", "3.0e-4", "2/10", "10/10", "0.5000", "+0.1250", "1,234", "running"):
        assert part in text
    assert "rung 2: others were ahead" in text
    assert "best so far: trial 0000, tiny-clip, 0.5000" in text


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_trial_has_one_line_at_any_width_and_its_state_is_readable(width: int) -> None:
    long_name = {"clip_model": "ViT-B-16-SigLIP2-256", "loss_function": "siglip", "training.learning_rate": 3e-4}
    lines = table([{**each, "config": long_name} for each in ROWS], width)
    assert max(map(len, lines)) <= width - 3, "a full line would be broken by the terminal's ^C"
    assert [line.split()[0] for line in lines[2:5]] == ["0000", "0001", "0002"]
    assert "rung 2" in lines[3]
    assert "behind" in lines[3] or "ahead" in lines[3]
    assert ("ViT-B-16-SigLIP2-256" in lines[3]) == (width >= 100)


WAITING = {"search": {"rungs": [32, 64]}}
PAUSES = [*ROWS, row(3, "PAUSED", examples_seen=32)]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_trials_that_paused_are_said_to_have_not_to_be_behind(width: int) -> None:
    """The one that has ended at its rung, too: others promised more, which is no judgement."""
    long_name = {"clip_model": "ViT-B-16-SigLIP2-256", "loss_function": "siglip", "training.learning_rate": 3e-4}
    text = "\n".join(lines := table([{**each, "config": long_name} for each in PAUSES], width, **WAITING))
    assert "2 of 4 trials ended, 1 paused, 45 s" in lines[0]
    assert max(map(len, lines)) <= width - 3
    assert "paused" in lines[3]
    assert "rung 2" in lines[3]
    assert "paused" in lines[5]
    assert "rung 1" in lines[5]
    assert ("paused at rung 1" in lines[5]) == (width >= 100)
    assert "behind" not in text
    assert "ahead" not in text


def test_an_event_line_says_at_which_rung_a_trial_paused_and_that_it_was_thawed() -> None:
    written = io.StringIO()
    settings = {"num_trials": 4, "side_by_side": 2, "budget_examples": 320, "stage_examples": 32, "expected_examples": 100.0}
    with Progress(Console(file=written, width=160), **settings) as progress:
        for state in ("RUNNING", "PAUSED", "RUNNING"):
            progress.show({"name": "it", "elapsed_s": 45.0, "trials": [row(0, state)], **WAITING})
        progress.show({"name": "it", "elapsed_s": 45.0, "trials": [row(0, "PRUNED", stop_reason="rung_2")], **WAITING})
    lines = written.getvalue().splitlines()
    assert [line.partition("examples/s")[2] for line in lines] == [
        "",
        "  paused at rung 2 after 64 examples",
        "  thawed",
        "  paused at rung 2 after 64 examples  (1 of 4 ended, about 26 s left)",
    ]


def test_on_a_low_terminal_running_trials_and_the_newest_stay() -> None:
    rows = [row(number, "RUNNING" if number in (2, 29) else "PRUNED", stop_reason="rung_1") for number in range(30)]
    lines = table(rows, 80, height=12)
    assert len(lines) <= 11
    assert [line[:4] for line in lines if line[:4].isdigit()] == ["0002", *(f"{number:04d}" for number in range(26, 30))]
    assert "25 more have ended" in " ".join(" ".join(lines).split())
    lines = table([{**rows[0], "state": "PAUSED"}, *rows[1:]], 80, height=12)
    assert "25 more have ended or are paused" in " ".join(" ".join(lines).split())


def test_before_the_first_trial_the_table_says_that_it_starts() -> None:
    assert "sweep-001: starting, 45 s" in shown([], terminal=True)


def test_a_message_that_has_no_room_in_the_table_stands_above_it() -> None:
    message = "12 samples could not be read, such as [shard] 000000.tar"
    text = shown([row(0, "FAIL", stop_reason="bad_data", message=message, recall_at_10=None)], terminal=True, width=100)
    assert text.count(message) == 1


def test_elsewhere_each_event_is_one_plain_line() -> None:
    lines = shown(ROWS, terminal=False).splitlines()
    assert len(lines) == 3, "nothing is said twice"
    assert "recall_at_10 0.5000 (+0.1250)  1,234 examples/s" in lines[2]
    assert lines[1].endswith("stopped at rung 2: others were ahead after 64 examples  (2 of 4 ended, about 7 s left)")


def test_a_failure_is_said_with_its_message() -> None:
    failed = row(0, "FAIL", stop_reason="bad_data", message="12 samples", recall_at_10=None, recall_change=None)
    assert "FAIL bad_data: 12 samples" in shown([failed], terminal=False)


def test_time_left_counts_what_runs_and_what_has_not_begun() -> None:
    def left(rows: list[dict[str, Any]], num_trials: int = 4, side_by_side: int = 2) -> float | None:
        progress = Progress(
            Console(),
            num_trials=num_trials,
            side_by_side=side_by_side,
            expected_examples=100.0,
            budget_examples=320,
            stage_examples=32,
        )
        return progress.seconds_left(rows)

    assert left([row(0, "RUNNING", examples_seen=0)]) is None
    pace = (30 + 10 + 5) / (320 + 64 + 64)
    assert left(ROWS) == pytest.approx(((100 - 64) + 100) * pace / 2)
    assert left([*ROWS, row(3, "FAIL", duration_s=0.0, examples_seen=0)]) == pytest.approx((100 - 64) * pace)
    progress = Progress(
        Console(), num_trials=4, side_by_side=2, expected_examples=100.0, budget_examples=320, stage_examples=32
    )
    few = [row(0, "PAUSED", examples_seen=64), row(1, "PAUSED", examples_seen=36)]
    progress.show({"name": "it", "elapsed_s": 45.0, "trials": few, **WAITING})
    assert progress.seconds_left(few) == pytest.approx((400 - 100) * 20 / 100 / 2), "all trials together have 400"
    beyond = [ROWS[0], row(1, "RUNNING", examples_seen=128, duration_s=12.0)]
    assert left(beyond, num_trials=2) == pytest.approx((320 - 128) * 42 / 448)
    assert [time_left(seconds) for seconds in (None, 0.0, 18.0, 600.0, 9000.0)] == [
        "",
        "",
        ", about 18 s left",
        ", about 10 min left",
        ", about 2.5 h left",
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_starts_look_different_whatever_their_names_are(width: int) -> None:
    names = ["shop [v1]", "shop [v2]", "ViT-B-16-SigLIP/webli", "ViT-B-16-SigLIP/other", "[/x]"]
    lines = table([row(number, "RUNNING", start=name) for number, name in enumerate(names)], width)
    shown = [line.split("sigmoid")[0][5:].strip() for line in lines[2:7]]
    assert len(set(shown)) == len(names)
    assert (shown[:2], shown[4]) == (["shop [v1]", "shop [v2]"], "[/x]")
