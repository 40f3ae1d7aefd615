"""A checkpoint is whole or refused, whatever was done to its files and whenever the writer was killed."""

import json
import os
import pickle
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from fashionclip_tune import files as files_module
from fashionclip_tune.errors import UserError
from fashionclip_tune.models.openclip import load_weights
from fashionclip_tune.storage import checkpoint as checkpoint_module
from fashionclip_tune.storage.checkpoint import (
    newest_checkpoint,
    newest_weights,
    open_checkpoint,
    save_checkpoint,
    strip_training_state,
    weights_at,
)


def save(run: Path, step: int) -> Path:
    """A checkpoint whose every number says which step it is of."""
    weights = {"matrix": torch.full((3, 4), float(step)), "scale": torch.tensor(step / 2)}
    state = {
        "step": step,
        "micro_batch_size": 4,
        "stage": {},
        "optimizer": {"state": {0: {"exp_avg": torch.full((12,), step / 4)}}},
        "scaler": {},
        "raw_weights": {},
    }
    record = {"step": step, "fingerprint": "f", "config": {}, "history": [{"step": step}]}
    return save_checkpoint(run / "checkpoints", weights, state, record)


def assert_whole(run: Path, step: int) -> None:
    found, _ = newest_checkpoint(run)
    assert found is not None
    assert found.step == step
    assert found.record["history"] == [{"step": step}]
    network = torch.nn.Module()
    network.matrix, network.scale = torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.tensor(0.0))
    load_weights(network, found.weights_file)
    assert network.matrix.eq(step).all()
    assert float(network.scale.detach()) == step / 2
    assert found.training_state()["step"] == step
    assert found.training_state()["optimizer"]["state"][0]["exp_avg"].eq(step / 4).all()


def steps_kept(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_is_saved_is_read_back_and_the_last_two_are_kept(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) == (None, [])
    for step in (2, 4, 10, 100):
        assert save(tmp_path, step).name == f"step_{step:08d}"
        assert_whole(tmp_path, step)
    assert steps_kept(tmp_path) == ["step_00000010", "step_00000100"]


def test_a_checkpoint_can_be_named_directly(tmp_path: Path) -> None:
    first = save(tmp_path, 2)
    save(tmp_path, 4)
    found, refused = newest_checkpoint(first)
    assert found is not None
    assert (found.step, refused) == (2, [])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def other_version(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 1}))


def incomplete(path: Path) -> None:
    record = json.loads(path.read_text())
    del record["history"]
    path.write_text(json.dumps(record))


def no_files(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": {}}))


def foreign(path: Path) -> None:
    path.write_text('{"step": 4, "loss": 1.5}')


def relist(path: Path) -> None:
    """The record says what the file is now."""
    record_file = path.parent / "checkpoint.json"
    record = json.loads(record_file.read_text())
    record["files"][path.name] = xxhash.xxh3_128(path.read_bytes()).hexdigest()
    record_file.write_text(json.dumps(record))


def replaced_by(content: Any) -> Callable[[Path], None]:
    """Another file with its right hash in the record: bytes, or what torch saves."""

    def replace(path: Path) -> None:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        relist(path)

    return replace


def of_another_step(path: Path) -> None:
    replaced_by({**torch.load(path, weights_only=True), "step": 3})(path)


DAMAGES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("model.safetensors", cut, "damaged: model.safetensors"),
    ("model.safetensors", flip_a_bit, "damaged: model.safetensors"),
    ("model.safetensors", Path.unlink, "model.safetensors is missing"),
    ("training_state.pt", cut, "damaged: training_state.pt"),
    ("training_state.pt", flip_a_bit, "damaged: training_state.pt"),
    ("training_state.pt", Path.unlink, "training_state.pt is missing"),
    ("training_state.pt", replaced_by({"epoch": 3, "optimizer": {}}), "is not ours .it lacks micro_batch_size, raw_weights"),
    ("training_state.pt", replaced_by([1, 2]), "training_state.pt is not ours"),
    ("training_state.pt", replaced_by(torch.zeros(3)), "training_state.pt is not ours"),
    ("training_state.pt", replaced_by(Path("a")), "training_state.pt is not ours"),
    ("training_state.pt", replaced_by(b""), "training_state.pt is not ours"),
    ("training_state.pt", replaced_by(b"text"), "training_state.pt is not ours"),
    ("training_state.pt", of_another_step, "training_state.pt is not ours .it is of step 3"),
    ("model.safetensors", replaced_by(b"text"), "model.safetensors is not ours"),
    ("model.safetensors", replaced_by({"step": 4}), "model.safetensors is not ours"),
    ("checkpoint.json", lambda path: path.write_text(path.read_text()[:40]), "no checkpoint of this project"),
    ("checkpoint.json", Path.unlink, "no checkpoint of this project"),
    ("checkpoint.json", foreign, "no checkpoint of this project"),
    ("checkpoint.json", no_files, "no checkpoint of this project"),
    ("checkpoint.json", lambda path: path.write_text("[1, 2]"), "no checkpoint of this project"),
    ("checkpoint.json", lambda path: path.write_bytes(b"\xff\xfe\x00"), "no checkpoint of this project"),
    ("checkpoint.json", other_version, "has format 1; this version of fashionclip_tune reads 3"),
    ("checkpoint.json", incomplete, "no checkpoint of this project: checkpoint.json lacks history"),
]


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGES)
def test_a_damaged_checkpoint_is_refused_with_the_reason_and_the_one_before_is_used(
    tmp_path: Path, name: str, damage: Callable[[Path], Any], reason: str
) -> None:
    save(tmp_path, 2)
    damaged = save(tmp_path, 4)
    damage(damaged / name)
    with pytest.raises(UserError, match=reason):
        open_checkpoint(damaged)
    _, refused = newest_checkpoint(tmp_path)
    assert_whole(tmp_path, 2)
    assert len(refused) == 1
    assert re.search(reason, refused[0])
    assert str(damaged) in refused[0]
    # and the stage is saved again over it
    save(tmp_path, 4)
    assert_whole(tmp_path, 4)
    assert newest_checkpoint(tmp_path)[1] == []


