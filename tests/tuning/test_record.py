"""Rows of ``sweep.json``, from a journal and trials' folders that are made up."""

import json

import pytest

from fashionclip_tune.tuning.engine import trial_dir
from fashionclip_tune.tuning.record import SweepRecord
from fashionclip_tune.tuning.study import SweepStudy

SETTINGS = {"clip_model": "tiny-clip", "loss_function": "contrastive"}


@pytest.mark.parametrize(
    ("kept", "device_s"), [(None, 4.0), ('{"device_s": 3.0}', 4.0), ('{"device_s": 9.5}', 9.5), ("{", 4.0)]
)
def test_a_trial_has_taken_what_it_took_after_its_last_row_too(tmp_path, kept, device_s):
    """It diverged then, or its last life was lost."""
    study = SweepStudy(tmp_path / "study.journal", seed=0, num_startup_trials=1)
    number, _ = study.suggest(lambda trial: SETTINGS)
    folder = trial_dir(tmp_path, number, SETTINGS)
    (folder / "evaluations").mkdir(parents=True)
    row = {"step": 2, "examples_seen": 32, "recall_at_10": 0.5, "device_s": 4.0, "duration_s": 5.0}
    (folder / "evaluations" / "step_00000002.json").write_text(json.dumps(row))
    study.record_stage(number, 32, 0.5)
    if kept is not None:
        (folder / "device_time.json").write_text(kept)
    (found,) = SweepRecord(tmp_path, study, {}).rows()
    assert found["device_s"] == device_s
