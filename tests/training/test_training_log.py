"""Every run leaves its evaluations in the published columns too."""

import csv
from pathlib import Path

import pytest

from fashionclip_tune import train
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.training.history import read_history

# The header of the published runs' files.
PUBLISHED = (
    "step,model,loss_function,recall@5_mean,recall@10_mean,recall@5_text_to_image,recall@5_image_to_text,"
    "recall@10_text_to_image,recall@10_image_to_text,num_samples,loss,loss_type"
)


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
