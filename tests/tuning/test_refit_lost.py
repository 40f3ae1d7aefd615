"""A refit of a sweep in two folders: the machine is lost in the middle of it, and another goes on."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.config.section import assignments
from fashionclip_tune.storage.folder import RemoteFolder
from fashionclip_tune.training.history import TIMING
from fashionclip_tune.training.train import print_row, train
from fashionclip_tune.tuning import refit
from fashionclip_tune.tuning.persistence.location import SweepCatalog
from fashionclip_tune.tuning.persistence.record import sweep_header
from fashionclip_tune.tuning.planning.plan import plan_sweep
from fashionclip_tune.tuning.planning.settings import SweepSettings
from fashionclip_tune.tuning.sweep import sweep

ROW = {"trial_id": "0000", "state": "COMPLETE", "stop_reason": "budget", "examples_seen": 96, "step": 6, "gain": None}
CONFIG = {"clip_model": "tiny-sig", "loss_function": "siglip", "training.learning_rate": 1e-3}
METRICS = {"recall_at_10": 0.5, "recall_at_5": 0.25}


class LostError(Exception):
    """The machine is gone."""


def history(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(path.read_text()) for path in sorted((run / "evaluations").glob("*.json"))]
    return [{name: value for name, value in row.items() if name not in (*TIMING, "memory_gb")} for row in rows]


@pytest.fixture
def settings(garments: Path, tmp_path: Path) -> SweepSettings:
    """Of a sweep that has ended, of which the drive has what there is; made without Ray."""
    settings = SweepSettings(
        data=str(garments),
        overrides=assignments(["model.pretrained=none", "training.batch_size=16"]),
        num_trials=2,
        budget_examples=96,
        grace_examples=48,
        samples_per_second=100.0,
        scratch=str(tmp_path / "making"),
        sync_every=0.0,
    )
    place = SweepCatalog(str(tmp_path / "drive")).place("it", settings.scratch)
    header = sweep_header(plan_sweep(settings), place)
    place.mirror.start(header)
    row = {**ROW, "config": CONFIG, **METRICS, "message": None, "duration_s": 1.0, "device_s": 1.0}
    best = {"trial_id": "0000", "config": CONFIG, "metrics": METRICS}
    content = {**header, "state": "FINISHED", "zero_shot": {}, "trials": [row], "best": best}
    place.mirror.folder.put("sweep.json", json.dumps(content).encode())
    return settings


def test_a_refit_goes_on_on_another_machine(settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []

    def run(machine: str, *, lost_at: int | None, dry_run: bool = False) -> str:
        def show(row: Any) -> None:
            print_row(row)
            steps.append(row["step"])
            if row["step"] == lost_at:
                raise LostError

        monkeypatch.setattr(refit, "print_row", show)
        here = SweepSettings(scratch=str(tmp_path / machine), sync_every=0.0)
        console = Console(file=io.StringIO(), width=400)
        common = {"resume": False, "dry_run": dry_run, "console": console, "refit": 2}
        sweep(here, results=tmp_path / "drive", name="it", **common)
        return console.file.getvalue()

    with pytest.raises(LostError):
        run("first", lost_at=6)
    shutil.rmtree(tmp_path / "first")
    run("second", lost_at=None)
    assert steps == [0, 3, 6, 6, 9, 12]

    drive = tmp_path / "drive" / "it" / "refit"
    config = ProjectConfig.from_dict(json.loads((drive / "config.json").read_text()))
    train(config, tmp_path / "never stopped")
    assert history(drive) == history(tmp_path / "never stopped")
    (local,) = (tmp_path / "second").glob("sweeps/*/refit/best/open_clip_model.safetensors")
    assert (drive / "best" / local.name).read_bytes() == local.read_bytes()
    assert RemoteFolder(drive).sizes("state") == {}

    # A third machine, which has nothing of it, and the second one: it is done, and stays as it is.
    steps.clear()
    sweep_dir = tmp_path / "drive" / "it"
    before = {path: path.stat().st_mtime_ns for path in sweep_dir.rglob("*") if path.is_file()}
    for machine in ("third", "second"):
        assert f"local-dir:{drive / 'best'}" in run(machine, lost_at=None)
    assert steps == []
    assert {path: path.stat().st_mtime_ns for path in sweep_dir.rglob("*") if path.is_file()} == before
    # Who has moved it away wants another one.
    (drive / "best").rename(tmp_path / "moved")
    assert "refit:    trial 0000, tiny-sig, 192 examples" in run("fourth", lost_at=None, dry_run=True)
