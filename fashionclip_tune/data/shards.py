"""WebDataset shards: how they are named, found and written. What is inside one shard is read by ``index``.

A data set is a folder of tars ``clip_dataset_{train,valid,test}[_aug].NNNNNN.tar`` with, for each photo, the members
``KEY.jpg``, ``KEY.txt0.txt`` (``_aug``: also ``KEY.txt1.txt``, ``KEY.txt2.txt`` and so on, any number) and ``KEY.json``,
and a ``dataset.json`` that names the splits.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import webdataset
from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

from fashionclip_tune.config.choices import RetrievalProtocol
from fashionclip_tune.errors import UnavailableError, UserError, command
from fashionclip_tune.files import write_json
from fashionclip_tune.storage.urls import SCHEMES, beside, name_of, read_url, scheme_of

SPLITS = ("train", "valid", "test")
SAMPLES_PER_SHARD = 1_000
# Only these are decoded: Pillow would hand an EPS file to Ghostscript, which runs what is written in it.
DECODED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_SHARD_NAME = re.compile(r"clip_dataset_(train|valid|test)(_aug)?\.(\d{6})\.tar")
# Fashion-Gen as published has 33 validation shards and no test shards: the first seven were used for tuning.
_PUBLISHED_VALID_SHARDS = 33
_PUBLISHED_TUNING_SHARDS = 7


@dataclass(frozen=True, kw_only=True)
class ShardSample:
    """One photo to be written: an encoded JPEG and its captions, the original one first."""

    key: str
    jpeg: bytes
    captions: tuple[str, ...]
    product_id: str
    category: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RemoteShard:
    """A shard behind a URL or a command; it is read from a copy."""

    url: str

    @property
    def name(self) -> str:
        return name_of(self.url)

    @property
    def parent(self) -> str:
        return self.url.removesuffix(self.name).rstrip("/")

    def __str__(self) -> str:
        return self.url


Shard = Path | RemoteShard


@dataclass(frozen=True)
class DatasetShards:
    """The shards of a data set by split, sorted; a split that is missing is an empty tuple."""

    root: Path | str
    train: tuple[Shard, ...]
    valid: tuple[Shard, ...]
    test: tuple[Shard, ...]
    protocol: str | None = None
    """By which these data want to be measured, as dataset.json says; None: it says nothing."""


def shard_name(split: str, number: int, *, augmented: bool) -> str:
    """``clip_dataset_train_aug.000007.tar`` for ("train", 7, augmented=True)."""
    return f"clip_dataset_{split}{'_aug' if augmented else ''}.{number:06d}.tar"


def product_id_from_caption(caption: str) -> str:
    """The product of a photo without a product id: photos whose captions differ in case or spaces only share it."""
    return hashlib.sha256(normalised_caption(caption).encode()).hexdigest()[:16]


def normalised_caption(caption: str) -> str:
    return " ".join(caption.casefold().split())


def write_split(out_dir: Path, split: str, samples: Iterable[ShardSample], *, augmented: bool = False) -> dict[str, Any]:
    """Writes samples to numbered shards of about 1,000 and returns {"shards": [names], "samples": n, "products": n}.

    The bytes depend on the samples only (no times or user names), and a shard has its final name only once it is whole.
    """
    assert split in SPLITS, split
    out_dir.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    products: set[str] = set()
    num_samples = 0
    remaining = iter(samples)
    while chunk := list(islice(remaining, SAMPLES_PER_SHARD)):
        name = shard_name(split, len(names), augmented=augmented)
        unfinished = out_dir / f"{name}.tmp"
        with open(unfinished, "wb") as file:
            with webdataset.TarWriter(file, mtime=0, encoder=False) as tar:
                for sample in chunk:
                    tar.write({"__key__": sample.key, **members_of(sample)})
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(out_dir / name)
        names.append(name)
        num_samples += len(chunk)
        products.update(sample.product_id for sample in chunk)
    return {"shards": names, "samples": num_samples, "products": len(products)}


def members_of(sample: ShardSample) -> dict[str, bytes]:
    """What a sample has in a shard, by the end of the member's name; they stand there sorted by it."""
    record = {"product_id": sample.product_id, "category": sample.category, **sample.attributes}
    captions = {f"txt{i}.txt": caption.encode() for i, caption in enumerate(sample.captions)}
    return {"jpg": sample.jpeg, "json": json.dumps(record, ensure_ascii=False, sort_keys=True).encode(), **captions}


def write_dataset_json(
    out_dir: Path, splits: Mapping[str, Mapping[str, Any]], *, source: str, protocol: str | None = None
) -> None:
    """Writes ``dataset.json`` last: a folder that has one is a whole data set.

    Args:
        protocol: by which a sweep on these data measures where nothing else is said; None: the default one.
    """
    described: dict[str, Any] = {"source": source, "splits": {name: dict(split) for name, split in splits.items()}}
    write_json(out_dir / "dataset.json", described | ({"protocol": protocol} if protocol else {}))


