"""A model by its name, and the lineage of its weights: the run that trained them, and how OpenCLIP loads those before it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import open_clip

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.config.start_names import HUB_PREFIX, LOCAL_PREFIX, brings_weights, is_path, is_tag, joined, parts
from fashionclip_tune.config.stored import stored_config
from fashionclip_tune.errors import UserError
from fashionclip_tune.models.description import CONFIG_NAME, registered
from fashionclip_tune.models.hub import cached_file
from fashionclip_tune.models.openclip import LoadedModel, load_model
from fashionclip_tune.models.starts import SWEEP_NAME, find_start, folder_of, is_described_here, model_folder
from fashionclip_tune.models.tiny import TINY_MODELS
from fashionclip_tune.models.weights import NAMES_IN_A_FOLDER
from fashionclip_tune.storage.checkpoint import RECORD_NAME, read_record, weights_at

TRIAL_NAME = "trial.json"  # in a sweep's best/


class NamedModel(NamedTuple):
    loaded: LoadedModel
    started_from: ProjectConfig | None
    """The run that trained it; None: an architecture's own weights, or nothing says what they started from."""


def named_model(name: str, config: ProjectConfig) -> NamedModel:
    """Loads what ``--model`` names, as ``clip_model`` takes it, on the CPU.

    Args:
        config: the caller's: its other settings, and whether the stored ones of a run may reach out.

    Raises:
        UserError: there is no such model.
    """
    if Path(name).is_dir() and name not in (*TINY_MODELS, *open_clip.list_models()) and not is_tag(name):
        name = f"{LOCAL_PREFIX}{name}"  # a folder here may be named without a slash, too
    chosen = config.with_overrides({"clip_model": name})
    if brings_weights(chosen.model_name):
        if config.model.pretrained not in (None, "default"):
            raise UserError(f"{name} and model.pretrained = {config.model.pretrained} both name weights: give one of them")
        chosen = chosen.with_overrides({"model.pretrained": "default"})
    return NamedModel(load_model(chosen), started_from(chosen.model_name, allow_remote=config.reading.allow_remote))


def started_from(name: str, *, allow_remote: bool) -> ProjectConfig | None:
    """The run that trained what ``clip_model`` names; None: nothing says what it started from."""
    folder = folder_of(name)
    place = model_folder(folder) if folder is not None else None
    if place is None:
        return None
    if (place / RECORD_NAME).is_file():
        return _stored(read_record(place)["config"], allow_remote=allow_remote)
    try:
        (record,) = place.parent.glob(f"trials/{exported_trial(place)}-*/config.json")
        return _stored(json.loads(record.read_text()), allow_remote=allow_remote)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        return None


def exported_trial(best: Path) -> str | None:
    """Whose weights a sweep's ``best/`` has: it may be older than what ``sweep.json`` calls the best. None: nobody says.

    Older versions did not record it; of what they have finished it is the best trial.
    """
    try:
        if (best / TRIAL_NAME).is_file():
            return str(json.loads((best / TRIAL_NAME).read_text())["trial_id"])
        sweep = json.loads((best.parent / SWEEP_NAME).read_text())
        return str(sweep["best"]["trial_id"]) if sweep["state"] == "FINISHED" and best.is_dir() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _stored(flat: Mapping[str, Any], *, allow_remote: bool) -> ProjectConfig:
    """A run's configuration, which may name a place on the hub where all that is needed of it is in the cache."""
    name = str(flat.get("clip_model"))
    repository, needed = name.removeprefix(HUB_PREFIX), ([CONFIG_NAME], NAMES_IN_A_FOLDER)
    is_here = name.startswith(HUB_PREFIX) and all(cached_file(repository, names, None) is not None for names in needed)
    return stored_config(flat, allow_remote=allow_remote, known_models=[name] if is_here else [])


def settled(config: ProjectConfig) -> ProjectConfig:
    """The same start by one name: ``clip_model`` has the weights too, and of a run the checkpoint that is its newest now."""
    name, place = config.model_name, config.model.pretrained
    architecture, own = parts(name)
    if own is not None and f"{architecture}={own}" == name:
        own = _settled(own)
        name = f"{architecture}={own}"
    if place not in ("default", None):
        place = _settled(str(place))
        name = name if brings_weights(name) else joined(name, place)
        place = "default" if parts(name)[1] == place else place
    if (folder := folder_of(name)) is not None:
        name = f"{LOCAL_PREFIX}{model_folder(folder)}"
    is_settled = (name, place) == (config.model_name, config.model.pretrained)
    return config if is_settled else config.with_overrides({"clip_model": name, "model.pretrained": place})


def _settled(place: str) -> str:
    """A tag or a file as it is."""
    folder = Path(place).expanduser()
    return str(model_folder(folder.absolute())) if is_path(place) and folder.is_dir() else place


def starting_point(config: ProjectConfig) -> ProjectConfig:
    """``should_load_checkpoint`` starts from the weights of a file, an OpenCLIP folder or one of our checkpoints."""
    if not config.should_load_checkpoint:
        return config
    assert config.checkpoint_path is not None
    return config.with_overrides({"model.pretrained": str(weights_at(config.checkpoint_path))})


def loading_call(name: str, pretrained: str | None) -> str | None:
    """How any OpenCLIP user loads the weights that a model starts from; None: they are random, or OpenCLIP cannot.

    The name may be of anybody's file: the hub is not asked.
    """
    calls = "open_clip.create_model_and_transforms"
    try:
        if not is_described_here(name):
            return f'{calls}("{name}")' if pretrained == "default" else None
        start = find_start(name, pretrained)
    except UserError:
        return None
    if start.repository is not None:
        return f'{calls}("{HUB_PREFIX}{start.repository}")'
    if not start.has_weights or start.file_hash is not None or start.is_of_transformers:
        return None
    if start.tag is None and folder_of(start.openclip_name) is not None:
        return f'{calls}("{start.openclip_name}")'
    # OpenCLIP would warn and take the activation of the name.
    said = registered(start.openclip_name).get("quick_gelu", False)
    quick = "" if said == start.model_config.get("quick_gelu", False) else ", force_quick_gelu=True"
    return f'{calls}("{start.openclip_name}", pretrained="{start.tag or start.file}"{quick})'


def use_zero_shot(name: str, pretrained: str | None) -> str:
    """What to say of weights that are worse than those they were trained from."""
    call = loading_call(name, pretrained)
    return "the trained weights are below zero-shot: use the zero-shot ones" + (f", {call}" if call else "")
