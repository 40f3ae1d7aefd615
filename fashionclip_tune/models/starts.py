"""From the two settings that name a model (``clip_model``, ``model.pretrained``) to a start."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip

from fashionclip_tune.config.start_names import (
    HUB_PREFIX,
    LOCAL_PREFIX,
    architecture_of,
    parts,
)
from fashionclip_tune.errors import UnavailableError, UserError, command
from fashionclip_tune.models.description import (
    CONFIG_NAME,
    DEFAULT_TAGS,
    architecture_of_file,
    architecture_of_tag,
    describe_folder,
    differences_of_starts,
    files_beside,
    is_said,
    known_name,
    preprocessing_beside,
    preprocessing_of_tag,
    published_preprocessing,
    random_preprocessing,
    refuse_another_network,
    registered,
    tags_with_quick_gelu,
)
from fashionclip_tune.models.hub import cached_file, description_folder
from fashionclip_tune.models.start import Start
from fashionclip_tune.models.tiny import TINY_MODELS, pretrained_tiny_dir
from fashionclip_tune.models.transformers_format import describe_transformers, is_transformers_folder
from fashionclip_tune.models.weights import weights_in_folder
from fashionclip_tune.storage.checkpoint import RECORD_NAME, WEIGHTS_NAME, newest_weights, read_record

SWEEP_NAME = "sweep.json"
# What the cards of models on the hub say that are in our spaces: a sweep is planned by it before they are fetched.
_ON_THE_HUB = {"Marqo/marqo-fashionCLIP": "ViT-B-16", "Marqo/marqo-fashionSigLIP": "ViT-B-16-SigLIP"}


def find_start(name: str, pretrained: str | None = "default") -> Start:
    """Where a model's weights come from; nothing is fetched but a description on the hub.

    Args:
        name: as ``clip_model`` takes it.
        pretrained: as ``model.pretrained``; None: random weights, of which only the architecture is looked for.

    Raises:
        UserError: there are no such weights, they are of another architecture, or nobody says how photos are prepared for them.
    """
    try:
        start = _find(name, pretrained)
    except RecursionError:
        raise UserError(f"clip_model = {name!r} started from itself, by its records") from None
    _refuse_oblong(name, start.model_config)
    paths = list(files_beside(start.file)) if start.file is not None else []
    folders = [
        folder_of(start.openclip_name),
        start.file.parent if start.file is not None and start.is_of_transformers else None,
    ]
    paths += [path for folder in folders if folder is not None for path in folder.iterdir() if path.is_file()]
    stats = [(path, path.stat()) for path in sorted(set(paths))]
    return replace(
        start, stamps=tuple((path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for path, stat in stats)
    )


def check_architecture(name: str) -> dict[str, Any]:
    """OpenCLIP's ``model_cfg`` of what ``clip_model`` names; raises as ``find_start`` does."""
    return find_start(name, None).model_config


def is_described_here(name: str) -> bool:
    """Whether the hub is not asked what ``clip_model`` names; raises UserError for what can be no place there."""
    return not name.startswith(HUB_PREFIX) or cached_file(name.removeprefix(HUB_PREFIX), [CONFIG_NAME], None) is not None


def architecture_start(name: str) -> Start:
    """A start on the hub for a plan: as far as it is known before it is fetched."""
    if (known := _known_beforehand(name)) is None:
        return find_start(name)
    return replace(_architecture(known, with_weights=False), repository=name.removeprefix(HUB_PREFIX))


def _known_beforehand(name: str) -> str | None:
    """The architecture of a model on the hub whose description is not here yet."""
    repository = name.removeprefix(HUB_PREFIX)
    return _ON_THE_HUB.get(repository) if cached_file(repository, [CONFIG_NAME], None) is None else None


def model_folder(place: Path) -> Path:
    """The checkpoint, the OpenCLIP folder or whatever else a folder stands for: of a sweep its winner, of a run its newest."""
    if (place / SWEEP_NAME).is_file():
        return place / "best"
    if place.name == WEIGHTS_NAME and (place.parent / RECORD_NAME).is_file():
        return place.parent
    weights = newest_weights(place)
    return place if weights is None else weights.parent


