"""A state that went over a durable folder to another machine is the state that was saved there."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import StorageError, UnavailableError
from fashionclip_tune.models.openclip import export_openclip, load_model
from fashionclip_tune.models.weights import read_weights
from fashionclip_tune.storage.checkpoint import newest_checkpoint, newest_weights
from fashionclip_tune.storage.folder import RemoteFolder
from fashionclip_tune.training.callbacks import RunCallbacks
from fashionclip_tune.training.history import TIMING
from fashionclip_tune.training.remote_state import RemoteState
from fashionclip_tune.training.train import run_training, train


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in (*TIMING, "memory_gb")}


def test_every_file_of_a_run_has_the_mode_that_the_umask_says(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    """Of the model that is handed on, of a checkpoint, and of what lies on the drive."""
    before = os.umask(0o027)
    try:
        config = tiny_config.with_overrides({"training.epochs": 1})
        run_training(config, tmp_path / "run", durable(tmp_path, tiny_config).watching(RunCallbacks()))
        durable(tmp_path, tiny_config).put_weights(newest_checkpoint(tmp_path / "run")[0].weights_file.parent)
        export_openclip(load_model(tiny_config), tmp_path / "best")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]
    assert sum(path.suffix == ".safetensors" for path in files) >= 4
    assert {str(path): oct(path.stat().st_mode & 0o777) for path in files} == {str(path): "0o640" for path in files}


class LostError(Exception):
    """The machine is gone."""


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint, _ = newest_checkpoint(run)
    return load_file(checkpoint.weights_file)


def durable(tmp_path: Path, config: Any, *, sync_every_s: float = 0.0) -> RemoteState:
    return RemoteState(RemoteFolder(tmp_path / "drive"), "trials/a", config, sync_every_s=sync_every_s)


def train_until_lost(config: Any, tmp_path: Path, step: int) -> None:
    """Up to the report of a step; then only what is durable is left."""

    def lose(row: Any) -> None:
        if row["step"] == step:
            raise LostError

    with pytest.raises(LostError):
        run_training(config, tmp_path / "lost", durable(tmp_path, config).watching(RunCallbacks(on_evaluation=lose)))
    shutil.rmtree(tmp_path / "lost")


@pytest.mark.parametrize(
    "options",
    [{}, {"loss_function": "siglip", "optimizer.ema_decay": 0.9, "training.micro_batch_size": 5, "freeze.text_tower": True}],
    ids=["plain", "frozen tower, average, micro-batches, added bias"],
)
def test_a_run_that_went_over_the_durable_folder_ends_with_the_same_bits(
    tiny_config: ProjectConfig, tmp_path: Path, options: Any
) -> None:
    config = tiny_config.with_overrides(options)
    whole = train(config, tmp_path / "whole")
    train_until_lost(config, tmp_path, step=4)
    assert durable(tmp_path, config).fetch_state(tmp_path / "run")
    resumed = train(config, tmp_path / "run", resume_from=tmp_path / "run")
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert [untimed(row) for row in resumed.history] == [untimed(row) for row in whole.history]


def test_a_state_is_written_between_stages_too_and_only_the_newest_is_kept(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    config = tiny_config.with_overrides({"training.stage_examples": 80})  # 5 steps
    train_until_lost(config, tmp_path, step=5)
    run = durable(tmp_path, config)
    assert {Path(name).parent.name for name in RemoteFolder(tmp_path / "drive").sizes()} == {"step_00000005"}
    (tmp_path / "drive" / "trials" / "a" / "state" / "step_00000005").rename(tmp_path / "hidden")
    with pytest.raises(LostError):  # stopped in the middle of the second stage
        run_training(config, tmp_path / "b", replace(run.watching(RunCallbacks()), on_checkpoint=lost_after(run, states=3)))
    assert {path.name for path in (tmp_path / "drive" / "trials" / "a" / "state").iterdir()} == {"step_00000003"}


def lost_after(run: RemoteState, states: int) -> Any:
    """The machine is lost when so many states are written."""
    left = iter(range(states - 1, -1, -1))

    def on_checkpoint(checkpoint: Path) -> None:
        run.put_state(checkpoint)
        if next(left) == 0:
            raise LostError

    return on_checkpoint


def test_what_the_base_holds_already_is_not_written(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    config = tiny_config.with_overrides({"freeze.text_tower": True})
    train_until_lost(config, tmp_path, step=2)
    (file,) = (tmp_path / "drive").rglob("model.safetensors")
    with safe_open(file, "pt") as opened:
        keys = set(opened.keys())
    assert keys
    assert all(key.startswith(("visual.", "token_embedding.")) or key == "logit_scale" for key in keys)
    assert "token_embedding.weight" not in keys


def test_weights_come_back_in_half_precision(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    train(tiny_config, tmp_path / "run")
    run = durable(tmp_path, tiny_config)
    for checkpoint in sorted((tmp_path / "run" / "checkpoints").glob("step_*")):
        run.put_weights(checkpoint)
    assert [path.name for path in (tmp_path / "drive" / "trials" / "a" / "weights").iterdir()] == ["step_00000010.safetensors"]
    assert run.fetch_weights(8) is None
    expected, found = read_weights(newest_weights(tmp_path / "run")), run.fetch_weights(10)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == torch.float32
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-6)
    assert run.forget_weights() > 0
    assert run.fetch_weights(10) is None


@pytest.mark.parametrize("damage", ["record missing", "weights cut off", "state cut off"])
def test_a_torn_state_is_none(tiny_config: ProjectConfig, tmp_path: Path, damage: Any) -> None:
    train_until_lost(tiny_config, tmp_path, step=4)
    (state,) = (tmp_path / "drive" / "trials" / "a" / "state").iterdir()
    whole = state.with_name("step_00000003")
    shutil.copytree(state, whole)  # older by its name, and whole
    name = {"weights cut off": "model.safetensors", "state cut off": "training_state.pt"}.get(damage)
    if name is None:
        (state / "checkpoint.json").unlink()
    else:
        (state / name).write_bytes((state / name).read_bytes()[:1000])
    run = durable(tmp_path, tiny_config)
    assert run.fetch_state(tmp_path / "run")
    shutil.rmtree(whole)
    assert not run.fetch_state(tmp_path / "other")


def test_the_local_state_is_kept_where_it_is_as_new(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    train_until_lost(tiny_config, tmp_path, step=4)
    run = durable(tmp_path, tiny_config)
    assert run.fetch_state(tmp_path / "run")
    assert not run.fetch_state(tmp_path / "run")


def test_a_state_of_other_base_weights_is_refused(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    train_until_lost(tiny_config, tmp_path, step=4)
    other = tiny_config.with_overrides({"training.seed": 1})  # random weights of another seed
    with pytest.raises(UnavailableError, match=r"trials/a started from other weights of tiny-clip.*bring them"):
        durable(tmp_path, other).fetch_state(tmp_path / "run")


def with_two_checkpoints(config: Any, tmp_path: Path) -> Any:
    """A trained run: its durable side, with nothing there yet, and its last two checkpoints."""
    train(config, tmp_path / "run")
    folder = RemoteFolder(tmp_path / "drive")
    return folder, RemoteState(folder, "trials/a", config), *sorted((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_a_state_over_the_budget_is_not_begun_and_the_one_before_it_stays(
    tiny_config: ProjectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run, older, newer = with_two_checkpoints(tiny_config, tmp_path)
    run.put_state(older)
    whole = folder.sizes()
    num_bytes = sum(whole.values())
    monkeypatch.setattr("fashionclip_tune.storage.folder.time.sleep", lambda seconds: None)
    folder.keep_below(2 * num_bytes - 2**20)
    with pytest.raises(StorageError, match=r"trials/a/state/step_00000010, which takes .* larger --disk-budget-gb"):
        run.put_state(newer)
    assert folder.sizes() == whole
    folder.put("trials/a/state/step_00000009/training_state.pt", b"x" * 2**21)  # torn: no record came after it
    folder.keep_below(2 * num_bytes + 2**20)
    run.put_state(newer)
    assert {Path(name).parent.name for name in folder.sizes()} == {"step_00000010"}


def test_weights_of_an_earlier_stage_make_room_for_the_next(
    tiny_config: ProjectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run, older, newer = with_two_checkpoints(tiny_config, tmp_path)
    run.put_weights(older)
    (num_bytes,) = folder.sizes().values()
    folder.keep_below(num_bytes + 2**10)
    run.put_weights(newer)
    assert list(folder.sizes()) == ["trials/a/weights/step_00000010.safetensors"]
    monkeypatch.setattr("fashionclip_tune.storage.folder.time.sleep", lambda seconds: None)
    folder.keep_below(num_bytes - 2**10)
    with pytest.raises(StorageError, match="disk budget"):
        RemoteState(folder, "trials/b", tiny_config).put_weights(newer)
    assert list(folder.sizes()) == ["trials/a/weights/step_00000010.safetensors"]
