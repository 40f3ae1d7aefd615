"""A folder of files that can be made again: they take no more than a limit, and those used longest ago make room for others.

Who uses a file sets its time of change. Who has one open that is removed goes on reading it.
"""

import contextlib
import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock


@dataclass(frozen=True)
class Room:
    """
    Attributes:
        max_bytes: of all its files together.
        spared_s: by the end of a file's name, for how many seconds after its last use it makes room for no other. What ends in
            another way is not counted.
        kept_s: a file that nobody has used for so many seconds goes in any case.
    """

    folder: Path
    max_bytes: int
    spared_s: Mapping[str, float]
    kept_s: float = math.inf

    def turn(self) -> FileLock:
        """Held while files are counted, claimed or renamed."""
        return FileLock(self.folder / "room.lock")

    def make(self, num_bytes: int) -> bool:
        """Removes files until so many bytes more fit in the limit and on the disk; whether they do. The caller has the turn."""
        now = time.time()
        found: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process removes files too
                stat = path.stat()
                if path.suffix in self.spared_s:
                    found.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in found)

        def fits() -> bool:
            return total + num_bytes <= self.max_bytes and num_bytes < shutil.disk_usage(self.folder).free

        for used, size, path in sorted(found):
            if now - used <= self.kept_s and fits():
                break
            spared_s = self.spared_s[path.suffix]
            if not spared_s or now - used > spared_s:
                path.unlink(missing_ok=True)
                total -= size
        return fits()


def touched(path: Path) -> bool:
    """Marks a file as used; False where there is none."""
    try:
        os.utime(path)
        return True
    except FileNotFoundError:
        return False
