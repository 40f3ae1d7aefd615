"""The disk fills in the middle of a sweep, or at its end: it stops with a clear message, and goes on after room was made."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from fashionclip_tune import train
from fashionclip_tune.config.section import assignments
from fashionclip_tune.models.weights import read_weights
from fashionclip_tune.storage.checkpoint import strip_training_state
from fashionclip_tune.tuning.persistence.location import SweepCatalog, SweepLocation
from fashionclip_tune.tuning.persistence.record import sweep_header
from fashionclip_tune.tuning.planning.plan import plan_sweep
from fashionclip_tune.tuning.planning.settings import SweepSettings
from fashionclip_tune.tuning.study.study import SweepStudy
from fashionclip_tune.tuning.trial import trial_dir
from tests.tuning.conftest import RunSweep, sweep_json

ROOT = Path(__file__).parents[2]
SETTINGS = (
    *("--set", "model.pretrained=none", "--set", "training.batch_size=16"),
    *("--budget-examples", "144", "--samples-per-second", "100"),
)


def run(garments: Path, *more: object) -> tuple[int, str]:
    command = [sys.executable, ROOT / "sweeps" / "run_sweep.py", "--data", garments, "--name", "it", "--num-trials", "2"]
    done = subprocess.run(
        [str(word) for word in (*command, *SETTINGS, "--max-concurrent", "1", *more)],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        timeout=500,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("tier", ["one folder", "durable"])
def test_a_full_disk_stops_the_sweep_and_loses_nothing(garments: Path, tmp_path: Path, disk: Any, tier: Any) -> None:
    place = ["--results", disk.folder]
    if tier == "durable":
        place += ["--scratch", tmp_path / "scratch", "--sync-every", "0"]
        disk.resize(4)
    code, out = run(garments, *place)
    assert code == 2, out
    assert "Traceback" not in out
    assert "nothing is lost" in out
    assert "make room" in out
    assert f"--results {disk.folder} --name it" in out
    assert " --resume" in out

    disk.resize(400)
    code, out = run(garments, *place, "--resume")
    assert code == 0, out
    rows = sweep_json(disk.folder / "it")["trials"]
    assert [row["trial_id"] for row in rows] == ["0000", "0001"]
    assert {row["state"] for row in rows} <= {"COMPLETE", "PRUNED"}
    assert "otherwise" not in "".join(path.read_text() for path in disk.folder.rglob("warnings.log"))


def all_but_the_winner(garments: Path, results: Path, scratch: Path | None) -> SweepLocation:
    """A sweep whose one trial has ended, and whose driver was killed then; made without Ray."""
    settings = SweepSettings(
        data=str(garments),
        overrides=assignments([*SETTINGS[1:4:2], "clip_model=tiny-clip"]),
        num_trials=1,
        budget_examples=48,
        grace_examples=48,
        samples_per_second=100.0,
        scratch=None if scratch is None else str(scratch),
    )
    plan = plan_sweep(settings)
    place = SweepCatalog(str(results)).place("it", settings.scratch)
    place.run_dir.mkdir(parents=True)
    header = sweep_header(plan, place)
    if place.mirror is not None:
        place.mirror.start(header)
    begun = {**header, "state": "RUNNING", "best": None, "zero_shot": {}, "trials": []}
    (place.run_dir / "sweep.json").write_text(json.dumps(begun))
    on_append = place.mirror.append_journal if place.mirror is not None else lambda: None
    study = SweepStudy(place.run_dir / "study.journal", seed=0, num_startup_trials=1, on_append=on_append, quota=plan.quota)
    number, drawn = study.suggest(plan.draw)
    folder = trial_dir(place.run_dir, number, drawn["clip_model"], drawn["loss_function"])
    for row in train(plan.build(drawn), folder).history:
        study.record_stage(number, row["examples_seen"], row["recall_at_10"])
    study.end(number, TrialState.COMPLETE, "budget")
    strip_training_state(folder)
    return place


@pytest.mark.parametrize("tier", ["one folder", "durable"])
def test_a_disk_that_is_full_when_the_winner_is_written_stops_the_sweep(
    garments: Path, tmp_path: Path, disk: Any, run_sweep: RunSweep, tier: Any
) -> None:
    disk.resize(200)
    scratch = tmp_path / "scratch" if tier == "durable" else None
    place = all_but_the_winner(garments, disk.folder, scratch)
    flags = ["--results", disk.folder, "--name", "it", *(["--scratch", scratch] if scratch else [])]
    disk.leave(megabytes=1)
    code, _, err = run_sweep(*flags, "--resume")
    assert code == 2
    assert err.startswith("error: the sweep has stopped, nothing is lost: ")
    assert "make room" in err
    assert f"go on with: {sys.executable} sweeps/run_sweep.py --results {disk.folder} --name it --resume " in err
    assert err.count("\n") == 2, err
    assert not list(disk.folder.rglob("*.tmp"))

    weights = read_weights(next((place.run_dir / "trials").rglob("step_*/model.safetensors")))
    winner_bytes = sum(tensor.nbytes for tensor in weights.values())
    disk.leave(megabytes=3 + winner_bytes // 10**6)  # for the winner, not for a report of 5 MB
    code, out, err = run_sweep(*flags, "--resume")
    assert code == 0, err
    assert sweep_json(disk.folder / "it")["state"] == "FINISHED"
    assert (disk.folder / "it" / "best" / "open_clip_model.safetensors").is_file()
    assert "no report (" in out
    assert f"compare.py {disk.folder / 'it'} makes it" in out
    assert not list(disk.folder.rglob("*.tmp"))


def test_a_disk_that_is_full_when_a_refit_is_written_stops_it(
    garments: Path, disk: Any, run_sweep: RunSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fashionclip_tune.tuning.sweep.write_sweep_report", lambda *_, **__: None)  # seconds each time
    disk.resize(200)
    all_but_the_winner(garments, disk.folder, None)
    flags = ["--results", disk.folder, "--name", "it"]
    for more in (["--resume"], ["--refit", "1"]):
        code, _, err = run_sweep(*flags, *more)
        assert code == 0, err
    # As it was before the model was written.
    folder = disk.folder / "it"
    shutil.rmtree(folder / "refit" / "best")
    content = sweep_json(folder)
    (folder / "sweep.json").write_text(json.dumps({name: value for name, value in content.items() if name != "refit"}))
    disk.leave(megabytes=1)
    code, _, err = run_sweep(*flags, "--refit", "1")
    assert code == 2
    assert "nothing is lost: the disk is full (" in err
    assert f"go on with: {sys.executable} sweeps/run_sweep.py --results {disk.folder} --name it --refit 1 " in err
    disk.resize(400)
    code, _, err = run_sweep(*flags, "--refit", "1")
    assert code == 0, err
    assert sweep_json(folder)["refit"]["metrics"] == content["refit"]["metrics"]
