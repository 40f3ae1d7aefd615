"""Photos to JPEGs in several processes, in order, with what the data report compares photos by.

Worker processes import this module and nothing of torch: they start in a fraction of a second.
"""

import hashlib
import io
import multiprocessing
import signal
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as TimeoutOfFuture
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from PIL import Image

from fashionclip_tune.errors import UserError
from fashionclip_tune.machine.child_processes import end_with_parent
from fashionclip_tune.prepare.photos import photo_as_jpeg, pixels_as_jpeg
from fashionclip_tune.prepare.tables import IMAGES_DATASET

_WORTH_A_POOL = 128  # photos; fewer are encoded before processes have started
_BATCHES_AHEAD = 4  # per worker: bounds what is encoded but not yet written
_LOOKS_EVERY_S = 1.0
THUMBNAIL_SIDE = 8
_NOISE = 3  # grey levels of 255


@dataclass(frozen=True)
class PhotoSource:
    """An image file, or a row of ``input_image`` in an HDF5 file."""

    path: Path
    row: int | None = None


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
    """The photos of each batch, in order, whatever the number of workers; None where one cannot be decoded.

    A batch of an HDF5 file is read at once, from its first row to its last.

    Raises:
        UserError: a worker died, most likely for want of memory.
    """
    if workers == 1 or sum(map(len, batches)) < _WORTH_A_POOL:
        for batch in batches:
            yield encode_batch(batch, size)
        return
    # Not forked: the parent has threads (of torch, of the progress bar), and a forked copy of their locks may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    running: deque[Future[list[EncodedPhoto | None]]] = deque()
    waiting = iter(batches)
    try:
        while True:
            for batch in islice(waiting, workers * _BATCHES_AHEAD - len(running)):
                with _interrupt_held():  # the first calls start the workers
                    running.append(pool.submit(encode_batch, batch, size))
            if not running:
                break
            yield _result(running.popleft(), pool)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died while it encoded photos, most likely for want of memory: start the same command "
            "again, with fewer --workers; it goes on where it stopped"
        ) from error
    except (KeyboardInterrupt, GeneratorExit):
        _kill(pool)  # a batch of large photos takes minutes on a busy machine, and nobody waits for it any more
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _result(future: Future[list[EncodedPhoto | None]], pool: ProcessPoolExecutor) -> list[EncodedPhoto | None]:
    """Waits for it, but not for ever where a worker was killed in the middle of a message.

    The pool's reader would wait for the rest of it: this process holds the other end of the pipe open, and the other workers
    wait for the lock of who was killed. Deaths at other moments the pool notices at once.
    """
    was_dead = False
    while True:
        try:
            return future.result(timeout=_LOOKS_EVERY_S)
        except TimeoutOfFuture:
            if was_dead:
                _kill(pool)
            was_dead = any(process.exitcode is not None for process in _workers_of(pool))


def _kill(pool: ProcessPoolExecutor) -> None:
    for process in _workers_of(pool):
        process.kill()
    pool._result_queue._writer.close()  # type: ignore[attr-defined]  # now the reader comes to an end


def _workers_of(pool: ProcessPoolExecutor) -> list[BaseProcess]:
    return list((pool._processes or {}).values())


@contextmanager
def _interrupt_held() -> Iterator[None]:
    """Holds Ctrl-C back for a moment, in this process, and for good in those that it starts."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    """A worker leaves Ctrl-C to its parent, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def encode_batch(batch: Sequence[PhotoSource], size: int) -> list[EncodedPhoto | None]:
    """Encodes photos and decodes them once more; None where either fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on odd metadata and on very large photos
        if batch[0].row is not None:
            return _encode_rows(batch[0].path, [source.row for source in batch if source.row is not None], size)
        return [_encode_file(source.path, size) for source in batch]


def _encode_file(path: Path, size: int) -> EncodedPhoto | None:
    try:
        jpeg = photo_as_jpeg(path, size)
        return EncodedPhoto(jpeg, image_hashes(jpeg))
    except Exception:  # on a broken file Pillow raises nearly anything: OSError, SyntaxError, struct.error
        return None


def _encode_rows(path: Path, rows: list[int], size: int) -> list[EncodedPhoto | None]:
    import h5py

    first = rows[0]
    try:
        with h5py.File(path, "r") as file:
            pixels = file[IMAGES_DATASET][first : rows[-1] + 1]
    except OSError:  # a damaged chunk costs the batch
        return [None] * len(rows)
    jpegs = [pixels_as_jpeg(pixels[row - first], size) for row in rows]
    return [EncodedPhoto(jpeg, image_hashes(jpeg)) for jpeg in jpegs]


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
