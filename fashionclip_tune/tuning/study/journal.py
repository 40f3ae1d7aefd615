"""The file of a study: one line a record, whole or absent."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from fashionclip_tune.errors import StorageError


def open_storage(journal: Path, on_append: Callable[[], None]) -> JournalStorage:
    """Of a study in a file, which is made if it is not there.

    Args:
        on_append: called when the journal has grown, before that takes effect.
    """
    _drop_torn_line(journal)
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


def _drop_torn_line(journal: Path) -> None:
    """Cuts off what a process wrote when it was killed in the middle of a line: the next append would ruin both lines."""
    if not journal.exists():
        return
    with open(journal, "rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
    # The lock of a process that was killed while it wrote; ours is the only one (the sweep's folder is locked).
    journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)
