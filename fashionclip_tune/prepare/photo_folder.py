"""Where the photos of a table's cells are: names as tables have them, against the files of a folder."""

import ast
import fnmatch
import os
import re
import unicodedata
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence, Set
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

# In the order in which a name without a suffix finds them.
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
_ADDRESS = r"(?:(?:https?|s3|gs|ftp)://|//[\w.-]+\.\w+/)"
MISSING, OUTSIDE, NONE_NAMED = "image missing", "image outside the folder", "row names no image"
_AMBIGUOUS = "image name fits several files"
_BY_NAME, _BY_NUMBER = "by the name of the file alone", "by their number without leading zeros"


class FoundPhoto(NamedTuple):
    """A name as the table has it, and its file; or None and what is wrong."""

    name: str
    path: Path | None
    problem: str = ""
    guess: str = ""
    """How it was found, where another name might as well be meant."""


class PhotoFolder:
    """Finds what a cell means: one name, several separated by ``|``, ``;`` or commas, addresses also by spaces, a list, a
    glob such as ``1163_*.jpg``, or a folder.

    A name is a path in the folder in any Unicode form and case, with or without its suffix, with Windows' separators or
    percent-encoded, absolute, or with the folder's own name before it. Where there is no such file, an address counts by
    its last part, a mere name wherever it lies below the folder, and a number without its leading zeros: if that
    stands for one file, and for no other name of the table (``settled``).
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._resolved = folder, folder.resolve()
        self._names_in = cache(self._sorted_names)  # one listing serves every row
        self._sure: set[Path] = set()
        self._guessed_from: defaultdict[Path, set[str]] = defaultdict(set)

    def find(self, cell: str, parts: Sequence[str] = ()) -> list[FoundPhoto]:
        """The photos of a cell; those of a glob or folder in their order by name.

        Args:
            parts: what the cell is made of, where the table itself has lists.
        """
        parts = parts or _listed(cell) or self._parts(cell, "|;\n")
        found: list[FoundPhoto] = []
        for part in filter(None, parts):
            matches = self._matching(part) if re.search(r"[*?\[]", part) and not _is_outside(part) else []
            photos = [FoundPhoto(name, self._folder / name) for name in matches] or self._one_or_several(part)
            if photos[0].path is None:
                photos = [FoundPhoto(name, self._folder / name) for name in self.photos_in(part)] or photos
            found += photos
        return found or [FoundPhoto(cell, None, NONE_NAMED)]

    def photos_in(self, cell: str) -> list[str]:
        """The photos that lie in a folder of this name; none where it is none."""
        name = self._within(_plain(cell)[0])
        if not name or name == ".":
            return []
        forms = dict.fromkeys((name, f"/{name}".rpartition(f"/{self._resolved.name}/")[2]))
        return [f"{form}/{each}" for form in forms if form for each in self._names_in(form) if _has_suffix(each)]

    def forget(self) -> None:
        """What was looked for until now was no name of the table's."""
        self._sure.clear()
        self._guessed_from.clear()

    def unnamed(self, named: Set[Path]) -> list[str]:
        """Photos of the folder that are none of those."""
        return [name for name in self._photos if self._folder / name not in named]

    def settled(self, found: FoundPhoto) -> FoundPhoto:
        """Once all names were looked for: a file that several of them would take for theirs belongs to none of these."""
        path = found.path
        if path is not None and found.guess and (path in self._sure or len(self._guessed_from[path]) > 1):
            return FoundPhoto(found.name, None, _AMBIGUOUS)
        return found

    def _one_or_several(self, part: str) -> list[FoundPhoto]:
        """Commas may be part of a name."""
        names = self._parts(part, ",")
        last = _plain(part)[0].rpartition("/")[2]
        is_one = len(names) < 2 or ("," in last and _key(last) in self._by_last)
        each = [] if is_one else [self._one(name) for name in names]
        are_several = any(one.path is not None for one in each) or any(map(names_photos, names[:-1]))
        return each if each and are_several else [self._one(part)]

    def _parts(self, cell: str, marks: str) -> list[str]:
        """The parts of a list; the cell where separators are part of a name.

        Of a list, too, a file is found: the last, with the folder's own name and the others before it, or the first.
        """
        parts = _split(cell, marks)
        if len(parts) < 2 or (path := self._surely(cell)) is None:
            return parts
        own = f"/{self._resolved.name}/"
        others = (part for part in parts[:-1] if names_photos(part) or own in f"/{_plain(part)[0]}" or self._surely(part))
        is_one = len(parts) == len(_split(path.relative_to(self._folder).as_posix(), marks)) or not any(others)
        return [cell] if is_one else parts

    def _one(self, cell: str) -> FoundPhoto:
        if (path := self._surely(cell)) is not None:
            return FoundPhoto(cell, path)
        name, is_address = _plain(cell)
        relative = self._within(name)
        if relative is None and not is_address:
            return FoundPhoto(cell, None, OUTSIDE)
        if relative is None or (not is_address and "/" in relative):
            return FoundPhoto(cell, None, MISSING)
        last = unquote(relative).rpartition("/")[2]
        named = self._by_last.get(_key(last)) or ([] if _has_suffix(last) else self._by_last_stem.get(_key(last), []))
        for how, files in ((_BY_NAME, named), (_BY_NUMBER, self._by_number.get(_number(_without_suffix(last)), []))):
            if files:
                best = self._best(_longest_tail(files, unquote(relative)))
                if best is None:
                    return FoundPhoto(cell, None, _AMBIGUOUS)
                self._guessed_from[best].add(name)
                return FoundPhoto(cell, best, guess=how)
        return FoundPhoto(cell, None, MISSING)

    def _surely(self, cell: str) -> Path | None:
        # os.path.isfile is False, where Path.is_file raises, for a name that is too long for the file system.
        if cell and not _is_outside(cell) and os.path.isfile(path := self._folder / cell):
            self._sure.add(path)
            return path
        plain = _plain(cell)[0]
        relative = self._within(plain)
        for form in dict.fromkeys((relative or plain, unquote(relative or plain))):
            # With the folder's own name in it, and whatever stands before that: also another machine's.
            _, is_repeated, rest = f"/{form}".rpartition(f"/{self._resolved.name}/")
            for name in [form] * bool(relative) + [rest] * bool(is_repeated):
                files = self._by_path.get(_key(name)) or ([] if _has_suffix(name) else self._by_stem.get(_key(name), []))
                if files and (best := self._best(files)) is not None:
                    self._sure.add(best)
                    return best
        return None

    def _best(self, names: Sequence[str]) -> Path | None:
        """Of files that differ in their suffix, the first in the order of suffixes; None where they are different photos."""
        if len({_without_suffix(name) for name in names}) > 1:
            return None

        def place(name: str) -> int:
            return next((place for place, suffix in enumerate(_SUFFIXES) if name.lower().endswith(suffix)), len(_SUFFIXES))

        return self._folder / min(names, key=place)

    def _within(self, name: str) -> str | None:
        """The path in the folder; None where the name leads out of it."""
        if re.match(r"[A-Za-z]:/", name):
            return None
        if name.startswith("/"):
            for folder in (os.path.abspath(self._folder), self._resolved):
                if name.startswith(f"{folder}/"):
                    name = name[len(str(folder)) + 1 :]
                    break
            else:  # such as Magento's: from the root of the photos
                return name[1:] if os.path.isfile(self._folder / name[1:]) and ".." not in Path(name).parts else None
        normal = os.path.normpath(name) if name else ""
        return None if normal == ".." or normal.startswith("../") else normal

    @cached_property
    def _files(self) -> list[str]:
        """All files below the folder, relative to it; hidden ones are left out."""
        found = []
        for parent, folders, names in os.walk(self._folder, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
            within = os.path.relpath(parent, self._folder)
            found += [name if within == "." else f"{within}/{name}" for name in sorted(names) if not name.startswith(".")]
        return found

    @cached_property
    def _photos(self) -> list[str]:
        return [name for name in self._files if _has_suffix(name)]

    @cached_property
    def _by_path(self) -> dict[str, list[str]]:
        return _grouped((_key(name), name) for name in self._files)

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        return _grouped((_key(_without_suffix(name)), name) for name in self._photos)

    @cached_property
    def _by_last(self) -> dict[str, list[str]]:
        return _grouped((_key(name.rpartition("/")[2]), name) for name in self._files)

    @cached_property
    def _by_last_stem(self) -> dict[str, list[str]]:
        return _grouped((_key(_without_suffix(name.rpartition("/")[2])), name) for name in self._photos)

    @cached_property
    def _by_number(self) -> dict[str, list[str]]:
        numbers = ((_number(_without_suffix(name.rpartition("/")[2])), name) for name in self._photos)
        return _grouped((number, name) for number, name in numbers if number)

    def _matching(self, pattern: str) -> list[str]:
        parent, _, last = pattern.rpartition("/")
        if re.search(r"[*?\[]", parent):
            paths = (path for path in self._folder.glob(pattern) if path.is_file())
            names = sorted(path.relative_to(self._folder).as_posix() for path in paths)
        else:
            all_names, start = self._names_in(parent), re.split(r"[*?\[]", last)[0]
            first, past = bisect_left(all_names, start), bisect_left(all_names, start + "\U0010ffff")
            matches = fnmatch.filter(all_names[first:past], last)
            names = [f"{parent}/{name}" if parent else name for name in matches]
        return [name for name in names if _has_suffix(name)]

    def _sorted_names(self, parent: str) -> list[str]:
        try:
            with os.scandir(self._folder / parent) as entries:
                return sorted(entry.name for entry in entries if entry.is_file())
        except OSError:  # no such folder, or no folder
            return []


def _plain(cell: str) -> tuple[str, bool]:
    """Without scheme, host and query where it is an address, with slashes; and whether it is one."""
    if re.match(_ADDRESS, cell, re.IGNORECASE):
        return urlsplit(cell).path.lstrip("/"), True
    if cell.lower().startswith("file://"):
        cell = unquote(cell[len("file://") :])
    return cell.replace("\\", "/"), False


def _longest_tail(files: Sequence[str], path: str) -> Sequence[str]:
    """Those that have most of the last parts of a path in common with it."""

    def common(file: str) -> int:
        parts = (reversed(_key(_without_suffix(name)).split("/")) for name in (file, path))
        pairs = zip(*parts, strict=False)
        return next((number for number, (mine, other) in enumerate(pairs) if mine != other), file.count("/") + 1)

    longest = max(map(common, files))
    return [file for file in files if common(file) == longest]


def _split(cell: str, marks: str) -> list[str]:
    """At these marks, and before addresses."""
    found = re.split(rf"([{marks}]|[\s,;|]+(?={_ADDRESS}))", cell, flags=re.IGNORECASE)
    parts: list[str] = []
    for mark, part in zip(["", *found[1::2]], map(str.strip, found[::2]), strict=True):
        is_parameter = mark == "," or (mark == ";" and "=" in part)
        if parts and is_parameter and _is_query(parts[-1]) and not _plain(part)[1] and not names_photos(part):
            parts[-1] += mark + part  # of the same address: no further photo
        elif part:
            parts.append(part)
    return parts


def _is_query(cell: str) -> bool:
    return _plain(cell)[1] and "?" in cell


def _is_outside(name: str) -> bool:
    """Whether a name leads out of the folder, or may."""
    return Path(name).is_absolute() or ".." in Path(name).parts


def names_photos(cell: str) -> bool:
    """Whether a cell has the look of names of photos."""
    return any(_has_suffix(_plain(part.strip())[0]) for part in re.split(r"[|;,\n]", cell))


def _listed(cell: str) -> list[str]:
    """The parts of a list written as JSON or Python writes it; none where it is none."""
    if not (cell.startswith(("['", '["')) and cell.endswith(("']", '"]'))):
        return []
    try:
        found = ast.literal_eval(cell)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    return [str(part).strip() for part in found] if isinstance(found, list) else []


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for key, name in pairs:
        groups[key].append(name)
    return dict(groups)


def _key(name: str) -> str:
    """Equal for names that people take for the same."""
    return unicodedata.normalize("NFC", name).casefold()


def _has_suffix(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES)


def _without_suffix(name: str) -> str:
    return name.rpartition(".")[0] if _has_suffix(name) else name


def _number(name: str) -> str:
    """Without leading zeros; empty for what is no number."""
    return name.lstrip("0") if name.isascii() and name.isdigit() else ""
