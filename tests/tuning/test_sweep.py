"""Real sweeps: real Ray, real Optuna, real training of the tiny towers, real kill signals."""

import csv
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.resilience.started_processes import Leaving, marked, running, running_below, still_there
from fashionclip_tune.evaluation.metric import DEFAULT_METRIC
from fashionclip_tune.machine.hardware import this_machine
from fashionclip_tune.training.history import TIMING
from fashionclip_tune.tuning.persistence.retention import keepers
from tests.tuning.conftest import RunSweep, sweep_json

ROOT = Path(__file__).parents[2]

SETTINGS = (
    *("--set", "model.pretrained=none", "--set", "training.batch_size=16"),
    *("--budget-examples", "144", "--samples-per-second", "100"),
)
# The first one runs to its budget, so that it can be met in the middle; where trials wait, benchmarks/kill_sweep kills them.
FOUR = ("--num-trials", "4", "--max-concurrent", "1", "--scheduler", "asha-stopping")
WITH_LOADERS = ("--set", "training.num_workers=2")  # cut to the cores
pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def finished(garments: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Any:
    """A sweep of six trials in this process, with stages of 16 examples and rungs at 16 and 48."""
    from rich.console import Console

    from fashionclip_tune.config.section import assignments
    from fashionclip_tune.tuning.planning.settings import SweepSettings
    from fashionclip_tune.tuning.sweep import sweep

    results = tmp_path_factory.mktemp("results")
    fixed = assignments(SETTINGS[1:4:2])
    # Two side by side take up to 0.57 GB.
    settings = SweepSettings(data=str(garments), num_trials=6, budget_examples=144, disk_budget_gb=0.6, overrides=fixed)
    with open(results / "output", "w") as output:
        sweep(settings, results=results, name="six", resume=False, dry_run=False, console=Console(file=output, width=200))
    return results / "six"


def test_every_trial_is_in_every_file(finished: Path) -> None:
    content = sweep_json(finished)
    assert content["state"] == "FINISHED"
    rows = content["trials"]
    assert [row["trial_id"] for row in rows] == [f"{number:04d}" for number in range(6)]
    with open(finished / "trials.csv") as file:
        table = list(csv.DictReader(file))
    assert [float(line["recall_at_10"]) for line in table] == [row["recall_at_10"] for row in rows]
    for row in rows:
        (folder,) = (finished / "trials").glob(f"{row['trial_id']}-*")
        loss = row["config"]["loss_function"]
        assert folder.name == f"{row['trial_id']}-{row['config']['clip_model']}-{loss}"
        evaluations = [json.loads(path.read_text()) for path in sorted((folder / "evaluations").glob("*.json"))]
        assert [e["examples_seen"] for e in evaluations] == list(range(0, row["examples_seen"] + 1, 16))
        assert evaluations[-1]["recall_at_10"] == row["recall_at_10"]
        assert max(e["recall_at_10"] for e in evaluations) == row["max_recall_at_10"]
        config = json.loads((folder / "config.json").read_text())
        assert {name: config[name] for name in row["config"]} == row["config"]
        zero_shot = evaluations[0]["recall_at_10"]
        assert content["zero_shot"][row["config"]["clip_model"]]["recall_at_10"] == row["untouched_recall_at_10"] == zero_shot
        assert row["gain"] == row["recall_at_10"] - zero_shot
        assert 0 < row["device_s"] == evaluations[-1]["device_s"] < row["duration_s"]
        assert row["relative_gain"] == pytest.approx(row["gain"] / zero_shot)
        assert (row["protocol"], row["num_gallery_images"], row["num_gallery_texts"]) == ("instance", 20, 20)
    assert [float(line["device_s"]) for line in table] == [row["device_s"] for row in rows]
    assert [float(line["gain"]) for line in table] == [row["gain"] for row in rows]
    assert "recall_at_10: instance among 20 photos, 20 texts" in (finished.parent / "output").read_text()


def test_trials_ended_by_budget_or_at_a_rung_and_some_were_stopped(finished: Path) -> None:
    ends = {(row["stop_reason"], row["examples_seen"], row["state"]) for row in sweep_json(finished)["trials"]}
    assert ends <= {("budget", 144, "COMPLETE"), ("rung_1", 16, "PRUNED"), ("rung_2", 48, "PRUNED")}
    assert len({end[0] for end in ends}) > 1


def test_the_best_trial_is_the_one_with_the_highest_last_recall(finished: Path) -> None:
    content = sweep_json(finished)
    assert content["best"]["metrics"]["recall_at_10"] == max(row["recall_at_10"] for row in content["trials"])


def test_the_winner_loads_with_openclip_and_scores_what_the_sweep_says(finished: Path, garments: Path) -> None:
    """Photos and captions read from the tar by hand, prepared and encoded by OpenCLIP alone, ranked by brute force."""
    import tarfile

    best = sweep_json(finished)["best"]
    assert f"trial {best['trial_id']}, the best of" in (finished / "best" / "README.md").read_text()
    name = f"local-dir:{finished / 'best'}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    with tarfile.open(garments / "clip_dataset_valid_aug.000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    keys = sorted(member[:-4] for member in members if member.endswith(".jpg"))
    import io

    photos = torch.stack([preprocess(Image.open(io.BytesIO(members[f"{key}.jpg"]))) for key in keys])
    captions = [members[f"{key}.txt0.txt"].decode() for key in keys]
    with torch.no_grad():
        images = model.encode_image(photos, normalize=True)
        # One encoding for equal captions: their similarities are to tie exactly.
        rows = {caption: model.encode_text(tokenizer([caption]), normalize=True)[0] for caption in captions}
    scores = images @ torch.stack([rows[caption] for caption in captions]).T

    def recall(scores: Any) -> Any:
        total = 0.0
        for i, row in enumerate(scores.tolist()):
            better, tied = sum(s > row[i] for s in row), sum(s == row[i] for s in row)
            total += min(1.0, max(0.0, (10 - better) / tied))
        return total / len(scores)

    assert (recall(scores) + recall(scores.T)) / 2 == pytest.approx(best["metrics"]["recall_at_10"], abs=1e-9)


def test_tensorboard_shows_a_curve_of_every_trial(finished: Path) -> None:
    for folder in sorted((finished / "trials").iterdir()):
        events = EventAccumulator(str(folder))
        events.Reload()
        evaluations = [json.loads(path.read_text()) for path in sorted((folder / "evaluations").glob("*.json"))]
        curve = [(event.step, event.value) for event in events.Scalars("recall_at_10")]
        expected = [(e["examples_seen"], pytest.approx(e["recall_at_10"], abs=1e-6)) for e in evaluations]
        assert curve == expected
        tags = set(events.Tags()["scalars"])
        assert {"train/loss", "train/learning_rate", "train/logit_scale", "train/samples_per_second", "recall_at_5"} <= tags


def test_the_best_three_of_an_architecture_keep_their_weights_and_none_an_optimizer(finished: Path) -> None:
    kept = keepers(sweep_json(finished)["trials"], DEFAULT_METRIC)
    for folder in (finished / "trials").iterdir():
        if folder.name[:4] not in kept:
            assert not (folder / "checkpoints").exists()
            continue
        (checkpoint,) = (folder / "checkpoints").glob("step_*")
        assert sorted(path.name for path in checkpoint.iterdir()) == ["checkpoint.json", "model.safetensors"]
    freed_bytes = sweep_json(finished)["freed_bytes"]
    assert freed_bytes > 6 * 9_000_000, "Adam's moments of each trial at least"
    assert f"freed {freed_bytes / 1e6:,.0f} MB: states of ended trials" in (finished.parent / "output").read_text()


def test_the_output_names_the_winner_its_gain_and_how_to_load_it(finished: Path) -> None:
    said = (finished.parent / "output").read_text()
    best = sweep_json(finished)["best"]
    assert f"best: trial {best['trial_id']}" in said
    assert "gain +" in said or "gain -" in said
    assert f"local-dir:{finished / 'best'}" in said
    assert f"{sys.executable} -m tensorboard.main --logdir {finished}" in said


def test_resuming_a_finished_sweep_says_so_and_changes_nothing(finished: Path, run_sweep: RunSweep) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    code, out, _ = run_sweep("--results", finished.parent, "--name", "six", "--resume")
    assert code == 0
    assert "finished: nothing to resume" in out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


def test_a_resumed_sweep_keeps_its_settings(finished: Path, run_sweep: RunSweep) -> None:
    common = ("--results", finished.parent, "--name", "six", "--resume")
    code, _, err = run_sweep(*common, "--num-trials", "5")
    assert (code, err.count("\n")) == (2, 1)
    assert "--num-trials 6, not 5" in err
    code, _, err = run_sweep(*common, "--set", "training.batch_size=32")
    assert code == 2
    assert "training.batch_size" in err


def test_a_finished_sweep_gets_more_trials(finished: Path, tmp_path: Path, run_sweep: RunSweep) -> None:
    """What had ended stays as it was; the search decides with it, and the terms grow with the trials."""
    shutil.copytree(finished, tmp_path / "six")
    before = sweep_json(finished)
    journal = (tmp_path / "six" / "study.journal").read_bytes()
    code, out, err = run_sweep("--results", tmp_path, "--name", "six", "--resume", "--num-trials", "8")
    assert (code, err) == (0, "")
    assert "so far:   6 of 8 trials have ended" in out
    content = sweep_json(tmp_path / "six")
    assert (content["state"], content["settings"]["num_trials"]) == ("FINISHED", 8)
    assert [row["trial_id"] for row in content["trials"]] == [f"{number:04d}" for number in range(8)]
    assert content["trials"][:6] == before["trials"]
    assert content["decisions"][: len(before["decisions"])] == before["decisions"]
    assert (tmp_path / "six" / "study.journal").read_bytes().startswith(journal)
    code, out, err = run_sweep("--results", tmp_path, "--name", "six", "--resume")
    assert code == 0
    assert "this sweep is finished: nothing to resume" in out


def test_every_decision_is_recorded_and_nobody_waits_at_the_end(finished: Path) -> None:
    content = sweep_json(finished)
    decisions = content["decisions"]
    at_rungs = [(each["reporter"], each["examples_seen"]) for each in decisions if each["reporter"] is not None]
    assert len(set(at_rungs)) == len(at_rungs)
    reached = {(int(row["trial_id"]), rung) for row in content["trials"] for rung in (16, 48) if row["examples_seen"] >= rung}
    assert set(at_rungs) == reached
    assert {row["state"] for row in content["trials"]} <= {"COMPLETE", "PRUNED"}
    started = [each["chosen"] for each in decisions if each["chosen"] is not None and each["chosen"]["trial"] is None]
    assert len(started) == 6 - 2, "but for the point of each start"
    assert all(0 <= each["predicted"] <= 1.5 and each["deviation"] > 0 for each in started)


def test_compare_ranks_a_sweep(finished: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "sweeps" / "compare.py", finished], capture_output=True, text=True, check=True, timeout=120
    )
    order = [line.split()[0] for line in done.stdout.splitlines() if line[:4].isdigit()]
    rows = sweep_json(finished)["trials"]
    expected = sorted(rows, key=lambda row: (-row["recall_at_10"], row["trial_id"]))
    assert order == [row["trial_id"] for row in expected]
    assert len({row["config"]["clip_model"] for row in rows}) == 2
    assert "best of each model" in done.stdout


