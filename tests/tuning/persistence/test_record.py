"""Rows of ``sweep.json``, from a journal and trials' folders that are made up."""

import io
from pathlib import Path

from optuna.trial import TrialState
from rich.console import Console

from fashionclip_tune.reporting.page import write_report
from fashionclip_tune.reporting.terminal import comparison
from fashionclip_tune.tuning.console.outcome import print_result
from fashionclip_tune.tuning.persistence.location import SweepLocation
from fashionclip_tune.tuning.persistence.record import SweepRecord
from fashionclip_tune.tuning.planning.settings import SweepSettings
from fashionclip_tune.tuning.study.study import SweepStudy

SETTINGS = {"clip_model": "tiny-clip", "loss_function": "contrastive"}


def test_a_sweep_of_which_no_trial_has_a_result_says_why(tmp_path: Path) -> None:
    """Each has ended before its first evaluation."""
    study = SweepStudy(tmp_path / "study.journal", seed=0, num_startup_trials=1)
    for state, reason in ((TrialState.PRUNED, "out_of_memory"), (TrialState.FAIL, "error"), (TrialState.PRUNED, "diverged")):
        number, _ = study.suggest(lambda trial: SETTINGS)
        study.end(number, state, reason, f"so it ended: {reason}")
    result = SweepRecord(tmp_path, study, {"name": "it", "seed": 0}).write("FINISHED")
    assert result["best"] is None
    written = io.StringIO()
    console = Console(file=written, width=200)
    print_result(result, SweepLocation(str(tmp_path), tmp_path, None), SweepSettings(), console)
    for part in comparison([tmp_path]):
        console.print(part)
    assert written.getvalue().count("no trial has ended with a result") == 2
    page = write_report([tmp_path], gallery=False).read_text()
    for number, reason in enumerate(("out_of_memory", "error", "diverged")):
        assert written.getvalue().count(f"failed: trial {number:04d} ({reason}): so it ended: {reason}") == 2
        assert f"so it ended: {reason}" in page
