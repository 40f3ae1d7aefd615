"""Judges whether a caption is in English, by lingua's models, which lie in the package: nothing is downloaded."""

import unicodedata
from functools import cache

from lingua import Language, LanguageDetector, LanguageDetectorBuilder

_TIMES_AS_LIKELY = 10
_NON_LATIN_SHARE = 0.5
_FOREIGN = ("German", "French", "Spanish", "Italian", "Dutch", "Portuguese", "Polish", "Swedish", "Turkish")
RULE = (
    f"half of the letters outside Latin script; or, as lingua judges, {_TIMES_AS_LIKELY} times as likely as English to be "
    f"{', '.join(_FOREIGN)}, and the same language without its accents; captions of a word or two may not be seen"
)


def looks_foreign(caption: str) -> str | None:
    """The language that a caption seems to be in, "not Latin script" for all other scripts, or None: it may be English."""
    text = unicodedata.normalize("NFC", caption)
    letters = [letter for letter in text if letter.isalpha()]
    if not letters:
        return None
    others = sum(not (letter.isascii() or unicodedata.name(letter, "").startswith("LATIN")) for letter in letters)
    if others >= _NON_LATIN_SHARE * len(letters):
        return "not Latin script"
    likeliest = _likeliest(text)
    # Accents alone decide much: those of café, crème and naïve are English too.
    return likeliest if text.isascii() or _likeliest(_without_accents(text), at_least=1) == likeliest else None


def _likeliest(text: str, at_least: float = _TIMES_AS_LIKELY) -> str | None:
    """The likeliest language; None where it is not so many times as likely as English."""
    found = {each.language: each.value for each in _detector().compute_language_confidence_values(text)}
    language = max(found, key=lambda each: found[each])
    is_foreign = language != Language.ENGLISH and found[language] >= at_least * found[Language.ENGLISH]
    return language.name.title() if is_foreign else None


def _without_accents(text: str) -> str:
    return "".join(letter for letter in unicodedata.normalize("NFD", text) if not unicodedata.combining(letter))


@cache
def _detector() -> LanguageDetector:
    languages = [Language.from_str(name) for name in ("English", *_FOREIGN)]
    return LanguageDetectorBuilder.from_languages(*languages).build()
