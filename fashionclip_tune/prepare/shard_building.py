"""Planned shards to files, one by one, so that a killed `prepare` goes on: what is finished stays, the rest is made anew.

In the folder of the data set: ``prepare.json`` says what is being made, ``.prepare/NAME.json`` that the shard NAME is
finished and what its photos look like, ``.prepare/building/`` holds the shard that is being written.
"""

import json
import os
import shutil
import tarfile
from base64 import b64decode, b64encode
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fashionclip_tune.data.index import index_path, write_index_beside
from fashionclip_tune.data.shards import ShardSample, members_of, shard_name, write_split
from fashionclip_tune.errors import UserError
from fashionclip_tune.files import sync_folder, write_json
from fashionclip_tune.prepare.item_rows import ItemRow
from fashionclip_tune.prepare.photo_encoding import EncodedPhoto, ImageHashes, PhotoSource, encode_all

_BATCH = 8  # image files that a worker encodes at a time: Ctrl-C waits for them


@dataclass(frozen=True)
class PlannedShard:
    """The rows of a shard, their keys set. Those that cannot be decoded are left out when it is written."""

    split: str
    name: str
    rows: tuple[ItemRow, ...]


@dataclass(frozen=True)
class FinishedShard:
    """A shard in its place, or none where no photo could be decoded; for each planned row its hashes or None."""

    planned: PlannedShard
    hashes: tuple[ImageHashes | None, ...]

    def written(self) -> list[tuple[ItemRow, ImageHashes]]:
        return [(row, hashes) for row, hashes in zip(self.planned.rows, self.hashes, strict=True) if hashes is not None]

    def lost(self) -> list[ItemRow]:
        return [row for row, hashes in zip(self.planned.rows, self.hashes, strict=True) if hashes is None]


