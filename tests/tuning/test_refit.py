"""``--refit N``: the winner's setting trained for longer, in a sweep's folder, by one process at a time."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
from filelock import FileLock, Timeout

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.models.weights import read_weights
from fashionclip_tune.reporting.terminal import comparison
from fashionclip_tune.storage.checkpoint import newest_weights
from fashionclip_tune.training.history import TIMING
from fashionclip_tune.training.train import print_row, train
from fashionclip_tune.tuning import refit
from tests.tuning.conftest import RunSweep, sweep_json


def history(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(path.read_text()) for path in sorted((run / "evaluations").glob("*.json"))]
    return [{name: value for name, value in row.items() if name not in (*TIMING, "memory_gb")} for row in rows]


def test_a_winner_is_trained_for_longer_stopped_and_gone_on_with(
    ended: Path, tmp_path: Path, run_sweep: RunSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--results", tmp_path, "--name", "it", "--refit", "2")
    code, out, err = run_sweep(*flags, "--dry-run")
    assert (code, err) == (0, "")
    assert "refit:    trial 0000, tiny-sig, 192 examples" in out
    assert not (ended / "refit").exists()

    def print_and_stop(row: Any) -> None:
        print_row(row)
        if row["step"] == 6:
            with pytest.raises(Timeout):
                FileLock(ended / ".lock").acquire(timeout=0)
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(refit, "print_row", print_and_stop)
        code, _, err = run_sweep(*flags)
    assert code == 143
    assert err.count("\n") == 1
    assert f"go on with: {sys.executable} sweeps/run_sweep.py --results {tmp_path} --name it --refit 2" in err
    assert "refit" not in sweep_json(ended)

    with FileLock(ended / ".lock"):
        code, _, err = run_sweep(*flags)
    assert (code, "is being run by another process" in err) == (2, True)

    code, out, _ = run_sweep(*flags, "--time-budget", "0.001")  # over before the first step
    assert code == 0
    assert (
        f"the time of this run is up; go on with: {sys.executable} sweeps/run_sweep.py --results {tmp_path} --name it --refit 2"
        in out
    )
    assert "refit" not in sweep_json(ended)

    code, out, err = run_sweep(*flags)
    assert code == 0, err
    found = sweep_json(ended)["refit"]
    assert (found["trial_id"], found["times"], found["examples_seen"], found["step"]) == ("0000", 2, 192, 12)
    rows = history(ended / "refit")
    assert found["metrics"]["recall_at_10"] == rows[-1]["recall_at_10"]
    assert f"refit: 2 times the examples (192), recall_at_10 {rows[-1]['recall_at_10']:.4f}; trial 0000 0.5000; gain" in out

    # As if it had never been stopped; and OpenCLIP loads what came of it.
    config = ProjectConfig.from_dict(json.loads((ended / "refit" / "config.json").read_text()))
    assert (config.loss_function.value, config.training.learning_rate) == ("siglip", 1e-3)
    train(config, tmp_path / "never stopped")
    assert history(tmp_path / "never stopped") == rows
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{ended / 'refit' / 'best'}")
    weights = newest_weights(tmp_path / "never stopped")
    assert weights is not None
    expected, loaded = read_weights(weights), model.state_dict()
    assert expected.keys() == loaded.keys()
    assert all(bool((loaded[name] == tensor).all()) for name, tensor in expected.items())

    assert any("refit: 2 times the examples" in part for part in comparison([ended]) if isinstance(part, str))
    assert "refit: 2 times the examples" in (ended / "report.html").read_text()
    # Once more, as a command that is always the same: it says where the model is, and trains and writes nothing.
    before = {path: path.stat().st_mtime_ns for path in ended.rglob("*") if path.is_file()}
    code, out, err = run_sweep(*flags)
    assert (code, err) == (0, "")
    assert "this refit is finished: nothing to train" in out
    assert f"local-dir:{ended / 'refit' / 'best'}" in out
    assert {path: path.stat().st_mtime_ns for path in ended.rglob("*") if path.is_file()} == before
    code, _, err = run_sweep(*flags[:-1], "3")
    assert (code, err.count("\n")) == (2, 1)
    assert "is a refit with 192 examples, not 288: move it away" in err


def test_what_cannot_be_refitted_is_refused(ended: Path, tmp_path: Path, run_sweep: RunSweep) -> None:
    flags = ("--results", tmp_path, "--name", "it", "--refit")
    code, _, err = run_sweep(*flags, "0")
    assert (code, "--refit 0 is not allowed" in err) == (2, True)
    shutil.copy(ended / "sweep.json", tmp_path / "kept")
    for change in ({"state": "INTERRUPTED"}, {"best": None}):
        (ended / "sweep.json").write_text(json.dumps({**json.loads((tmp_path / "kept").read_text()), **change}))
        code, _, err = run_sweep(*flags, "2")
        assert (code, "has no winner yet" in err) == (2, True)
