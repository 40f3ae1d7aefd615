"""What a shard holds and where: one pass over a tar's headers and texts, kept in the cache, never the images' bytes.

With an index, any photo is read by its offset, so the order of samples is free, a resumed run skips nothing by reading
it, and every worker count gives the same batches.
"""

import hashlib
import json
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fashionclip_tune.cache import cache_dir
from fashionclip_tune.errors import UserError
from fashionclip_tune.shards import product_id_from_caption

_FORMAT = 3
_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_CAPTION_MEMBERS = ("txt0.txt", "txt1.txt", "txt2.txt")


class BadSample(NamedTuple):
    """A sample that could not be used: in which shard, which one, and why."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}"


@dataclass(frozen=True)
class ShardIndex:
    """The usable samples of several shards, concatenated in their order.

    Spans are byte offset and size in the sample's shard; a caption that does not exist has size 0.
    """

    shards: tuple[Path, ...]
    shard_sizes: npt.NDArray[np.int64]  # [shards] samples
    shard_of: npt.NDArray[np.int64]  # [samples]
    keys: npt.NDArray[np.str_]  # [samples]
    product_ids: npt.NDArray[np.str_]  # [samples]
    categories: npt.NDArray[np.str_]  # [samples]; empty where KEY.json names none
    image_spans: npt.NDArray[np.int64]  # [samples, 2]
    caption_spans: npt.NDArray[np.int64]  # [samples, 3, 2]
    bad: tuple[BadSample, ...]
    fingerprint: str
    """Hash of keys, image sizes, captions and metadata in their order; paths do not count."""

    def __len__(self) -> int:
        return len(self.keys)


def load_index(shards: Sequence[Path]) -> ShardIndex:
    """The index of these shards, from the cache where a shard has not changed since.

    Raises:
        UserError: no usable sample in all of them; what is bad in some of them is listed in ``bad``.
    """
    parts = [_cached_part(shard) for shard in shards]
    if not any(len(part["keys"]) for part in parts):
        names = f"{shards[0].name} and {len(shards) - 1} more" if len(shards) > 1 else shards[0].name
        reasons = {str(reason) for part in parts for _, reason in part["bad"]}
        raise UserError(f"no usable sample in {names} of {shards[0].parent}: {'; '.join(sorted(reasons)) or 'empty'}")
    sizes = np.array([len(part["keys"]) for part in parts], dtype=np.int64)
    digest = hashlib.sha256("".join(str(part["fingerprint"]) for part in parts).encode()).hexdigest()[:16]
    return ShardIndex(
        shards=tuple(shards),
        shard_sizes=sizes,
        shard_of=np.repeat(np.arange(len(shards)), sizes),
        keys=np.concatenate([part["keys"] for part in parts]),
        product_ids=np.concatenate([part["product_ids"] for part in parts]),
        categories=np.concatenate([part["categories"] for part in parts]),
        image_spans=np.concatenate([part["image_spans"] for part in parts]),
        caption_spans=np.concatenate([part["caption_spans"] for part in parts]),
        bad=tuple(
            BadSample(shard.name, str(key), str(reason))
            for shard, part in zip(shards, parts, strict=True)
            for key, reason in part["bad"]
        ),
        fingerprint=digest,
    )


_Part = dict[str, npt.NDArray[np.generic]]


def _cached_part(shard: Path) -> _Part:
    stat = shard.stat()
    identity = f"{_FORMAT}:{shard.absolute()}:{stat.st_size}:{stat.st_mtime_ns}"
    cached = cache_dir() / "index" / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.npz"
    try:
        with open(cached, "rb") as opened, np.load(opened) as arrays:  # np.load alone leaves a damaged file open
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        part = _read_part(shard)
    cached.parent.mkdir(parents=True, exist_ok=True)
    # Several trials may index the same shard at the same time: each writes aside, the last rename wins.
    with tempfile.NamedTemporaryFile(dir=cached.parent, suffix=".tmp", delete=False) as file:
        np.savez(file, **part)  # type: ignore[arg-type]
    os.replace(file.name, cached)
    return part


class _Sample:
    def __init__(self) -> None:
        self.image: tuple[int, int] | None = None
        self.captions: dict[int, tuple[int, int]] = {}
        self.texts: dict[int, str] = {}
        self.metadata: dict[str, object] = {}
        self.problems: list[str] = []


def _read_part(shard: Path) -> _Part:
    samples: dict[str, _Sample] = {}
    bad: list[tuple[str, str]] = []
    digest = hashlib.sha256()
    shard_bytes = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, suffix = _key_and_suffix(member.name)
                if member.isfile() and key:
                    _add_member(samples.setdefault(key, _Sample()), tar, member, suffix)
            _refuse_silent_end(tar)
    except (tarfile.TarError, EOFError, OSError) as error:
        # What stands before the break is good; a truncated tail costs its own samples only.
        bad.append(("(rest of the shard)", f"not a readable tar from there on ({error})"))
    good: list[tuple[str, _Sample]] = []
    for key, sample in samples.items():
        if sample.image is None:
            sample.problems.append("no image")
        elif sum(sample.image) > shard_bytes:
            sample.problems.append("truncated")
        if 0 not in sample.captions:
            sample.problems.append("no caption")
        if sample.problems:
            bad.append((key, sample.problems[0]))
        else:
            good.append((key, sample))
    caption_spans = np.zeros((len(good), len(_CAPTION_MEMBERS), 2), dtype=np.int64)
    product_ids, categories = [], []
    for row, (key, sample) in enumerate(good):
        for column, span in sample.captions.items():
            caption_spans[row, column] = span
        product_id = sample.metadata.get("product_id")
        if product_id is None or product_id == "":
            product_id = product_id_from_caption(sample.texts[0])
        product_ids.append(str(product_id))
        categories.append(str(sample.metadata.get("category") or ""))
        image_bytes = sample.image[1] if sample.image else 0
        content = [key, image_bytes, sorted(sample.texts.items()), product_ids[-1], categories[-1]]
        digest.update(f"{json.dumps(content)}\n".encode())
    return {
        "keys": np.array([key for key, _ in good], dtype=np.str_),
        "product_ids": np.array(product_ids, dtype=np.str_),
        "categories": np.array(categories, dtype=np.str_),
        "image_spans": np.array([sample.image for _, sample in good], dtype=np.int64).reshape(-1, 2),
        "caption_spans": caption_spans,
        "bad": np.array(bad, dtype=np.str_).reshape(-1, 2),
        "fingerprint": np.array(digest.hexdigest()),
    }


def _key_and_suffix(name: str) -> tuple[str, str]:
    """Cut at the first dot of the file's name, as WebDataset does: ``./a.b/000.txt0.txt`` is ``a.b/000``, ``txt0.txt``.

    A hidden file has no key: macOS' tar adds one to each member.
    """
    folder, _, file_name = name.removeprefix("./").rpartition("/")
    stem, _, suffix = file_name.partition(".")
    return (f"{folder}/{stem}" if folder and stem else stem), suffix.lower()


def _refuse_silent_end(tar: tarfile.TarFile) -> None:
    """``tarfile`` takes a damaged or cut header for the end; the true one is a block of zeros."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("damaged or cut off")


def _add_member(sample: _Sample, tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> None:
    span = (member.offset_data, member.size)
    if suffix in _IMAGE_SUFFIXES:
        if sample.image is not None:
            sample.problems.append("two images under one key")
        sample.image = span
    elif suffix in (*_CAPTION_MEMBERS, "txt"):
        column = _CAPTION_MEMBERS.index(suffix) if suffix != "txt" else 0
        text = _member_text(sample, tar, member)
        if not text.strip():
            sample.problems.append(f"caption {suffix} is empty or not UTF-8")
        sample.captions[column] = span
        sample.texts[column] = text
    elif suffix == "json":
        try:
            record = json.loads(_member_text(sample, tar, member))
            sample.metadata = record if isinstance(record, dict) else {}
        except ValueError:
            sample.problems.append("KEY.json is not JSON")


def _member_text(sample: _Sample, tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = tar.extractfile(member)
    assert file is not None
    data = file.read()
    if len(data) < member.size:
        sample.problems.append("truncated")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return ""
