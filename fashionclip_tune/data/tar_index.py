"""The index of one shard: keys, products, byte offsets and pixel sizes of its samples, from the tar alone."""

import contextlib
import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fashionclip_tune.data.shards import product_id_from_caption

JPEG_START = b"\xff\xd8\xff"


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Width and height from the frame header (ITU-T T.81, B.2.2); (0, 0) if there is none in ``data``."""
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = data[place + 5] << 8 | data[place + 6], data[place + 7] << 8 | data[place + 8]
            return width, height
        has_length = not (marker == 0xFF or 0xD0 <= marker <= 0xD8 or marker == 0x01)
        place += 2 + (data[place + 2] << 8 | data[place + 3]) if has_length else 1 if marker == 0xFF else 2
    return 0, 0


FORMAT = 7  # 4 saw three captions a photo, 5 no numbers with leading zeros, 6 kept no captions
_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_CAPTION_MEMBER = re.compile(r"txt([0-9]{1,9})\.txt")
# A JPEG's size stands behind its metadata: mostly within the first block, with a preview or a colour profile far behind.
_HEAD_BYTES, _LONG_HEAD_BYTES = 2_048, 1 << 18
_MAX_METADATA_BYTES = 1 << 20

TarIndex = dict[str, npt.NDArray[np.generic]]
"""Arrays by name, those of ``index.ShardIndex`` for one shard; a pure function of the tar's bytes."""


class _Sample:
    def __init__(self) -> None:
        self.image: tuple[int, int] | None = None
        self.pixels = (0, 0)
        self.captions: dict[int, tuple[int, int]] = {}
        self.texts: dict[int, str] = {}
        self.metadata: dict[str, object] = {}
        self.problems: list[str] = []


def index_tar(shard: Path) -> TarIndex:
    """Damaged samples are named in ``bad`` with the reason; what stands before damage to the tar itself is good."""
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
    product_ids, categories, caption_spans, gaps = [], [], [], []
    for key, sample in good:
        numbers = sorted(sample.captions)
        caption_spans += [sample.captions[number] for number in numbers]
        if numbers[-1] != len(numbers) - 1:
            gaps.append((key, _missing(numbers)))
        product_id = sample.metadata.get("product_id")
        if product_id is None or product_id == "":
            product_id = product_id_from_caption(sample.texts[0])
        product_ids.append(str(product_id))
        categories.append(str(sample.metadata.get("category") or ""))
        image_bytes = sample.image[1] if sample.image else 0
        content = [key, image_bytes, sample.pixels, sorted(sample.texts.items()), product_ids[-1], categories[-1]]
        digest.update(f"{json.dumps(content)}\n".encode())
    return {
        "keys": np.array([key for key, _ in good], dtype=np.str_),
        "product_ids": np.array(product_ids, dtype=np.str_),
        "categories": np.array(categories, dtype=np.str_),
        "pixel_sizes": np.array([sample.pixels for _, sample in good], dtype=np.int64).reshape(-1, 2),
        "image_spans": np.array([sample.image for _, sample in good], dtype=np.int64).reshape(-1, 2),
        "num_captions": np.array([len(sample.captions) for _, sample in good], dtype=np.int64),
        "caption_spans": np.array(caption_spans, dtype=np.int64).reshape(-1, 2),
        "captions": np.frombuffer(_distinct_captions([sample for _, sample in good]), dtype=np.uint8),
        "caption_gaps": np.array(gaps, dtype=np.str_).reshape(-1, 2),
        "bad": np.array(bad, dtype=np.str_).reshape(-1, 2),
        "fingerprint": np.array(digest.hexdigest()),
        "format": np.array(FORMAT),
        "bytes": np.array(shard_bytes),
        "checksum": np.array(checksum(shard)),
    }


def metadata_of(shard: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The key of each sample that has a ``KEY.json``, and what that says; a file that is no JSON object is left out.

    Raises:
        OSError, tarfile.TarError: the shard cannot be read.
    """
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            key, suffix = _key_and_suffix(member.name)
            if suffix == "json" and member.isreg() and member.size <= _MAX_METADATA_BYTES:
                with contextlib.suppress(ValueError, RecursionError):
                    file = tar.extractfile(member)
                    record = json.loads(file.read()) if file else None
                    if isinstance(record, dict):
                        yield key, record


def _distinct_captions(samples: list[_Sample]) -> bytes:
    """A list in JSON: an array of strings would give each the length of the longest."""
    distinct = {text.strip() for sample in samples for text in sample.texts.values()}
    return json.dumps(sorted(distinct), ensure_ascii=False).encode()


def _missing(numbers: list[int]) -> str:
    """Which captions stand between those of these numbers, in rising order: ``no txt1.txt``, ``no txt1.txt to txt3.txt``."""
    holes = [(before + 1, after - 1) for before, after in pairwise(numbers) if after > before + 1]
    return "no " + ", ".join(f"txt{first}.txt" + (f" to txt{last}.txt" if last > first else "") for first, last in holes)


def checksum(shard: Path) -> str:
    """BLAKE2b of all bytes of a file, 16 bytes in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    with open(shard, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


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
        sample.pixels = _pixel_size(tar, span)
    elif (numbered := _CAPTION_MEMBER.fullmatch(suffix)) or suffix == "txt":
        number = int(numbered[1]) if numbered else 0
        text = _member_text(sample, tar, member)
        if not text.strip():
            sample.problems.append(f"caption {suffix} is empty or not UTF-8")
        if number in sample.captions:
            sample.problems.append(f"two captions of number {number}")
        sample.captions[number] = span
        sample.texts[number] = text
    elif suffix == "json":
        try:
            record = json.loads(_member_text(sample, tar, member))
            sample.metadata = record if isinstance(record, dict) else {}
        except ValueError:
            sample.problems.append("KEY.json is not JSON")


def _pixel_size(tar: tarfile.TarFile, span: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a JPEG as stored (turning is left to who decodes it); (0, 0) where that is not known."""
    assert tar.fileobj is not None
    offset, size = span
    tar.fileobj.seek(offset)  # tarfile itself seeks before it reads on
    head = tar.fileobj.read(min(size, _HEAD_BYTES))
    if not head.startswith(JPEG_START):
        return 0, 0
    if jpeg_size(head) == (0, 0):
        head += tar.fileobj.read(min(size, _LONG_HEAD_BYTES) - len(head))
    return jpeg_size(head)


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
