"""How a trial that fails is reported; without Ray, whose ``report`` is replaced."""

import errno
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock
from safetensors import SafetensorError

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.dataset import cached_index, run_shards
from fashionclip_tune.errors import (
    BadDataError,
    DivergedError,
    OutOfMemoryError,
    StoppedError,
    StorageError,
    UnavailableError,
    UserError,
)
from fashionclip_tune.training.callbacks import RunCallbacks
from fashionclip_tune.training.remote_state import RemoteState
from fashionclip_tune.tuning.backend import worker as trainable
from fashionclip_tune.tuning.backend.hooks import StudyScheduler, StudySearcher, SweepJob
from fashionclip_tune.tuning.backend.stop_signal import StopSignal
from fashionclip_tune.tuning.backend.worker import claim_gpu_share
from fashionclip_tune.tuning.planning.dataset import rows_of_captions
from fashionclip_tune.tuning.planning.disk import plan_disk
from fashionclip_tune.tuning.planning.slots import Slots
from fashionclip_tune.tuning.schedulers import NO_STOPPING
from fashionclip_tune.tuning.study.search import StoppingSearch
from fashionclip_tune.tuning.study.study import SweepStudy
from fashionclip_tune.tuning.trial import DurablePlan, Share, TrialPlan


@pytest.mark.parametrize(
    ("error", "stop_reason", "message"),
    [
        (DivergedError("the loss is nan"), "diverged", "the loss is nan"),
        (BadDataError("3 of 4 samples"), "bad_data", "3 of 4 samples"),
        (OutOfMemoryError("out of memory at step 1"), "out_of_memory", "out of memory at step 1"),
        (KeyError("surprise"), "error", "KeyError: 'surprise' (see "),
        (StoppedError("asked to end, after 3 of 9 steps"), "interrupted", "asked to end, after 3 of 9 steps"),
        (UserError("freeze.image_blocks = 9"), "error", "UserError: freeze.image_blocks = 9 (see "),
        (UnavailableError("no GPU here"), "storage", "no GPU here"),
        (StorageError("the drive is full"), "storage", "the drive is full"),
        (OSError(errno.ENOSPC, "no space"), "storage", "the disk is full ("),
        (SafetensorError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error 28)"), "storage", "the disk is full ("),
        (
            BadDataError(f"3 of 4: shard cannot be read ([Errno 28] {os.strerror(errno.ENOSPC)})"),
            "storage",
            "the disk is full (",
        ),
    ],
)
def test_a_trial_reports_how_it_failed_with_its_last_row(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tiny_config: ProjectConfig,
    error: Exception,
    stop_reason: str,
    message: str,
) -> None:
    def run_training(config: ProjectConfig, out_dir: Path, callbacks: RunCallbacks, *, resume_from: Path) -> None:
        assert out_dir == resume_from == tmp_path / "trial", "a trial goes on from its own folder, not from a copy of Ray's"
        callbacks.on_evaluation({"examples_seen": 64, "recall_at_10": 0.25})
        raise error

    reported: list[dict[str, Any]] = []
    monkeypatch.setattr(trainable, "run_training", run_training)
    monkeypatch.setattr(trainable.tune, "report", reported.append)
    plan = TrialPlan(3, str(tmp_path / "trial"), tiny_config.to_dict())
    trainable.run_trial(plan.to_ray())
    row, end = reported
    assert row == {"examples_seen": 64, "recall_at_10": 0.25}
    assert {name: end[name] for name in row} == row
    assert end["stop_reason"] == stop_reason
    assert end["message"].startswith(message)


def test_what_was_taken_away_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_config: ProjectConfig) -> None:
    """As "storage" stops the sweep and records nothing: it goes on when the thing is back."""
    (tmp_path / "drive").mkdir()
    gone, blank = str(tmp_path / "gone"), str(tmp_path / "drive")  # of a drive that is not mounted its empty folder is there
    monkeypatch.setattr(trainable, "_LETS_GO_WITHIN_S", 0.01)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def end_of(**overrides: str) -> tuple[str, str]:
        config = tiny_config.with_overrides({name.replace("__", "."): value for name, value in overrides.items()})
        reported: list[dict[str, Any]] = []
        monkeypatch.setattr(trainable.tune, "report", reported.append)
        trainable.run_trial(TrialPlan(3, str(tmp_path / "trial"), config.to_dict()).to_ray())
        (end,) = reported
        return end["stop_reason"], end["message"]

    for overrides, said in (
        ({"dataset_root": gone}, f"data folder {gone} does not exist"),
        ({"dataset_root": blank}, "has no shards named"),
        ({"valid_shards_pattern": "elsewhere.{0..1}.tar"}, "matches none of its files"),
        ({"model__pretrained": f"{gone}/weights.safetensors"}, "is neither a file, a folder nor a tag"),
        ({"model__pretrained": blank}, "has no open_clip_config.json"),
        ({"device": "cuda"}, "torch sees no GPU here"),
    ):
        reason, message = end_of(**overrides)
        assert (reason, said in message) == ("storage", True), message
    assert end_of(model__pretrained="laion9b")[0] == "error", "a wrong name is the setting's fault"

    with FileLock(tmp_path / "trial" / ".lock"):
        reason, message = end_of()
    assert (reason, "is held by the process of an earlier run" in message) == ("storage", True)

    def run_training(*_: Any, **__: Any) -> None:
        raise BadDataError("3 of 4: shard cannot be read")

    monkeypatch.setattr(trainable, "run_training", run_training)
    assert end_of()[0] == "bad_data"
    assert end_of(dataset_root=gone)[0] == "storage"


