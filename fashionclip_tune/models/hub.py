"""Files of repositories on the Hugging Face hub: those in a cache on this machine, else fetched once into it.

What is in a cache is taken as it is, without asking the hub for a newer one: a sweep starts from the same weights to its end.
"""

from collections.abc import Sequence
from pathlib import Path

import open_clip
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from fashionclip_tune.errors import UnavailableError

CARD_NAME = "README.md"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json", "sentencepiece.bpe.model")
_BESIDE_TOKENIZERS = ("*token*.json", "merges.txt", "config.json", CARD_NAME)


def hub_cache(cache_dir: Path | None) -> Path:
    """The folder that is looked in. None: the hub's own, of ``HF_HOME``."""
    return cache_dir if cache_dir is not None else Path(constants.HF_HUB_CACHE)


def cached_file(repository: str, names: Sequence[str], cache_dir: Path | None) -> Path | None:
    """The first of these files that is in the cache or, where another cache was named, in the hub's own."""
    for cache in dict.fromkeys((cache_dir, None)):
        try:
            folder = Path(snapshot_download(repository, cache_dir=cache, local_files_only=True))
        except LocalEntryNotFoundError:
            continue
        found = [folder / name for name in names if (folder / name).is_file()]
        if found:
            return found[0]
    return None


def hub_file(repository: str, what: str, names: Sequence[str], cache_dir: Path | None, *, also: Sequence[str] = ()) -> Path:
    """The first of these files that the repository has, at its place in the cache; ``also``: patterns of files beside it.

    The hub's client asks for a whole snapshot: a machine without a network is told so at once, where it would try for a minute
    to fetch a single file.

    Args:
        what: is looked for, in words.

    Raises:
        UnavailableError: it is neither in a cache nor can it be fetched; says where it was looked for and how to bring it.
    """
    found = cached_file(repository, names, cache_dir)
    reason = f"it has none of {', '.join(names)}"
    for name in names if found is None else ():
        try:
            folder = Path(snapshot_download(repository, allow_patterns=[name, *also, CARD_NAME], cache_dir=cache_dir))
        except Exception as error:  # the hub's client raises many types
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            break
        if (folder / name).is_file():
            return folder / name
    if found is None:
        place = f"models--{repository.replace('/', '--')}"
        looked = " and ".join(str(cache / place) for cache in dict.fromkeys((hub_cache(cache_dir), hub_cache(None))))
        raise UnavailableError(
            f"{what} of {repository} ({names[0]}) is not on this machine, nor could it be fetched from the hub: looked in "
            f"{looked} ({reason}). Copy that folder from a machine that has it, or name a folder with the model: "
            "--set clip_model=local-dir:FOLDER, or ARCHITECTURE=FILE"
        )
    return found


def tokenizer_folder(repository: str, cache_dir: Path | None) -> Path:
    """The folder of a repository's tokenizer; raises as ``hub_file`` does."""
    return hub_file(repository, "the tokenizer", _TOKENIZER_FILES, cache_dir, also=_BESIDE_TOKENIZERS).parent


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def tag_file(name: str, tag: str, weights_names: Sequence[str], cache_dir: Path) -> Path:
    """The weights of one of OpenCLIP's tags, fetched if need be; raises as ``hub_file`` does."""
    known = open_clip.get_pretrained_cfg(name, tag)
    repository, _, filename = known.get("hf_hub", "").rpartition("/")
    if not repository:  # at an address of its own
        return Path(open_clip.download_pretrained(known, cache_dir=str(cache_dir)))
    names = (filename.rpartition(".")[0] + ".safetensors", filename) if filename else tuple(weights_names)
    return hub_file(repository, f"the weights of {name}, tag {tag},", tuple(dict.fromkeys(names)), cache_dir)


def cached_tag_file(name: str, tag: str, weights_names: Sequence[str], cache_dir: Path) -> Path | None:
    """The same where it is on this machine already."""
    repository, _, filename = open_clip.get_pretrained_cfg(name, tag).get("hf_hub", "").rpartition("/")
    names = (filename.rpartition(".")[0] + ".safetensors", filename) if filename else weights_names
    return cached_file(repository, names, cache_dir) if repository else None
