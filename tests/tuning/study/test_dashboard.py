"""optuna-dashboard opens the journal of a sweep that is still running."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from fashionclip_tune.tuning.study.study import SweepStudy

PROGRAM = shutil.which("optuna-dashboard", path=str(Path(sys.executable).parent))


def space(trial: Any) -> Any:
    rate = trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)
    return {"clip_model": "tiny-clip", "loss_function": "contrastive", "training.learning_rate": rate}


@pytest.fixture
def address(tmp_path: Path) -> Iterator[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PROGRAM, str(tmp_path / "study.journal"), "--port", str(port), "--server", "wsgiref", "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    yield f"http://127.0.0.1:{port}", process
    process.terminate()
    process.communicate()


def get(address: Any, path: Any) -> Any:
    url, process = address
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url + path, timeout=30) as answer:
                return json.load(answer)
        except OSError:
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.skipif(PROGRAM is None, reason="optuna-dashboard is not installed")
def test_the_dashboard_shows_a_sweep_while_it_runs(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    study = SweepStudy(tmp_path / "study.journal", seed=0, num_startup_trials=2)
    complete, _ = study.suggest(space)
    study.record_stage(complete, 100, 0.25)
    study.record_stage(complete, 200, 0.5)
    study.end(complete, TrialState.COMPLETE, "budget")
    running, drawn = study.suggest(space)
    study.record_stage(running, 100, 0.375)

    address = request.getfixturevalue("address")
    (summary,) = get(address, "/api/studies")["study_summaries"]
    assert (summary["study_name"], summary["directions"]) == ("sweep", ["maximize"])
    first, second = get(address, f"/api/studies/{summary['study_id']}")["trials"]
    assert (first["state"], first["values"]) == ("Complete", [0.5])
    assert [(each["step"], each["value"]) for each in first["intermediate_values"]] == [(100, 0.25), (200, 0.5)]
    assert (second["state"], [each["value"] for each in second["intermediate_values"]]) == ("Running", [0.375])
    (rate,) = second["params"]
    assert float(rate["param_internal_value"]) == drawn["training.learning_rate"]

    study.record_stage(running, 200, 0.75)  # the sweep goes on, undisturbed, and is seen to
    study.end(running, TrialState.PRUNED, "rung_2")
    deadline = time.monotonic() + 30
    while True:
        _, second = get(address, f"/api/studies/{summary['study_id']}")["trials"]
        if second["state"] == "Pruned":
            break
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert [each["value"] for each in second["intermediate_values"]] == [0.375, 0.75]
    assert SweepStudy(tmp_path / "study.journal", seed=0, num_startup_trials=2).unfinished() == []
