"""The file of a study: one line a record, whole or absent."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from fashionclip_tune.errors import StorageError, UserError
from fashionclip_tune.files import atomic_write


def open_storage(journal: Path, on_append: Callable[[], None]) -> JournalStorage:
    """Of a study in a file, which is made if it is not there.

    Args:
        on_append: called when the journal has grown, before that takes effect.
    """
    _mend(journal)
    return JournalStorage(_AnnouncedBackend(journal, on_append))


class _AnnouncedBackend(JournalFileBackend):
    def __init__(self, journal: Path, on_append: Callable[[], None]) -> None:
        super().__init__(str(journal))
        self._on_append = on_append

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        try:
            super().append_logs(logs)
        except OSError as error:
            raise StorageError(f"{self._file_path} cannot be written to ({error}): make room, then --resume") from error
        self._on_append()


def _mend(journal: Path) -> None:
    """Cuts off what a process wrote when it was killed in the middle of a line: the next append would ruin both lines.

    Blank lines, which network file systems leave, are taken out.

    Raises:
        UserError: another line is damaged.
    """
    if not journal.exists():
        return
    content = journal.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    lines = whole.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{journal}, line {number}, is damaged ({error}): put the file back from a copy, such as that in --results of "
                "a sweep with --scratch"
            ) from error
    kept = b"".join(line for line in lines if line.strip())
    if kept != whole:
        with atomic_write(journal, "wb") as file:
            file.write(kept)
    elif whole != content:
        with open(journal, "rb+") as file:
            file.truncate(len(whole))
    # The lock of a process that was killed while it wrote; ours is the only one (the sweep's folder is locked).
    journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)
