"""Sweeps whose files were changed by somebody: to go on with one, to refit it or to start with its trials runs nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.tuning.console.outcome import how_to_go_on
from fashionclip_tune.tuning.persistence.location import SweepLocation
from fashionclip_tune.tuning.planning.settings import SweepSettings, stored_settings
from fashionclip_tune.tuning.study.study import SweepStudy
from tests.support.tampering import tampered
from tests.tuning.conftest import RunSweep, sweep_json


@pytest.fixture
def marker(tmp_path: Path) -> Any:
    return tmp_path / "it-ran"


@pytest.fixture
def interrupted(ended: Path) -> Any:
    """``ended``, as it was when its only trial ran: with a journal."""
    content = sweep_json(ended)
    study = SweepStudy(ended / "study.journal", seed=0, num_startup_trials=1)
    trial = {**content["best"]["config"], "model.pretrained": None, "training.batch_size": 16}
    study.suggest(lambda _: trial)
    (ended / "sweep.json").write_text(json.dumps({**content, "state": "INTERRUPTED", "best": None, "trials": []}))
    return ended


def refused(result: Any, marker: Any) -> None:
    code, _, err = result
    assert (code, err.count("\n")) == (2, 1), err
    assert "must be asked for: --allow-remote" in err
    assert not marker.exists()


@pytest.mark.parametrize("how", [("--resume",), ("--resume", "--dry-run"), ("--refit", "2"), ("--refit", "2", "--dry-run")])
def test_what_a_sweep_says_of_its_data_is_not_followed(
    ended: Path, interrupted: Any, tmp_path: Path, marker: Path, run_sweep: RunSweep, how: Any
) -> None:
    if "--refit" in how:
        content = sweep_json(ended)
        best = {"trial_id": "0000", "config": {"clip_model": "tiny-sig", "loss_function": "siglip"}}
        (ended / "sweep.json").write_text(json.dumps({**content, "state": "FINISHED", "best": best}))
    tampered(ended, marker)
    refused(run_sweep("--results", tmp_path, "--name", "it", *how), marker)


def only_trials(folder: Any, marker: Any) -> None:
    """The settings of trials are tampered with, those of the sweep are as they were."""
    before = sweep_json(folder)
    after = json.loads((tampered(folder, marker) / "sweep.json").read_text())
    same = {name: before[name] for name in ("settings", "base_config")}
    (folder / "sweep.json").write_text(json.dumps({**after, **same}))


def test_what_a_winner_says_of_its_data_is_not_followed(ended: Path, tmp_path: Path, marker: Path, run_sweep: RunSweep) -> None:
    only_trials(ended, marker)
    refused(run_sweep("--results", tmp_path, "--name", "it", "--refit", "2"), marker)


@pytest.mark.ray
@pytest.mark.slow
def test_what_a_trial_says_of_its_data_is_not_followed(
    interrupted: Any, tmp_path: Path, marker: Path, run_sweep: RunSweep, local_ray: None
) -> None:
    """It fails, with the reason; the other one is well."""
    only_trials(interrupted, marker)
    code, out, err = run_sweep("--results", tmp_path, "--name", "it", "--resume", "--max-concurrent", "1")
    assert not marker.exists()
    assert (code, err) == (0, ""), out
    foreign, own = sweep_json(interrupted)["trials"]
    assert (foreign["state"], own["state"]) == ("FAIL", "COMPLETE")
    assert "must be asked for: --allow-remote" in foreign["message"]


def test_older_trials_run_nothing(garments: Path, ended: Path, tmp_path: Path, marker: Path, run_sweep: RunSweep) -> None:
    study = SweepStudy(ended / "study.journal", seed=0, num_startup_trials=1)
    number, _ = study.suggest(lambda _: {"clip_model": "tiny-sig"})
    study.record_stage(number, 48, 0.3)
    study.end(number, TrialState.COMPLETE, "budget")
    older = tampered(Path(shutil.copytree(ended, tmp_path / "older")), marker)
    fixed = ("--set", "model.pretrained=none", "--set", "training.batch_size=16", "--samples-per-second", "100")
    for more in ((), ("--dry-run",)):
        run_sweep("--data", garments, "--results", tmp_path, "--name", "new", *fixed, "--warm-start", older, *more)
    assert not marker.exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_on_photos_from_elsewhere_goes_on_where_its_caller_allows_it_again(
    garments: Path, ended: Path, interrupted: Any, tmp_path: Path, run_sweep: RunSweep, local_ray: None
) -> None:
    content = sweep_json(interrupted)
    for split in ("train", "valid"):
        shard = f"pipe:cat {garments}/clip_dataset_{split}_aug.000000.tar"
        content["settings"]["overrides"][f"{split}_shards_pattern"] = shard
    content["settings"]["allow_remote"] = True
    (interrupted / "sweep.json").write_text(json.dumps(content))
    command = ("--results", tmp_path, "--name", "it", "--resume", "--max-concurrent", "1")
    code, _, err = run_sweep(*command)
    assert (code, "must be asked for: --allow-remote" in err) == (2, True)
    code, out, err = run_sweep(*command, "--allow-remote", "--time-budget", "0.001")  # over before a trial could start
    assert code == 0, err
    (how,) = (line for line in out.splitlines() if "go on with: " in line)
    assert " --allow-remote" in how
    code, out, err = run_sweep(*command, "--allow-remote")
    assert (code, err) == (0, ""), out
    rows = sweep_json(interrupted)["trials"]
    assert len(rows) == 2
    assert {row["state"] for row in rows} <= {"COMPLETE", "PRUNED"}
    for path in interrupted.glob("trials/*/config.json"):
        config = ProjectConfig.from_dict(json.loads(path.read_text()))
        assert config.reading.allow_remote
        assert str(config.valid_shards_pattern).startswith("pipe:")
    assert "What the winner finds" in (interrupted / "report.html").read_text()
    assert "must be asked for" not in (interrupted / "report.html").read_text(), "the sweep's own report has the photos"


REMOTE = {"address": "10.0.0.1:6379", "allow_remote": True, "warm_start": "s3://bucket/older", "num_trials": 16}


def test_what_reaches_out_is_to_be_said_again() -> None:
    stored = stored_settings(REMOTE, "it")
    with pytest.raises(UserError, match=r"sweep it was started with --address 10\.0\.0\.1:6379, .*or --address local to go on"):
        stored.resumed(SweepSettings(), "it")
    with pytest.raises(UserError, match=r"sweep it was started with --warm-start s3://bucket/older, .*give this flag again"):
        stored.resumed(SweepSettings(address="local"), "it")
    here = stored.resumed(SweepSettings(address="local", warm_start="s3://bucket/older"), "it")
    assert (here.cluster, here.allow_remote, here.num_trials) == (None, None, 16)
    there = stored.resumed(SweepSettings(address="10.0.0.1:6379", warm_start="s3://bucket/older", allow_remote=True), "it")
    assert (there.cluster, there.allow_remote) == ("10.0.0.1:6379", True)
    assert SweepSettings(address="local").cluster is None
    said = how_to_go_on(SweepLocation("/results/it", Path("/results/it"), None), there)
    for flag in ("--address 10.0.0.1:6379", "--allow-remote", "--warm-start s3://bucket/older"):
        assert flag in said
    in_a_folder = stored_settings({"warm_start": "/results/older"}, "it")
    assert in_a_folder.resumed(SweepSettings(), "it").warm_start == "/results/older"


def test_settings_that_are_none_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"recorded with sweep it are not of this version .*'evil'"):
        stored_settings({"evil": 1}, "it")


def test_a_resumed_sweep_does_not_connect_to_an_address_from_its_files(
    ended: Path, tmp_path: Path, run_sweep: RunSweep
) -> None:
    content = sweep_json(ended)
    content["settings"]["address"] = "127.0.0.1:1"
    (ended / "sweep.json").write_text(json.dumps({**content, "state": "INTERRUPTED"}))
    code, _, err = run_sweep("--results", tmp_path, "--resume")
    assert (code, "no Ray cluster answers" in err, "give this flag again" in err) == (2, False, True)
    code, out, err = run_sweep("--results", tmp_path, "--resume", "--address", "local", "--dry-run")
    assert (code, err) == (0, ""), out
