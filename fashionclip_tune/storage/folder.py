"""A folder that outlives the machine: a mounted drive, or object storage. It may be slow, and it is no POSIX file system.

Files are written once, under new names; nothing is renamed, locked or appended to. What is torn is found by its content,
so whoever reads checks it.
"""

import hashlib
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import NativeFile, fs

from fashionclip_tune.errors import StorageError, UserError
from fashionclip_tune.storage.urls import scheme_of

_T = TypeVar("_T")
_WAITS_S = (1.0, 4.0, 15.0)
_CHUNK = 2**22
_MAKE_ROOM = "make room or bring it back; all that was written before stays valid, and --resume goes on from there"
_SMALL_BYTES = 2**20  # not worth a look at all that is in the folder


class RemoteFolder:
    """Whole files below one place. Names are relative, with slashes."""

    def __init__(self, location: str | Path, filesystem: fs.FileSystem | None = None) -> None:
        """``location``: a folder, or an address that Arrow (and so Ray) knows: ``s3://bucket/path``, ``gs://bucket/path``.

        Raises:
            UserError: no such kind of address.
            StorageError: what is behind it does not answer.
        """
        self.location = str(location)
        self._before_change: Callable[[bool], None] = lambda is_removal: None
        self._max_bytes: int | None = None
        self._is_local = scheme_of(self.location) is None
        if filesystem is not None:
            self._fs, self._root = filesystem, self.location
        elif self._is_local:
            self._fs, self._root = fs.LocalFileSystem(), str(Path(location).absolute())
        else:
            try:
                self._fs, self._root = fs.FileSystem.from_uri(self.location)
            except (OSError, ValueError) as error:
                kind = StorageError if isinstance(error, OSError) else UserError
                raise kind(f"{self.location} cannot be opened: {error}") from error

    def guard(self, before_change: Callable[[bool], None]) -> None:
        """From now on called before a file is written or removed, with whether it is to be removed; what it raises keeps
        that from happening."""
        self._before_change = before_change

    def keep_below(self, max_bytes: int) -> None:
        """From now on no file of a MB or more is written that would take all that is in the folder over so many bytes."""
        self._max_bytes = max_bytes

    def put(self, name: str, content: bytes) -> None:
        """Writes a file.

        Raises:
            StorageError: it could not be written, several times over; what had been written is removed.
        """
        self._write(name, lambda stream: stream.write(content))

    def put_file(self, name: str, source: Path) -> None:
        """Writes a file with the content of a local one, or raises as ``put``; at once where there is no room for it."""
        self.require_room(name, source.stat().st_size)

        def copy(stream: NativeFile) -> None:
            with open(source, "rb") as file:
                while chunk := file.read(_CHUNK):
                    stream.write(chunk)

        self._write(name, copy)

    def read(self, name: str) -> bytes:
        """A small file's content.

        Raises:
            FileNotFoundError: it is not there.
            StorageError: nothing can be read there, several times over.
        """

        def attempt() -> bytes:
            with self._fs.open_input_stream(self._path(name)) as stream:
                content: bytes = stream.read()
            return content

        return self._reached(name, attempt)

    def fetch(self, name: str, target: Path) -> None:
        """Copies a file to a local path, or raises as ``read``."""
        target.parent.mkdir(parents=True, exist_ok=True)

        def attempt() -> None:
            with self._fs.open_input_stream(self._path(name)) as stream, open(target, "wb") as file:
                while chunk := stream.read(_CHUNK):
                    file.write(chunk)

        self._reached(name, attempt)

    def exists(self, name: str) -> bool:
        return bool(self._infos(self._path(name)).type == fs.FileType.File)

    def folders(self) -> list[str]:
        """Names of the folders directly in this one."""
        found = self._infos(fs.FileSelector(self._root, allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory and _is_below(info.base_name))

    def sizes(self, under: str = "") -> dict[str, int]:
        """Name and bytes of each file below a folder; none where there is no such folder.

        Left out is what no folder can have: an object's key may be ``best/../../x``, and a copy would lie outside.
        """
        selector = fs.FileSelector(self._path(under), allow_not_found=True, recursive=True)
        found = [info for info in self._infos(selector) if info.type == fs.FileType.File]
        sizes = {info.path[len(self._root) :].removeprefix("/"): info.size for info in found}
        return {name: size for name, size in sizes.items() if _is_below(name)}

    def remove(self, name: str) -> None:
        """Deletes a file, emptied before: a drive keeps what was deleted in its trash, which counts.

        Raises:
            StorageError: it could not be, several times over.
        """
        self._before_change(True)
        with suppress(FileNotFoundError):  # gone already
            self._reached(name, lambda: self._remove(self._path(name)))

    def _remove(self, path: str) -> None:
        if self._is_local:
            self._fs.open_output_stream(path).close()
        self._fs.delete_file(path)
        if self._is_local:
            with suppress(OSError):  # others may be in it, or it is gone
                Path(path).parent.rmdir()

    def _infos(self, what: str | fs.FileSelector) -> Any:
        def attempt() -> Any:
            try:
                return self._fs.get_file_info(what)
            except FileNotFoundError as error:  # a folder that another process removed while it was walked
                raise OSError(str(error)) from error

        return self._reached(what if isinstance(what, str) else what.base_dir, attempt)

    def _reached(self, name: str, attempt: Callable[[], _T]) -> _T:
        try:
            return _retried(attempt)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(
                f"{self.location} cannot be reached ({name}: {error}): bring it back, then go on with --resume"
            ) from error

    def require_room(self, name: str, num_bytes: int, free_obsolete: Callable[[], object] = lambda: None) -> None:
        """To be asked before something large is written; it counts in place of what has the name, or lies below it, already.

        Args:
            free_obsolete: removes what is of no use any more; called only where there is no room otherwise.

        Raises:
            StorageError: there is none: on the disk, where it can say so (one that is full to the brim takes no record of the
                journal either), or within ``keep_below``, not even after others have had time to free what they hold.
        """
        if self._lack_of_disk(name, num_bytes) or self._lack_of_budget(name, num_bytes):
            free_obsolete()
        if lack := self._lack_of_disk(name, num_bytes):
            raise StorageError(lack)
        for wait_s in _WAITS_S:
            if not self._lack_of_budget(name, num_bytes):
                return
            time.sleep(wait_s)
        if lack := self._lack_of_budget(name, num_bytes):
            raise StorageError(lack)

    def _lack_of_disk(self, name: str, num_bytes: int) -> str:
        """What is wrong, and what to do; empty where there is room."""
        if not self._is_local or not Path(self._root).is_dir():
            return ""
        usage, path = shutil.disk_usage(self._root), Path(self._path(name))
        free = usage.free + (path.stat().st_size if path.is_file() else 0)
        if not usage.total or free >= num_bytes:  # some mounts say 0 of 0
            return ""
        return f"{self.location} is full: {name} takes {num_bytes / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free: {_MAKE_ROOM}"

    def _lack_of_budget(self, name: str, num_bytes: int) -> str:
        if self._max_bytes is None or num_bytes < _SMALL_BYTES:
            return ""
        others = sum(size for each, size in self.sizes().items() if each != name and not each.startswith(f"{name}/"))
        if others + num_bytes <= self._max_bytes:
            return ""
        return (
            f"the disk budget of {self._max_bytes / 1e9:g} GB is used up: {self.location} has {others / 1e9:.3g} GB beside "
            f"{name}, which takes {num_bytes / 1e6:,.0f} MB. What was obsolete is gone, all that was written before stays "
            "valid: go on with a larger --disk-budget-gb"
        )

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _write(self, name: str, fill: Callable[[NativeFile], object]) -> None:
        path = self._path(name)

        def attempt() -> None:
            self._before_change(False)
            if self._is_local:
                self._fs.create_dir(path.rpartition("/")[0], recursive=True)
            with self._fs.open_output_stream(path) as stream:
                fill(stream)

        try:
            _retried(attempt)
        except OSError as error:
            with suppress(OSError, StorageError):  # another's file of this name stays
                self._before_change(True)
                self._remove(path)
            raise StorageError(f"{self.location} cannot be written to ({name}: {error}): {_MAKE_ROOM}") from error


def _is_below(name: str) -> bool:
    return not {"", ".", ".."} & set(name.split("/"))


def _retried(attempt: Callable[[], _T]) -> _T:
    for wait_s in _WAITS_S:
        try:
            return attempt()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(wait_s)
    return attempt()


def piece_name(offset: int, writer: str, piece: bytes) -> str:
    """``journal/OFFSET-WRITER-HASH.jsonl``: where it belongs, whose it is, and by what a torn one is known."""
    return f"journal/{offset:012d}-{writer}-{_digest(piece)}.jsonl"


def read_journal(folder: RemoteFolder) -> bytes:
    """The pieces up to the first that is missing or torn.

    Where two machines wrote at the same place, what the later writer says holds, from there on: the other one had not
    noticed yet that it was overtaken.
    """
    pieces = [(*Path(name).stem.split("-", 1), name) for name in folder.sizes("journal")]
    found = [(int(offset), *rest.rpartition("-")[::2], name) for offset, rest, name in pieces]
    found.sort(key=lambda piece: piece[1], reverse=True)
    whole, writer = b"", ""
    for offset, by, digest, name in sorted(found, key=lambda piece: piece[0]):
        if offset == len(whole) and by >= writer and _digest(piece := folder.read(name)) == digest:
            whole, writer = whole + piece, by
    return whole


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()