def test_a_finished_sweep_is_extended_by_one_that_starts_with_its_trials(
    finished: Path, garments: Path, run_sweep: RunSweep
) -> None:
    """As many more trials as are asked for; the older ones are in the study, not in the tables."""
    before = (finished / "study.journal").read_bytes()
    arguments = ("--data", garments, "--results", finished.parent, "--name", "more", "--num-trials", "2", *SETTINGS)
    code, out, err = run_sweep(*arguments, "--warm-start", finished, "--seed", "1")
    assert (code, err) == (0, "")
    assert f"older:    6 ended trials of {finished} come first: not counted, not ranked here" in out
    rows = sweep_json(finished.parent / "more")["trials"]
    assert [row["trial_id"] for row in rows] == ["0006", "0007"]
    assert len(list((finished.parent / "more" / "trials").iterdir())) == 2
    assert (finished / "study.journal").read_bytes() == before
    assert sweep_json(finished.parent / "more")["best"]["trial_id"] in ("0006", "0007")
    code, out, err = run_sweep("--results", finished.parent, "--name", "more", "--resume", "--warm-start", garments)
    assert code == 2
    assert f"--warm-start {finished}, not {garments}" in err


def test_tables_say_what_was_trained_not_what_the_space_drew(
    garments: Path, tmp_path: Path, run_sweep: RunSweep, local_ray: None
) -> None:
    """``--set`` overrules the space, which may also leave model and loss to its BASE."""
    file = tmp_path / "mine.py"
    file.write_text(
        "BASE = {'clip_model': 'tiny-sig'}\n"
        "def space(trial):\n"
        "    return {'training.learning_rate': trial.suggest_float('learning_rate', 1e-5, 1e-2, log=True)}\n"
    )
    fixed = ("--set", "training.learning_rate=0.001", "--budget-examples", "48", "--scheduler", "none")
    arguments = ("--data", garments, "--results", tmp_path, "--name", "mine", "--space", file, "--num-trials", "3")
    code, out, err = run_sweep(*arguments, *SETTINGS[:4], *fixed)
    assert code == 0, err
    content = sweep_json(tmp_path / "mine")
    for row in content["trials"]:
        assert row["config"] == {
            "clip_model": "tiny-sig",
            "loss_function": "contrastive",
            "training.learning_rate": 0.001,
            "model.pretrained": None,
            "training.batch_size": 16,
        }
    assert list(content["zero_shot"]) == ["tiny-sig"]
    # The rungs know the architecture: equal runs score equally, and none is below the others.
    assert {row["stop_reason"] for row in content["trials"]} == {"budget"}
    # What started it goes on with it: here it is finished.
    code, out, err = run_sweep(*arguments, *SETTINGS[:4], *fixed, "--device", "auto", "--max-concurrent", "1", "--resume")
    assert (code, err) == (0, "")
    assert "nothing to resume" in out


