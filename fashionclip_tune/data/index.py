"""What shards hold and where: read once, kept beside them, so that any photo is read by its offset.

The order of samples is free then, a resumed run skips nothing by reading it, and every worker count gives the same
batches. ``SHARD.index.npz`` beside ``SHARD.tar`` is a function of the shard's bytes only; it is believed where this
machine has seen this very file (path, size, time of change) before, else checked against the shard's checksum, at once
or, where the shard is read from a copy, when it is copied.
"""

import contextlib
import hashlib
import io
import json
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fashionclip_tune.data.shard_cache import ShardDigest, ShardStorage
from fashionclip_tune.data.shards import RemoteShard, Shard
from fashionclip_tune.data.tar_index import FORMAT, TarIndex, checksum, index_tar
from fashionclip_tune.errors import UnavailableError, UserError
from fashionclip_tune.files import atomic_write, cache_dir
from fashionclip_tune.progress import OnProgress, no_progress
from fashionclip_tune.storage.urls import beside, read_url

_PARSING = Lock()  # numpy parses headers by ``ast``, which in Python 3.11 threads disturb each other in (cpython, gh-106905)
_CAPTIONS = "captions"  # as many bytes as all the rest, and seldom asked for
_AT_A_TIME = 8  # index files of a mounted drive or a server take long to open, not to read


class BadSample(NamedTuple):
    """A sample that could not be used: in which shard, which one, and why."""

    shard: str
    key: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason without its particulars."""
        return self.reason.partition(" (")[0]

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}"


def count_kinds(bad: Sequence[BadSample]) -> str:
    """``2 no caption, 1 not a decodable image``; the most frequent first."""
    return ", ".join(f"{count:,} {kind}" for kind, count in Counter(sample.kind for sample in bad).most_common())


def gaps_in_captions(*indexes: "ShardIndex") -> str | None:
    """How many photos' captions have a gap in their numbers, in a line; None where none has."""
    found = [sample for index in indexes for sample in index.caption_gaps]
    if not found:
        return None
    photos, their = ("photo has", "its") if len(found) == 1 else ("photos have", "their")
    found_in = f"{len(found):,} {photos} a gap in the numbers of {their} captions"
    return f"{found_in}, such as {found[0]}: all that are there are used"


@dataclass(frozen=True)
class ShardIndex:
    """The usable samples of several shards, concatenated in their order.

    Spans are byte offset and size in the sample's shard. Those of all captions stand one sample after the other.
    """

    shards: tuple[Shard, ...]
    contents: tuple[ShardDigest, ...]  # [shards]
    shard_sizes: npt.NDArray[np.int64]  # [shards] samples
    shard_of: npt.NDArray[np.int64]  # [samples]
    keys: npt.NDArray[np.str_]  # [samples]
    product_ids: npt.NDArray[np.str_]  # [samples]
    categories: npt.NDArray[np.str_]  # [samples]; empty where KEY.json names none
    pixel_sizes: npt.NDArray[np.int64]  # [samples, 2] width and height as stored; 0, 0 where the photo is no JPEG
    image_spans: npt.NDArray[np.int64]  # [samples, 2]
    num_captions: npt.NDArray[np.int64]  # [samples]; at least 1
    caption_spans: npt.NDArray[np.int64]  # [captions of all samples, 2]; of each sample the original one first
    bad: tuple[BadSample, ...]
    caption_gaps: tuple[BadSample, ...]
    """Samples that are used, though the numbers of their captions have a gap: ``no txt1.txt``."""
    fingerprint: str
    """Hash of keys, image sizes, captions and metadata in their order; paths do not count."""

    def __len__(self) -> int:
        return len(self.keys)

    def caption_spans_of(self, sample: int) -> npt.NDArray[np.int64]:
        """[captions, 2]"""
        end = self._caption_ends[sample]
        return self.caption_spans[end - self.num_captions[sample] : end]

    @cached_property
    def _caption_ends(self) -> npt.NDArray[np.int64]:
        return np.cumsum(self.num_captions)


