"""From the two settings that name a model (``clip_model``, ``model.pretrained``) to what is read: a file, a tag, or nothing."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import open_clip

from fashionclip_tune.errors import UnavailableError, UserError, command
from fashionclip_tune.models.description import (
    DEFAULT_TAGS,
    Description,
    architecture_of_file,
    architecture_of_tag,
    check_architecture,
    describe,
    describe_folder,
    files_beside,
    folder_of,
    hub_repository,
    local_name,
    preprocessing_by_name,
    preprocessing_of_file,
    preprocessing_of_folder,
    random_preprocessing,
    weights_of_repository,
)
from fashionclip_tune.models.tiny import TINY_MODELS, pretrained_tiny_dir
from fashionclip_tune.models.weights import weights_in_folder


@dataclass(frozen=True)
class Start:
    """A model before it is trained. At most one of ``tag``, ``file`` and ``repository`` says where its weights are."""

    openclip_name: str
    """By which OpenCLIP builds it and finds its tokenizer."""
    model_config: dict[str, Any] = field(compare=False)
    preprocessing: dict[str, Any] = field(compare=False)
    """What of OpenCLIP's ``preprocess_cfg`` has to be said; a tag says its own."""
    tag: str | None = None
    file: Path | None = None
    repository: str | None = None
    stamps: tuple[object, ...] = ()
    """Of all files that say something about it: by the next time, others may have taken their place."""

    @property
    def has_weights(self) -> bool:
        """Else they are random."""
        return (self.tag or self.file or self.repository) is not None

    def fetch(self, cache_dir: Path) -> Path:
        """The weights file, fetched if need be."""
        if self.tag is not None:
            known = open_clip.get_pretrained_cfg(self.openclip_name, self.tag)
            return Path(open_clip.download_pretrained(known, cache_dir=str(cache_dir)))
        if self.repository is not None:
            return weights_of_repository(self.repository)
        assert self.file is not None
        return self.file


def loading_call(name: str, pretrained: str | None) -> str | None:
    """How any OpenCLIP user loads the weights that a model starts from; None: they are random, or not to be found here."""
    try:
        start = find_start(name, pretrained)
    except UserError:
        return None
    if not start.has_weights:
        return None
    calls = "open_clip.create_model_and_transforms"
    if start.tag is not None or (folder_of(start.openclip_name) is None and start.file is not None):
        # OpenCLIP would warn and take the activation of the name.
        is_said = check_architecture(name).get("quick_gelu", False) == start.model_config.get("quick_gelu", False)
        quick = "" if is_said else ", force_quick_gelu=True"
        return f'{calls}("{name}", pretrained="{start.tag or start.file}"{quick})'
    return f'{calls}("{start.openclip_name}")'


def use_zero_shot(name: str, pretrained: str | None) -> str:
    """What to say of weights that are worse than those they were trained from."""
    call = loading_call(name, pretrained)
    return "the trained weights are below zero-shot: use the zero-shot ones" + (f", {call}" if call else "")


def find_start(name: str, pretrained: str | None) -> Start:
    """Where a model's weights come from; nothing is fetched but a description on the hub.

    Raises:
        UserError: there are no such weights, they are of another architecture, or nobody says how photos are prepared for them.
    """
    start = _find(name, pretrained)
    paths = list(files_beside(start.file)) if start.file is not None else []
    if (folder := folder_of(start.openclip_name)) is not None:
        paths += [path for path in folder.iterdir() if path.is_file()]
    stats = [(path, path.stat()) for path in sorted(set(paths))]
    return replace(
        start, stamps=tuple((path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for path, stat in stats)
    )


def _find(name: str, pretrained: str | None) -> Start:
    described = describe(name)
    if pretrained is None:
        return Start(name, described.model_config, random_preprocessing(name))
    place = _default_place(name) if pretrained == "default" else _place(name, pretrained)
    if isinstance(place, str) and hub_repository(place) is not None:
        own = described.preprocessing or preprocessing_by_name(name, "the weights there", Path("open_clip_config.json"))
        return Start(name, described.model_config, own, repository=hub_repository(place))
    if isinstance(place, str):
        return Start(name, architecture_of_tag(name, place), {}, tag=place)
    if not place.is_dir():
        return Start(name, architecture_of_file(name, place), preprocessing_of_file(name, place), file=place)
    own_folder = _folder(name, place, described)
    return Start(
        local_name(place),
        own_folder.model_config,
        preprocessing_of_folder(name, place, own_folder),
        file=weights_in_folder(place),
    )


def _default_place(name: str) -> str | Path:
    """A tag, a folder, or a name on the hub."""
    if name in TINY_MODELS:
        folder = pretrained_tiny_dir(name)
        if not folder.is_dir():
            raise UnavailableError(
                f"the pretrained weights of {name} are not made yet: `{command('pretrain')}` makes them in "
                "about a minute (model.pretrained=none starts from random weights)"
            )
        return folder
    if hub_repository(name) is not None:
        return name
    if (own := folder_of(name)) is not None:
        return own
    if name not in DEFAULT_TAGS:
        raise UserError(f"model.pretrained must be given for {name}: {_allowed_weights(name)}")
    return DEFAULT_TAGS[name]


def _place(name: str, pretrained: str) -> str | Path:
    """A tag, or an existing file or folder."""
    if open_clip.get_pretrained_cfg(name, pretrained):
        return pretrained
    path = Path(pretrained).expanduser().absolute()
    if not path.exists():
        kind = UserError if path.name == pretrained else UnavailableError  # a tag that is none, or a place with nothing there
        raise kind(f"model.pretrained = {pretrained!r} is neither a file, a folder nor a tag: {_allowed_weights(name)}")
    return path


def _allowed_weights(name: str) -> str:
    tags = open_clip.list_pretrained_tags_by_model(name)
    return f"a tag of {name} ({', '.join(tags) or 'it has none'}), a weights file, an OpenCLIP folder, or none"


def _folder(name: str, folder: Path, expected: Description) -> Description:
    """Of an OpenCLIP folder, which must be of the named architecture but for a logit bias."""
    if folder == folder_of(name):
        return expected
    found = describe_folder(folder, f"model.pretrained = {folder}")
    for key in ("embed_dim", "vision_cfg"):
        ours, theirs = expected.model_config.get(key), found.model_config.get(key)
        if ours != theirs:
            raise UserError(f"the weights in {folder} are not of {name}: {key} is {theirs}, not {ours}")
    return found
