"""A sweep's durable side: what another machine needs to go on with it, in a folder that need not be POSIX or fast.

The sweep runs in a folder on local disk, as ever; this keeps, beside the runs' own states (``remote_state``), the journal in
pieces (``journal/OFFSET-WRITER-HASH.jsonl``), ``headers/WRITER.json``, and for people copies of sweep.json, tables and
``best/``.
"""

import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fashionclip_tune.files import write_json
from fashionclip_tune.reporting.sweep_files import FREED
from fashionclip_tune.storage.folder import RemoteFolder, piece_name, read_journal
from fashionclip_tune.tuning.persistence.fencing import FencingCheck, FencingToken, register, sign_off

HEADERS = "headers"
_FOR_PEOPLE = ("trials.csv", "report.html", "sweep.json")
_FOLDERS_FOR_PEOPLE = ("best/", "refit/best/")
_EVENTS = "events.out.tfevents."
_PER_TRIAL = ("config.json", "last_queries.npz", "bad_samples.csv", "warnings.log", "error.log")


class SweepMirror:
    """Keeps ``sweep_dir``, on local disk, so that ``folder`` is enough to go on from."""

    def __init__(self, folder: RemoteFolder, sweep_dir: Path) -> None:
        self.folder = folder
        self._sweep_dir = sweep_dir
        self._journal = sweep_dir / "study.journal"
        self._mirrored_bytes = 0
        self._published_at = -math.inf
        self._published: dict[str, tuple[int, int]] = {}
        self._writer: FencingToken | None = None

    def is_started(self) -> bool:
        """Whether there is a sweep to go on with."""
        return read_header(self.folder) is not None

    def take_over(self) -> FencingToken | None:
        """Makes this process the one that writes; returns the one before it where that may be running still."""
        self._writer, before = register(self.folder, self._sweep_dir)
        fencing_check = FencingCheck(self.folder, self._writer.name)
        self.folder.guard(fencing_check)
        fencing_check()  # of two that start at once the earlier one may have seen nobody
        return before

    @property
    def writer(self) -> str:
        """Whose pieces of the journal and files of trials the next ones are."""
        assert self._writer is not None, "nothing is written before take_over"
        return self._writer.name

    def let_go(self) -> None:
        """The sweep has ended or stopped here, in an orderly way."""
        if self._writer is not None:
            sign_off(self.folder, self._writer)

    def start(self, header: Mapping[str, Any]) -> None:
        """Keeps what does not change in the life of a sweep, once; again where it has got more trials.

        Of two machines that start a sweep of one name at the same time each leaves its own: that of the later writer holds.
        """
        if self._writer is None:
            self.take_over()
        known = read_header(self.folder)
        if known is None or any(known.get(name) != header.get(name) for name in ("created", "settings")):
            self.folder.put(f"{HEADERS}/{self.writer}.json", json.dumps(header, indent=2).encode())

    def restore(self) -> bool:
        """Brings the local folder to where the durable one is; False if what was there had gone another way.

        The local folder is kept where it is of the same life of the sweep: it may know one event more than the durable
        one, if the process died between the two. Where the sweep has gone on elsewhere since, it must not be used: the
        caller removes it and calls again.

        Of the time that the sweep has taken, ``elapsed_s``, and of what was freed, the durable side knows what the last copy of
        sweep.json says; what an earlier machine did after it is not counted.
        """
        durable = read_journal(self.folder)
        local = self._journal.read_bytes() if self._journal.exists() else b""
        if local and not local.startswith(durable):
            return False
        self._sweep_dir.mkdir(parents=True, exist_ok=True)
        if not local:
            self._journal.write_bytes(durable)
            header = read_header(self.folder)
            assert header is not None, "nothing is restored of a sweep that has not begun"
            begun: dict[str, Any] = {"state": "RUNNING", "best": None, "zero_shot": {}, "trials": [], **self._counted()}
            write_json(self._sweep_dir / "sweep.json", {**begun, **header})
        self._mirrored_bytes = len(durable)
        self.fetch_evaluations()
        return True

    def _counted(self) -> dict[str, float]:
        known: dict[str, float] = {}
        with suppress(FileNotFoundError, ValueError):  # none yet, or torn
            known = json.loads(self.folder.read("sweep.json"))
        return {name: known.get(name, 0) for name in ("elapsed_s", *FREED)}

    def append_journal(self) -> None:
        """Keeps what was added to the journal; to be called after each addition, before it takes effect."""
        with open(self._journal, "rb") as file:
            file.seek(self._mirrored_bytes)
            piece = file.read()
        piece = piece[: piece.rfind(b"\n") + 1]
        if piece:
            self.folder.put(piece_name(self._mirrored_bytes, self.writer, piece), piece)
            self._mirrored_bytes += len(piece)

    def fetch_evaluations(self, under: str = "trials") -> None:
        """Copies evaluations and curves that are not in the local folder: of an earlier machine, or of another node."""
        for name in self.folder.sizes(under):
            parts = name.split("/")
            is_known = parts[-1] in _PER_TRIAL or parts[-1].startswith(_EVENTS)
            is_of_run = is_known and len(parts) == (2 if under == "refit" else 3)
            is_wanted = parts[-1].endswith(".json") if "evaluations" in parts else is_of_run
            target = self._sweep_dir / name
            if not is_wanted or target.exists():
                continue
            content = self.folder.read(name)
            if parts[-1].endswith(".json"):
                try:
                    json.loads(content)
                except ValueError:  # torn: that stage is trained again
                    continue
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            self._published[name] = _version(target)

    def fetch_for_people(self) -> None:
        """Copies tables, curves and winners of a sweep that has ended, where they are not in the local folder yet."""
        self.fetch_evaluations("refit")
        for name, size in self.folder.sizes().items():
            target = self._sweep_dir / name
            is_wanted = name in _FOR_PEOPLE or name.startswith(_FOLDERS_FOR_PEOPLE) or f"/{_EVENTS}" in name
            if not is_wanted:
                continue
            if name == "sweep.json" or not target.is_file() or target.stat().st_size != size:
                self.folder.fetch(name, target)
            # What a refit leaves as it was is not written over: the only durable copy would be torn for that long.
            self._published[name] = _version(target)

    def publish_run(self, run_dir: Path) -> None:
        """Curves and tables of a trial that has ended, or of a refit."""
        events = [path.name for path in run_dir.glob(f"{_EVENTS}*")]
        place = run_dir.relative_to(self._sweep_dir).as_posix()
        self._publish([f"{place}/{name}" for name in (*_PER_TRIAL, *events)])

    def publish(self, *, not_before_s: float = 0.0) -> None:
        """The sweep's winner and tables, for people; not again before so many seconds have gone by.

        That a sweep is finished is written last: until then ``--resume`` does all this again.
        """
        if time.monotonic() - self._published_at < not_before_s:
            return
        self._published_at = time.monotonic()
        for folder in _FOLDERS_FOR_PEOPLE:
            self._publish_folder(folder)
        self._publish(list(_FOR_PEOPLE))

    def _publish_folder(self, folder: str) -> None:
        """As it is here: a winner of another architecture leaves no file behind."""
        names = [f"{folder}{path.name}" for path in (self._sweep_dir / folder).glob("*") if path.is_file()]
        if not names:
            return
        self._publish(names)
        for name in self.folder.sizes(folder.rstrip("/")).keys() - set(names):
            self.folder.remove(name)

    def _publish(self, names: list[str]) -> None:
        """Writes what has changed since it was last written: a winner may have 1.5 GB."""
        for name in names:
            path = self._sweep_dir / name
            if not path.is_file():
                continue
            version = _version(path)
            if self._published.get(name) != version:
                self.folder.put_file(name, path)
                self._published[name] = version


def read_header(folder: RemoteFolder, sweep: str = "") -> dict[str, Any] | None:
    """What does not change in the life of a sweep; None where there is none, or a torn one: nothing has come after it.

    Args:
        sweep: its place in ``folder``.
    """
    for name in sorted(folder.sizes(f"{sweep}/{HEADERS}" if sweep else HEADERS), reverse=True):
        with suppress(FileNotFoundError, ValueError):
            header: dict[str, Any] = json.loads(folder.read(name))
            return header
    return None


def _version(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