class Driver:
    """``run_sweep.py`` in a process group of its own, as a user's terminal starts it."""

    def __init__(self, results: Path, garments: Path, *more: str) -> None:
        command = [sys.executable, ROOT / "sweeps" / "run_sweep.py", "--data", garments, "--results", results, "--name", "it"]
        self.sweep_dir = results / "it"
        self.mark = f"{self.sweep_dir} {time.monotonic_ns()}"
        self.process = subprocess.Popen(
            [*map(str, command), *FOUR, *SETTINGS, *map(str, more)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # The threshold: as if memory were short, where Ray would end workers, and Tune the sweep for it.
            env={**os.environ, "RAY_memory_usage_threshold": "0.01", **marked(self.mark)},
        )

    def wait_for(self, trials: int, evaluations: int) -> None:
        """Until so many trials were started and the last of them has so many evaluations."""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            folders = sorted((self.sweep_dir / "trials").glob("*"))
            if len(folders) >= trials and len(list(folders[-1].glob("evaluations/*.json"))) >= evaluations:
                return
            assert self.process.poll() is None, self.process.stdout.read()
            time.sleep(0.01)
        raise AssertionError("the sweep did not get that far")

    def kill(self, attacks: ModuleType, kind: str) -> Leaving:
        """The end of all that it had started, which the next driver does not wait for."""
        below = attacks.kill(self.process, kind, random.Random(0))
        if this_machine().cores > 1:  # else trials read for themselves
            assert any("multiprocessing.forkserver" in name for name in below.values())
        if kind == "worker":
            return Leaving(lambda: still_there(below))
        self.process.stdout.close()  # unread: whoever lives on may hold the other end
        return Leaving(lambda: running(self.mark))

    def finish(self) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=500)
        return self.process.returncode, out


