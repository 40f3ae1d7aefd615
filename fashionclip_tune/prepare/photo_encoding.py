"""Photos to JPEGs in several threads, in order, with what the data report compares photos by."""

import hashlib
import io
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from fashionclip_tune.prepare.photos import photo_as_jpeg, pixels_as_jpeg, why_unreadable
from fashionclip_tune.prepare.tables.hdf5_reader import pixels_in
from fashionclip_tune.prepare.tables.parquet_reader import photos_in

_BATCHES_AHEAD = 4  # per worker: bounds what is encoded but not yet written
THUMBNAIL_SIDE = 8
_NOISE = 3  # grey levels of 255


@dataclass(frozen=True)
class PhotoSource:
    """An image file, or a row of a table that holds its photos: of a column of a Parquet file, or of an HDF5 file."""

    path: Path
    row: int | None = None
    column: str | None = None
    """Of a Parquet file."""

    def problem(self) -> str:
        """Why it could not be decoded."""
        if self.row is None:
            try:
                return why_unreadable(self.path.read_bytes())
            except OSError as error:
                return f"image file cannot be read: {error.strerror}"
        if self.column is None:
            return "image cannot be decoded"
        try:
            (data,) = photos_in(self.path, self.column, [self.row])
        except OSError:
            return "image cannot be decoded"
        return "image missing" if data is None else why_unreadable(data)


@dataclass(frozen=True)
class ImageHashes:
    """What photos are compared by.

    ``pixels``: hash of the decoded pixels as written. ``gradients``: dHash, 64 bits. ``thumbnail``: 8 x 8 RGB bytes.
    """

    pixels: int
    gradients: int
    thumbnail: bytes


@dataclass(frozen=True)
class EncodedPhoto:
    """A JPEG that decodes, with its hashes."""

    jpeg: bytes
    hashes: ImageHashes


def encode_all(
    batches: Sequence[Sequence[PhotoSource]], *, size: int, workers: int
) -> Generator[list[EncodedPhoto | None], None, None]:
    """The photos of each batch, in order, whatever the number of threads; None where one cannot be decoded.

    A batch of an HDF5 or Parquet file is read at once.
    """
    pool = ThreadPoolExecutor(workers)  # Pillow lets go of Python's lock while it decodes and resizes
    waiting = iter(batches)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # on odd metadata and on very large photos
            running = deque(pool.submit(_encode_batch, batch, size) for batch in islice(waiting, workers * _BATCHES_AHEAD))
            while running:
                yield running.popleft().result()
                running.extend(pool.submit(_encode_batch, batch, size) for batch in islice(waiting, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_batch(batch: Sequence[PhotoSource], size: int) -> list[EncodedPhoto | None]:
    """Encodes photos and decodes them once more; None where either fails."""
    first = batch[0]
    if first.row is None:
        return [_encoded(source.path.read_bytes, size) for source in batch]
    rows = [source.row for source in batch if source.row is not None]
    try:
        if first.column is None:
            jpegs = [pixels_as_jpeg(pixels, size) for pixels in pixels_in(first.path, rows)]
            return [EncodedPhoto(jpeg, image_hashes(jpeg)) for jpeg in jpegs]
        photos = photos_in(first.path, first.column, rows)
    except OSError:  # a damaged chunk costs the batch
        return [None] * len(rows)
    return [_encoded(lambda data=data: data or b"", size) for data in photos]  # type: ignore[misc]


def _encoded(read: Callable[[], bytes], size: int) -> EncodedPhoto | None:
    try:
        jpeg = photo_as_jpeg(read(), size)
        return EncodedPhoto(jpeg, image_hashes(jpeg))
    except Exception:  # on a broken file Pillow raises nearly anything: OSError, SyntaxError, struct.error
        return None


def image_hashes(jpeg: bytes) -> ImageHashes:
    """Decodes a JPEG in full and says what it looks like.

    dHash: for 9 x 8 grey pixels, whether each is brighter than its left neighbour (Neal Krawetz, "Kind of Like That",
    2013); here brighter by more than noise, since catalogue photos are white for the most part.
    """
    with Image.open(io.BytesIO(jpeg)) as opened:
        image = opened.convert("RGB")
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    return ImageHashes(
        pixels=int.from_bytes(hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()[:8], "big"),
        gradients=int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1] + _NOISE).tobytes(), "big"),
        thumbnail=image.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX).tobytes(),
    )
