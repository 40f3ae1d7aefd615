"""Shards that can be read by offset: local files as they are, remote or slow ones as copies on a fast local disk.

Copies are named by the checksum of their content, so that trials, loader processes and later runs share them. Those used
longest ago are removed when the limit is reached; who has one open goes on reading it.
"""

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fashionclip_tune.data.room import Room, touched
from fashionclip_tune.data.shards import RemoteShard, Shard
from fashionclip_tune.files import cache_dir
from fashionclip_tune.progress import OnProgress
from fashionclip_tune.storage.urls import open_url

_CHUNK_BYTES = 1 << 20
_ATTEMPTS = 2
_POLL_S = 0.05
_SHOWN_EVERY_S = 0.5
_COPIES_AT_A_TIME = 4
# A part of a copy that has not grown for an hour is of a process that was killed.
_SPARED_S = {".tar": 0, ".part": 3_600}


class CopyError(OSError):
    """A shard could not be copied: which one and why."""


@dataclass(frozen=True)
class ShardDigest:
    """What a shard's index says of its bytes."""

    checksum: str
    num_bytes: int


@dataclass(frozen=True)
class ShardStorage:
    """Where shards are read. Processes may share a scratch folder.

    Attributes:
        scratch: local shards are copied there too; None: only remote ones are copied, to the cache folder.
        max_bytes: of all copies together.
        stall_s: a copy that does not grow for so many seconds is given up.
    """

    scratch: Path | None = None
    max_bytes: int = 20 * 10**9
    stall_s: float = 300.0

    def copies(self, shard: Shard) -> bool:
        return self.scratch is not None or isinstance(shard, RemoteShard)

    def path(self, shard: Shard, content: ShardDigest, *, on_wait: Callable[[], None] | None = None) -> Path:
        """A local file with the shard's bytes; waits until it is there, and calls ``on_wait`` as long as bytes come.

        Raises:
            CopyError: it cannot be read, stalls, or is not what its index says.
        """
        if isinstance(shard, Path) and self.scratch is None:
            return shard
        copy = self._folder() / f"{content.checksum}.tar"
        self._ensure(shard, copy, content, on_wait or _nothing)
        return copy

    @contextlib.contextmanager
    def unindexed(self, shard: Shard) -> Iterator[Path]:
        """A local file of a shard whose content is not known yet."""
        if isinstance(shard, Path) and self.scratch is None:
            yield shard
            return
        copy = self._folder() / f"new-{os.getpid()}-{threading.get_ident()}.tar"
        copy.unlink(missing_ok=True)
        self._ensure(shard, copy, None, _nothing)
        try:
            yield copy
        finally:
            copy.unlink(missing_ok=True)

    def adopt(self, copy: Path, content: ShardDigest) -> None:
        """Keeps a file of ``unindexed`` as the copy of this content."""
        if copy.parent == self._folder():
            copy.replace(copy.with_name(f"{content.checksum}.tar"))

    @property
    def root(self) -> Path:
        """A local folder for what can be made again."""
        return self.scratch if self.scratch is not None else cache_dir()

    def _folder(self) -> Path:
        return self.root / "shards"

    def _ensure(self, shard: Shard, copy: Path, content: ShardDigest | None, on_wait: Callable[[], None]) -> None:
        copy.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{copy}.lock", thread_local=False)
        seen, since = 0, time.monotonic()
        while not touched(copy):
            try:
                with lock.acquire(timeout=0):
                    if not touched(copy):
                        self._copy(shard, copy, content, on_wait)
            except Timeout:  # another process or thread is at it
                written = _written_at(_part_of(copy))
                if written != seen:
                    seen, since = written, time.monotonic()
                    on_wait()
                elif time.monotonic() - since > self.stall_s:
                    raise CopyError(f"{shard}: no byte came for {self.stall_s:g} s") from None
                time.sleep(_POLL_S)

    def _copy(self, shard: Shard, copy: Path, content: ShardDigest | None, on_wait: Callable[[], None]) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            self._make_room(_part_of(copy), content.num_bytes if content else 0)
            copying = _Download(shard, _part_of(copy))
            try:
                found = copying.run(self.stall_s, on_wait)
                if content is not None and found != content:
                    raise CopyError(
                        f"{shard}: {found.num_bytes:,} bytes with checksum {found.checksum}, its index says "
                        f"{content.num_bytes:,} with {content.checksum}: changed since, or damaged on the way (a shard that "
                        "was changed on purpose needs a new index: remove its .index.npz)"
                    )
                with self._room().turn():  # who counts meanwhile would find it under neither name
                    _part_of(copy).replace(copy)
                return
            except OSError as error:
                _part_of(copy).unlink(missing_ok=True)
                if attempt == _ATTEMPTS or copying.stalled:
                    raise error if isinstance(error, CopyError) else CopyError(f"{shard}: {error}") from error

    def _room(self) -> Room:
        return Room(self._folder(), self.max_bytes, _SPARED_S)

    def _make_room(self, part: Path, num_bytes: int) -> None:
        """Removes copies until ``part`` fits, as far as that helps, and claims its size."""
        room = self._room()
        with room.turn():
            room.make(num_bytes)
            with open(part, "wb") as file:
                file.truncate(num_bytes)


