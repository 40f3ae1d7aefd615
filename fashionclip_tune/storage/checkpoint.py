"""Checkpoints of a run: whole or not there, checked before they are believed, never executing what they hold.

``checkpoints/step_00001000/`` has ``model.safetensors`` (weights), ``training_state.pt`` (optimizer, scaler, counters, sums
of the stage; tensors and plain values only) and ``checkpoint.json`` (what, of which run, and the hash of the other files).
``checkpoints/best_00001000/`` is the same without a training state: to use, not to go on from.
``checkpoints/token_table/`` has, once, what of the weights no step changes, where checkpoints are without it.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fashionclip_tune.errors import StorageError, UserError
from fashionclip_tune.files import give_usual_mode, sync_folder, write_json
from fashionclip_tune.storage.pickled import load_pickled

_VERSION = 3
_KEPT = 2
_RECORD_BYTES = 2**20
_TABLE_FOLDER = "token_table"
WEIGHTS_NAME, STATE_NAME, RECORD_NAME = "model.safetensors", "training_state.pt", "checkpoint.json"
_REQUIRED = ("step", "fingerprint", "config", "history")
# Of the training state, as ``Trainer.state_dict`` makes it.
_REQUIRED_STATE = {"step", "micro_batch_size", "stage", "optimizer", "scaler", "raw_weights"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole. ``record`` is its JSON: step, fingerprint, config, history."""

    folder: Path
    record: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.record["step"])

    @property
    def weights_file(self) -> Path:
        return self.folder / WEIGHTS_NAME

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor in the weights file, by name."""
        with safe_open(self.weights_file, "pt") as weights:
            names = weights.keys()
            return {name: tuple(weights.get_slice(name).get_shape()) for name in names}

    def training_state(self) -> dict[str, Any]:
        """Optimizer, scaler and counters."""
        return _training_state(self.folder)


def save_checkpoint(
    checkpoints: Path,
    weights: Mapping[str, Tensor],
    training_state: Mapping[str, Any],
    record: Mapping[str, Any],
    tables: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes ``step_NNNNNNNN`` from ``record["step"]`` and keeps the last two; a kill at any moment leaves those before it.

    Args:
        tables: ``tables_to_save``, before it.

    Raises:
        StorageError: it does not fit the disk; those before it are whole.
    """
    final = checkpoints / f"step_{record['step']:08d}"
    if tables:
        _write_whole(checkpoints / _TABLE_FOLDER, tables, None, {})
    _write_whole(final, weights, training_state, record)
    # Later ones were refused on resume; among the newest two they would push this one out.
    leftovers = [folder for folder in _folders(checkpoints) if folder.name > final.name]
    for folder in [*leftovers, *checkpoints.glob(".*.tmp")]:
        shutil.rmtree(folder, ignore_errors=True)
    _remove_older(checkpoints, keep=_KEPT)
    return final


