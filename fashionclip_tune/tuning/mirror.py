"""A sweep's durable side: what another machine needs to go on with it, in a folder that need not be POSIX or fast.

The sweep runs in a folder on local disk, as ever; this keeps, beside the runs' own states (``portable``), the journal in
pieces (``journal/OFFSET-HASH.jsonl``), ``header.json``, and for people copies of sweep.json, tables and ``best/``.
"""

import hashlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fashionclip_tune.durable import DurableFolder
from fashionclip_tune.files import write_json

HEADER_NAME = "header.json"
_FOR_PEOPLE = ("sweep.json", "trials.csv", "report.html")
_PER_TRIAL = ("config.json", "last_queries.npz", "bad_samples.csv", "warnings.log", "error.log")


class SweepMirror:
    """Keeps ``sweep_dir``, on local disk, so that ``folder`` is enough to go on from."""

    def __init__(self, folder: DurableFolder, sweep_dir: Path) -> None:
        self.folder = folder
        self._sweep_dir = sweep_dir
        self._journal = sweep_dir / "study.journal"
        self._mirrored_bytes = 0
        self._published_at = -math.inf

    def is_started(self) -> bool:
        """Whether there is a sweep to go on with."""
        return self.folder.exists(HEADER_NAME)

    def start(self, header: Mapping[str, Any]) -> None:
        """Keeps what does not change in the life of a sweep, once."""
        if not self.is_started():
            self.folder.put(HEADER_NAME, json.dumps(header, indent=2).encode())

    def restore(self) -> bool:
        """Brings the local folder to where the durable one is; False if what was there had gone another way.

        The local folder is kept where it is of the same life of the sweep: it may know one event more than the durable
        one, if the process died between the two. Where the sweep has gone on elsewhere since, it must not be used: the
        caller removes it and calls again.
        """
        durable = self._durable_journal()
        local = self._journal.read_bytes() if self._journal.exists() else b""
        if local and not local.startswith(durable):
            return False
        self._sweep_dir.mkdir(parents=True, exist_ok=True)
        if not local:
            self._journal.write_bytes(durable)
            header = json.loads(self.folder.read(HEADER_NAME))
            write_json(
                self._sweep_dir / "sweep.json", {"state": "RUNNING", "best": None, "zero_shot": {}, "trials": [], **header}
            )
        self._mirrored_bytes = len(durable)
        self.fetch_evaluations()
        return True

    def _durable_journal(self) -> bytes:
        """The pieces up to the first that is missing or torn."""
        whole = b""
        for name in sorted(self.folder.sizes("journal")):
            offset, _, digest = Path(name).stem.partition("-")
            piece = self.folder.read(name)
            if int(offset) == len(whole) and _digest(piece) == digest:
                whole += piece  # where a torn one stands there too, this is what a later life wrote instead
        return whole

    def append_journal(self) -> None:
        """Keeps what was added to the journal; to be called after each addition, before it takes effect."""
        with open(self._journal, "rb") as file:
            file.seek(self._mirrored_bytes)
            piece = file.read()
        piece = piece[: piece.rfind(b"\n") + 1]
        if piece:
            self.folder.put(f"journal/{self._mirrored_bytes:012d}-{_digest(piece)}.jsonl", piece)
            self._mirrored_bytes += len(piece)

    def fetch_evaluations(self) -> None:
        """Copies evaluations that are not in the local folder: those of an earlier machine, or of another node."""
        for name in self.folder.sizes("trials"):
            parts = name.split("/")
            is_wanted = parts[-1].endswith(".json") if "evaluations" in parts else len(parts) == 3 and parts[-1] in _PER_TRIAL
            target = self._sweep_dir / name
            if not is_wanted or target.exists():
                continue
            content = self.folder.read(name)
            if parts[-1].endswith(".json") and not _is_json(content):
                continue  # torn: that stage is trained again
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)

    def publish_trial(self, trial_dir: Path) -> None:
        """Curves and tables of a trial that has ended."""
        events = [path.name for path in trial_dir.glob("events.out.tfevents.*")]
        self._publish([f"trials/{trial_dir.name}/{name}" for name in (*_PER_TRIAL, *events)])

    def publish(self, *, not_before_s: float = 0.0) -> None:
        """The sweep's tables and its winner, for people; not again before so many seconds have gone by."""
        if time.monotonic() - self._published_at < not_before_s:
            return
        self._published_at = time.monotonic()
        best = [f"best/{path.name}" for path in (self._sweep_dir / "best").glob("*")]
        self._publish([*_FOR_PEOPLE, *best])

    def _publish(self, names: list[str]) -> None:
        for name in names:
            if (self._sweep_dir / name).is_file():
                self.folder.put_file(name, self._sweep_dir / name)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True