def test_a_trial_on_a_card_that_another_program_fills_stays_unfinished(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_config: ProjectConfig
) -> None:
    """Its claim fails within the trial; the driver records no end and stops the sweep, which goes on when the card is free."""
    gib = 2**30
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=16 * gib))
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", lambda fraction: None)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (gib, 16 * gib))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: 0)
    monkeypatch.setattr(trainable, "claim_gpu_share", partial(claim_gpu_share, wait_s=0))
    monkeypatch.setattr(trainable, "run_training", lambda *_, **__: pytest.fail("it has no memory"))
    reported: list[dict[str, Any]] = []
    monkeypatch.setattr(trainable.tune, "report", reported.append)
    study = SweepStudy(tmp_path / "study.journal", seed=0, num_startup_trials=1)
    stop, share = StopSignal(), Share(0.5, 1.0, gpu_memory_bytes=8 * gib, gpu_needed_bytes=6 * gib)
    job = SweepJob(
        space=lambda trial: {"clip_model": "tiny-clip", "loss_function": "contrastive"},
        build=tiny_config.with_overrides,
        sweep_dir=tmp_path,
        slots=Slots(1, 1.0, 0.5),
        share_of=lambda config: share,
    )
    search = StoppingSearch(study, NO_STOPPING, 2)
    searcher = StudySearcher(study, search, job, stop)
    plan = searcher.suggest("a")
    assert plan is not None
    trainable.run_trial(plan)
    (end,) = reported
    assert (end["stop_reason"], "another program holds the rest" in end["message"]) == ("storage", True)

    StudyScheduler(study, search, stop).on_trial_result(None, SimpleNamespace(config=plan), end)
    searcher.on_trial_complete("a")
    assert searcher.suggest("b") == "FINISHED"
    assert study.unfinished() == [0]
    assert stop.reason == end["message"]


def test_a_trial_whose_base_weights_are_not_here_waits_for_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As "storage" stops the sweep and records nothing; as a failure the trial would be lost, and each one after it."""

    def fetch_state(self: RemoteState, run_dir: Path) -> bool:
        raise UnavailableError("started from other weights: bring them")

    reported: list[dict[str, Any]] = []
    monkeypatch.setattr(RemoteState, "fetch_state", fetch_state)
    monkeypatch.setattr(trainable, "run_training", lambda *_, **__: pytest.fail("it must not begin anew"))
    monkeypatch.setattr(trainable.tune, "report", reported.append)
    durable = DurablePlan(str(tmp_path / "drive"), 60.0, (), "000001-a", str(tmp_path / "lock"))
    trainable.run_trial(TrialPlan(3, str(tmp_path / "trial"), ProjectConfig().to_dict(), durable).to_ray())
    (end,) = reported
    assert (end["stop_reason"], end["message"]) == ("storage", "started from other weights: bring them")


@pytest.mark.parametrize("tier", ["one folder", "durable"])
def test_a_trial_over_the_disk_budget_waits_with_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_config: ProjectConfig, tier: str
) -> None:
    """Something else has come to lie in the sweep's folder: there is room for one state of 64 MB, and not for a second one."""
    reported: list[dict[str, Any]] = []
    monkeypatch.setattr(trainable.tune, "report", reported.append)
    monkeypatch.setattr(trainable, "StopPoll", lambda: lambda: False)
    monkeypatch.setattr("fashionclip_tune.storage.folder.time.sleep", lambda seconds: None)
    sweep_dir, durable = tmp_path / "run", None
    if tier == "durable":
        durable = DurablePlan(str(tmp_path / "drive"), 0.0, (), "000001-a", str(tmp_path / "lock"))
    budgeted = sweep_dir if durable is None else tmp_path / "drive"
    budgeted.mkdir()
    (budgeted / "other").write_bytes(b"x" * 3_000_000)
    config = tiny_config.with_overrides({"freeze.text_tower": True, "training.budget_examples": 96})
    bytes_of = plan_disk([config], 1, rows_of_captions(config, cached_index(run_shards(config).train))).models["tiny-clip"]
    budget_bytes = 3_000_000 + int(1.5 * (bytes_of.state if durable is None else bytes_of.durable_state))
    budget_bytes += bytes_of.tables if durable is None else 0
    trial_dir = sweep_dir / "trials" / "0003-a"
    plan = TrialPlan(3, str(trial_dir), config.to_dict(), durable, disk_budget_bytes=budget_bytes)
    trainable.run_trial(plan.to_ray())
    end = reported[-1]
    assert end["stop_reason"] == "storage"
    assert f"the disk budget of {budget_bytes / 1e9:g} GB is used up" in end["message"]
    assert "go on with a larger --disk-budget-gb" in end["message"]
    states = budgeted.rglob("training_state.pt")
    assert len({path.parent.name for path in states}) == 1
    assert not [path for path in budgeted.rglob("*.tmp")]

    reported.clear()
    trainable.run_trial(replace(plan, disk_budget_bytes=300_000_000).to_ray())
    assert reported[-1]["examples_seen"] == 96
    assert not any("stop_reason" in row for row in reported)
