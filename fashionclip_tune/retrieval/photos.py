"""The photos to search: those of a folder, or of a data set's shards."""

import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.dataset import cached_index, dataset_shards, storage_of
from fashionclip_tune.data.reader import ShardReader
from fashionclip_tune.data.tar_index import metadata_of
from fashionclip_tune.errors import UserError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class Photo:
    """A photo, and what says whether it is still the one that was embedded."""

    id: str
    """The path in the folder, or the key in the shard."""
    path: str
    """Of the file, or of the shard."""
    seen: str
    """Changes with the photo: size and time of a file; checksum of a shard and the photo's place in it."""
    read: Callable[[], bytes]
    """Raises OSError."""


@dataclass(frozen=True)
class PhotoSource:
    photos: tuple[Photo, ...]
    name: str
    """Absolute path or URL."""
    attributes: Callable[[], dict[str, dict[str, str]]]
    """Of each photo that has any, by the photo's ``seen``: what ``KEY.json`` says. Reads all shards once."""


def photo_source(place: str, config: ProjectConfig) -> PhotoSource:
    """What ``--images`` names: a folder of photos, in which sub-folders count too, or one of shards, or their URL.

    Raises:
        UserError: no such folder, or nothing in it.
    """
    folder = Path(place).expanduser()
    if "://" in place or (folder / "dataset.json").is_file() or (folder.is_dir() and any(folder.glob("clip_dataset_*.tar"))):
        return _of_shards(config.with_overrides({"dataset_root": place}))
    if not folder.is_dir():
        raise UserError(f"--images {place}: no such folder")
    photos = tuple(_in_folder(folder.absolute()))
    if not photos:
        raise UserError(f"--images {place}: no photos in it (files that end in {', '.join(_SUFFIXES)}), and no shards")
    return PhotoSource(photos, str(folder.absolute()), dict)


def _in_folder(folder: Path) -> Iterator[Photo]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if path.suffix.lower() in _SUFFIXES and not name.startswith(".") and path.is_file():
                stat = path.stat()
                name = str(path.relative_to(folder))
                yield Photo(name, str(path), f"{stat.st_size}:{stat.st_mtime_ns}:{name}", path.read_bytes)


def _of_shards(config: ProjectConfig) -> PhotoSource:
    found, storage = dataset_shards(config), storage_of(config)
    shards = found.train + found.valid + found.test
    reader = ShardReader(cached_index(shards, storage), storage)
    index, reading = reader.index, Lock()

    def image(sample: int) -> bytes:
        with reading:
            return reader.image(sample)

    def seen(shard: int, key: str) -> str:
        return f"{index.contents[shard].checksum}:{key}"

    def photo(sample: int) -> Photo:
        shard, key = int(index.shard_of[sample]), str(index.keys[sample])
        return Photo(key, str(index.shards[shard]), seen(shard, key), partial(image, sample))

    def attributes() -> dict[str, dict[str, str]]:
        of_photo = {}
        for number, shard in enumerate(index.shards):
            try:
                for key, record in metadata_of(storage.path(shard, index.contents[number])):
                    texts = {name: str(value) for name, value in record.items() if isinstance(value, str | int | float)}
                    of_photo[seen(number, key)] = texts
            except (OSError, tarfile.TarError) as error:
                raise UserError(f"shard {shard} cannot be read: {error}") from error
        return of_photo

    return PhotoSource(tuple(map(photo, range(len(index)))), str(config.dataset_dir), attributes)
