"""A sweep in two folders: the machine is lost with all but the durable one, at any moment, and another goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.dataset import cached_index, run_shards
from fashionclip_tune.storage.folder import RemoteFolder
from fashionclip_tune.training.history import TIMING
from fashionclip_tune.tuning.planning.dataset import rows_of_captions
from fashionclip_tune.tuning.planning.disk import DiskPlan, plan_disk
from tests.tuning.conftest import RunSweep

NOISY = (*TIMING, "memory_gb")
ROOT = Path(__file__).parents[2]
SETTINGS = (
    *("--set", "model.pretrained=none", "--set", "training.batch_size=16"),
    *("--budget-examples", "144", "--samples-per-second", "100"),
)
NUM_TRIALS = 3
pytestmark = [pytest.mark.ray, pytest.mark.slow]


def command(data: Path, machine: Path, results: Path | str, *more: str) -> list[str]:
    words = ["--data", data, "--results", results, "--name", "it", "--num-trials", NUM_TRIALS, "--max-concurrent", 1]
    return [*map(str, (*words, "--scratch", machine / "scratch", "--sync-every", "0.0001")), *SETTINGS, *more]


def start(data: Path, machine: Path, results: Path | str, *more: str) -> subprocess.Popen[str]:
    """The driver on a machine of its own: scratch, home, user and, where that may be set, host name are its own."""
    (machine / "home").mkdir(parents=True, exist_ok=True)
    words = [sys.executable, str(ROOT / "sweeps" / "run_sweep.py"), *command(data, machine, results, *more)]
    return subprocess.Popen(
        [*named(machine.name), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "HOME": str(machine / "home"), "USER": machine.name},
    )


def named(host: str) -> list[str]:
    """Runs what follows under another host name; nothing where this user may not."""
    unshared = ["unshare", "--uts", "sh", "-c", f'hostname {host} && exec "$@"', "sh"]
    may = shutil.which("unshare") and subprocess.run([*unshared, "true"], capture_output=True, check=False).returncode == 0
    return unshared if may else []


def end(process: subprocess.Popen[str]) -> str:
    """Waits for its end, which is to be a good one; returns what it said."""
    out, _ = process.communicate(timeout=500)
    assert process.returncode == 0, out
    return out


def lose(process: subprocess.Popen[str], *folders: Path) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    for folder in folders:
        while folder.exists():  # workers outlive their driver for seconds, and write
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.2)


def outcome(results: Path) -> dict[str, Any]:
    """What must not depend on which machines did the work."""
    content = json.loads((results / "it" / "sweep.json").read_text())
    rows = [{name: value for name, value in row.items() if name not in NOISY} for row in content["trials"]]
    histories = {}
    for folder in sorted((results / "it" / "trials").iterdir()):
        rows_of = [json.loads(path.read_text()) for path in sorted((folder / "evaluations").glob("*.json"))]
        histories[folder.name] = [{k: v for k, v in row.items() if k not in NOISY} for row in rows_of]
    return {"state": content["state"], "trials": rows, "best": content["best"], "histories": histories}


def wait_for_stages(sweep: RemoteFolder, process: subprocess.Popen[str], *, trials: int, evaluations: int) -> None:
    """Until so many trials have begun, and one has so many evaluations: beyond its first rung, that is, while others wait."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        stages = Counter(name.split("/")[1] for name in sweep.sizes("trials") if "/evaluations/" in name)
        if len(stages) >= trials and max(stages.values()) >= evaluations:
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    raise AssertionError("the sweep did not get that far")


def copy_under_way(drive: Path, copy: Path) -> None:
    """Files in it may be torn; one that was removed while others were copied is no loss of a machine: once more."""
    try:
        shutil.copytree(drive, copy)
    except shutil.Error:
        shutil.rmtree(copy)
        copy_under_way(drive, copy)


class Watch(threading.Thread):
    """Looks at a sweep's durable folder while it runs: the most bytes at a time, and the most that each file had."""

    def __init__(self, sweep: RemoteFolder) -> None:
        super().__init__(daemon=True)
        self.sweep, self.most_bytes, self.files, self.over = sweep, 0, dict[Any, Any](), threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.05):
            sizes = self.sweep.sizes()
            self.most_bytes = max(self.most_bytes, sum(sizes.values()))
            for name, size in sizes.items():
                self.files[name] = max(size, self.files.get(name, 0))


@pytest.fixture(scope="module")
def whole(garments: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Watch]:
    """A sweep that was never stopped: its outcome, and what it took of the durable folder."""
    folder = tmp_path_factory.mktemp("whole")
    watch = Watch(RemoteFolder(folder / "results" / "it"))
    process = start(garments, folder / "steady", folder / "results")
    watch.start()
    end(process)
    watch.over.set()
    watch.join()
    return outcome(folder / "results"), watch


