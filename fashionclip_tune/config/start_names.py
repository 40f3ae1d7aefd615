"""Names of what a model starts from, as ``clip_model`` takes them; nothing is looked up but folders on this machine.

``ViT-B-32`` (the published weights), ``ViT-B-16/dfn2b`` (a tag), ``ViT-B-16=FILE`` (weights of that architecture;
``ViT-B-16/dfn2b=FILE``: with photos prepared as for that tag), ``hf-hub:OWNER/NAME``, ``local-dir:FOLDER`` or a path alone.
"""

import os
import re
from collections.abc import Iterable
from itertools import count
from pathlib import Path

# OpenCLIP's own, of models that it does not list.
LOCAL_PREFIX, HUB_PREFIX = "local-dir:", "hf-hub:"
_PREFIXES = (LOCAL_PREFIX, HUB_PREFIX)
# Folders that say nothing about what is in them: their parents do.
_SAYS_NOTHING = re.compile(r"best|refit|trials|checkpoints|snapshots|models?|(?:step|best)_[0-9]+|[0-9a-f]{40}")
_HUB_CACHE = re.compile(r"models--(?:.+--)?(.+)")


def parts(name: str) -> tuple[str, str | None]:
    """The architecture, or what else OpenCLIP builds it by, and the tag or place of its weights; None: its own."""
    if name.startswith(_PREFIXES):
        return name, None
    architecture, equals, place = name.partition("=")
    if equals and not architecture.startswith(("/", ".", "~")):
        return architecture, place
    architecture, slash, place = name.partition("/")
    return (architecture, place) if slash and architecture else (name, None)


def architecture_of(name: str) -> str:
    """What OpenCLIP builds the network by."""
    architecture = parts(name)[0]
    return architecture if architecture.startswith(_PREFIXES) else architecture.partition("/")[0]


def brings_weights(name: str) -> bool:
    """Whether it names more than an architecture."""
    return name.startswith(_PREFIXES) or parts(name)[1] is not None


def joined(architecture: str, place: str) -> str:
    """The name of an architecture with weights that are not its own."""
    return f"{architecture}={place}" if is_path(place) else f"{architecture}/{place}"


def is_path(place: str) -> bool:
    """Whether it is a file or a folder, and no tag of OpenCLIP."""
    return "/" in place or os.sep in place or Path(place).suffix != ""


def absolute(name: str) -> str:
    """The same name from wherever one stands: trials change their folder. A path alone becomes ``local-dir:``.

    Raises:
        ValueError: a part of it is missing, or it is below the home of somebody who is not there.
    """
    try:
        if name.startswith(LOCAL_PREFIX):
            folder = name.removeprefix(LOCAL_PREFIX)
            return LOCAL_PREFIX + str(Path(folder).expanduser().resolve()) if folder else name
        if name.startswith(HUB_PREFIX):
            return name
        if name.startswith(("/", "./", "../", "~")) or (_has_place(name) and Path(name).is_dir() and not is_tag(name)):
            return LOCAL_PREFIX + str(Path(name).expanduser().resolve())
        architecture, place = parts(name)
        if place == "":
            raise ValueError("nothing behind the architecture")
        return f"{architecture}={Path(place or '').expanduser().absolute()}" if f"{architecture}={place}" == name else name
    except RuntimeError as error:  # of expanduser
        raise ValueError(str(error)) from error


def _has_place(name: str) -> bool:
    return "/" in name or "=" in name


def is_tag(name: str) -> bool:
    """Whether it is ``ARCHITECTURE/TAG`` of OpenCLIP's list."""
    import open_clip  # seconds, only where a folder has the form of a tag

    architecture, place = parts(name)
    return bool(open_clip.get_pretrained_cfg(architecture, place))


def start_labels(names: Iterable[str]) -> dict[str, str]:
    """A short name for each, which no other of them has."""
    found = dict.fromkeys(names)
    labels = {name: _label(name, 1) for name in found}
    for depth in (2, 3, 99):
        many = list(labels.values())
        labels = {name: _label(name, depth) if many.count(label) > 1 else label for name, label in labels.items()}
    taken = set[str]()
    for name, label in labels.items():  # two files that differ in their suffix, two snapshots of one repository
        numbered = (label if number == 1 else f"{label}-{number}" for number in count(1))
        labels[name] = next(each for each in numbered if each not in taken)
        taken.add(labels[name])
    return labels


def _label(name: str, depth: int) -> str:
    """``depth``: so many parts of a path that say something."""
    if name.startswith(HUB_PREFIX):
        owner, _, repository = name.removeprefix(HUB_PREFIX).partition("/")
        shortened = re.sub(rf"(?i)^{re.escape(owner)}[-_]", "", repository)
        return shortened if depth == 1 else f"{owner}/{repository}"
    if name.startswith(LOCAL_PREFIX):
        return _path_label(Path(name.removeprefix(LOCAL_PREFIX)), depth)
    architecture, place = parts(name)
    if place is None or not is_path(place):
        return name
    return f"{architecture}={_path_label(Path(place).with_suffix(''), depth)}"


def _path_label(path: Path, depth: int) -> str:
    """The last parts of a path, back to the ``depth``-th that says something; a hub's cache by its repository."""
    kept = list[str]()
    for part in reversed(path.parts[1:]):
        in_cache = _HUB_CACHE.fullmatch(part)
        kept.insert(0, in_cache[1] if in_cache else part)
        depth -= 1 if in_cache or not _SAYS_NOTHING.fullmatch(part) else 0
        if depth <= 0:
            break
    return "/".join(part for part in kept if not re.fullmatch(r"snapshots|checkpoints|trials|[0-9a-f]{40}", part)) or str(path)
