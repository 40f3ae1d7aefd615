"""Small disks, which get full."""

import math
import shutil
import subprocess
from pathlib import Path

import pytest


class Disk:
    """A file system in memory, of a size that can be changed."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        self.folder = folder
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", folder], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"a small disk needs the right to mount: {done.stderr.strip()}")

    def resize(self, megabytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={megabytes}m", self.folder], check=True)

    def leave(self, megabytes: int) -> None:
        """So much room beside what is there."""
        self.resize(megabytes + math.ceil(shutil.disk_usage(self.folder).used / 2**20))
