"""Files written so that a killed process leaves the old or the new one; the cache folder."""

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Writes JSON aside, syncs it to the disk and renames it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(unfinished, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


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
