"""Which processes something has started, and when the last of them is gone: read from /proc, so on Linux only."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

Processes = dict[tuple[int, int], str]
"""How each calls itself, by its id and the time of its start, which together are of one process only."""

GONE_WITHIN_S = 10.0
"""What a killed process leaves running after so many seconds counts as left."""
_MARK = "STARTED_BY"
_LOOKS_EVERY_S = 0.05


def marked(mark: str) -> dict[str, str]:
    """Environment of a process by which it is found, with all that it starts, whoever their parents are by then."""
    # Ray's processes write their titles; else setproctitle would use the room where the environment is.
    return {_MARK: mark, "SPT_NOENV": "1"}


def running(mark: str) -> Processes:
    """Those with this mark; zombies are gone."""
    entry = f"{_MARK}={mark}\0".encode()
    return {identity: name for (identity, name, _), folder in _all() if entry in _environment(folder)}


def running_below(pid: int) -> Processes:
    """All descendants of a process."""
    everyone = [process for process, _ in _all()]
    found: Processes = {}
    border = {pid}
    while border:
        children = {identity: name for identity, name, parent in everyone if parent in border}
        found |= children
        border = {child for child, _ in children}
    return found


def still_there(processes: Processes) -> Processes:
    return {identity: name for (identity, name, _), _ in _all() if identity in processes}


class Leaving(threading.Thread):
    """Waits until ``left`` finds nothing any more, for ``GONE_WITHIN_S`` seconds at most."""

    def __init__(self, left: Callable[[], Processes]) -> None:
        super().__init__(daemon=True)
        self._left = left
        self._since = time.monotonic()
        self.gone_after_s: float | None = None
        """None: it was not gone in time."""
        self.left: Processes = {}
        self.start()

    def run(self) -> None:
        while True:
            self.left, now_s = self._left(), time.monotonic() - self._since
            if not self.left:
                self.gone_after_s = now_s
            if not self.left or now_s > GONE_WITHIN_S:
                return
            time.sleep(_LOOKS_EVERY_S)

    def violation(self) -> str:
        """Waits for the end; empty where all are gone."""
        self.join()
        names = ", ".join(f"{pid} {name[:60]}" for (pid, _), name in self.left.items())
        return f"left running after {GONE_WITHIN_S:g} s: {names}" if self.left else ""


def _all() -> list[tuple[tuple[tuple[int, int], str, int], Path]]:
    """((id, start), name, parent) of every process that is no zombie, and its folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, *rest = (folder / "stat").read_text().rpartition(")")[2].split()
            name = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # it has just ended
            continue
        if state != "Z":
            found.append((((int(folder.name), int(rest[17])), name, int(parent)), folder))
    return found


def _environment(folder: Path) -> bytes:
    try:
        return (folder / "environ").read_bytes() + b"\0"
    except OSError:
        return b""