def test_a_run_that_starts_over_below_refused_checkpoints_keeps_its_own(tmp_path: Path) -> None:
    for step in (8, 10):
        cut(save(tmp_path, step) / "training_state.pt")
    assert newest_checkpoint(tmp_path)[0] is None
    written = save(tmp_path, 2)
    assert written.is_dir()
    assert_whole(tmp_path, 2)
    save(tmp_path, 4)
    assert_whole(tmp_path, 4)
    assert steps_kept(tmp_path) == ["step_00000002", "step_00000004"]
    assert newest_weights(tmp_path) == tmp_path / "checkpoints" / "step_00000004" / "model.safetensors"


class Killed(BaseException):
    """SIGKILL: nothing of the writer's code runs after it."""


def writes_to_disk(monkeypatch: pytest.MonkeyPatch, before: Callable[[], None]) -> None:
    """Calls ``before`` ahead of each operation that changes the disk or forces it there."""

    def watched(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            before()
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    watched(Path, "mkdir")
    watched(Path, "replace")
    watched(os, "fsync")
    watched(os, "unlink")
    watched(os, "rmdir")
    watched(checkpoint_module, "save_file")
    watched(checkpoint_module.torch, "save")
    watched(checkpoint_module, "write_json")
    watched(files_module.json, "dump")


@pytest.mark.parametrize("over_a_refused_one", [False, True])
def test_a_kill_between_any_two_file_operations_leaves_a_checkpoint_to_go_on_from(
    tmp_path: Path, over_a_refused_one: bool
) -> None:
    def prepare(run: Path) -> None:
        save(run, 2)
        save(run, 4)
        if over_a_refused_one:
            cut(save(run, 6) / "model.safetensors")

    operations = 0

    def count() -> None:
        nonlocal operations
        operations += 1

    prepare(tmp_path / "counted")
    with pytest.MonkeyPatch.context() as patch:
        writes_to_disk(patch, count)
        save(tmp_path / "counted", 6)
    assert operations > 12

    seen = set()
    for fatal in range(operations):
        run = tmp_path / str(fatal)
        prepare(run)
        remaining = fatal

        def kill() -> None:
            nonlocal remaining
            if remaining == 0:
                raise Killed
            remaining -= 1

        with pytest.MonkeyPatch.context() as patch:
            writes_to_disk(patch, kill)
            with pytest.raises(Killed):
                save(run, 6)
        found, _ = newest_checkpoint(run)
        assert found is not None
        assert_whole(run, found.step)
        seen.add(found.step)
        # the next life trains the stage again and leaves nothing of the dead one behind
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)
            save(run, 6)
        assert_whole(run, 6)
        assert steps_kept(run) == ["step_00000004", "step_00000006"]
    assert seen == {4, 6}


def test_a_stripped_run_keeps_the_weights_only_and_cannot_be_resumed(tmp_path: Path) -> None:
    save(tmp_path, 2)
    newest = save(tmp_path, 4)
    strip_training_state(tmp_path)
    strip_training_state(tmp_path)
    assert steps_kept(tmp_path) == ["step_00000004"]
    assert sorted(path.name for path in newest.iterdir()) == ["checkpoint.json", "model.safetensors"]
    assert newest_weights(tmp_path) == weights_at(newest) == newest / "model.safetensors"
    found, refused = newest_checkpoint(tmp_path)
    assert found is None
    assert "training_state.pt is missing" in refused[0]
    strip_training_state(tmp_path / "nothing here")
    assert newest_weights(tmp_path / "nothing here") is None


def test_weights_that_someone_has_open_outlive_their_checkpoint(tmp_path: Path) -> None:
    """They are mapped, not read: who touches them after the file was cut short dies of SIGBUS."""
    weights = load_file(save(tmp_path, 2) / "model.safetensors")
    save(tmp_path, 4)
    save(tmp_path, 6)
    assert sorted(folder.name for folder in tmp_path.rglob("step_*")) == ["step_00000004", "step_00000006"]
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_weights_at_leaves_other_paths_alone(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "weights.safetensors"):
        assert weights_at(path) == path


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_with_code_does_not_run_even_when_its_hash_is_right(tmp_path: Path, zipped: bool) -> None:
    save(tmp_path, 2)
    folder = save(tmp_path, 4)
    exploded = tmp_path / "exploded"
    state = folder / "training_state.pt"
    if zipped:
        torch.save({"step": 4, "optimizer": Bomb(exploded)}, state)
    else:
        state.write_bytes(pickle.dumps({"step": 4, "optimizer": Bomb(exploded)}, protocol=2))
    relist(state)

    with pytest.raises(UserError, match="is not ours"):
        open_checkpoint(folder)
    assert_whole(tmp_path, 2)
    assert not exploded.exists()
    # the bomb is live
    with suppress(RuntimeError):
        torch.load(state, weights_only=False)
    assert exploded.is_dir()
