"""The disk fills in the middle of a sweep: it stops with a clear message, and goes on after room was made."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import sweep_json  # tests/tuning/conftest.py

ROOT = Path(__file__).parents[2]
SETTINGS = ("--set", "model.pretrained=none", "--set", "training.batch_size=16", "--budget-examples", "144")
pytestmark = [pytest.mark.ray, pytest.mark.slow]


class Disk:
    """A file system in memory, of a size that can be changed."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        self.folder = folder
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", folder], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"a small disk needs the right to mount: {done.stderr.strip()}")

    def resize(self, megabytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={megabytes}m", self.folder], check=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk", megabytes=20)  # a checkpoint of a tiny tower has 9 to 13 MB
    yield disk
    subprocess.run(["umount", "--lazy", disk.folder], check=True)


def run(garments: Path, *more: object) -> tuple[int, str]:
    command = [sys.executable, ROOT / "sweeps" / "run_sweep.py", "--data", garments, "--name", "it", "--num-trials", "2"]
    done = subprocess.run(
        [str(word) for word in (*command, *SETTINGS, "--max-concurrent", "1", *more)],
        capture_output=True,
        text=True,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        timeout=500,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("tier", ["one folder", "durable"])
def test_a_full_disk_stops_the_sweep_and_loses_nothing(garments, tmp_path, disk, tier):
    place = ["--results", disk.folder]
    if tier == "durable":
        place += ["--scratch", tmp_path / "scratch", "--sync-every", "0"]
        disk.resize(4)
    code, out = run(garments, *place)
    assert code == 2, out
    assert "Traceback" not in out
    assert "nothing is lost" in out
    assert "make room" in out
    assert f"--results {disk.folder} --name it" in out
    assert " --resume" in out

    disk.resize(400)
    code, out = run(garments, *place, "--resume")
    assert code == 0, out
    rows = sweep_json(disk.folder / "it")["trials"]
    assert [row["trial_id"] for row in rows] == ["0000", "0001"]
    assert {row["state"] for row in rows} <= {"COMPLETE", "PRUNED"}
    assert "otherwise" not in "".join(path.read_text() for path in disk.folder.rglob("warnings.log"))
