"""Files written so that a killed process leaves the old or the new one; the cache folder."""

import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal


@contextmanager
def atomic_write(path: Path, mode: Literal["w", "wb"] = "w", **how: Any) -> Iterator[Any]:
    """A file that is written aside, then synced to the disk and renamed into place; removed where the block fails.

    Of several writers at the same time, in other processes or threads, the last one's rename holds. ``how``: as for ``open``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(unfinished, mode, **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder beside ``folder`` to write into, which takes its place when the block ends; removed where that fails.

    Raises:
        OSError: ``folder`` is a file, or has something in it by then.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    unfinished.mkdir()
    try:
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Atomically, with two spaces of indentation."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def give_usual_mode(path: Path) -> None:
    """Lets others read a file as the umask says: safetensors leaves it to its owner alone."""
    umask = os.umask(0o077)  # only by setting one is it told
    os.umask(umask)
    with suppress(OSError):  # some mounts have modes of their own
        path.chmod(0o666 & ~umask)


def is_full(error: Exception) -> bool:
    """Whether there was no room, on the disk or for this user; exceptions of safetensors and of our own only say so."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in numbers
    return any(os.strerror(number) in str(error) for number in numbers)


def sync_folder(folder: Path) -> None:
    """Makes renames and new names in ``folder`` survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_dir() -> Path:
    """``$FASHIONCLIP_CACHE``, else ``fashionclip_tune`` below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if chosen := os.environ.get("FASHIONCLIP_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "fashionclip_tune"