def _find(name: str, pretrained: str | None) -> Start:
    architecture, own = parts(name)
    if own is not None and pretrained is not None:
        if pretrained not in ("default", own):
            raise UserError(f"clip_model = {name!r} and model.pretrained = {pretrained!r} both name weights: give one of them")
        pretrained = own
    like = architecture.partition("/")[2] if own is not None else ""
    architecture = architecture_of(name)
    if own is not None:
        registered(architecture, said=name)
    base = _architecture(architecture, with_weights=pretrained == "default")
    if pretrained is None or (pretrained == "default" and base.has_weights):
        return base
    place = _default_place(architecture) if pretrained == "default" else _place(name, architecture, pretrained)
    if isinstance(place, str):
        prepared = preprocessing_of_tag(architecture, place)
        return Start(architecture, architecture_of_tag(architecture, place), prepared, tag=place)
    if place.is_dir():
        if like:
            raise UserError(
                f"clip_model = {name!r}: {place} is a folder, which no tag describes: {architecture}={place}, or "
                f"{architecture}/{like}=FILE with its weights file"
            )
        return _folder(architecture, place, base.model_config)
    if like:  # activation and photos are as the user says, whatever lies beside the file
        expected, prepared = architecture_of_tag(architecture, like), preprocessing_of_tag(architecture, like)
        architecture_of_file(architecture, place, {**expected, "quick_gelu": False})
        return Start(architecture, expected, prepared, file=place)
    start = Start(base.openclip_name, architecture_of_file(architecture, place, base.model_config), {}, file=place)
    beside = preprocessing_beside(place)
    if not beside and not start.model_config.get("quick_gelu") and (quick := tags_with_quick_gelu(architecture)):
        note = f"computed with GELU; weights like those of {', '.join(quick)} want QuickGELU: {architecture}/{quick[0]}=FILE"
        start = replace(start, notes=(note,))
    said = base.preprocessing if folder_of(base.openclip_name) else {}
    return _prepared(start, beside or said, f"the weights file {place}", place.parent)


def _architecture(name: str, *, with_weights: bool) -> Start:
    """What is known by the first part of a name; with the weights that come with it, if any and if they are wanted."""
    what = f"clip_model = {name!r}"
    if (folder := folder_of(name)) is not None:
        return _in_folder(folder, what, with_weights=with_weights)
    if not name.startswith(HUB_PREFIX):
        return Start(name, registered(name), random_preprocessing(name))
    if not with_weights and (known := _known_beforehand(name)) is not None:
        return _architecture(known, with_weights=False)
    repository = name.removeprefix(HUB_PREFIX)
    folder = description_folder(repository, f"{what}: the description", CONFIG_NAME)
    start = replace(_described(folder, what, with_weights=with_weights), is_on_the_hub=True)
    return replace(start, repository=repository) if with_weights else start


def folder_of(name: str) -> Path | None:
    """The folder of a name that is ``local-dir:FOLDER``."""
    return Path(name.removeprefix(LOCAL_PREFIX)).expanduser().absolute() if name.startswith(LOCAL_PREFIX) else None


def _in_folder(folder: Path, what: str, *, with_weights: bool) -> Start:
    """Of any kind of folder that models are in."""
    place = model_folder(folder)
    if place.is_file():
        raise UserError(f"{what} is a file: name its architecture, too, as clip_model=ARCHITECTURE={folder}")
    if not place.is_dir():
        raise UnavailableError(f"{what}: there is no such folder")
    if (place / RECORD_NAME).is_file():
        start = _in_checkpoint(place)
        return start if with_weights else replace(start, file=None, file_hash=None)
    if is_transformers_folder(place):
        start = _in_transformers_folder(place)
        return start if with_weights else replace(start, file=None, is_of_transformers=False)
    if not (place / CONFIG_NAME).is_file():
        raise UnavailableError(  # a drive that is not mounted leaves an empty folder
            f"{what} is no model: {place} has no {CONFIG_NAME} (an OpenCLIP folder), no {RECORD_NAME} (a checkpoint of ours), "
            f"no checkpoints/ (a run) and no {SWEEP_NAME} (a sweep), "
            "no config.json of transformers"
        )
    start = _described(place, what, with_weights=with_weights)
    return replace(start, file=weights_in_folder(place)) if with_weights else start


def _in_transformers_folder(folder: Path) -> Start:
    found = describe_transformers(folder)
    return Start(
        found.architecture,
        found.model_config,
        found.preprocessing,
        file=found.weights_file,
        is_of_transformers=True,
        tokenizer_folder=found.tokenizer_folder,
        notes=found.notes,
    )


def _described(folder: Path, what: str, *, with_weights: bool) -> Start:
    """An OpenCLIP folder; where its weights are wanted, it has to say how photos are prepared for them."""
    described = describe_folder(folder, what)
    start = Start(f"{LOCAL_PREFIX}{folder}", described.model_config, described.preprocessing)
    return _prepared(start, described.preprocessing, f"the OpenCLIP folder {folder}", folder) if with_weights else start


def _prepared(start: Start, said: Mapping[str, Any], what: str, folder: Path) -> Start:
    """With what is said of how photos are prepared, else with what its architecture's published weights have in common."""
    if is_said(said):
        return replace(start, preprocessing=dict(said))
    published = published_preprocessing(start.openclip_name, start.model_config, what, folder / CONFIG_NAME)
    architecture = known_name(start.model_config) or start.openclip_name
    note = f"photos are prepared as for the published weights of {architecture}: nothing beside {what} says how"
    return replace(start, preprocessing=published, notes=(*start.notes, note))


