"""From what a user calls a model (an architecture, a checkpoint, a run, a sweep, an OpenCLIP folder) to a loaded one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import open_clip

from fashionclip_tune.checkpoint import RECORD_NAME, WEIGHTS_NAME, newest_weights
from fashionclip_tune.config import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.model import CONFIG_NAME, DEFAULT_TAGS, LoadedModel, load_model
from fashionclip_tune.preprocessing import Preprocessing
from fashionclip_tune.stored import stored_config
from fashionclip_tune.tiny import TINY_MODELS, register_tiny_models

_SWEEP_NAME = "sweep.json"


class NamedModel(NamedTuple):
    loaded: LoadedModel
    started_from: ProjectConfig | None
    """The run that trained it; None: an architecture's own weights, or nothing says what they started from."""


def named_model(name: str, config: ProjectConfig) -> NamedModel:
    """Loads what ``--model`` names, on the CPU.

    Args:
        config: the caller's; its architecture and weights count where ``name`` is an architecture or an OpenCLIP folder, and
            whether the stored one of a run may reach out is taken from it.

    Raises:
        UserError: there is no such model, or the folder is none.
    """
    place = Path(name).expanduser()
    if not place.exists():
        if place.name != name:
            raise UserError(f"--model {name}: there is no such folder, and architectures have no slash in their names")
        return NamedModel(load_model(config.with_overrides({"clip_model": name})), None)
    place = place.parent if place.name == WEIGHTS_NAME else place
    if (place / _SWEEP_NAME).is_file():
        place = place / "best"
    if (weights := newest_weights(place)) is not None:
        place = weights.parent
    if (place / RECORD_NAME).is_file():
        return _checkpoint_model(place, config.reading.allow_remote)
    if (place / CONFIG_NAME).is_file():
        settings = {"clip_model": _architecture(place), "model.pretrained": str(place.absolute())}
        return NamedModel(
            load_model(config.with_overrides(settings)), _start_of_the_best_trial(place, config.reading.allow_remote)
        )
    raise UserError(
        f"--model {name} is no model: give an OpenCLIP architecture, or the folder of a checkpoint ({RECORD_NAME}), a run, a "
        f"sweep or an OpenCLIP model ({CONFIG_NAME}); a single weights file by --set model.pretrained=FILE"
    )


def _checkpoint_model(folder: Path, allow_remote: bool) -> NamedModel:
    try:
        record = json.loads((folder / RECORD_NAME).read_text())
        started_from = stored_config(record["config"], allow_remote=allow_remote)
        weights = started_from.with_overrides({"model.pretrained": str(folder.absolute() / WEIGHTS_NAME)})
        stored = record["preprocessing"]
        preprocessing = Preprocessing(**{**stored, "mean": tuple(stored["mean"]), "std": tuple(stored["std"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is no checkpoint of this project: {RECORD_NAME}: {error!r}") from error
    # A weights file does not say how photos are to be prepared.
    loaded = replace(load_model(weights), preprocessing=preprocessing)
    return NamedModel(loaded, started_from)


def _start_of_the_best_trial(best: Path, allow_remote: bool) -> ProjectConfig | None:
    """What the winner of a sweep started from, where its folder is still in the sweep's."""
    sweep_dir = best.absolute().parent
    try:
        trial_id = json.loads((sweep_dir / _SWEEP_NAME).read_text())["best"]["trial_id"]
        (record,) = sweep_dir.glob(f"trials/{trial_id}-*/config.json")
        return stored_config(json.loads(record.read_text()), allow_remote=allow_remote)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _architecture(folder: Path) -> str:
    """Which of OpenCLIP's architectures a folder's ``model_cfg`` is, but for a bias of the logits."""
    try:
        described = json.loads((folder / CONFIG_NAME).read_text())["model_cfg"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--model {folder} is no OpenCLIP folder: {CONFIG_NAME} cannot be read ({error})") from error
    described.pop("init_logit_bias", None)
    register_tiny_models()
    for name in dict.fromkeys([*DEFAULT_TAGS, *TINY_MODELS, *open_clip.list_models()]):
        known = dict(open_clip.get_model_config(name) or {})
        known.pop("init_logit_bias", None)
        if known == described:
            return str(name)
    raise UserError(f"--model {folder}: its model_cfg is none of the architectures that OpenCLIP knows")