def test_a_lost_machine_costs_the_time_since_the_last_sync_only(garments: Path, tmp_path: Path, whole: Any) -> None:
    first = start(garments, tmp_path / "first", tmp_path / "drive")
    wait_for_stages(RemoteFolder(tmp_path / "drive" / "it"), first, trials=2, evaluations=4)
    copy_under_way(tmp_path / "drive", tmp_path / "elsewhere" / "results")
    lose(first, tmp_path / "drive", tmp_path / "first")
    shutil.copytree(garments, tmp_path / "elsewhere" / "shards")

    results = tmp_path / "elsewhere" / "results"
    kept = [path.name for path in results.glob("it/trials/0001-*/state/*")]
    out = end(start(tmp_path / "elsewhere" / "shards", tmp_path / "second", results, "--resume"))
    assert not list((tmp_path / "second").rglob("warnings.log")), "the state was not passed over"
    assert kept, "the test needs a state that was kept: in it the trial goes on"
    assert ("first (process " in out) == bool(named("host")), "who is told to stop, should it still run"
    assert outcome(results) == whole[0]
    assert not list(results.glob("it/trials/*/state/*")), "states of ended trials are removed"
    assert (results / "it" / "best" / "open_clip_model.safetensors").is_file()


def test_a_machine_that_runs_still_stops_when_another_goes_on(garments: Path, tmp_path: Path, whole: Any) -> None:
    drive = tmp_path / "drive"
    first = start(garments, tmp_path / "first", drive)
    while not list(drive.glob("it/headers/*")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGSTOP)  # else it may have ended before the second is at it
    second = start(garments, tmp_path / "second", drive, "--resume")
    try:
        while len(list(drive.glob("it/writers/*.json"))) < 2:
            assert second.poll() is None, second.communicate()
            time.sleep(0.1)
    finally:
        os.killpg(first.pid, signal.SIGCONT)
    out, _ = first.communicate(timeout=500)
    assert first.returncode == 2, out
    assert "Traceback" not in out
    assert "is written by another machine now, " in out
    end(second)
    assert outcome(drive) == whole[0]


@pytest.mark.filterwarnings("ignore")  # the server's own
def test_object_storage_is_a_durable_side_too(
    garments: Path, tmp_path: Path, bucket: Any, whole: Any, run_sweep: RunSweep
) -> None:
    sweep = RemoteFolder(f"{bucket}/it")
    first = start(garments, tmp_path / "first", bucket)
    wait_for_stages(sweep, first, trials=2, evaluations=4)
    lose(first, tmp_path / "first")
    kept = [name for name in sweep.sizes("trials") if re.search("/0001-.*/state/", name)]
    end(start(garments, tmp_path / "second", bucket, "--resume"))
    assert not list((tmp_path / "second").rglob("warnings.log")), "the state was not passed over"
    assert kept, "the test needs a state that was kept: in it the trial goes on"
    shutil.rmtree(tmp_path / "second")

    for name in sweep.sizes():
        sweep.fetch(name, tmp_path / "copy" / "it" / name)
    assert outcome(tmp_path / "copy") == whole[0]
    assert not list((tmp_path / "copy").glob("it/trials/*/state/*")), "states of ended trials are removed"
    # A third machine, on which nothing is left to do, has what is said to be there.
    code, out, err = run_sweep(*command(garments, tmp_path / "third", bucket, "--resume"))
    assert code == 0, err
    best = Path(re.search('local-dir:(.+?)"', out)[1])
    expected = (tmp_path / "copy" / "it" / "best" / "open_clip_model.safetensors").read_bytes()
    assert (best / "open_clip_model.safetensors").read_bytes() == expected


def test_the_durable_side_takes_what_was_planned(whole: Any, garments: Path) -> None:
    watch = whole[1]
    configs = [ProjectConfig(clip_model=name) for name in ("tiny-clip", "tiny-sig")]
    trained_on = cached_index(run_shards(ProjectConfig(dataset_root=garments)).train)
    plan: DiskPlan = plan_disk(configs, NUM_TRIALS, rows_of_captions(configs[0], trained_on))
    assert watch.most_bytes <= plan.durable_bytes(dict.fromkeys(plan.models, 1))
    found: dict[str, set[str]] = {"state": set(), "weights": set()}
    for name, size in watch.files.items():
        parts = name.split("/")
        kind = parts[2] if len(parts) > 2 else ""
        model = plan.models["tiny-sig" if "tiny-sig" in name else "tiny-clip"]
        expected: Mapping[str, float] = {
            "model.safetensors": model.trained,
            "training_state.pt": 2 * model.trained,
            "weights": model.durable_weights,
        }
        if (of := kind if kind == "weights" else parts[-1]) in expected and kind in found:
            found[kind].add(name)
            assert size == pytest.approx(expected[of], rel=0.03), name
    assert all(found.values())