@pytest.fixture
def attacks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark that kills sweeps: its ways to kill, and what has to hold afterwards."""
    return importlib.import_module("benchmarks.resilience.kill_sweep")


@pytest.mark.slow
@pytest.mark.timeout(1500)  # it starts a sweep four times: four minutes alone, more beside others
def test_a_sweep_that_is_killed_again_and_again_ends_as_one_that_never_was(
    garments: Path, tmp_path: Path, run_sweep: RunSweep, local_ray: None, attacks: Any
) -> None:
    """SIGKILL to the trial's worker, to the driver with all below it, to the driver alone (its workers live on for seconds)."""
    driver = Driver(tmp_path, garments, *WITH_LOADERS)
    driver.wait_for(trials=1, evaluations=3)
    leaving = [driver.kill(attacks, "worker")]
    driver.wait_for(trials=2, evaluations=1)  # by itself
    code, _, err = run_sweep("--results", tmp_path, "--name", "it", "--resume")
    assert (code, err.count("\n")) == (2, 1)
    assert "is being run by another process" in err
    leaving.append(driver.kill(attacks, "group"))
    assert sweep_json(driver.sweep_dir)["state"] == "RUNNING"
    assert attacks.violations(driver.sweep_dir, 1, ended=False) == []

    driver = Driver(tmp_path, garments, "--resume")
    driver.wait_for(trials=3, evaluations=1)
    leaving.append(driver.kill(attacks, "driver"))
    assert attacks.violations(driver.sweep_dir, 1, ended=False) == []

    code, out = Driver(tmp_path, garments, "--resume").finish()
    assert code == 0, out
    assert [each.violation() for each in leaving] == ["", "", ""], "loader processes and Ray's own included"
    assert attacks.violations(driver.sweep_dir, 1, ended=True) == []
    four = ("--data", garments, "--results", tmp_path, *FOUR, *SETTINGS, *WITH_LOADERS)
    code, _, err = run_sweep(*four, "--name", "never-stopped")
    assert code == 0, err
    ours, expected = (attacks.outcome(tmp_path / name) for name in ("it", "never-stopped"))
    assert attacks.differences(ours, expected) == []
    # and a stage that is missing, or recorded twice, would have been noticed
    next(driver.sweep_dir.glob("trials/0001-*/evaluations/step_00000000.json")).unlink()
    assert any("trial 1 has evaluations at [1" in found for found in attacks.violations(driver.sweep_dir, 1, ended=True))
    journal = driver.sweep_dir / "study.journal"
    stage = next(line for line in journal.read_text().splitlines(keepends=True) if '"op_code":7' in line)
    journal.write_text(journal.read_text() + stage)
    assert any("twice in the journal" in found for found in attacks.violations(driver.sweep_dir, 1, ended=True))


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", ".sweep.json.4711.tmp"]])
@pytest.mark.parametrize("name", [["--name", "it"], []])
def test_a_sweep_killed_before_anything_was_recorded_starts_afresh(
    garments: Path, tmp_path: Path, run_sweep: RunSweep, left: Any, name: Any
) -> None:
    folder = tmp_path / ("it" if name else "sweep-001")
    folder.mkdir()
    for file in left:
        (folder / file).write_text("{")
    arguments = ("--data", garments, "--results", tmp_path, *name, *SETTINGS, "--dry-run")
    code, out, err = run_sweep(*arguments, "--resume")
    assert (code, err) == (0, "")
    assert f"sweep:    {folder}\n" in out
    (folder / "study.journal").touch()
    code, out, err = run_sweep(*arguments, "--resume")
    assert (code, "exists: add --resume" in err) == (2, True) if name else (0, False)