def plan_shards(rows: Mapping[str, Sequence[ItemRow]], *, largest: int, augmented: bool) -> list[PlannedShard]:
    """Cuts each split's rows into as few shards as can be, of equal size to one sample."""
    plan: list[PlannedShard] = []
    for split, of_split in rows.items():
        count = -(-len(of_split) // largest)
        borders = [len(of_split) * i // count for i in range(count + 1)] if count else [0]
        for number, (start, end) in enumerate(pairwise(borders)):
            name = shard_name(split, number, augmented=augmented)
            plan.append(PlannedShard(split, name, tuple(of_split[start:end])))
    return plan


class Workspace:
    """The folder that a data set is made in."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._private = out / ".prepare"
        self._building = self._private / "building"

    @contextmanager
    def claimed(self, identity: Mapping[str, Any]) -> Iterator[None]:
        """Makes or takes up the folder, and keeps others out while it is used.

        Args:
            identity: what decides the bytes of the data set; of JSON types.

        Raises:
            UserError: something else is in the folder, or another process is at work on it.
        """
        self._refuse_foreign(identity)
        self._private.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self._private / "lock", timeout=0):
                shutil.rmtree(self._building, ignore_errors=True)
                for unfinished in [*self.out.glob("*.json*.tmp"), *self._private.glob("*.tmp")]:
                    unfinished.unlink()
                if not (self.out / "prepare.json").exists():
                    write_json(self.out / "prepare.json", identity)
                yield
        except Timeout:
            raise UserError(f"--out {self.out}: another prepare is at work there; wait for it or stop it") from None

    def _refuse_foreign(self, identity: Mapping[str, Any]) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out} is a file: choose another --out")
        try:
            before = json.loads((self.out / "prepare.json").read_text())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            before = None
        if not isinstance(before, dict):
            if taken := sorted([*self.out.glob("dataset.json"), *self.out.glob("clip_dataset_*.tar")]):
                raise UserError(f"--out {self.out} holds a data set already ({taken[0].name}): choose another or remove it")
            if other := sorted(path.name for path in self.out.glob("[!.]*")):
                raise UserError(f"--out {self.out} is not empty ({other[0]}): choose another, or a new folder in it")
        elif before != identity:
            old, new = (known.get("arguments", {}) for known in (before, identity))
            differing = [f"{name}: {old.get(name)!r}, now {new[name]!r}" for name in new if old.get(name) != new[name]]
            what = "; ".join(differing) or "the table, the photos or Pillow's version have changed since"
            raise UserError(
                f"--out {self.out} was begun with other input ({what}): start the same command as then to go on, "
                "or choose another --out, or remove it to begin anew"
            )

    def finished(self, shard: PlannedShard) -> FinishedShard | None:
        """What an earlier run has made, if the file is there and has its size."""
        try:
            record = json.loads((self._private / f"{shard.name}.json").read_text())
            hashes = tuple(None if photo is None else _hashes_from_json(photo) for photo in record["photos"])
            size = (self.out / shard.name).stat().st_size if any(hashes) else 0
        except (OSError, ValueError, KeyError):
            return None
        return FinishedShard(shard, hashes) if size == record["bytes"] and len(hashes) == len(shard.rows) else None

    def build(
        self, plan: Sequence[PlannedShard], *, size: int, workers: int, block: int, on_photo: Callable[[int], None]
    ) -> Generator[FinishedShard, None, None]:
        """All shards, first those that are finished already, then the others as they are.

        ``on_photo(n)`` is told of each photo that is done, and at once of those in finished shards. ``block``: photos of
        an HDF5 file that are read together.
        """
        found = [(shard, self.finished(shard)) for shard in plan]
        for _, finished in found:
            if finished is not None:
                on_photo(len(finished.hashes))
                yield finished
        batches = {shard.name: batches_of(shard.rows, block) for shard, finished in found if finished is None}
        with closing(encode_all([batch for some in batches.values() for batch in some], size=size, workers=workers)) as encoded:
            for shard in plan:
                if shard.name in batches:
                    photos: list[EncodedPhoto | None] = []
                    for batch in batches[shard.name]:
                        photos += next(encoded)
                        for _ in batch:
                            on_photo(1)
                    yield self._write(shard, photos)

    def _write(self, shard: PlannedShard, photos: Sequence[EncodedPhoto | None]) -> FinishedShard:
        finished = FinishedShard(shard, tuple(None if photo is None else photo.hashes for photo in photos))
        found = zip(shard.rows, photos, strict=True)
        samples = [replace(row.sample, jpeg=photo.jpeg) for row, photo in found if photo is not None]
        num_bytes = 0
        if samples:
            augmented = shard.name.startswith(f"clip_dataset_{shard.split}_aug")
            (name,) = write_split(self._building, shard.split, samples, augmented=augmented)["shards"]
            verify_shard(self._building / name, samples)
            num_bytes = (self._building / name).stat().st_size
            write_index_beside(self._building / name)
            index_path(self._building / name).replace(index_path(self.out / shard.name))
            (self._building / name).replace(self.out / shard.name)
            sync_folder(self.out)
        record = {"bytes": num_bytes, "photos": [None if each is None else _hashes_as_json(each) for each in finished.hashes]}
        write_json(self._private / f"{shard.name}.json", record)
        return finished

    def discard(self) -> None:
        """Removes all that was made: there was nothing else when we began."""
        for pattern in ("clip_dataset_*.tar", "clip_dataset_*.index.npz", "dataset.json", "report.json", "prepare.json"):
            for path in self.out.glob(pattern):
                path.unlink()
        shutil.rmtree(self._private)


def batches_of(rows: Sequence[ItemRow], block: int) -> list[list[PhotoSource]]:
    """Image files by number, rows of HDF5 files by the block that they stand in; the order of rows is kept."""
    numbered = enumerate(row.source for row in rows)

    def place(item: tuple[int, PhotoSource]) -> tuple[Path | None, int]:
        number, source = item
        return (None, number // _BATCH) if source.row is None else (source.path, source.row // block)

    return [[source for _, source in batch] for _, batch in groupby(numbered, place)]


def verify_shard(path: Path, samples: Sequence[ShardSample]) -> None:
    """Reads a shard back, from the disk where the system allows: every member must be there, in order, byte for byte.

    All JPEGs were decoded by the worker that made them, so that equal bytes decode too.

    Raises:
        UserError: the file is not what was written.
    """
    expected = [(f"{each.key}.{name}", content) for each in samples for name, content in sorted(members_of(each).items())]
    with open(path, "rb") as shard:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(shard.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            with tarfile.open(fileobj=shard, mode="r:") as tar:
                found = [(member.name, file.read() if (file := tar.extractfile(member)) else b"") for member in tar]
        except (tarfile.TarError, ValueError) as error:
            raise UserError(f"{path} cannot be read back ({error}): is the disk sound?") from error
    if found != expected:
        raise UserError(f"{path} reads back differently from what was written: is the disk sound?")


def _hashes_as_json(hashes: ImageHashes) -> str:
    return f"{hashes.pixels:x} {hashes.gradients:x} {b64encode(hashes.thumbnail).decode()}"


def _hashes_from_json(photo: str) -> ImageHashes:
    pixels, gradients, thumbnail = photo.split()
    return ImageHashes(int(pixels, 16), int(gradients, 16), b64decode(thumbnail))
