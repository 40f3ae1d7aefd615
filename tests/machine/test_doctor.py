"""What is wrong with machines that are made up; and that this one can be looked at."""

import errno
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from fashionclip_tune.cli import doctor as doctor_command
from fashionclip_tune.cli.main import main
from fashionclip_tune.errors import UserError
from fashionclip_tune.machine.doctor import Level, judge, lines, problems
from fashionclip_tune.machine.facts import PACKAGES, Facts, Gpu, Mount, gather, look_at_mount
from fashionclip_tune.machine.hardware import Machine, memory_limit_bytes

GB = 10**9
T4 = Gpu("Tesla T4", 15 * 2**30, has_bf16=False)
DISK = Mount("/content", "results", is_writable=True, free_bytes=100 * GB, fsync_s=0.004, renames=True, locks=True)
NOTEBOOK = Facts(
    machine=Machine(2, int(12.7 * GB), 6 * GB),
    python="3.11.7",
    packages={name: "2.8.0" for name in PACKAGES},
    cuda_of_torch="12.8",
    driver="550.54",
    cuda_of_driver=(12, 4),
    system_gpus=("Tesla T4",),
    gpus=(T4,),
    mounts=(DISK,),
)


def said(facts: Facts, device: str = "auto") -> str:
    return " ".join(finding.text for finding in judge(facts, device=device) if finding.level is not Level.OK)


def test_a_sound_notebook_has_no_complaint_and_its_precision_is_named() -> None:
    findings = judge(NOTEBOOK)
    assert {finding.level for finding in findings} == {Level.OK}
    assert "Tesla T4, 15.0 GiB, no bf16 in hardware, so fp16" in "\n".join(lines(findings))


def test_a_gpu_that_torch_does_not_see_is_a_problem_with_a_command_unless_the_cpu_is_asked_for() -> None:
    too_new = replace(NOTEBOOK, gpus=(), cuda_of_torch="13.0")
    assert "torch sees none: torch 2.8.0 is built for CUDA 13.0" in said(too_new)
    assert f"{sys.executable} -m pip install --upgrade 'torch>=2.4,<2.9' torchvision" in said(too_new)
    assert "-m pip install" in said(replace(too_new, cuda_of_torch=None))
    assert "unset CUDA_VISIBLE_DEVICES" in said(replace(NOTEBOOK, gpus=()))
    assert "update it" in said(replace(too_new, cuda_of_driver=(11, 4)))
    assert problems(judge(too_new, device="cpu")) == []
    none = replace(NOTEBOOK, gpus=(), system_gpus=())
    assert problems(judge(none)) == []
    assert "--device cuda, and there is none" in said(none, "cuda")


@pytest.mark.parametrize(
    ("changes", "level", "text"),
    [
        ({"is_writable": False}, Level.PROBLEM, "cannot be written to"),
        ({"fsync_s": None}, Level.PROBLEM, "does not answer"),
        ({"fsync_s": 1.5}, Level.WARNING, "add --scratch"),
        ({"locks": False}, Level.WARNING, "no locks"),
        ({"renames": False, "locks": False}, Level.WARNING, "no rename or locks"),
        ({"free_bytes": GB}, Level.WARNING, "1.0 GB free"),
    ],
)
def test_disks(changes: Mapping[str, object], level: Level, text: str) -> None:
    (finding,) = [each for each in judge(replace(NOTEBOOK, mounts=(replace(DISK, **changes),))) if each.about == "results"]
    assert (finding.level, text in finding.text) == (level, True)


def test_a_scratch_folder_must_be_local_and_then_a_slow_durable_one_is_no_fault() -> None:
    slow, scratch = replace(DISK, fsync_s=2.0, locks=False), replace(DISK, purpose="scratch")
    assert said(replace(NOTEBOOK, mounts=(slow, scratch))) == ""
    assert "on a local disk" in said(replace(NOTEBOOK, mounts=(DISK, replace(scratch, fsync_s=2.0))))


def test_little_shared_memory_little_memory_and_missing_packages() -> None:
    assert "--shm-size" in said(replace(NOTEBOOK, machine=Machine(2, 12 * GB, 64 * 2**20)))
    assert "tiny models only" in said(replace(NOTEBOOK, machine=Machine(2, 4 * GB, GB)))
    assert f"missing: ray; {sys.executable} -m pip install -e ." in said(
        replace(NOTEBOOK, packages={**NOTEBOOK.packages, "ray": None})
    )


