"""What is kept of ended trials, here and on the durable side. Nothing trains: checkpoints are made up."""

from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.evaluation.metric import DEFAULT_METRIC
from fashionclip_tune.reporting.sweep_files import freed_line, read_sweep
from fashionclip_tune.storage.folder import RemoteFolder
from fashionclip_tune.tuning.persistence.mirror import SweepMirror
from fashionclip_tune.tuning.persistence.record import SweepRecord
from fashionclip_tune.tuning.persistence.retention import Retention
from fashionclip_tune.tuning.study.study import SweepStudy
from fashionclip_tune.tuning.trial import trial_dir

SETTINGS = {"clip_model": "tiny-clip", "loss_function": "contrastive"}
LOCAL = {"checkpoint.json": 10, "model.safetensors": 1000, "training_state.pt": 2000}
DURABLE = {"state/step_00000008/model.safetensors": 700, "state/step_00000008/checkpoint.json": 7}
WEIGHTS = {"weights/step_00000008.safetensors": 300}


class Sweep:
    def __init__(self, tmp_path: Path, **more: Any) -> None:
        self.run_dir, self.rows = tmp_path / "run", list[Any]()
        self.drive = RemoteFolder(tmp_path / "drive")
        mirror = SweepMirror(self.drive, self.run_dir)
        self.retention = Retention(
            self.run_dir, lambda settings: ProjectConfig().with_overrides(settings), mirror, DEFAULT_METRIC, **more
        )

    def add(self, recall: float | None, state: str = "COMPLETE") -> None:
        """A trial with its last two checkpoints here, a state and weights on the drive."""
        number = len(self.rows)
        row = {"trial_id": f"{number:04d}", "state": state, "config": SETTINGS, "recall_at_10": recall, "examples_seen": 16}
        self.rows.append(row)
        folder = self.folder(number)
        for name, size in ((f"checkpoints/step_{step:08d}/{name}", size) for step in (4, 8) for name, size in LOCAL.items()):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x" * size)
        (folder / "config.json").write_text("{}")
        for name, size in {**DURABLE, **WEIGHTS}.items():
            self.drive.put(f"trials/{folder.name}/{name}", b"x" * size)

    def folder(self, number: int) -> Path:
        return trial_dir(self.run_dir, number, SETTINGS["clip_model"], SETTINGS["loss_function"])

    def here(self, number: int) -> dict[str, int]:
        folder = self.folder(number) / "checkpoints"
        return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}

    def there(self, number: int) -> dict[str, int]:
        place = f"trials/{self.folder(number).name}"
        return {name.removeprefix(f"{place}/"): size for name, size in self.drive.sizes(place).items()}


STRIPPED = {"step_00000008/checkpoint.json": 10, "step_00000008/model.safetensors": 1000}
FREED, FREED_DURABLE = 3010 + 2000, 707


def freed(sweep: Sweep) -> tuple[int, int]:
    return sweep.retention.freed_bytes, sweep.retention.freed_durable_bytes


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    sweep = Sweep(tmp_path)
    for recall in (0.1, 0.3, 0.2):
        sweep.add(recall)
    sweep.add(0.9, "RUNNING")
    sweep.retention.apply(sweep.rows)
    return sweep


def test_the_best_three_keep_weights_and_a_running_trial_all(sweep: Any) -> None:
    for number in range(3):
        assert sweep.here(number) == STRIPPED
        assert sweep.there(number) == {**WEIGHTS, "config.json": 2}
    assert len(sweep.here(3)) == 6
    assert sweep.there(3) == {**DURABLE, **WEIGHTS}
    assert freed(sweep) == (3 * FREED, 3 * FREED_DURABLE)


def test_one_that_is_among_them_no_more_keeps_its_figures_which_are_written_once(
    sweep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, put_file = [], sweep.drive.put_file
    monkeypatch.setattr(sweep.drive, "put_file", lambda name, source: (written.append(name), put_file(name, source)))
    sweep.rows[3]["state"] = "PRUNED"
    sweep.retention.apply(sweep.rows)
    assert sweep.here(0) == {}
    assert sweep.there(0) == {"config.json": 2}
    assert sweep.here(3) == STRIPPED
    assert sweep.there(3) == {**WEIGHTS, "config.json": 2}
    assert freed(sweep) == (4 * FREED + 1010, 4 * FREED_DURABLE + 300)
    assert written == [f"trials/{sweep.folder(3).name}/config.json"]
    sweep.retention.apply(sweep.rows)
    assert freed(sweep) == (4 * FREED + 1010, 4 * FREED_DURABLE + 300)


@pytest.mark.parametrize("keeps_states", [True, False])
def test_a_trial_that_waits_keeps_its_last_state_here_and_on_the_drive_if_there_is_room(
    tmp_path: Path, keeps_states: bool
) -> None:
    """Its best rivals have ended: it is no keeper, and keeps its weights nevertheless."""
    sweep = Sweep(tmp_path, keeps_paused_states=keeps_states)
    for recall in (0.5, 0.6, 0.7):
        sweep.add(recall)
    sweep.add(0.1, "PAUSED")
    with FileLock(sweep.folder(3) / ".lock"):  # its worker is about to let go
        sweep.retention.apply(sweep.rows)
        assert len(sweep.here(3)) == 6
    sweep.retention.apply(sweep.rows)
    assert sweep.here(3) == {f"step_00000008/{name}": size for name, size in LOCAL.items()}
    assert sweep.there(3) == ({**DURABLE, **WEIGHTS} if keeps_states else WEIGHTS)
    assert freed(sweep) == (3 * FREED + 3010, (3 if keeps_states else 4) * FREED_DURABLE)
    sweep.rows[3]["state"] = "PRUNED"
    sweep.retention.apply(sweep.rows)
    assert (sweep.here(3), sweep.there(3)) == ({}, {"config.json": 2})


def test_a_folder_that_its_worker_still_holds_is_left_for_later(sweep: Any) -> None:
    sweep.add(0.05)
    with FileLock(sweep.folder(4) / ".lock"):
        sweep.retention.apply(sweep.rows)
        assert len(sweep.here(4)) == 6
        assert sweep.there(4) == {**DURABLE, **WEIGHTS}
    sweep.retention.apply(sweep.rows)
    assert (sweep.here(4), sweep.there(4)) == ({}, {"config.json": 2})


def test_what_was_freed_stands_in_the_record_of_all_lives(tmp_path: Path) -> None:
    study = SweepStudy(tmp_path / "study.journal", seed=0, num_startup_trials=1)
    record = SweepRecord(tmp_path, study, {"name": "it", "freed_bytes": 1_000_000, "freed_durable_bytes": 0})
    content = record.write("RUNNING", (2_000_000, 3_000_000))
    assert (content["freed_bytes"], content["freed_durable_bytes"]) == (3_000_000, 3_000_000)
    assert read_sweep(tmp_path)["freed_bytes"] == 3_000_000
    assert freed_line(content).startswith("freed 3 MB in the results, 3 MB in the scratch folder: states of ended trials")
    assert freed_line({**content, "freed_durable_bytes": 0}).startswith("freed 3 MB: states")
    assert freed_line(SweepRecord(tmp_path, study, {}).write("RUNNING")) is None
