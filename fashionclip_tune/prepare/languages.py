"""Judges whether a caption is in English, by lingua's models, which lie in the package: nothing is downloaded."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache

from lingua import Language, LanguageDetector, LanguageDetectorBuilder

_TIMES_AS_LIKELY = 10
_NON_LATIN_SHARE = 0.5
_FOREIGN = ("German", "French", "Spanish", "Italian", "Dutch", "Portuguese", "Polish", "Swedish", "Turkish")
RULE = (
    f"half of the letters outside Latin script; or, as lingua judges, {_TIMES_AS_LIKELY} times as likely as English to be "
    f"{', '.join(_FOREIGN)}, and the same language without its accents; once, where most captions are likelier in one "
    "other language than in English; captions of a word or two may not be seen"
)


def foreign_captions(captions: Sequence[str]) -> dict[str, str]:
    """The language of those that look foreign.

    Words such as Blouse and Satin are those of several languages: a caption alone must be clear, a whole shop's need not be.
    """
    found = {caption: (looks_foreign(caption), looks_foreign(caption, at_least=1)) for caption in captions}
    ((of_most, count),) = Counter(likeliest for _, likeliest in found.values()).most_common(1) or [(None, 0)]
    said = {
        caption: likeliest if likeliest == of_most and count > len(found) / 2 else clear
        for caption, (clear, likeliest) in found.items()
    }
    return {caption: language for caption, language in said.items() if language}


def looks_foreign(caption: str, at_least: float = _TIMES_AS_LIKELY) -> str | None:
    """The language that a caption seems to be in, "not Latin script" for all other scripts, or None: it may be English.

    Args:
        at_least: how many times as likely as English.
    """
    text = unicodedata.normalize("NFC", caption)
    letters = [letter for letter in text if letter.isalpha()]
    if not letters:
        return None
    others = sum(not (letter.isascii() or unicodedata.name(letter, "").startswith("LATIN")) for letter in letters)
    if others >= _NON_LATIN_SHARE * len(letters):
        return "not Latin script"
    likeliest = _likeliest(text, at_least)
    # Accents alone decide much: those of café, crème and naïve are English too.
    return likeliest if text.isascii() or _likeliest(_without_accents(text), at_least=1) == likeliest else None


def _likeliest(text: str, at_least: float) -> str | None:
    """The likeliest language; None where it is not so many times as likely as English."""
    found = _confidences(text)
    language = max(found, key=lambda each: found[each])
    is_foreign = language != Language.ENGLISH and found[language] >= at_least * found[Language.ENGLISH]
    return language.name.title() if is_foreign else None


@lru_cache(maxsize=4)
def _confidences(text: str) -> dict[Language, float]:
    return {each.language: each.value for each in _detector().compute_language_confidence_values(text)}


def _without_accents(text: str) -> str:
    return "".join(letter for letter in unicodedata.normalize("NFD", text) if not unicodedata.combining(letter))


@cache
def _detector() -> LanguageDetector:
    languages = [Language.from_str(name) for name in ("English", *_FOREIGN)]
    return LanguageDetectorBuilder.from_languages(*languages).build()