def save_best(checkpoints: Path, weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> Path:
    """Writes ``best_NNNNNNNN`` from ``record["step"]``, weights only, then removes the one that was the best before.

    Raises:
        StorageError: it does not fit the disk; the one before it is whole.
    """
    final = checkpoints / f"best_{record['step']:08d}"
    _write_whole(final, weights, None, record)
    for folder in checkpoints.glob("best_*"):
        if folder != final:
            shutil.rmtree(folder, ignore_errors=True)
    return final


def tables_beside(weights: Path) -> Path:
    """Where the tables are that a checkpoint's weights file is without."""
    return weights.parent.parent / _TABLE_FOLDER / WEIGHTS_NAME


def tables_to_save(checkpoints: Path, tables: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Those that are not there yet."""
    return {} if (checkpoints / _TABLE_FOLDER).is_dir() else tables


def _write_whole(
    final: Path, weights: Mapping[str, Tensor], training_state: Mapping[str, Any] | None, record: Mapping[str, Any]
) -> None:
    """Under another name first: what has the final name is whole."""
    checkpoints = final.parent
    unfinished = checkpoints / f".{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    num_bytes = checkpoint_bytes(weights, training_state)
    names = (WEIGHTS_NAME,) if training_state is None else (WEIGHTS_NAME, STATE_NAME)
    _require_room(unfinished, num_bytes)
    try:
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}, unfinished / WEIGHTS_NAME)
        give_usual_mode(unfinished / WEIGHTS_NAME)
        if training_state is not None:
            torch.save(dict(training_state), unfinished / STATE_NAME)
        hashes = {name: file_hash(unfinished / name, synced=True) for name in names}
        write_json(unfinished / RECORD_NAME, {"version": _VERSION, "files": hashes, **record})
    except Exception:  # torch and safetensors have exceptions of their own for a full disk
        _require_room(unfinished, num_bytes)
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    sync_folder(unfinished)
    if final.exists():  # one that was refused, or a stage that is trained again
        shutil.rmtree(final, ignore_errors=True)
    unfinished.replace(final)
    sync_folder(checkpoints)


def _require_room(folder: Path, num_bytes: int) -> None:
    """Raises StorageError, and removes ``folder``, if so many bytes, those in it included, do not fit the disk."""
    present = sum(path.stat().st_size for path in folder.iterdir())
    free = shutil.disk_usage(folder).free
    if present + free < num_bytes + _RECORD_BYTES:
        shutil.rmtree(folder, ignore_errors=True)
        raise StorageError(
            f"the disk is full: a checkpoint of {num_bytes / 1e6:,.0f} MB does not fit {folder.parent}, which has "
            f"{(present + free) / 1e6:,.0f} MB free. The one before it is valid: make room, then go on from it"
        )


def checkpoint_bytes(weights: Mapping[str, Tensor], training_state: Mapping[str, Any] | None) -> int:
    """What a checkpoint takes on a disk, but for its record."""
    return _num_bytes(weights) + _num_bytes(training_state)


def _num_bytes(value: object) -> int:
    """Of the tensors in it."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_num_bytes, value.values()))
    return sum(map(_num_bytes, value)) if isinstance(value, list | tuple) else 0


def newest_checkpoint(
    place: Path, check: Callable[[Checkpoint], None] = lambda checkpoint: None
) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint at ``place`` (a checkpoint, or a run's folder), and why newer ones were refused.

    ``check`` refuses one by raising UserError, too.
    """

    def checked(folder: Path) -> Checkpoint:
        checkpoint = open_checkpoint(folder)
        check(checkpoint)
        return checkpoint

    if (place / RECORD_NAME).is_file():
        return checked(place), []
    refused: list[str] = []
    for folder in reversed(_folders(place / "checkpoints")):
        try:
            return checked(folder), refused
        except UserError as error:
            refused.append(str(error))
    return None, refused


def open_checkpoint(folder: Path) -> Checkpoint:
    """Checks a checkpoint's files against its record.

    Raises:
        UserError: it is not one of ours, of another version, half-written, changed, or stripped of its training state; or
            its files are what its record says, but foreign.
    """
    try:
        record = json.loads((folder / RECORD_NAME).read_text())
        version, hashes, _ = record["version"], dict(record["files"]), int(record["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no checkpoint of this project: {RECORD_NAME}: {error!r}") from error
    if version != _VERSION:
        raise UserError(f"{folder} has format {version}; this version of fashionclip_tune reads {_VERSION}")
    if missing := [name for name in _REQUIRED if name not in record]:
        raise UserError(f"{folder} is no checkpoint of this project: {RECORD_NAME} lacks {', '.join(missing)}")
    if set(hashes) == {WEIGHTS_NAME}:
        raise UserError(f"{folder} cannot be resumed from: it has weights only, no training state")
    if set(hashes) != {WEIGHTS_NAME, STATE_NAME}:
        raise UserError(f"{folder} is no checkpoint of this project: {RECORD_NAME} lists {', '.join(hashes) or 'no files'}")
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder} cannot be resumed from: {name} is missing")
        if file_hash(folder / name) != expected:
            raise UserError(f"{folder} is damaged: {name} is not what {RECORD_NAME} says")
    _check_content(folder, int(record["step"]))
    return Checkpoint(folder, record)


def read_record(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of its weights, one that is stripped of its training state included; its files are not looked at.

    Raises:
        UserError: it is none of ours.
    """
    try:
        record: dict[str, Any] = json.loads((folder / RECORD_NAME).read_text())
        _ = record["config"]["clip_model"], record["files"][WEIGHTS_NAME], record.get("model_config")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is no checkpoint of this project: {RECORD_NAME}: {error!r}") from error
    return record


def _check_content(folder: Path, step: int) -> None:
    """A right hash says that a file is the one that was listed, not that it is ours."""
    try:
        with safe_open(folder / WEIGHTS_NAME, "pt") as weights:
            weights.keys()
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be resumed from: {WEIGHTS_NAME} is not ours ({error})") from error
    # Mapped: structure and counters are read, the tensors' bytes are not.
    state = _training_state(folder, mmap=True)
    missing = _REQUIRED_STATE - state.keys() if isinstance(state, dict) else _REQUIRED_STATE
    if missing or state["step"] != step:
        reason = f"it lacks {', '.join(sorted(missing))}" if missing else f"it is of step {state['step']}"
        raise UserError(f"{folder} cannot be resumed from: {STATE_NAME} is not ours ({reason})")


def _training_state(folder: Path, *, mmap: bool = False) -> dict[str, Any]:
    """A file that holds anything but tensors and plain values is refused, not executed."""
    try:
        state: dict[str, Any] = load_pickled(folder / STATE_NAME, mmap=mmap)
    except ValueError as error:
        raise UserError(f"{folder} cannot be resumed from: {STATE_NAME} is not ours ({error})") from error
    return state


def weights_at(place: Path) -> Path:
    """The weights file of a checkpoint, one stripped of its training state included; any other path as it is."""
    return place / WEIGHTS_NAME if (place / RECORD_NAME).is_file() else place


def newest_weights(run_dir: Path) -> Path | None:
    """The weights file of a run's newest checkpoint, one stripped of its training state included."""
    folders = _folders(run_dir / "checkpoints")
    return folders[-1] / WEIGHTS_NAME if folders else None


def best_checkpoint(run_dir: Path) -> Path | None:
    """The best weights of a run that keeps them; the later ones, where it was killed before the others were removed."""
    return max((run_dir / "checkpoints").glob("best_*"), default=None)


def checkpoint_steps(run_dir: Path) -> list[int]:
    """The steps at which a run has checkpoints, whole or not."""
    return [int(folder.name.removeprefix("step_")) for folder in _folders(run_dir / "checkpoints")]


def strip_training_state(run_dir: Path) -> None:
    """Keeps the newest checkpoint's weights only: for a run that will not go on (two thirds of its bytes are Adam's)."""
    keep_newest(run_dir)
    for folder in _folders(run_dir / "checkpoints"):
        (folder / STATE_NAME).unlink(missing_ok=True)


def keep_newest(run_dir: Path) -> None:
    """Removes older checkpoints, and what a killed process had begun to write."""
    checkpoints = run_dir / "checkpoints"
    for unfinished in checkpoints.glob(".*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)
    _remove_older(checkpoints, keep=1)


def remove_checkpoints(run_dir: Path) -> None:
    """For a run of which only the figures are to be kept."""
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)


def _folders(checkpoints: Path) -> list[Path]:
    return sorted(checkpoints.glob("step_*")) if checkpoints.is_dir() else []


def _remove_older(checkpoints: Path, *, keep: int) -> None:
    for folder in _folders(checkpoints)[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)


def file_hash(path: Path, *, synced: bool = False) -> str:
    """As records list it. ``synced``: the file is brought to the disk first."""
    # Against damage, not against forgers, and fast: a full state of SigLIP2 has 4.5 GB, and is hashed at each checkpoint.
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        if synced:
            os.fsync(file.fileno())
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
