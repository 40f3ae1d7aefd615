"""The best single trial of a sweep, as a folder that any OpenCLIP user loads."""

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.models.hub import CARD_NAME
from fashionclip_tune.models.named_model import TRIAL_NAME, starting_point
from fashionclip_tune.models.openclip import LoadedModel, export_openclip, load_model
from fashionclip_tune.models.transformers_shapes import activation_notes
from fashionclip_tune.models.weights import put_weights
from fashionclip_tune.reporting.sweep_files import TrialRow
from fashionclip_tune.storage.checkpoint import newest_weights
from fashionclip_tune.storage.folder import RemoteFolder
from fashionclip_tune.tuning.persistence.mirror import SweepMirror
from fashionclip_tune.tuning.persistence.retention import durable_run
from fashionclip_tune.tuning.trial import dir_of

_log = logging.getLogger(__name__)


def export_best(
    sweep_dir: Path,
    best: TrialRow | None,
    build: Callable[[dict[str, Any]], ProjectConfig],
    mirror: SweepMirror | None,
    limited: RemoteFolder | None = None,
    card: Callable[[Mapping[str, Any]], str] | None = None,
) -> None:
    """Writes ``SWEEP/best/``, whole or not at all.

    Args:
        best: the best trial; None: nothing is written.
        limited: the sweep's folder, where a budget holds for it.
        card: makes the text of the model card of what is known of the weights before training: licence and source.

    Raises:
        StorageError: it does not fit that budget, or the disk.
    """
    if best is None:
        return
    folder, config = dir_of(sweep_dir, best), build(best["config"])
    weights = _weights(folder, int(best["step"]), config, mirror)
    if weights is None:
        # Only where checkpoints are not written at every stage: its worker was killed before it could write the last one.
        warnings.warn(f"the weights of trial {best['trial_id']} at step {best['step']} were lost: no best/", stacklevel=2)
        return
    loaded = load_model(starting_point(config))
    put_weights(loaded.network, weights, folder)
    for note in activation_notes(loaded.model_config):
        _log.info(f"note: {note}")
    also = {TRIAL_NAME: json.dumps({"trial_id": best["trial_id"]}) + "\n"}
    if card is not None:
        also[CARD_NAME] = card(loaded.card)
    export_whole(loaded, sweep_dir / "best", limited, also)


def export_whole(
    loaded: LoadedModel, folder: Path, limited: RemoteFolder | None = None, also: Mapping[str, str] = MappingProxyType({})
) -> None:
    """An OpenCLIP folder, in place of an older one, whole or not at all. ``limited``: as for ``export_best``.

    ``also``: texts of more files, by name.
    """
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    if limited is not None:
        num_bytes = sum(tensor.nbytes for tensor in loaded.network.state_dict().values())
        # The older one can be made again: its trial has its weights.
        limited.require_room(unfinished.name, num_bytes, lambda: shutil.rmtree(folder, ignore_errors=True))
    try:
        export_openclip(loaded, unfinished)
        for name, text in also.items():
            (unfinished / name).write_text(text)
    except Exception:  # a full disk: what is half there would only take the room that is made
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def _weights(folder: Path, step: int, config: ProjectConfig, mirror: SweepMirror | None) -> Mapping[str, Tensor] | None:
    """From this machine, else, in half precision, from the durable folder."""
    file = newest_weights(folder)
    if file is not None and file.parent.name == f"step_{step:08d}":
        weights: Mapping[str, Tensor] = load_file(file)
        return weights
    return durable_run(mirror, folder, config).fetch_weights(step) if mirror is not None else None
