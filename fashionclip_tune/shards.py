"""WebDataset shards: how they are named, found and written. What is inside one shard is read by ``index``.

A data set is a folder of tars ``clip_dataset_{train,valid,test}[_aug].NNNNNN.tar`` with, for each photo, the members
``KEY.jpg``, ``KEY.txt0.txt`` (``_aug``: also ``KEY.txt1.txt``, ``KEY.txt2.txt``) and ``KEY.json``, and a
``dataset.json`` that names the splits.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import webdataset
from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

from fashionclip_tune.errors import UserError

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
class DatasetShards:
    """The shards of a data set by split, sorted; a split that is missing is an empty tuple."""

    root: Path
    train: tuple[Path, ...]
    valid: tuple[Path, ...]
    test: tuple[Path, ...]


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
                    tar.write(_members(sample))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(out_dir / name)
        names.append(name)
        num_samples += len(chunk)
        products.update(sample.product_id for sample in chunk)
    return {"shards": names, "samples": num_samples, "products": len(products)}


def _members(sample: ShardSample) -> dict[str, Any]:
    record = {"product_id": sample.product_id, "category": sample.category, **sample.attributes}
    members: dict[str, Any] = {"__key__": sample.key, "jpg": sample.jpeg}
    members |= {f"txt{i}.txt": caption.encode() for i, caption in enumerate(sample.captions)}
    members["json"] = json.dumps(record, ensure_ascii=False, sort_keys=True).encode()
    return members


def write_dataset_json(out_dir: Path, splits: Mapping[str, Mapping[str, Any]], *, source: str) -> None:
    """Writes ``dataset.json`` last: a folder that has one is a whole data set."""
    text = json.dumps({"source": source, "splits": {name: dict(split) for name, split in splits.items()}}, indent=2)
    unfinished = out_dir / "dataset.json.tmp"
    unfinished.write_text(text + "\n")
    unfinished.replace(out_dir / "dataset.json")


def find_dataset(root: Path) -> DatasetShards:
    """The shards below ``root``: as ``dataset.json`` says, else by file name (``_aug`` preferred where both exist).

    Raises:
        UserError: no such folder, no shards in it, or shards that dataset.json names are missing.
    """
    if not root.is_dir():
        raise UserError(f"data folder {root} does not exist: give a folder with shards, as `prepare` writes them")
    if (root / "dataset.json").is_file():
        return _from_dataset_json(root)
    found: dict[tuple[str, bool], list[Path]] = {}
    for path in sorted(root.glob("*.tar")):
        if match := _SHARD_NAME.fullmatch(path.name):
            found.setdefault((match[1], match[2] is not None), []).append(path)
    splits = {split: tuple(found.get((split, True)) or found.get((split, False)) or ()) for split in SPLITS}
    if not splits["train"] or not splits["valid"]:
        missing = "train" if not splits["train"] else "valid"
        raise UserError(
            f"data folder {root} has no shards named {shard_name(missing, 0, augmented=False)} (or with _aug): "
            f"make them with `python -m fashionclip_tune prepare --table items.csv --images DIR --out {root}`"
        )
    if not splits["test"] and len(splits["valid"]) == _PUBLISHED_VALID_SHARDS:
        splits["test"] = splits["valid"][_PUBLISHED_TUNING_SHARDS:]
        splits["valid"] = splits["valid"][:_PUBLISHED_TUNING_SHARDS]
    return DatasetShards(root, **splits)


def _from_dataset_json(root: Path) -> DatasetShards:
    path = root / "dataset.json"
    try:
        described = json.loads(path.read_text())["splits"]
        splits = {split: tuple(root / name for name in described.get(split, {"shards": []})["shards"]) for split in SPLITS}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a data set's description ({error!r}): run `prepare` again") from error
    for split in ("train", "valid"):
        if not splits[split]:
            raise UserError(f"{path} has no {split} shards: a sweep needs both train and valid")
    for shard in (shard for split in splits.values() for shard in split):
        if not shard.is_file():
            raise UserError(f"{path} names {shard.name}, which is not there: copy it, or run `prepare` again")
    return DatasetShards(root, **splits)


def expand_pattern(root: Path, pattern: str) -> tuple[Path, ...]:
    """The files of a pattern in brace notation, such as ``clip_dataset_train.{000000..000260}.tar``, below ``root``.

    Raises:
        UserError: a URL or ``pipe:`` (it reaches out, or runs a command), unbalanced braces, or a file that is missing.
    """
    if pattern.startswith("pipe:") or "://" in pattern:
        raise UserError(f"shard pattern {pattern!r} is a URL or a pipe, which can run commands: only files are read")
    try:
        paths = tuple(root / str(name) for name in braceexpand(pattern) or ())
    except UnbalancedBracesError as error:
        raise UserError(f"shard pattern {pattern!r} has unbalanced braces: write e.g. {{000000..000006}}") from error
    missing = [path for path in paths if not path.is_file()]
    if missing:
        found = "none of its files" if len(missing) == len(paths) else f"{len(missing)} of its {len(paths)} files missing"
        raise UserError(f"shard pattern {pattern!r} matches {found} in {root}; the first missing one is {missing[0].name}")
    return paths
