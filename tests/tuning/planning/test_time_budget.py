"""``--time-budget`` with real sweeps: they end in time, nothing is lost, and the command that they print goes on."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.resilience.sweep_invariants import histories_of, study_of, violations
from tests.tuning.conftest import RunSweep, sweep_json

ROOT = Path(__file__).parents[3]
STAGE_STEPS = 50
SIZES = ("--num-trials", "2", "--max-concurrent", "1", "--scheduler", "none", "--budget-examples", "4000")
SETTINGS = (*SIZES, "--grace-examples", "800", "--set", "model.pretrained=none", "--set", "training.batch_size=16")
RATE = "--samples-per-second"  # stated: nothing is measured before
GO_ON = re.compile(r"the time of this run is up; go on with: \S+ sweeps/run_sweep\.py (.*)")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_sweep_ends_in_time_and_the_command_that_it_prints_ends_it(
    garments: Path, tmp_path: Path, run_sweep: RunSweep
) -> None:
    """Two trials take longer than the 15 of 18 seconds that are left to them; the folder's name has a blank in it."""
    results = tmp_path / "My Drive"
    command = [sys.executable, ROOT / "sweeps" / "run_sweep.py", "--data", garments, "--results", results, "--name", "it"]
    done = subprocess.run(
        [*map(str, command), *SETTINGS, RATE, "500", "--time-budget", "0.3"],
        capture_output=True,
        text=True,
        timeout=500,
        env=dict(os.environ),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    found = GO_ON.search(done.stdout)
    assert found is not None, done.stdout
    in_time = " --time-budget 0.3"
    assert in_time in found[1], "whose machine ends after some hours has as many the next time"

    content = sweep_json(results / "it")
    assert content["state"] == "INTERRUPTED"
    assert content["elapsed_s"] < 60
    study = study_of(results / "it")
    assert [trial["number"] for trial in study] == list(range(len(study)))
    assert len([trial for trial in study if trial["state"] == "RUNNING"]) <= 1
    assert any(trial["state"] == "RUNNING" for trial in study) or len(study) < 2
    assert violations(results / "it", STAGE_STEPS, ended=False) == []
    before = histories_of(results / "it")

    code, _, err = run_sweep(*shlex.split(found[1].replace(in_time, "")))
    assert code == 0, err
    assert sweep_json(results / "it")["state"] == "FINISHED"
    rows = sweep_json(results / "it")["trials"]
    assert [(row["trial_id"], row["examples_seen"], row["stop_reason"]) for row in rows] == [
        ("0000", 4000, "budget"),
        ("0001", 4000, "budget"),
    ]
    assert violations(results / "it", STAGE_STEPS, ended=True) == []
    after = histories_of(results / "it")
    for number, history in before.items():
        assert after[number][: len(history)] == history


def test_what_cannot_reach_its_first_rung_is_not_started_and_said(garments: Path, tmp_path: Path, run_sweep: RunSweep) -> None:
    """By the stated rate the first rung is two hours away: not even Ray is started."""
    arguments = ("--data", garments, "--results", tmp_path, "--name", "it", *SETTINGS, RATE, "0.1")
    code, out, err = run_sweep(*arguments, "--time-budget", "30")
    assert (code, err) == (0, "")
    assert GO_ON.search(out) is not None, out
    assert sweep_json(tmp_path / "it")["trials"] == []
    assert study_of(tmp_path / "it") == []
    assert re.search(r"no more trials were started: the first rung takes 136 min, 2[345] min were left", out), out
