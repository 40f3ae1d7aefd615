"""Writing files so that a killed process leaves the old one or the new one, never half of one."""

import errno
import json
import os
import shutil
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


def is_full(error: OSError) -> bool:
    """Whether there was no room, on the disk or for this user."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def remove_file(path: Path) -> None:
    """Deletes a file if it is there, emptied before: a drive keeps what was deleted in its trash, which counts."""
    with suppress(FileNotFoundError):
        os.truncate(path, 0)
        path.unlink()


def remove_folder(folder: Path) -> None:
    """Deletes a folder as far as it can be, its files emptied before."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with suppress(OSError):
                os.truncate(path, 0)
    shutil.rmtree(folder, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Makes renames and new names in ``folder`` survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
