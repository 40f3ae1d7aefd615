"""Where a sweep lies: in one folder, or with ``--scratch`` in two, a local one to run in and a durable one to survive in."""

import hashlib
import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from fashionclip_tune.errors import UserError
from fashionclip_tune.storage.folder import RemoteFolder
from fashionclip_tune.storage.urls import scheme_of
from fashionclip_tune.tuning.persistence.fencing import WRITERS, FencingToken
from fashionclip_tune.tuning.persistence.mirror import HEADERS, SweepMirror, read_header
from fashionclip_tune.tuning.trial import DurablePlan

_LOCK = ".lock"


@dataclass(frozen=True)
class SweepLocation:
    """``run_dir`` is on local disk, complete while the sweep runs; ``shown`` is what the user calls the sweep."""

    shown: str
    run_dir: Path
    mirror: SweepMirror | None

    @property
    def readable(self) -> Path:
        """The folder to point a person to."""
        return self.run_dir if self.mirror is None or self.is_at_an_address else Path(self.shown)

    @property
    def is_at_an_address(self) -> bool:
        """Its durable side is no folder that a person could look into."""
        return scheme_of(self.shown) is not None

    def durable_plan(self, sync_every_s: float, kept_at: tuple[int, ...] = ()) -> DurablePlan | None:
        """For a trial, or a refit: None where the sweep lies in one folder. After ``take_over``."""
        if self.mirror is None:
            return None
        return DurablePlan(self.shown, sync_every_s, kept_at, self.mirror.writer, str(self.run_dir / ".durable.lock"))

    def keep_below(self, budget_bytes: int | None) -> RemoteFolder | None:
        """Refuses what would grow the sweep's folder in the results over a budget; None: there is no limit.

        Returns:
            The folder, to be asked for room, where the sweep lies in one only: a mirror asks itself.
        """
        if budget_bytes is None:
            return None
        folder = self.mirror.folder if self.mirror is not None else RemoteFolder(self.run_dir)
        folder.keep_below(budget_bytes)
        return folder if self.mirror is None else None

    def check_is_new(self) -> None:
        """Raises UserError where a sweep has come here since it was looked for.

        With other settings, it may be: these would go on under the name, and the record, of those.
        """
        has_begun_here = (self.run_dir / "sweep.json").is_file()
        if has_begun_here if self.mirror is None else self.mirror.is_started():
            raise UserError(f"sweep {self.shown} was started by another process meanwhile: give another --name, or --resume")
        if has_begun_here:
            raise UserError(
                f"{self.run_dir} has a sweep of this name, of which {self.shown} knows nothing: bring that folder back (is its "
                f"drive mounted?), give another --name, or remove {self.run_dir}"
            )

    def take_over(self) -> FencingToken | None:
        """Before anything is written to the durable side; returns who else may be at it still.

        Raises:
            StorageError: another machine has started in the same moment, and goes on.
        """
        return self.mirror.take_over() if self.mirror is not None else None

    def let_go(self) -> None:
        if self.mirror is not None:
            self.mirror.let_go()

    def restore(self) -> None:
        """Makes the local folder what the durable one says, on a machine that is new or that was overtaken by another."""
        if self.mirror is None or not self.mirror.is_started() or self.mirror.restore():
            return
        for path in self.run_dir.iterdir():  # the sweep has gone on elsewhere since
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.mirror.restore()

    def fetch_result(self) -> None:
        """Brings a finished sweep to where people are pointed to."""
        assert self.mirror is not None
        self.restore()
        self.mirror.fetch_for_people()


class SweepCatalog:
    """The folder of all sweeps."""

    def __init__(self, location: str) -> None:
        self.location = location if scheme_of(location) is not None else str(Path(location).absolute())
        self._folder = RemoteFolder(self.location)

    def to_resume(self, name: str | None) -> tuple[str, dict[str, Any]] | None:
        """The named sweep if it was started at all, or the latest unfinished one; and what is known of it."""
        if name is not None:
            _check_name(name)
            saved = self._saved(name)
            return None if saved is None else (name, saved)
        unfinished = [(each, saved) for each, saved in self._all() if saved["state"] != "FINISHED"]
        return max(unfinished, key=lambda entry: entry[1]["created"], default=None)

    def names(self) -> list[str]:
        return [name for name, _ in self._all()]

    def _all(self) -> list[tuple[str, dict[str, Any]]]:
        return [(each, saved) for each in self._folder.folders() if (saved := self._saved(each)) is not None]

    def new(self, name: str | None, *, may_be_begun: bool) -> str:
        """The name of a sweep that is to be started, the next free one if none is given.

        Raises:
            UserError: it exists; one that was killed before its first file may be begun again.
        """
        taken = self._folder.folders()

        def is_free(candidate: str) -> bool:
            return candidate not in taken or (may_be_begun and self._never_began(candidate))

        if name is None:
            return next(candidate for number in count(1) if is_free(candidate := f"sweep-{number:03d}"))
        _check_name(name)
        if not is_free(name):
            raise UserError(f"sweep {self.location}/{name} exists: add --resume to go on with it, or choose another --name")
        return name

    def place(self, name: str, scratch: str | None, saved: dict[str, Any] | None = None) -> SweepLocation:
        """Where a sweep is to run; one that was started in one folder stays there.

        Raises:
            UserError: results in an object store, or in two folders before, and no scratch to run in.
        """
        shown = f"{self.location}/{name}"
        is_remote = scheme_of(self.location) is not None
        if (is_remote or (saved is not None and saved["two_tiers"])) and scratch is None:
            raise UserError(f"{shown} is to outlive this machine only: add --scratch DIR, a folder on local disk to run in")
        if scratch is None or (saved is not None and not saved["two_tiers"]):
            return SweepLocation(shown, Path(shown), None)
        # Other results may hold a sweep of this name.
        run_dir = Path(scratch).absolute() / "sweeps" / f"{name}-{hashlib.sha256(shown.encode()).hexdigest()[:8]}"
        return SweepLocation(shown, run_dir, SweepMirror(RemoteFolder(shown), run_dir))

    def _never_began(self, name: str) -> bool:
        """It was killed before or within its first files: its lock, its writer and its header's beginning are all there can be.

        Only asked of one of which nothing can be read.
        """
        first = (f"{name}/{HEADERS}/", f"{name}/{WRITERS}/")
        return all(Path(path).name.startswith(".") or path.startswith(first) for path in self._folder.sizes(name))

    def _saved(self, name: str) -> dict[str, Any] | None:
        """What was written first holds; what is rewritten for people may be torn."""
        header, record = read_header(self._folder, name), None
        with suppress(FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            record = json.loads(self._folder.read(f"{name}/sweep.json"))
        if header is None and record is None:
            return None
        return {"state": "RUNNING", **(record or {}), **(header or {}), "name": name, "two_tiers": header is not None}


def _check_name(name: str) -> None:
    if Path(name).name != name or name in ("", ".."):
        raise UserError(f"--name {name!r} is not allowed: one folder name, without slashes")