def load_index(
    shards: Sequence[Shard],
    storage: ShardStorage | None = None,
    *,
    on_progress: OnProgress = no_progress,
) -> ShardIndex:
    """The index of these shards: from the cache or beside them where it is not stale, else by reading them.

    Args:
        storage: how shards are reached; None: local files as they are.
        on_progress: called with (done, total) after each shard.

    Raises:
        UserError: a shard cannot be read, or there is no usable sample in all of them; what is bad in some of them is
            listed in ``bad``.
    """
    storage = storage or ShardStorage()
    parts: list[TarIndex] = []
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        for part in pool.map(lambda shard: _shard_index(shard, storage), shards):
            parts.append({name: array for name, array in part.items() if name != _CAPTIONS})
            on_progress(len(parts), len(shards))
    if not any(len(part["keys"]) for part in parts):
        names = f"{shards[0].name} and {len(shards) - 1} more" if len(shards) > 1 else shards[0].name
        reasons = {str(reason) for part in parts for _, reason in part["bad"]}
        raise UserError(f"no usable sample in {names} of {shards[0].parent}: {'; '.join(sorted(reasons)) or 'empty'}")
    sizes = np.array([len(part["keys"]) for part in parts], dtype=np.int64)
    together = ("keys", "product_ids", "categories", "pixel_sizes", "image_spans", "num_captions", "caption_spans")
    joined: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in together}
    return ShardIndex(
        shards=tuple(shards),
        contents=tuple(ShardDigest(str(part["checksum"]), int(part["bytes"])) for part in parts),
        shard_sizes=sizes,
        shard_of=np.repeat(np.arange(len(shards)), sizes),
        **joined,
        bad=_noted(shards, parts, "bad"),
        caption_gaps=_noted(shards, parts, "caption_gaps"),
        fingerprint=hashlib.sha256("".join(str(part["fingerprint"]) for part in parts).encode()).hexdigest()[:16],
    )


def captions_by_shard(index: ShardIndex, storage: ShardStorage | None = None) -> Iterator[list[str]]:
    """The distinct captions of each shard's samples, stripped, in alphabetical order; raises as ``load_index`` does."""
    for shard in index.shards:
        captions: list[str] = json.loads(_shard_index(shard, storage or ShardStorage())[_CAPTIONS].tobytes())
        yield captions


def _noted(shards: Sequence[Shard], parts: Sequence[TarIndex], name: str) -> tuple[BadSample, ...]:
    noted = ((shard.name, part[name]) for shard, part in zip(shards, parts, strict=True))
    return tuple(BadSample(shard, str(key), str(reason)) for shard, samples in noted for key, reason in samples)


def write_index_beside(shard: Path) -> None:
    """Indexes a shard that was just written."""
    _write(index_path(shard), index_tar(shard))


def index_path(shard: Path) -> Path:
    """``SHARD.index.npz`` beside ``SHARD.tar``."""
    return shard.with_name(_index_name(shard.name))


def _index_name(shard_name: str) -> str:
    return f"{shard_name.removesuffix('.tar')}.index.npz"


def _shard_index(shard: Shard, storage: ShardStorage) -> TarIndex:
    try:
        identity = _identity(shard)
        cached = cache_dir() / "index" / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.npz"
        if cached.is_file() and (known := _parse(cached.read_bytes())) is not None:
            return known
        part = _beside(shard, storage)
        if part is None:
            with storage.unindexed(shard) as path:
                part = index_tar(path)
                storage.adopt(path, ShardDigest(str(part["checksum"]), int(part["bytes"])))
            if isinstance(shard, Path):
                with contextlib.suppress(OSError):  # a folder that is not ours: the cache has it
                    _write(index_path(shard), part)
        _write(cached, part)
        return part
    except OSError as error:
        raise UnavailableError(f"shard {shard} cannot be read: {error}") from error


def _identity(shard: Shard) -> str:
    if isinstance(shard, RemoteShard):
        return f"{FORMAT}:{shard.url}"
    stat = shard.stat()
    return f"{FORMAT}:{shard.absolute()}:{stat.st_size}:{stat.st_mtime_ns}"


def _beside(shard: Shard, storage: ShardStorage) -> TarIndex | None:
    """The index beside a shard, if there is one of this very content."""
    try:
        if isinstance(shard, RemoteShard):
            url = beside(shard.url, _index_name(shard.name))
            return None if url is None else _parse(read_url(url))
        part = _parse(index_path(shard).read_bytes())
    except OSError:
        return None
    if part is None or int(part["bytes"]) != shard.stat().st_size:
        return None
    return part if storage.copies(shard) or checksum(shard) == str(part["checksum"]) else None


def _parse(data: bytes) -> TarIndex | None:
    """None for a file that is damaged, or of another format."""
    try:
        with _PARSING, np.load(io.BytesIO(data)) as arrays:
            part = dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    return part if "format" in part and int(part["format"]) == FORMAT else None


def _write(path: Path, part: TarIndex) -> None:
    with atomic_write(path, "wb") as file:  # several trials may index the same shard at the same time
        np.savez_compressed(file, **part)  # type: ignore[arg-type]
