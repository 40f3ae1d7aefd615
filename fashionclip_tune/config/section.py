"""The base of all configuration classes: values are checked and converted by their types, ``--set`` included."""

import re
import types
import typing
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Union

from fashionclip_tune.errors import UserError
from fashionclip_tune.storage.urls import scheme_of


def assignments(texts: Sequence[str]) -> dict[str, str]:
    """``["training.epochs=2"]`` to ``{"training.epochs": "2"}``; the configuration converts and checks the values."""
    pairs = {}
    for text in texts:
        path, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text!r} is not allowed: write PATH=VALUE, such as training.epochs=2")
        pairs[path.strip()] = value.strip()
    return pairs


# Of a field that changes no number of a run: paths, the device, logging, how data is fetched.
NO_FINGERPRINT = {"fingerprint": False}


class Section:
    """Converts and checks each field by its annotation, then calls ``_check`` for what a type cannot say."""

    _prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        section: Any = type(self)
        for name, annotation in annotations(section).items():
            value = _converted(getattr(self, name), annotation, self._prefix + name)
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        pass

    def _require(self, condition: bool, name: str, allowed: str) -> None:
        if not condition:
            raise UserError(f"{self._prefix}{name} = {getattr(self, name)!r} is not allowed: {allowed}")


def dotted_paths(section: type, *, only_fingerprinted: bool = False, prefix: str = "") -> list[str]:
    """The paths of all fields of a section and of the sections in it."""
    paths = []
    for name, annotation in annotations(section).items():
        counts = section.__dataclass_fields__[name].metadata.get("fingerprint", True)  # type: ignore[attr-defined]
        if is_dataclass(annotation):
            within = f"{prefix}{name}."
            paths += dotted_paths(typing.cast(type, annotation), only_fingerprinted=only_fingerprinted, prefix=within)
        elif counts or not only_fingerprinted:
            paths.append(prefix + name)
    return paths


@cache
def annotations(section: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(section)
    return {f.name: hints[f.name] for f in fields(section)}


def value_at(section: Section, path: str) -> Any:
    value: Any = section
    for name in path.split("."):
        value = getattr(value, name)
    return value


def plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def _converted(value: Any, annotation: Any, path: str) -> Any:
    """``value`` as the annotated type, text included; raises UserError where that is not possible."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        options = typing.get_args(annotation)
        if type(None) in options and (value is None or value == "none"):
            return None
        errors = []
        for option in (option for option in options if option is not type(None)):
            try:
                return _converted(value, option, path)
            except UserError as error:
                errors.append(error)
        raise errors[-1]
    if annotation is Path and isinstance(value, str | Path) and scheme_of(str(value)) is None:
        return Path(value).expanduser()
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        for member in annotation:
            if value is member or value in (member.value, member.name):
                return member
        raise UserError(f"{path} = {value!r} is not allowed: one of {', '.join(m.value for m in annotation)}")
    if is_dataclass(annotation) or annotation is str:
        if isinstance(value, typing.cast(type, annotation)):
            return value
    elif annotation is bool:
        if isinstance(value, bool) or value in ("true", "false"):
            return value in (True, "true")
    elif annotation in (int, float) and not isinstance(value, bool):
        try:
            if annotation is int and isinstance(value, int | str) and _WHOLE_NUMBER.fullmatch(str(value)):
                return int(value)  # exact beyond 2**53, where a float is not
            number = float(value)
            if annotation is int and number == int(number):
                return int(number)
            if annotation is float and number == number and abs(number) != float("inf"):
                return number
        except (TypeError, ValueError, OverflowError):
            pass
    raise UserError(f"{path} = {value!r} is not allowed: {_TYPE_WORDS.get(annotation, annotation)} expected")


_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+")
_TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
