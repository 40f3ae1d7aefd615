"""Who writes a sweep's durable side: the process that started last. The one before it stops where it was about to write.

A drive honours no lock, and who has lost a machine a minute ago is not to wait for one. So nothing is asked: each driver
leaves a file of a new name in ``writers/``, and whoever is about to write looks there now and then for a later one.
"""

import json
import os
import platform
import secrets
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from fashionclip_tune.errors import StorageError
from fashionclip_tune.storage.folder import RemoteFolder

WRITERS = "writers"
_LOOKED_EVERY_S = 3.0


@dataclass(frozen=True)
class FencingToken:
    """A driver. Names sort in the order of starting; a later one goes before the others."""

    name: str
    host: str
    process: int
    started: str
    run_dir: str
    """The folder on its local disk; two on one host are two drivers."""

    def __str__(self) -> str:
        return f"{self.host} (process {self.process}, started {self.started[:19].replace('T', ' ')} UTC)"


def register(folder: RemoteFolder, run_dir: Path) -> tuple[FencingToken, FencingToken | None]:
    """This process as the writer; and the one before it, unless that has signed off or ran in this very folder.

    (There it would have kept the folder's lock.)
    """
    before = _newest(folder)
    number = 1 + (int(before.partition("-")[0]) if before else 0)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    writer = FencingToken(f"{number:06d}-{secrets.token_hex(4)}", platform.node(), os.getpid(), now, str(run_dir))
    folder.put(f"{WRITERS}/{writer.name}.json", json.dumps(asdict(writer)).encode())
    if before is None or folder.exists(f"{WRITERS}/{before}.ended"):
        return writer, None
    there = _read(folder, before)
    return writer, None if (there.host, there.run_dir) == (writer.host, writer.run_dir) else there


def sign_off(folder: RemoteFolder, writer: FencingToken) -> None:
    """Says that the process has ended; not worth a word where it cannot be said."""
    with suppress(StorageError):
        folder.put(f"{WRITERS}/{writer.name}.ended", b"ended\n")


class FencingCheck:
    """Called before something is written or removed; raises StorageError once a later writer is there.

    What is written is written beside what a later writer has, or again, so that a look now and then will do. What is removed
    is gone: there it looks each time.
    """

    def __init__(self, folder: RemoteFolder, name: str) -> None:
        self._folder = folder
        self._name = name
        self._next_look = 0.0

    def __call__(self, is_removal: bool = False) -> None:
        if not is_removal and time.monotonic() < self._next_look:
            return
        newest = _newest(self._folder)
        if newest is not None and newest > self._name:
            raise StorageError(
                f"{self._folder.location} is written by another machine now, {_read(self._folder, newest)}: leave it to that "
                "one (a start here takes it back)"
            )
        self._next_look = time.monotonic() + _LOOKED_EVERY_S


def _newest(folder: RemoteFolder) -> str | None:
    return max((Path(name).stem for name in folder.sizes(WRITERS) if name.endswith(".json")), default=None)


def _read(folder: RemoteFolder, name: str) -> FencingToken:
    try:
        return FencingToken(**json.loads(folder.read(f"{WRITERS}/{name}.json")))
    except (FileNotFoundError, ValueError, TypeError):  # torn
        return FencingToken(name, "a machine of unknown name", 0, "", "")
