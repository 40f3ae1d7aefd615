"""Captions from a table's columns: ``'{title}. {colour} {category}'``, tidy where a column is empty."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fashionclip_tune.errors import UserError

_EMPTY = "\0"  # stands for an empty field while the text around it is tidied
_SEPARATORS = r"\s,;:.!?|/&+·\u2013\u2014\-"  # the last two: dashes
_GAP = re.compile(rf"[{_SEPARATORS}]*{_EMPTY}[{_SEPARATORS}{_EMPTY}]*")
# Names of columns may have colons, dots and anything but braces in them, which the standard library's templates do not allow.
_PIECES = re.compile(r"\{\{|\}\}|\{(?P<column>[^{}]*)\}|(?P<text>[^{}]+)|[{}]")
_EMPTY_BRACKETS = re.compile("|".join(rf"\{start}{_GAP.pattern}\{end}" for start, end in ("()", "[]", '""', "''")))


@dataclass(frozen=True)
class CaptionTemplate:
    """Literal texts and columns in turn: literals[0] columns[0] literals[1] ... literals[-1]."""

    text: str
    literals: tuple[str, ...]
    columns: tuple[str, ...]

    def fill(self, values: Mapping[str, str]) -> str:
        """The caption of a row. An empty column takes the separators and brackets around it along; words stay.

        What stands in the columns is kept as it is, but for its white space.
        """
        # Stretches of literals and empty columns are tidied alone, so that no column's own punctuation is touched.
        parts: list[str] = []
        stretch = self.literals[0]
        for column, literal in zip(self.columns, self.literals[1:], strict=True):
            if value := values[column].replace(_EMPTY, ""):
                parts += [_tidied(stretch, first=not parts, last=False), value]
                stretch = literal
            else:
                stretch += _EMPTY + literal
        parts.append(_tidied(stretch, first=not parts, last=True))
        return " ".join("".join(parts).split())


def parse_template(text: str, columns: Sequence[str]) -> CaptionTemplate:
    """A template as ``--caption`` gives it; a brace is written ``{{``.

    Raises:
        UserError: it has no column, or one that the table lacks, or braces that do not match.
    """
    literals, names = [""], list[str]()
    for piece in _PIECES.finditer(text):
        column = piece["column"]
        if column is None:
            if piece[0] in ("{", "}"):
                raise UserError(
                    f"--caption {text!r}: a {piece[0]!r} stands alone; write columns as {{name}} and braces as {{{{ }}}}"
                )
            literals[-1] += piece[0] if piece["text"] else piece[0][0]
            continue
        if column not in columns:
            raise UserError(f"--caption {text!r}: there is no column {column!r}; the columns are {', '.join(columns)}")
        names.append(column)
        literals.append("")
    if not names:
        raise UserError(f"--caption {text!r} names no column, so that all captions would be alike: write e.g. {{{columns[0]}}}")
    return CaptionTemplate(text, tuple(literals), tuple(names))


def _tidied(stretch: str, *, first: bool, last: bool) -> str:
    if _EMPTY not in stretch:
        return stretch
    while (shorter := _EMPTY_BRACKETS.sub(_EMPTY, stretch)) != stretch:
        stretch = shorter

    def kept(gap: re.Match[str]) -> str:
        at_start, at_end = first and gap.start() == 0, last and gap.end() == len(stretch)
        if at_end:
            own_ending = gap[0].rpartition(_EMPTY)[2].strip()  # the full stop of '{title} in {colour}.'
            return own_ending if own_ending in (".", "!", "?") and not at_start else ""
        if at_start or stretch[: gap.start()].endswith(("(", "[")) or stretch[gap.end() :].startswith((")", "]")):
            return ""
        separators = [part for part in gap[0].split(_EMPTY) if part.strip()]
        return separators[0] if separators else " "

    return _GAP.sub(kept, stretch)
