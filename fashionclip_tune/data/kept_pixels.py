"""Photos as an evaluation wants them: decoded and resized once, then read from disk by whoever evaluates on this machine.

A file a shard has a record a photo: its pixels, its number, their checksum. A record counts where its checksum is right, at
each reading, so that nothing has to be locked, finished or renamed: who finds no record decodes the photo and writes one. Two
who do so at the same time write the same bytes; what a killed process, a full disk or a failing one leaves is no record. Files
are read, not mapped: processes share their pages either way, and a mapped file that is cut off ends the process (SIGBUS).

A photo that cannot be read has no record: it is tried again each time, and a drive that failed once is not held against it.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import struct
import zlib
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import PIL
import torchvision
from PIL import features
from torch import Tensor

from fashionclip_tune.data.index import load_index
from fashionclip_tune.data.preprocessing import Preprocessing
from fashionclip_tune.data.reader import ShardReader
from fashionclip_tune.data.room import Room, touched
from fashionclip_tune.errors import UserError

# Increase it with every change of what ``decode_pil`` or ``Preprocessing.resize`` make of a photo.
_FORMAT = 1
_SUFFIX = ".pixels"
# A file used within the last hour is that of a sweep that runs: who finds no room beside it decodes, instead of taking turns in
# removing each other's. What nobody has used for a week goes.
_SPARED_S, _KEPT_S = {_SUFFIX: 3_600}, 7 * 86_400
PART_OF_LIMIT = 0.5
"""Of ``reading.scratch_gb``, for decoded photos beside the copies of shards."""
_MARK = struct.Struct("<II")  # the photo's number in its shard, from 1, which no hole in a file has; the checksum


def record_bytes(size: int) -> int:
    """Of a photo of ``size`` x ``size`` pixels."""
    return 3 * size**2 + _MARK.size


class KeptPixels:
    """For one pass over the photos of a reader, by several threads.

    Attributes:
        why_not: the reason for which not all that was decoded is kept; empty: it is.
    """

    def __init__(self, reader: ShardReader, preprocessing: Preprocessing) -> None:
        self.why_not = ""
        self._index, self._storage = reader.index, reader.storage
        self._preprocessing = preprocessing
        self._record_bytes = record_bytes(preprocessing.size)
        self._num_bytes = self._record_bytes - _MARK.size
        self._folder = self._storage.root / "pixels"
        self._ends = np.cumsum(self._index.shard_sizes)
        self._paths: dict[int, Path] = {}  # of the shards that have been asked for
        self._not_kept = set[int]()
        self._seen: dict[int, tuple[Any, bool]] = {}  # a shard's file, and whether it is the one that was indexed
        self._lock = Lock()

    def read(self, sample: int, pixels_CHW: Tensor) -> bool:
        """Fills in a photo's pixels, uint8; False where they are not kept."""
        shard, number = self._place(sample)
        try:
            file = os.open(self._path(shard), os.O_RDONLY)
        except OSError:
            return False
        try:
            record = os.pread(file, self._record_bytes, number * self._record_bytes)
        except OSError:
            return False
        finally:
            os.close(file)
        if len(record) < self._record_bytes or record[self._num_bytes :] != self._mark(number, record[: self._num_bytes]):
            return False
        pixels_CHW.numpy()[:] = np.frombuffer(record, np.uint8, self._num_bytes).reshape(pixels_CHW.shape)
        return True

    def write(self, sample: int, pixels_CHW: Tensor) -> None:
        """Keeps what has just been read of a photo, if there is room and its shard is still the one that was indexed."""
        shard, number = self._place(sample)
        if shard in self._not_kept:
            return
        data = pixels_CHW.numpy().tobytes()
        try:
            if not self._is_as_indexed(shard):
                raise OSError(f"{self._index.shards[shard].name} has changed since it was indexed")
            file = self._opened(shard)
            try:
                os.pwrite(file, data + self._mark(number, data), number * self._record_bytes)
            finally:
                os.close(file)
        except OSError as error:
            self._not_kept.add(shard)
            self.why_not = error.strerror or str(error)

    def _place(self, sample: int) -> tuple[int, int]:
        shard = int(self._index.shard_of[sample])
        return shard, sample - int(self._ends[shard] - self._index.shard_sizes[shard])

    @staticmethod
    def _mark(number: int, data: bytes) -> bytes:
        return _MARK.pack(number + 1, zlib.crc32(data))

    def _path(self, shard: int) -> Path:
        """Named by all that decides pixels: the shard's content, where its photos are, what is made of them, and by what."""
        if shard not in self._paths:
            index, end, prepared = self._index, int(self._ends[shard]), self._preprocessing
            spans = index.image_spans[end - int(index.shard_sizes[shard]) : end]
            decided_by = [
                *(_FORMAT, *_decoders(), index.contents[shard].checksum, hashlib.sha256(spans.tobytes()).hexdigest()),
                *(prepared.size, prepared.resize_mode, prepared.interpolation),
            ]
            name = hashlib.sha256(json.dumps(decided_by).encode()).hexdigest()[:32]
            path = self._folder / f"{name}{_SUFFIX}"
            with contextlib.suppress(OSError):  # another user's
                touched(path)
            self._paths[shard] = path
        return self._paths[shard]

    def _opened(self, shard: int) -> int:
        """The shard's file, open to be written; made if need be.

        Raises:
            OSError: there is no room.
        """
        path = self._path(shard)
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, os.O_WRONLY)
        self._folder.mkdir(parents=True, exist_ok=True)
        # Half of what is free at most: checkpoints come on the same disk.
        at_most = min(int(PART_OF_LIMIT * self._storage.max_bytes), shutil.disk_usage(self._folder).free // 2)
        room = Room(self._folder, at_most, _SPARED_S, _KEPT_S)
        with room.turn():
            num_bytes = int(self._index.shard_sizes[shard]) * self._record_bytes
            if not path.exists() and not room.make(num_bytes):
                limit = f"reading.scratch_gb = {self._storage.max_bytes / 1e9:g}"
                raise OSError(f"{self._folder} takes at most half of {limit}, and half of what is free on the disk")
            file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            os.truncate(file, num_bytes)  # counted as a whole from now on
            return file

    def _is_as_indexed(self, shard: int) -> bool:
        """One that is read where it is may be another by now: what it gives would be kept under the first one's name."""
        path = self._index.shards[shard]
        if self._storage.copies(path):
            return True
        assert isinstance(path, Path)
        stat = path.stat()
        file = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        with self._lock:
            if self._seen.get(shard, (None, False))[0] != file:
                try:
                    is_same = load_index((path,), self._storage).contents[0] == self._index.contents[shard]
                except UserError:
                    is_same = False
                self._seen[shard] = (file, is_same)
            return self._seen[shard][1]


@cache
def _decoders() -> tuple[str, ...]:
    """What photos are decoded and resized by."""
    codecs = [str(features.version(codec)) for codec in ("jpg", "libjpeg_turbo", "webp", "zlib", "libtiff")]
    return PIL.__version__, *codecs, torchvision.__version__, platform.machine()
