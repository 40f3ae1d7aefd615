"""Sweep folders that earlier versions left open, resume and compare today (``tests/formats``)."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ARCHIVES = sorted((ROOT / "tests" / "formats").glob("*.tar.xz"))
STANDS_FOR_THE_FOLDER = b"/FIXTURE"
TEXTS = (".json", ".journal", ".csv")


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name)
def left(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder that a version left, unpacked, with its own paths in it."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    for path in (tmp_path / "results").rglob("*"):
        if path.suffix in TEXTS:
            path.write_bytes(path.read_bytes().replace(STANDS_FOR_THE_FOLDER, str(tmp_path).encode()))
    return tmp_path


def run(folder: Path, *command: object) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def sweep_json(sweep_dir: Path) -> dict[str, Any]:
    sweep: dict[str, Any] = json.loads((sweep_dir / "sweep.json").read_text())
    return sweep


def stages(sweep_dir: Path, trial_id: str) -> list[int]:
    (trial,) = sweep_dir.glob(f"trials/{trial_id}-*")
    return sorted(int(path.stem.removeprefix("step_")) for path in (trial / "evaluations").glob("step_*.json"))


@pytest.mark.slow
def test_a_finished_sweep_is_compared_measured_and_not_run_again(left: Path) -> None:
    sweep_dir = left / "results" / "finished"
    before = sweep_json(sweep_dir)
    shown = run(left, ROOT / "sweeps" / "compare.py", sweep_dir)
    best = before["best"]
    assert f"best: trial {best['trial_id']}" in shown
    assert (sweep_dir / "report.html").is_file()
    figures = left / "figures.json"
    run(
        *(left, "-m", "fashionclip_tune", "evaluate", "--model", sweep_dir, "--data", left / "shards"),
        *("--protocol", "instance", "--json", figures, "--set", "device=cpu"),
    )
    # One query of the twenty more or less may be another processor's rounding.
    recall = json.loads(figures.read_text())["figures"][0]["recall_at_10"]
    assert recall == pytest.approx(best["metrics"]["recall_at_10"], abs=0.026)
    again = run(left, ROOT / "sweeps" / "run_sweep.py", "--results", left / "results", "--name", "finished", "--resume")
    assert "this sweep is finished" in again
    assert sweep_json(sweep_dir)["trials"] == before["trials"]


@pytest.mark.slow
@pytest.mark.ray
def test_an_interrupted_sweep_goes_on_to_its_end(left: Path) -> None:
    sweep_dir = left / "results" / "interrupted"
    first = sweep_json(sweep_dir)["trials"][0]
    assert stages(sweep_dir, "0001") == [0, 2, 4]
    run(left, ROOT / "sweeps" / "run_sweep.py", "--results", left / "results", "--name", "interrupted", "--resume")
    after = sweep_json(sweep_dir)
    assert after["state"] == "FINISHED"
    assert [row["trial_id"] for row in after["trials"]] == ["0000", "0001", "0002"]
    assert {name: after["trials"][0][name] for name in first} == first
    assert stages(sweep_dir, "0001") == [0, 2, 4, 6]  # it had passed its only rung
    assert after["trials"][1]["examples_seen"] == 96
    assert (sweep_dir / "best" / "open_clip_config.json").is_file()