def _in_checkpoint(folder: Path) -> Start:
    """Of one of our checkpoints: its own weights, in the network and with the tokenizer of what its run started from.

    Its record may be anyone's: it may add a bias and an activation to that network, and nothing that is looked for elsewhere.
    """
    record = read_record(folder)
    name, model_config = str(record["config"]["clip_model"]), record.get("model_config")
    place = parts(name)[1] or str(record["config"].get("model.pretrained"))
    began = f"{LOCAL_PREFIX}{place}" if Path(place).is_absolute() and Path(place).is_dir() else architecture_of(name)
    repository = began.removeprefix(HUB_PREFIX)
    if repository != began and cached_file(repository, [CONFIG_NAME], None) is None:
        raise UnavailableError(
            f"{folder} started from {began}, which is not in the hub's cache on this machine: fetch it by its name first, "
            f"`{command('evaluate', '--model', began, '--data', 'SHARDS')}`, or copy the cache"
        )
    try:
        base = _architecture(began, with_weights=False)
    except UnavailableError as error:
        base = _listed(model_config, f"{folder} started from {began}, which is not to be had: {error}")
    model_config = base.model_config if model_config is None else model_config
    differing = differences_of_starts(model_config, base.model_config)
    if differing:
        raise UserError(f"{folder} is not of what its record says that it started from, {began}: {'; '.join(differing)}")
    weights = folder / WEIGHTS_NAME
    start = Start(
        base.openclip_name,
        model_config,
        {},
        file=weights,
        file_hash=str(record["files"][WEIGHTS_NAME]),
        tokenizer_folder=base.tokenizer_folder,
        is_on_the_hub=base.is_on_the_hub,
    )
    return _prepared(start, preprocessing_beside(weights), f"the checkpoint {folder}", folder)


def _listed(model_config: object, lacking: str) -> Start:
    """What a run started from is gone: its network, where OpenCLIP lists it and has its tokenizer within."""
    known = known_name(model_config) if isinstance(model_config, Mapping) else None
    if known is None or registered(known)["text_cfg"].get("hf_tokenizer_name"):
        raise UnavailableError(lacking)
    return Start(known, registered(known), {})


def _default_place(name: str) -> str | Path:
    """A tag, or the folder of a tiny tower's pretrained weights."""
    if name in TINY_MODELS:
        folder = pretrained_tiny_dir(name)
        if not folder.is_dir():
            raise UnavailableError(
                f"the pretrained weights of {name} are not made yet: `{command('pretrain')}` makes them in "
                "about a minute (model.pretrained=none starts from random weights)"
            )
        return folder
    if name not in DEFAULT_TAGS:
        tags = open_clip.list_pretrained_tags_by_model(name)
        named = f"{name}/{tags[0]}" if tags else f"{name}=FILE"
        raise UserError(
            f"{name} has no weights that are its own: name some, such as clip_model={named}: {_allowed_weights(name)}"
        )
    return DEFAULT_TAGS[name]


def _place(name: str, architecture: str, pretrained: str) -> str | Path:
    """A tag, or an existing file or folder."""
    if open_clip.get_pretrained_cfg(architecture, pretrained):
        return pretrained
    path = Path(pretrained).expanduser().absolute()
    if not path.exists():
        kind = UserError if path.name == pretrained else UnavailableError  # a tag that is none, or a place with nothing there
        whose = f"the weights of clip_model = {name!r}" if parts(name)[1] else f"model.pretrained = {pretrained!r}"
        raise kind(f"{whose}: {pretrained!r} is neither a file, a folder nor a tag: {_allowed_weights(architecture)}")
    return path


def _allowed_weights(name: str) -> str:
    tags = open_clip.list_pretrained_tags_by_model(name)
    return f"a tag of {name} ({', '.join(tags) or 'it has none'}), a weights file, an OpenCLIP folder, or none"


def _folder(name: str, folder: Path, expected: Mapping[str, Any]) -> Start:
    """Weights in a folder, which must be of the named architecture but for a logit bias."""
    start = _in_folder(folder, f"model.pretrained = {folder}", with_weights=True)
    if folder != folder_of(name):
        refuse_another_network(f"the weights in {folder}", name, start.model_config, expected)
    return start


def _refuse_oblong(name: str, model_config: Mapping[str, Any]) -> None:
    size = model_config["vision_cfg"].get("image_size", 224)
    if isinstance(size, list | tuple) and len(set(size)) > 1:
        raise UserError(f"{name}: photos of {size[0]} x {size[1]} pixels are not supported, only square ones")
