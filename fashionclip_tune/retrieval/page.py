"""What a search found as a page to look at: one HTML file, photos within it."""

import base64
import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from fashionclip_tune.evaluation.examples import as_jpeg, thumbnail
from fashionclip_tune.files import atomic_write
from fashionclip_tune.retrieval.nearest import Answer

_PIXELS, _QUALITY, _MOST_LETTERS = 320, 80, 40
_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: #1d2733; font: 15px/1.5 Inter, "Segoe UI", system-ui, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 32px 20px 60px; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; }
p { color: #5b6875; font-size: 13.5px; margin: 4px 0 18px; overflow-wrap: anywhere; }
.photos { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(46%, 200px), 1fr)); gap: 14px; }
section { margin-bottom: 36px; }
figure { margin: 0; background: white; border: 1px solid #e3e8ed; border-radius: 10px; overflow: hidden; }
img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: white; }
figcaption { padding: 8px 12px 10px; font-size: 13px; overflow-wrap: anywhere; }
figcaption small { display: block; color: #5b6875; }
.asked { width: 160px; border-radius: 10px; border: 1px solid #e3e8ed; margin: 8px 0; }
"""


class Search(NamedTuple):
    query: str
    """The words, or the name of the photo."""
    photo: bytes | None
    """Encoded, where a photo is what was searched by."""
    answers: Sequence[Answer]


def write_page(path: Path, searches: Sequence[Search], about: str, read: Callable[[dict[str, str]], bytes]) -> None:
    """Writes the page.

    Args:
        about: what was searched, and with which model: a line.
        read: a photo's bytes by its row; OSError where it is gone.

    Raises:
        OSError: the file cannot be written.
    """
    sections = "".join(_section(search, about, read) for search in searches)
    title = html.escape(", ".join(search.query for search in searches))
    with atomic_write(path) as file:
        file.write(
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
            f"<body><main>{sections}</main></body></html>\n"
        )


def _section(search: Search, about: str, read: Callable[[dict[str, str]], bytes]) -> str:
    asked = f'<img class="asked" alt="asked for" src="{_source(search.photo)}">' if search.photo else ""
    figures = "".join(_figure(rank, answer, read) for rank, answer in enumerate(search.answers, start=1))
    return (
        f'<section><h1>{html.escape(search.query)}</h1>{asked}<p>{html.escape(about)}</p><div class="photos">{figures}</div>'
        "</section>"
    )


def _figure(rank: int, answer: Answer, read: Callable[[dict[str, str]], bytes]) -> str:
    name, said = html.escape(answer.row["id"]), html.escape(attributes_text(answer.row))
    try:
        image = f'<img alt="{name}" src="{_source(read(answer.row))}">'
    except (OSError, ValueError) as error:
        image = f"<p>{html.escape(str(error))}</p>"
    return f"<figure>{image}<figcaption>{rank}. {name}<small>{answer.score:.3f} {said}</small></figcaption></figure>"


def _source(encoded: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(as_jpeg(thumbnail(encoded, _PIXELS), _QUALITY)).decode()}"


def attributes_text(row: dict[str, str]) -> str:
    """What is said of a photo beside its name, in a few words: descriptions and numbers are left to the table."""
    own = ("id", "path", "checksum", "seen")
    words = (value for name, value in row.items() if name not in own and not value.isdigit() and len(value) <= _MOST_LETTERS)
    return ", ".join(dict.fromkeys(filter(None, words)))
