"""Files of repositories on the Hugging Face hub: those in a cache on this machine, else fetched once into it.

What is in a cache is taken as it is, without asking the hub for a newer one: a sweep starts from the same weights to its end.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
from huggingface_hub import constants, model_info, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # documented, and not in an __all__

from fashionclip_tune.errors import UnavailableError, UserError

CARD_NAME = "README.md"
_ANSWERS_WITHIN_S = 20
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json", "sentencepiece.bpe.model")
_BESIDE_TOKENIZERS = ("*token*.json", "merges.txt", "config.json", CARD_NAME)


def _check_repository(repository: str, *, has_owner: bool = False) -> None:
    """Raises UserError for what cannot be the name of a repository; old ones, which OpenCLIP names, have no owner."""
    try:
        validate_repo_id(repository)
        is_place = "/" in repository or not has_owner
    except HFValidationError:
        is_place = False
    if not is_place:
        raise UserError(f"hf-hub:{repository} is no place on the hub: hf-hub:OWNER/NAME is expected")


def cached_file(repository: str, names: Sequence[str], cache_dir: Path | None) -> Path | None:
    """The first of these files that is in the cache or, where another cache was named, in the hub's own."""
    _check_repository(repository)
    for cache in dict.fromkeys((cache_dir, None)):
        for name in names:
            found = try_to_load_from_cache(repository, name, cache_dir=cache)
            if isinstance(found, str):
                return Path(found)
    return None


def hub_file(repository: str, what: str, names: Sequence[str], cache_dir: Path | None, *, also: Sequence[str] = ()) -> Path:
    """The first of these files that the repository has, at its place in the cache; ``also``: patterns of files beside it.

    The hub is asked for its list first: a machine without a network is told so at once, where the hub's client would try for a
    minute to fetch a file.

    Args:
        what: is looked for, in words.

    Raises:
        UnavailableError: it is neither in a cache nor can it be fetched; says where it was looked for and how to bring it.
    """
    if (found := cached_file(repository, names, cache_dir)) is not None:
        return found
    try:
        there = {file.rfilename for file in model_info(repository, timeout=_ANSWERS_WITHIN_S).siblings or ()}
        name = next((name for name in names if name in there), None)
        if name is not None:
            folder = snapshot_download(repository, allow_patterns=[name, *also, CARD_NAME], cache_dir=cache_dir)
            return Path(folder) / name
        reason = f"it has none of {', '.join(names)}"
    except Exception as error:  # the hub's client raises many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise _not_here(f"{what} of {repository} ({names[0]})", _looked_in(repository, cache_dir), reason)


def _not_here(what: str, looked_in: str, reason: str) -> UnavailableError:
    return UnavailableError(
        f"{what} is not on this machine, nor could it be fetched: looked in {looked_in} ({reason}). Copy that folder from a "
        "machine that has it, or name a folder with the model: --set clip_model=local-dir:FOLDER, or ARCHITECTURE=FILE"
    )


def _looked_in(repository: str, cache_dir: Path | None) -> str:
    place, own = f"models--{repository.replace('/', '--')}", Path(constants.HF_HUB_CACHE)
    return " and ".join(str(cache / place) for cache in dict.fromkeys((cache_dir or own, own)))


def tokenizer_folder(repository: str, cache_dir: Path | None) -> Path:
    """The folder of a repository's tokenizer; raises as ``hub_file`` does."""
    return hub_file(repository, "the tokenizer", _TOKENIZER_FILES, cache_dir, also=_BESIDE_TOKENIZERS).parent


def cached_tokenizer(repository: str, cache_dir: Path | None) -> Path | None:
    """A file of it where it is on this machine already."""
    return cached_file(repository, _TOKENIZER_FILES, cache_dir)


def text_tower_here(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``text_cfg`` by which OpenCLIP builds a text tower of transformers from a folder, without asking the hub for it.

    Empty for towers that are OpenCLIP's own. Raises as ``hub_file`` does.
    """
    text = model_config["text_cfg"]
    if not (tower := text.get("hf_model_name")):
        return {}
    is_here = Path(tower).is_dir()
    folder = tower if is_here else hub_file(tower, "the description of the text tower", ["config.json"], None).parent
    return {"text_cfg": {**text, "hf_model_name": str(folder), "hf_model_pretrained": False}}


def description_folder(repository: str, what: str, name: str) -> Path:
    """The folder of a model's description, and of its tokenizer where it has one of its own.

    Raises:
        UserError: somebody named what is no place on the hub; else as ``hub_file`` does.
    """
    _check_repository(repository, has_owner=True)
    return hub_file(repository, what, [name], None, also=(*_TOKENIZER_FILES, *_BESIDE_TOKENIZERS)).parent


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def tag_file(name: str, tag: str, weights_names: Sequence[str], cache_dir: Path) -> Path:
    """The weights of one of OpenCLIP's tags, fetched if need be; raises as ``hub_file`` does."""
    what, known = f"the weights of {name}, tag {tag},", open_clip.get_pretrained_cfg(name, tag)
    repository, names = _place_of(known, weights_names)
    if repository:
        return hub_file(repository, what, names, cache_dir)
    try:  # at an address of its own
        return Path(open_clip.download_pretrained(known, cache_dir=str(cache_dir)))
    except Exception as error:  # of urllib, and of OpenCLIP's own check
        raise _not_here(f"{what} of {known.get('url')}", str(cache_dir), str(error)) from error


def cached_tag_file(name: str, tag: str, weights_names: Sequence[str], cache_dir: Path) -> Path | None:
    """The same where it is on this machine already."""
    known = open_clip.get_pretrained_cfg(name, tag)
    repository, names = _place_of(known, weights_names)
    if repository:
        return cached_file(repository, names, cache_dir)
    file = cache_dir / str(known.get("url")).rpartition("/")[2]
    return file if file.is_file() else None


def _place_of(known: Mapping[str, Any], weights_names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """A tag's repository, empty where it has an address instead, and the files there that may be its weights."""
    repository, _, filename = known.get("hf_hub", "").rpartition("/")
    return repository, (filename.rpartition(".")[0] + ".safetensors", filename) if filename else tuple(weights_names)
