"""A run's state and weights on a durable folder: without what the base model's own files say already.

Left out are tensors that are, bit by bit, those of the weights that the run started from (a frozen tower, a token
embedding); the base is named and its hash kept. ``TRIAL/state/step_N/`` is a checkpoint but for that, its record written
last; ``TRIAL/weights/step_N.safetensors`` are the weights in half precision, to rank and export.
"""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import StorageError, UnavailableError, UserError
from fashionclip_tune.models.openclip import base_weights
from fashionclip_tune.models.token_rows import split_tables, whole
from fashionclip_tune.storage.checkpoint import (
    RECORD_NAME,
    STATE_NAME,
    WEIGHTS_NAME,
    checkpoint_steps,
    file_hash,
    open_checkpoint,
    save_checkpoint,
    tables_to_save,
)
from fashionclip_tune.storage.folder import RemoteFolder
from fashionclip_tune.training.callbacks import RunCallbacks

_BASE = "base"


class RemoteState:
    """The durable side of one run."""

    def __init__(
        self,
        folder: RemoteFolder,
        name: str,
        config: ProjectConfig,
        *,
        sync_every_s: float = math.inf,
        turn: AbstractContextManager[Any] | None = None,
    ) -> None:
        """
        Args:
            name: the run's place in the folder.
            sync_every_s: a state is written no more often.
            turn: held while something is written, so that one run at a time has it there twice.
        """
        self._turn = turn if turn is not None else nullcontext()
        self._folder = folder
        self._name = name
        self._config = config
        self._sync_every_s = sync_every_s
        self._synced_at = time.monotonic()

    def watching(self, callbacks: RunCallbacks) -> RunCallbacks:
        """Callbacks of the run that also keep its state here."""
        return replace(callbacks, wants_checkpoint=self.is_due, on_checkpoint=self.put_state)

    def is_due(self) -> bool:
        """Whether so much was done since the last state that it would be missed."""
        return time.monotonic() - self._synced_at >= self._sync_every_s

    def put_state(self, checkpoint: Path) -> None:
        """Writes a checkpoint, then removes older ones."""
        record = json.loads((checkpoint / RECORD_NAME).read_text())
        place = f"{self._name}/state/{checkpoint.name}"
        with self._turn, _scratch(checkpoint) as scratch:
            weights = Path(scratch) / WEIGHTS_NAME
            record["base"] = self._write_changed(checkpoint / WEIGHTS_NAME, weights, torch.float32)
            record["files"][WEIGHTS_NAME] = file_hash(weights)
            num_bytes = weights.stat().st_size + (checkpoint / STATE_NAME).stat().st_size
            self._folder.require_room(place, num_bytes, self._remove_torn_states)
            self._folder.put_file(f"{place}/{WEIGHTS_NAME}", weights)
            self._folder.put_file(f"{place}/{STATE_NAME}", checkpoint / STATE_NAME)
            self._folder.put(f"{place}/{RECORD_NAME}", json.dumps(record).encode())
            self._remove("state", but=place)
        self._synced_at = time.monotonic()

    def put_weights(self, checkpoint: Path) -> None:
        """Writes the weights of a checkpoint in half precision, then removes older ones."""
        place = f"{self._name}/weights/{checkpoint.name}.safetensors"
        with self._turn, _scratch(checkpoint) as scratch:
            weights = Path(scratch) / WEIGHTS_NAME
            self._write_changed(checkpoint / WEIGHTS_NAME, weights, torch.float16)
            # Those of an earlier stage are of no use: the trial has gone on from there, and is back there after a loss.
            self._folder.require_room(place, weights.stat().st_size, lambda: self._remove("weights", but=place))
            self._folder.put_file(place, weights)
            self._remove("weights", but=place)

    def fetch_state(self, run_dir: Path) -> bool:
        """Makes the newest whole state the run's newest checkpoint; False if the run's own is as new, or there is none.

        Raises:
            UnavailableError: the base weights are not those that the run started from.
        """
        names = self._folder.sizes(f"{self._name}/state")
        places = sorted({name.rpartition("/")[0] for name in names if name.endswith(f"/{RECORD_NAME}")})
        own = max(checkpoint_steps(run_dir), default=-1)
        for place in reversed(places):
            if int(place.rpartition("_")[2]) <= own:
                return False
            run_dir.mkdir(parents=True, exist_ok=True)
            for leftover in run_dir.glob("fetched-*"):  # of a worker that was killed here
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix="fetched-", dir=run_dir) as fetched:
                try:
                    for name in (WEIGHTS_NAME, STATE_NAME, RECORD_NAME):
                        self._folder.fetch(f"{place}/{name}", Path(fetched) / name)
                    state = open_checkpoint(Path(fetched))
                except StorageError:
                    raise
                except (FileNotFoundError, UserError):
                    continue  # torn when the machine was lost: the one before it is whole
                weights = {**self._base(state.record["base"]), **load_file(state.weights_file)}
                weights, tables = split_tables(weights)
                record = {name: value for name, value in state.record.items() if name not in ("version", "files", "base")}
                checkpoints = run_dir / "checkpoints"
                save_checkpoint(checkpoints, weights, state.training_state(), record, tables_to_save(checkpoints, tables))
                return True
        return False

    def fetch_weights(self, step: int) -> Mapping[str, Tensor] | None:
        """The weights of a step, in single precision; None if they are not there."""
        with tempfile.TemporaryDirectory(prefix="portable-") as scratch:
            file = Path(scratch) / WEIGHTS_NAME
            try:
                self._folder.fetch(f"{self._name}/weights/step_{step:08d}.safetensors", file)
                with safe_open(file, "pt") as opened:
                    base = json.loads(opened.metadata()[_BASE])
                changed = load_file(file)
            except (FileNotFoundError, SafetensorError):
                return None
        found = {**self._base(base), **changed}
        return {key: each.float() if each.dtype == torch.half else each for key, each in whole(found, found).items()}

    def forget_state(self) -> int:
        """Removes the states; returns the number of bytes freed."""
        return self._remove("state", but=None)

    def forget_weights(self) -> int:
        """Removes the weights; returns the number of bytes freed."""
        return self._remove("weights", but=None)

    def _remove_torn_states(self) -> None:
        """What was being written when a machine was lost; whole ones go when there is a newer one."""
        sizes = self._folder.sizes(f"{self._name}/state")
        whole = {name.rpartition("/")[0] for name in sizes if name.endswith(f"/{RECORD_NAME}")}
        for name in sizes:
            if name.rpartition("/")[0] not in whole:
                self._folder.remove(name)

    def _remove(self, kind: str, *, but: str | None) -> int:
        """Records go first: a state without one is none."""
        sizes = self._folder.sizes(f"{self._name}/{kind}")
        old = [name for name in sizes if but is None or not (name == but or name.startswith(f"{but}/"))]
        for name in sorted(old, key=lambda name: not name.endswith(RECORD_NAME)):
            self._folder.remove(name)
        return sum(sizes[name] for name in old)

    def _write_changed(self, source: Path, target: Path, dtype: torch.dtype) -> dict[str, str]:
        """Writes the tensors that are not the base's to ``target``; returns what the base is."""
        tensors, fingerprint = base_weights(self._config)
        base = {"model": self._config.model_name, "weights": str(self._config.model.pretrained), "fingerprint": fingerprint}
        changed = {}
        with safe_open(source, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118 (not a dict)
                tensor = weights.get_tensor(key)
                if key not in tensors or not torch.equal(tensor, tensors[key]):
                    is_scalar = tensor.ndim == 0  # scale and bias: nothing to gain
                    changed[key] = tensor if is_scalar or not tensor.is_floating_point() else tensor.to(dtype)
        save_file(changed, target, metadata={_BASE: json.dumps(base)})
        return base

    def _base(self, expected: Mapping[str, str]) -> dict[str, Tensor]:
        tensors, fingerprint = base_weights(self._config)
        if fingerprint != expected["fingerprint"]:
            raise UnavailableError(
                f"{self._folder.location}/{self._name} started from other weights of {expected['model']} (model.pretrained = "
                f"{expected['weights']}, fingerprint {expected['fingerprint']}), not those here ({fingerprint}): bring them"
            )
        return tensors


def _scratch(checkpoint: Path) -> tempfile.TemporaryDirectory[str]:
    """Beside a checkpoint, by a name that the next one's writing clears away after a kill."""
    return tempfile.TemporaryDirectory(prefix=".portable-", suffix=".tmp", dir=checkpoint.parent)
