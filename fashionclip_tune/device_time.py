"""The seconds of its device that a run takes, in all its lives: what its user pays.

Rows and checkpoints have them. What is trained after the last of these a kill throws away, and it is trained again; so the
count is kept in the run's folder too, every few seconds. Nobody knows the last few seconds before a kill, nor, where a run
goes on on another machine, what came after the last row that was recorded.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fashionclip_tune.history import read_history

DEVICE_TIME_FILE = "device_time.json"
_KEPT_EVERY_S = 5.0


class DeviceTime:
    """Counts them. ``share``: of the device, that the run has: a second counts as so much of one."""

    def __init__(self, run_dir: Path, share: float) -> None:
        self.seconds = 0.0
        self._run_dir = run_dir
        self._share = share
        self._since = self._next_time = time.monotonic()

    def go_on(self, checkpoint_s: float) -> None:
        """From what earlier lives took, as far as it is known; ``checkpoint_s``: of the one that the run goes on from."""
        rows_s = (row.get("device_s", 0.0) for row in read_history(self._run_dir))
        self.seconds = max(checkpoint_s, known_device_s(self._run_dir), *rows_s)

    @contextmanager
    def counting(self) -> Iterator[None]:
        started, self._since = time.perf_counter(), time.monotonic()
        try:
            yield
        except BaseException:  # no row will say it
            self._keep()
            raise
        finally:
            self.seconds += self._share * (time.perf_counter() - started)

    def keep(self) -> None:
        """Within ``counting``, before each step: every few seconds the count goes into the run's folder."""
        if time.monotonic() >= self._next_time:
            self._next_time = time.monotonic() + _KEPT_EVERY_S
            self._keep()

    def _keep(self) -> None:
        seconds = self.seconds + self._share * (time.monotonic() - self._since)
        with suppress(OSError):  # a full disk: it is a figure, and the run has more to say of that
            (self._run_dir / DEVICE_TIME_FILE).write_text(json.dumps({"device_s": seconds}))


def known_device_s(run_dir: Path) -> float:
    """What was kept last; 0 where there is nothing, or it was torn by a kill."""
    try:
        return float(json.loads((run_dir / DEVICE_TIME_FILE).read_text())["device_s"])
    except (OSError, ValueError, KeyError):
        return 0.0