@pytest.fixture
def begun(finished: Path, garments: Path, tmp_path: Path) -> Any:
    """A sweep of which only sweep.json is left, on data and with a space that the test may change."""
    content = sweep_json(finished)
    data, space = tmp_path / "data", tmp_path / "mine.py"
    shutil.copytree(garments, data)
    shutil.copy(ROOT / "fashionclip_tune" / "spaces" / "tiny.py", space)
    content["settings"] |= {"data": str(data), "space": str(space)}
    (tmp_path / "results" / "it").mkdir(parents=True)
    (tmp_path / "results" / "it" / "sweep.json").write_text(json.dumps({**content, "state": "INTERRUPTED"}))
    return SimpleNamespace(data=data, space=space, resume=("--results", tmp_path / "results", "--resume", "--dry-run"))


def test_a_sweep_whose_space_has_changed_is_refused_with_the_lines(begun: Any, run_sweep: RunSweep) -> None:
    code, _, err = run_sweep(*begun.resume)
    assert (code, err) == (0, "")
    begun.space.write_text(begun.space.read_text().replace("1e-4, 1e-2", "1e-4, 1e-3"))
    code, _, err = run_sweep(*begun.resume)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{begun.space} has changed since sweep it was started: line 19: " in err
    line = '"training.learning_rate": trial.suggest_float("learning_rate", 1e-4, {}, log=True),'
    assert f"{line.format('1e-2')} -> {line.format('1e-3')}. Put it back" in err


