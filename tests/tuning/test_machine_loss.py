"""A sweep in two folders: the machine is lost with all but the durable one, at any moment, and another goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fashionclip_tune.history import TIMING

NOISY = (*TIMING, "memory_gb")
ROOT = Path(__file__).parents[2]
SETTINGS = ("--set", "model.pretrained=none", "--set", "training.batch_size=16", "--budget-examples", "144")
pytestmark = [pytest.mark.ray, pytest.mark.slow]


def start(data: Path, machine: Path, results: Path, *more: str) -> subprocess.Popen:
    """The driver on a machine of its own: scratch, home and user are its own."""
    command = [sys.executable, ROOT / "sweeps" / "run_sweep.py", "--data", data, "--results", results, "--name", "it"]
    common = ("--num-trials", "3", "--max-concurrent", "1", "--scratch", machine / "scratch", "--sync-every", "0.01")
    (machine / "home").mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "HOME": str(machine / "home"), "USER": machine.name}
    return subprocess.Popen(
        [*map(str, [*command, *common]), *SETTINGS, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment,
    )


def outcome(results: Path) -> dict:
    """What must not depend on which machines did the work."""
    content = json.loads((results / "it" / "sweep.json").read_text())
    rows = [{name: value for name, value in row.items() if name not in NOISY} for row in content["trials"]]
    histories = {}
    for folder in sorted((results / "it" / "trials").iterdir()):
        rows_of = [json.loads(path.read_text()) for path in sorted((folder / "evaluations").iterdir())]
        histories[folder.name] = [{k: v for k, v in row.items() if k not in NOISY} for row in rows_of]
    return {"state": content["state"], "trials": rows, "best": content["best"], "histories": histories}


def wait_for_stages(results: Path, process: subprocess.Popen, *, trials: int, evaluations: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        folders = sorted((results / "it" / "trials").glob("*"))
        if len(folders) >= trials and len(list(folders[-1].glob("evaluations/*.json"))) >= evaluations:
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    raise AssertionError("the sweep did not get that far")


def test_a_lost_machine_costs_the_time_since_the_last_sync_only(garments, tmp_path):
    whole = start(garments, tmp_path / "steady", tmp_path / "whole")
    out, _ = whole.communicate(timeout=240)
    assert whole.returncode == 0, out

    first = start(garments, tmp_path / "first", tmp_path / "drive")
    wait_for_stages(tmp_path / "drive", first, trials=2, evaluations=3)
    shutil.copytree(tmp_path / "drive", tmp_path / "elsewhere" / "results")  # under way: files in it may be torn
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    for folder in (tmp_path / "drive", tmp_path / "first"):
        while folder.exists():  # workers outlive their driver for seconds, and write
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.2)
    shutil.copytree(garments, tmp_path / "elsewhere" / "shards")

    results = tmp_path / "elsewhere" / "results"
    kept = [path.name for path in results.glob("it/trials/0001-*/state/*")]
    second = start(tmp_path / "elsewhere" / "shards", tmp_path / "second", results, "--resume")
    out, _ = second.communicate(timeout=240)
    assert second.returncode == 0, out
    assert not list((tmp_path / "second").rglob("warnings.log")), "the state was not passed over"
    assert kept, "the test needs a state that was kept: in it the trial goes on"
    assert outcome(results) == outcome(tmp_path / "whole")
    assert not list(results.glob("it/trials/*/state/*")), "states of ended trials are removed"
    assert (results / "it" / "best" / "open_clip_model.safetensors").is_file()