class _Download:
    """One copy, in a thread of its own, since reading may hang for ever."""

    def __init__(self, shard: Shard, target: Path) -> None:
        self.stalled = False
        self._shard = shard
        self._target = target
        self._num_bytes = 0
        self._digest = hashlib.blake2b(digest_size=16)
        self._error: Exception | None = None
        self._stream: Any = None

    def run(self, stall_s: float, on_wait: Callable[[], None]) -> ShardDigest:
        thread = threading.Thread(target=self._work, daemon=True)
        thread.start()
        seen, since = 0, time.monotonic()
        while thread.is_alive():
            thread.join(min(1.0, stall_s / 4))
            if self._num_bytes != seen:
                seen, since = self._num_bytes, time.monotonic()
                on_wait()
            elif thread.is_alive() and time.monotonic() - since > stall_s:
                self.stalled = True
                if process := getattr(self._stream, "proc", None):  # of a command, such as curl
                    process.kill()
                raise CopyError(f"{self._shard}: no byte came for {stall_s:g} s")
        if self._error is not None:
            raise self._error if isinstance(self._error, OSError) else CopyError(f"{self._shard}: {self._error}")
        return ShardDigest(self._digest.hexdigest(), self._num_bytes)

    def _work(self) -> None:
        try:
            shard = self._shard
            self._stream = open(shard, "rb") if isinstance(shard, Path) else open_url(shard.url)  # noqa: SIM115
            with self._stream, open(self._target, "r+b") as target:
                while (chunk := self._stream.read(_CHUNK_BYTES)) and not self.stalled:
                    target.write(chunk)
                    self._digest.update(chunk)
                    self._num_bytes += len(chunk)
                target.truncate()
        except Exception as error:  # gopen's handlers raise ValueError and subprocess' errors, too
            self._error = error


def _nothing() -> None:
    pass


def _part_of(copy: Path) -> Path:
    return copy.with_suffix(".part")


def _written_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def copy_first(storage: ShardStorage, wanted: Iterable[tuple[Shard, ShardDigest]], on_progress: OnProgress) -> None:
    """Copies shards, several at a time, as far as all of them fit; those that are read where they are need no copy.

    What cannot be copied is left to whoever reads it, who meets the error too, and reports it. ``on_progress`` is called with
    the numbers of shards now and then; when it raises, what has not begun is not copied.
    """
    fitting, total_bytes = list[tuple[Shard, ShardDigest]](), 0
    for shard, content in dict(wanted).items():
        total_bytes += content.num_bytes if storage.copies(shard) else 0
        if storage.copies(shard) and total_bytes <= storage.max_bytes:
            fitting.append((shard, content))
    pool = ThreadPoolExecutor(_COPIES_AT_A_TIME)
    try:
        copying = [pool.submit(storage.path, *each) for each in fitting]
        while left := wait(copying, _SHOWN_EVERY_S).not_done:
            on_progress(len(copying) - len(left), len(copying))
        on_progress(len(copying), len(copying))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Prefetcher:
    """Copies shards that will be needed, in the order of their need, in a thread; stops when told to."""

    def __init__(self, storage: ShardStorage) -> None:
        self._storage = storage
        self._wanted: list[tuple[Shard, ShardDigest]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def want(self, shards: Sequence[tuple[Shard, ShardDigest]]) -> None:
        """From now on these, the first one first."""
        with self._changed:
            self._wanted = list(shards)
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def __reduce__(self) -> tuple[Any, ...]:
        return Prefetcher, (self._storage,)  # a loader process has a thread of its own

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._closed)
                if self._closed:
                    return
                shard, content = self._wanted.pop(0)
            with contextlib.suppress(OSError):  # whoever reads it meets the error too, and reports it
                self._storage.path(shard, content)
