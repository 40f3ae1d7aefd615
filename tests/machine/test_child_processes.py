"""SIGKILL to real processes of each kind that starts others: within seconds nothing of them is left."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.resilience.started_processes import Processes, marked, running
from fashionclip_tune.config.project import ProjectConfig
from tests.support.runs import hard, started

_WITHIN_S = 5.0
_LOADERS = "multiprocessing.forkserver"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc"),
]


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """In the environment of all that the test starts; what a test leaves running is ended."""
    for name, value in marked(str(tmp_path)).items():
        monkeypatch.setenv(name, value)
    yield str(tmp_path)
    for pid, _ in running(str(tmp_path)):
        os.kill(pid, signal.SIGKILL)


def wait_until(mark: str, holds: Callable[[Processes], bool], seconds: float) -> Processes:
    """The marked processes when it holds of them, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while not holds(found := running(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def kill(process: "subprocess.Popen[Any]", mark: str) -> None:
    """And nothing that it had started is left in time."""
    process.kill()
    process.wait()
    assert wait_until(mark, lambda found: not found, _WITHIN_S) == {}


def python(code: str, *arguments: object) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.DEVNULL)


def named(found: Processes, part: str) -> int:
    return sum(part in name for name in found.values())


def test_a_killed_run_leaves_no_loader_process(tiny_config: ProjectConfig, tmp_path: Path, mark: str) -> None:
    config = hard(tiny_config).with_overrides({"training.num_workers": 2, "training.budget_examples": 60_000})
    process = started(config, tmp_path / "run", cwd=tmp_path)
    assert process.stdout is not None
    with process.stdout:
        assert named(running(mark), _LOADERS) == 3  # the server too
        kill(process, mark)


_STUCK = """
import json, os, sys
from fashionclip_tune.data import loader
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.training.train import train
made = loader.TrainBatches
def stuck(config, index, *others):
    batches = made(config, index, *others)
    for shard in index.shards:  # to open them takes for ever, as on a mount that hangs
        shard.unlink()
        os.mkfifo(shard)
    return batches
loader.TrainBatches = stuck
train(ProjectConfig.from_dict(json.loads(sys.argv[1])), sys.argv[2])
"""


def test_loader_processes_that_are_stuck_end_with_a_killed_run(tiny_config: ProjectConfig, tmp_path: Path, mark: str) -> None:
    shutil.copytree(tiny_config.dataset_dir, tmp_path / "data")
    config = tiny_config.with_overrides({"training.num_workers": 2, "dataset_root": tmp_path / "data"})
    process = python(_STUCK, json.dumps(config.to_dict()), tmp_path / "run")
    assert named(wait_until(mark, lambda found: named(found, _LOADERS) == 3, 120), _LOADERS) == 3
    while not list((tmp_path / "run").glob("evaluations/*.json")):
        assert process.poll() is None
        time.sleep(0.02)
    kill(process, mark)


def test_a_server_of_loader_processes_that_is_still_importing_ends_too(mark: str) -> None:
    code = """
import multiprocessing.forkserver, time
multiprocessing.set_forkserver_preload(["fashionclip_tune.data.fork_server"])
multiprocessing.forkserver.ensure_running()
time.sleep(600)
"""
    process = python(code)

    def imports_torch(found: Processes) -> bool:
        servers = (pid for (pid, _), name in found.items() if _LOADERS in name and "main(" in name)
        return any("libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in servers)

    assert imports_torch(wait_until(mark, imports_torch, 60))
    kill(process, mark)


@pytest.mark.parametrize("delay_s", [0.0, 12.0])  # while they import torch, and while they train
def test_pretraining_that_is_killed_leaves_no_process(
    tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch, delay_s: float
) -> None:
    monkeypatch.setenv("FASHIONCLIP_CACHE", str(tmp_path / "cache"))
    code = """
from fashionclip_tune.training import pretraining
if __name__ == "__main__":
    pretraining.PRETRAINING_PRODUCTS = 100
    pretraining.pretrain_missing(["tiny-clip", "tiny-sig"])
"""
    process = python(code)
    assert named(wait_until(mark, lambda found: named(found, "spawn_main") == 2, 60), "spawn_main") == 2
    time.sleep(delay_s)
    kill(process, mark)


def test_a_killed_probe_leaves_no_process_that_it_timed(tiny_config: ProjectConfig, mark: str) -> None:
    code = """
import json, sys
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.profiling.throughput import run_side_by_side
if __name__ == "__main__":
    run_side_by_side(ProjectConfig.from_dict(json.loads(sys.argv[1])), 2)
"""
    process = python(code, json.dumps(tiny_config.to_dict()))
    assert named(wait_until(mark, lambda found: named(found, "spawn_main") == 2, 60), "spawn_main") == 2
    kill(process, mark)


@pytest.mark.parametrize("command", ["exec sleep 600", "sleep 600 | cat", "sleep 600; true", "(sleep 600) | gunzip"])
def test_a_command_that_waits_for_a_silent_server_ends_too(mark: str, command: str) -> None:
    process = python(f"from fashionclip_tune.storage.urls import read_url; read_url('pipe:{command}')")
    assert named(wait_until(mark, lambda found: named(found, "sleep 600") > 1, 60), "sleep 600")
    kill(process, mark)