def find_dataset(root: Path | str, *, allow_remote: bool = False) -> DatasetShards:
    """The shards below ``root``: as ``dataset.json`` says, else by file name (``_aug`` preferred where both exist).

    Args:
        root: a folder, or the URL of one that has a dataset.json.
        allow_remote: a URL is followed.

    Raises:
        UserError: no such folder, no shards in it, or shards that dataset.json names are missing.
    """
    if isinstance(root, str):
        return _remote_dataset(root, allow_remote)
    if not root.is_dir():
        raise UnavailableError(f"data folder {root} does not exist: give a folder with shards, as `prepare` writes them")
    if (root / "dataset.json").is_file():
        found, protocol = _described(root / "dataset.json", (root / "dataset.json").read_bytes(), lambda name: root / name)
        for shard in (shard for split in found.values() for shard in split if isinstance(shard, Path)):
            if not shard.is_file():
                raise UnavailableError(
                    f"{root / 'dataset.json'} names {shard.name}, which is not there: copy it, or run `prepare` again"
                )
        return DatasetShards(root, found["train"], found["valid"], found["test"], protocol)
    named: dict[tuple[str, bool], list[Path]] = {}
    for path in sorted(root.glob("*.tar")):
        if match := _SHARD_NAME.fullmatch(path.name):
            named.setdefault((match[1], match[2] is not None), []).append(path)
    splits: dict[str, tuple[Shard, ...]] = {
        split: tuple(named.get((split, True)) or named.get((split, False)) or ()) for split in SPLITS
    }
    if not splits["train"] or not splits["valid"]:
        missing = "train" if not splits["train"] else "valid"
        raise UnavailableError(
            f"data folder {root} has no shards named {shard_name(missing, 0, augmented=False)} (or with _aug): "
            f"make them with `{command('prepare', '--table', 'items.csv', '--images', 'DIR', '--out', root)}`"
        )
    if not splits["test"] and len(splits["valid"]) == _PUBLISHED_VALID_SHARDS:
        splits["test"] = splits["valid"][_PUBLISHED_TUNING_SHARDS:]
        splits["valid"] = splits["valid"][:_PUBLISHED_TUNING_SHARDS]
    return DatasetShards(root, splits["train"], splits["valid"], splits["test"])


def _remote_dataset(root: str, allow_remote: bool) -> DatasetShards:
    _check_remote(root, allow_remote)
    described = _in_folder(root, "dataset.json")
    try:
        content = read_url(described)
    except OSError as error:
        raise UnavailableError(
            f"{described} cannot be read ({error}): copy what `prepare` wrote there, or name the shards by patterns "
            "(train_shards_pattern, valid_shards_pattern)"
        ) from error
    splits, protocol = _described(described, content, lambda name: RemoteShard(_in_folder(root, name)))
    return DatasetShards(root, splits["train"], splits["valid"], splits["test"], protocol)


def _in_folder(root: str, name: str) -> str:
    url = beside(root.rstrip("/") + "/", name)
    if url is None:
        raise UserError(f"data folder {root!r} is a command: name shards by whole patterns (train_shards_pattern and so on)")
    return url


def _described(
    path: Path | str, content: bytes, shard: Callable[[str], Shard]
) -> tuple[dict[str, tuple[Shard, ...]], str | None]:
    """The shards of each split, and the protocol."""
    try:
        whole = json.loads(content)
        described, protocol = whole["splits"], whole.get("protocol")
        splits = {split: tuple(map(shard, described.get(split, {"shards": []})["shards"])) for split in SPLITS}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a data set's description ({error!r}): run `prepare` again") from error
    for split in ("train", "valid"):
        if not splits[split]:
            raise UserError(f"{path} has no {split} shards: a sweep needs both train and valid")
    if protocol not in (None, *(each.value for each in RetrievalProtocol)):
        raise UserError(f"{path} names a protocol that there is not, {protocol!r}: run `prepare` again, or take the line out")
    return splits, protocol


def expand_pattern(root: Path | str, pattern: str, *, allow_remote: bool = False) -> tuple[Shard, ...]:
    """The shards of a pattern in brace notation, such as ``clip_dataset_train.{000000..000260}.tar``, below ``root``.

    A pattern may be a URL or a ``pipe:`` itself; such shards are not looked for before they are read.

    Raises:
        UserError: a URL or ``pipe:`` that is not allowed, unbalanced braces, or a file that is missing.
    """
    if isinstance(root, str) and scheme_of(pattern) is None:
        pattern = _in_folder(root, pattern)
    remote = scheme_of(pattern) is not None
    if remote:
        _check_remote(pattern, allow_remote)
    try:
        names = [str(name) for name in braceexpand(pattern) or ()]
    except UnbalancedBracesError as error:
        raise UserError(f"shard pattern {pattern!r} has unbalanced braces: write e.g. {{000000..000006}}") from error
    if remote:
        return tuple(map(RemoteShard, names))
    paths = tuple(Path(root) / name for name in names)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        found = "none of its files" if len(missing) == len(paths) else f"{len(missing)} of its {len(paths)} files missing"
        raise UnavailableError(
            f"shard pattern {pattern!r} matches {found} in {root}; the first missing one is {missing[0].name}"
        )
    return paths


def _check_remote(location: str, allowed: bool) -> None:
    if scheme_of(location) not in SCHEMES:
        raise UserError(f"{location!r} is not allowed: a path, or one of {', '.join(SCHEMES)}")
    if not allowed:
        raise UserError(
            f"{location!r} reaches out or runs a command, which must be asked for: --allow-remote (reading.allow_remote=true)"
        )
