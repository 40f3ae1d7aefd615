"""What a run records of its evaluations: rows, TensorBoard's events, and the published columns, over all its lives."""

import csv
import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fashionclip_tune import train
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.training.history import History, read_history, read_whole_rows

# The header of the published runs' files.
PUBLISHED = (
    "step,model,loss_function,recall@5_mean,recall@10_mean,recall@5_text_to_image,recall@5_image_to_text,"
    "recall@10_text_to_image,recall@10_image_to_text,num_samples,loss,loss_type"
)


def row(step: int, recall: float, **more: Any) -> dict[str, Any]:
    return {"step": step, "examples_seen": 16 * step, "recall_at_10": recall, "num_pairs": 20, "duration_s": 1.0 * step, **more}


def record(run: Path, rows: list[dict[str, Any]], *, first_new_examples: int) -> list[str | None]:
    history = History(run, first_new_examples=first_new_examples)
    differences = [history.record(each) for each in rows]
    history.close()
    return differences


def scalars(run: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def as_float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def test_rows_are_read_back_in_the_order_of_their_steps_to_the_last_bit(tmp_path: Path) -> None:
    rows = [row(step, 1 / (3 + step), logit_bias=-0.1 * step) for step in (0, 2, 10, 100)]
    assert record(tmp_path, rows, first_new_examples=0) == [None] * 4
    assert read_history(tmp_path) == rows
    assert scalars(tmp_path, "recall_at_10") == [(16 * each["step"], as_float32(each["recall_at_10"])) for each in rows]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"recall_at_10", "train/logit_bias"}


def test_a_run_without_a_row_has_an_empty_history(tmp_path: Path) -> None:
    assert read_history(tmp_path) == []


@pytest.mark.parametrize("content", ["", '{"step": 2, "recall', "\x00\x00"])
def test_a_torn_evaluation_is_no_hole_for_a_run_and_left_out_for_people(tmp_path: Path, content: str) -> None:
    record(tmp_path, [row(0, 0.1), row(2, 0.2), row(4, 0.3)], first_new_examples=0)
    torn = tmp_path / "evaluations" / "step_00000002.json"
    torn.write_text(content)
    with pytest.raises(UserError, match=r"step_00000002\.json is torn or no JSON"):
        read_history(tmp_path)
    assert read_whole_rows(tmp_path) == ([row(0, 0.1), row(4, 0.3)], [torn])


def test_a_row_recorded_again_is_compared_and_the_first_one_stays(tmp_path: Path) -> None:
    record(tmp_path, [row(0, 0.1), row(2, 0.2, loss=1.5), row(4, 0.3)], first_new_examples=0)
    again = [
        row(2, 0.2, loss=1.5),
        {**row(4, 0.3), "duration_s": 9.0, "samples_per_second": 4.0, "images_encoded_per_second": 7.0},
    ]
    assert record(tmp_path, again, first_new_examples=32) == [None, None]
    before = read_history(tmp_path)
    (difference,) = record(tmp_path, [row(2, 0.2, loss=1.25)], first_new_examples=32)
    assert difference is not None
    for part in ("step 2", "loss", "1.5", "1.25"):
        assert part in difference
    assert read_history(tmp_path) == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_no_numbers_equal_themselves(tmp_path: Path, value: float) -> None:
    for expected in (None, None):
        assert record(tmp_path, [row(2, value)], first_new_examples=0) == [expected]


def test_a_field_that_an_earlier_life_did_not_have_is_a_difference(tmp_path: Path) -> None:
    record(tmp_path, [row(2, 0.5)], first_new_examples=0)
    (difference,) = record(tmp_path, [row(2, 0.5, loss=1.0)], first_new_examples=0)
    assert difference is not None
    assert "loss was None" in difference


def test_tensorboard_shows_each_step_once_over_several_lives(tmp_path: Path) -> None:
    """Lives that died after 3, 2 and 0 new rows; the last one goes on to the end."""
    record(tmp_path, [row(step, step / 10) for step in (0, 2, 4)], first_new_examples=0)
    record(tmp_path, [row(step, step / 10) for step in (2, 4, 6)], first_new_examples=32)
    record(tmp_path, [row(2, 0.2)], first_new_examples=32)
    record(tmp_path, [row(step, step / 10) for step in (2, 4, 6, 8)], first_new_examples=32)
    assert scalars(tmp_path, "recall_at_10") == [(16 * step, as_float32(step / 10)) for step in (0, 2, 4, 6, 8)]


def test_half_a_row_left_by_a_kill_is_not_read(tmp_path: Path) -> None:
    record(tmp_path, [row(2, 0.5)], first_new_examples=0)
    (tmp_path / "evaluations" / ".step_00000004.json.77.tmp").write_text('{"step": 4, "rec')
    assert [each["step"] for each in read_history(tmp_path)] == [2]
    assert json.loads((tmp_path / "evaluations" / "step_00000002.json").read_text()) == row(2, 0.5)


def test_a_curve_that_was_restored_without_its_events_is_whole_again(tmp_path: Path) -> None:
    """After the loss of a machine the evaluations are there, and a state of step 4; step 6 is trained again."""
    rows = [row(step, 0.1 * step, loss=1.0 / (1 + step)) for step in (0, 2, 4, 6)]
    record(tmp_path / "lost", rows, first_new_examples=0)
    shutil.copytree(tmp_path / "lost" / "evaluations", tmp_path / "found" / "evaluations")
    record(tmp_path / "found", rows[2:], first_new_examples=64)
    for name in ("recall_at_10", "train/loss"):
        assert scalars(tmp_path / "found", name) == scalars(tmp_path / "lost", name)
    assert read_history(tmp_path / "found") == rows
    record(tmp_path / "found", rows[3:], first_new_examples=96)
    assert len(scalars(tmp_path / "found", "recall_at_10")) == 4, "with its events nothing is written twice"


def test_lives_that_follow_at_once_are_read_in_their_order(tmp_path: Path) -> None:
    """Five lives within a moment: their event files are named by the second, and read in the order of their names."""
    for life in range(5):
        history = History(tmp_path, first_new_examples=16 * life)
        history.record(row(life, 0.1 * life))
        history.close()
    made = [int(path.name.split(".")[3]) for path in tmp_path.glob("events.out.tfevents.*")]
    assert len(set(made)) == 5
    assert [step for step, _ in scalars(tmp_path, "recall_at_10")] == [0, 16, 32, 48, 64]


def test_a_run_writes_the_published_columns_over_all_its_lives(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    config = tiny_config.with_overrides({"training.budget_examples": 64})

    def stop_at_step_2(row: dict[str, float]) -> None:
        if row["step"] == 2:
            raise SystemExit

    with pytest.raises(SystemExit):
        train(config, tmp_path, on_eval=stop_at_step_2)
    train(config, tmp_path, resume_from=tmp_path)
    lines = (tmp_path / "evaluations" / "training_log.csv").read_text().splitlines()
    assert lines[0] == PUBLISHED
    rows, history = list(csv.DictReader(lines)), read_history(tmp_path)
    assert [int(row["step"]) for row in rows] == [0, 2, 4]
    for row, recorded in zip(rows, history, strict=True):
        assert float(row["recall@10_mean"]) == recorded["recall_at_10"]
        assert float(row["recall@5_image_to_text"]) == recorded["recall_at_5_image_to_text"]
        assert (row["model"], row["loss_function"], row["loss_type"]) == ("tiny-clip", "contrastive", "clip_contrastive")
        assert row["num_samples"] == "20"
        assert row["loss"] == ("" if row["step"] == "0" else str(recorded["loss"]))
