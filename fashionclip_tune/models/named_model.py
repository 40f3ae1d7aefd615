"""From what a user calls a model (an architecture, a checkpoint, a run, a sweep, an OpenCLIP folder) to a loaded one."""

import json
from pathlib import Path
from typing import NamedTuple

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.config.stored import stored_config
from fashionclip_tune.errors import UserError
from fashionclip_tune.models.description import CONFIG_NAME, describe_folder, folder_of, hub_repository, known_name, local_name
from fashionclip_tune.models.openclip import LoadedModel, load_model
from fashionclip_tune.storage.checkpoint import RECORD_NAME, WEIGHTS_NAME, file_hash, newest_weights, weights_at

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
    place = folder_of(name) or Path(name).expanduser()
    if not place.exists():
        if hub_repository(name) is not None:
            settings = {"clip_model": name, "model.pretrained": "default"}
            return NamedModel(load_model(config.with_overrides(settings)), None)
        if place.name != name:
            raise UserError(f"--model {name}: there is no such folder, and architectures have no slash in their names")
        return NamedModel(load_model(config.with_overrides({"clip_model": name})), None)
    if place.name == WEIGHTS_NAME and (place.parent / RECORD_NAME).is_file():
        place = place.parent
    if config.model.pretrained not in (None, "default"):
        raise UserError(f"--model {name} and model.pretrained = {config.model.pretrained} both name weights: give one of them")
    if (place / _SWEEP_NAME).is_file():
        place = place / "best"
    if (weights := newest_weights(place)) is not None:
        place = weights.parent
    if (place / RECORD_NAME).is_file():
        return _checkpoint_model(place, config.reading.allow_remote)
    if (place / CONFIG_NAME).is_file():
        architecture = known_name(describe_folder(place, f"--model {name}").model_config) or local_name(place)
        settings = {"clip_model": architecture, "model.pretrained": str(place.absolute())}
        started_from = _start_of_the_best_trial(place, config.reading.allow_remote)
        return NamedModel(load_model(config.with_overrides(settings)), started_from)
    raise UserError(
        f"--model {name} is no model: give an OpenCLIP architecture, or the folder of a checkpoint ({RECORD_NAME}), a run, a "
        f"sweep or an OpenCLIP model ({CONFIG_NAME}); a single weights file by --set model.pretrained=FILE"
    )


def _checkpoint_model(folder: Path, allow_remote: bool) -> NamedModel:
    try:
        record = json.loads((folder / RECORD_NAME).read_text())
        started_from = stored_config(record["config"], allow_remote=allow_remote)
        weights = started_from.with_overrides({"model.pretrained": str(folder.absolute() / WEIGHTS_NAME)})
        expected = record["files"][WEIGHTS_NAME]
        is_whole = file_hash(folder / WEIGHTS_NAME) == expected
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is no checkpoint of this project: {RECORD_NAME}: {error!r}") from error
    if not is_whole:
        raise UserError(f"{folder} is damaged: {WEIGHTS_NAME} is not what {RECORD_NAME} says")
    return NamedModel(load_model(weights), started_from)


def _start_of_the_best_trial(best: Path, allow_remote: bool) -> ProjectConfig | None:
    """What the winner of a sweep started from, where its folder is still in the sweep's."""
    sweep_dir = best.absolute().parent
    try:
        trial_id = json.loads((sweep_dir / _SWEEP_NAME).read_text())["best"]["trial_id"]
        (record,) = sweep_dir.glob(f"trials/{trial_id}-*/config.json")
        return stored_config(json.loads(record.read_text()), allow_remote=allow_remote)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        return None


def starting_point(config: ProjectConfig) -> ProjectConfig:
    """``should_load_checkpoint`` starts from the weights of a file, an OpenCLIP folder or one of our checkpoints."""
    if not config.should_load_checkpoint:
        return config
    assert config.checkpoint_path is not None
    return config.with_overrides({"model.pretrained": str(weights_at(config.checkpoint_path))})