def test_a_space_file_may_lie_elsewhere_when_a_sweep_goes_on(begun: Any, run_sweep: RunSweep) -> None:
    moved = begun.space.rename(begun.space.with_name("moved.py"))
    code, _, err = run_sweep(*begun.resume, "--space", moved)
    assert (code, err) == (0, "")
    code, _, err = run_sweep(*begun.resume, "--space", "openclip")
    assert (code, f"was started with --space {begun.space}, not openclip" in err) == (2, True)


def test_a_sweep_whose_data_have_changed_is_refused_with_what_is_other(begun: Any, run_sweep: RunSweep) -> None:
    shutil.copy(begun.data / "clip_dataset_test_aug.000000.tar", begun.data / "clip_dataset_valid_aug.000000.tar")
    code, _, err = run_sweep(*begun.resume)
    assert (code, err.count("\n")) == (2, 1)
    assert (
        f"{begun.data} has changed since sweep it was started: valid: clip_dataset_valid_aug.000000.tar is another. Put" in err
    )


def untimed(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(path.read_text()) for path in sorted((run / "evaluations").glob("*.json"))]
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


@pytest.mark.slow
def test_sigterm_at_the_driver_stops_a_trial_within_its_stage_and_loses_no_step(
    garments: Path, tmp_path: Path, run_sweep: RunSweep, local_ray: None
) -> None:
    from fashionclip_tune.config.project import ProjectConfig
    from fashionclip_tune.training.train import train

    one_stage = ("--num-trials", "1", "--set", "hardware.threads=1", "--budget-examples", "2400", "--grace-examples", "2400")
    driver = Driver(tmp_path, garments, *one_stage)
    driver.wait_for(trials=1, evaluations=1)
    while sweep_json(driver.sweep_dir)["trials"][0]["untouched_recall_at_10"] is None:
        time.sleep(0.01)
    time.sleep(1)  # a stage takes about five
    driver.process.send_signal(signal.SIGTERM)
    code, out = driver.finish()
    assert code == 130, out
    assert "Traceback" not in out
    assert f"--results {tmp_path} --name it --resume" in out
    assert sweep_json(driver.sweep_dir)["state"] == "INTERRUPTED"
    (trial,) = (driver.sweep_dir / "trials").iterdir()
    (checkpoint,) = (trial / "checkpoints").glob("step_*")
    assert 0 < int(checkpoint.name.removeprefix("step_")) < 150
    assert [row["step"] for row in untimed(trial)] == [0]
    (row,) = sweep_json(driver.sweep_dir)["trials"]
    assert (row["state"], row["stop_reason"], row["step"]) == ("RUNNING", None, 0)

    code, out, _ = run_sweep("--results", tmp_path, "--name", "it", "--resume")
    assert code == 0, out
    (row,) = sweep_json(driver.sweep_dir)["trials"]
    assert (row["state"], row["stop_reason"], row["step"]) == ("COMPLETE", "budget", 150)
    train(ProjectConfig.from_dict(json.loads((trial / "config.json").read_text())), tmp_path / "never stopped")
    assert untimed(trial) == untimed(tmp_path / "never stopped")


@pytest.mark.slow
def test_a_sweep_whose_ray_is_ended_with_it_ends_at_once_and_can_be_resumed(
    garments: Path, tmp_path: Path, run_sweep: RunSweep, local_ray: None, attacks: Any
) -> None:
    """SIGTERM to every process, as where a machine is preempted: Ray's own client would wait a minute, then die silently."""
    driver = Driver(tmp_path, garments, *WITH_LOADERS)
    driver.wait_for(trials=2, evaluations=2)
    started = time.monotonic()
    for pid in (driver.process.pid, *(pid for pid, _ in running_below(driver.process.pid))):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    code, out = driver.finish()
    assert code == 130, out
    assert time.monotonic() - started < 30
    assert f"go on with: {sys.executable} sweeps/run_sweep.py" in out.splitlines()[-1]

    code, out, _ = run_sweep("--results", tmp_path, "--name", "it", "--resume")
    assert code == 0, out
    rows = sweep_json(driver.sweep_dir)["trials"]
    assert [row["trial_id"] for row in rows] == ["0000", "0001", "0002", "0003"]
    assert attacks.violations(driver.sweep_dir, 1, ended=True) == []