def test_the_docs_show_what_is_said_of_these_faults() -> None:
    drive = replace(DISK, path="/content/drive/MyDrive/results", fsync_s=1.5, renames=False, locks=False)
    remote = replace(DISK, path="/mnt/nfs", purpose="scratch", locks=False)
    small = replace(NOTEBOOK, machine=Machine(2, int(12.7 * GB), 64 * 10**6), packages={**NOTEBOOK.packages, "ray": None})
    faulty = (
        replace(NOTEBOOK, gpus=(), cuda_of_torch="13.0"),
        replace(NOTEBOOK, gpus=(), cuda_of_torch="13.0", driver="470.82", cuda_of_driver=(11, 4)),
        replace(NOTEBOOK, gpus=()),
        replace(small, mounts=(drive,)),
        replace(NOTEBOOK, mounts=(DISK, remote)),
        replace(NOTEBOOK, mounts=(replace(DISK, fsync_s=None),)),
    )
    docs = " ".join((Path(__file__).parents[2] / "docs" / "t4.md").read_text().split())
    found = [line for facts in faulty for line in lines(judge(facts)) if not line.startswith("ok")]
    assert len(found) == 8
    for line in found:
        assert " ".join(line.split()).replace(sys.executable, "python") in docs, line


def test_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = gather({"results": tmp_path / "not" / "there"})
    (mount,) = facts.mounts
    assert mount.path == str(tmp_path)
    assert (mount.is_writable, mount.renames, mount.locks) == (True, True, True)
    assert list(tmp_path.iterdir()) == []
    assert facts.machine.cores >= 1
    main(["doctor", "--results", str(tmp_path), "--device", "cpu"])
    out = capsys.readouterr().out
    assert "ok       GPU       not asked for: --device cpu" in out
    assert "ray 2.60" in out


def test_a_mount_without_locks_is_found_and_said_before_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    assert not look_at_mount(tmp_path, "results").locks
    doctor_command.refuse_problems(str(tmp_path), None, "cpu")
    assert "no locks: a slow or remote mount; add --scratch with a local folder" in capsys.readouterr().out
    with pytest.raises(UserError, match="no locks: give --scratch a folder on a local disk"):
        doctor_command.refuse_problems(str(tmp_path), str(tmp_path / "scratch"), "cpu")


def test_a_mount_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the very question whether a folder exists is not answered."""
    answered = threading.Event()
    monkeypatch.setattr(Path, "exists", lambda path: answered.wait(30))
    assert look_at_mount(tmp_path / "it", "results", timeout_s=0.05).fsync_s is None
    answered.set()


def test_object_storage_is_named_and_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--results", "s3://bucket/results", "--device", "cpu"])
    assert "ok       results   s3://bucket/results: object storage, not looked at" in capsys.readouterr().out


def test_before_a_sweep_what_will_be_slow_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    drive = replace(DISK, fsync_s=1.5, locks=False, path="/content/drive/MyDrive/results")
    monkeypatch.setattr("fashionclip_tune.machine.facts.gather", lambda folders: replace(NOTEBOOK, mounts=(drive,)))
    doctor_command.refuse_problems("results", None, None)
    (line,) = capsys.readouterr().out.splitlines()
    found = "/content/drive/MyDrive/results: 100.0 GB free, a synced write takes 1500 ms; no locks"
    assert line.startswith(f"warning  results   {found}")


def test_what_dead_sweeps_left_in_the_scratch_folder_is_named_with_its_size(tmp_path: Path) -> None:
    for name in ("dead-1", "driven-2", "worked-3"):
        worker = tmp_path / "sweeps" / name / "trials" / "0000-a"
        worker.mkdir(parents=True)
        (worker / "weights").write_bytes(b"w" * 1000)
        for lock in (worker / ".lock", tmp_path / "sweeps" / name / ".lock"):
            lock.touch()
    held = [tmp_path / "sweeps" / "driven-2" / ".lock", tmp_path / "sweeps" / "worked-3" / "trials" / "0000-a" / ".lock"]
    with FileLock(held[0]), FileLock(held[1]):
        facts = gather({"scratch": tmp_path})
    assert facts.leftovers == {str(tmp_path / "sweeps" / "dead-1"): 1000}
    (text,) = [each.text for each in judge(facts) if "nothing runs" in each.text]
    assert f"{tmp_path}/sweeps/dead-1 (0.00 GB)" in text


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("max\n")
    whole = memory_limit_bytes((str(limit),))
    limit.write_text("1000000\n")
    assert memory_limit_bytes((str(limit),)) == 1_000_000 < whole


def test_the_command_ends_with_status_2_and_a_sweep_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    broken = replace(NOTEBOOK, gpus=(), cuda_of_torch="13.0")
    monkeypatch.setattr("fashionclip_tune.machine.facts.gather", lambda folders: broken)
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--results", str(tmp_path)])
    assert ended.value.code == 2
    assert "problem  GPU" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"torch sees none.*pip install"):
        doctor_command.refuse_problems(str(tmp_path), None, None)
    doctor_command.refuse_problems(str(tmp_path), None, "cpu")
