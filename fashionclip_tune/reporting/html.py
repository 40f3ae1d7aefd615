"""Pieces of a page: sections, tables, plots, and a gallery's rows of photos."""

import html
from collections.abc import Iterator, Sequence

import plotly.graph_objects as go

from fashionclip_tune.reporting.gallery import Gallery, Query, Shown


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>"


def plot(figure: go.Figure | None, why_not: str, elsewhere: str) -> str:
    """``elsewhere``: HTML, where the figures are found without JavaScript, and which are nowhere else."""
    if figure is None:
        return f'<p class="note">No figure: {why_not}.</p>'
    return _drawn(figure) + _without_script("This plot needs", elsewhere)


def _without_script(needs: str, elsewhere: str) -> str:
    return f'<noscript><p class="note">{needs} JavaScript. {elsewhere}</p></noscript>'


def _drawn(figure: go.Figure) -> str:
    settings = {"displayModeBar": False, "responsive": True}
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config=settings, default_width="100%"))


def panels(figures: Sequence[go.Figure], elsewhere: str) -> str:
    """Small figures, beside one another where there is room. ``elsewhere``: as for ``plot``."""
    drawn = "".join(f"<div>{_drawn(figure)}</div>" for figure in figures)
    return f'<div class="panels">{drawn}</div>{_without_script("These plots need", elsewhere)}'


def wide(drawn: str) -> str:
    """For what cannot be read on a phone's width: there it is scrolled sideways."""
    return f'<div class="wide">{drawn}</div>'


class Markup(str):
    """A cell that is HTML already."""


def table(headers: Sequence[str], rows: Sequence[tuple[Sequence[str], str]], numbers: Sequence[int] | range) -> str:
    """Cells are words, whoever wrote them, or ``Markup``; the second of each row is its class."""

    def line(cells: Sequence[str], tag: str, kind: str = "") -> str:
        shown = (cell if isinstance(cell, Markup) else text(cell) for cell in cells)
        marked = (f"<{tag}{' class=number' if column in numbers else ''}>{cell}</{tag}>" for column, cell in enumerate(shown))
        return f"<tr{f' class={kind}' if kind else ''}>{''.join(marked)}</tr>"

    body = "".join(line(cells, "td", kind) for cells, kind in rows)
    return f"<table><thead>{line(headers, 'th')}</thead><tbody>{body}</tbody></table>"


def text(value: object) -> str:
    return html.escape(str(value))


def answers(gallery: Gallery | str) -> Iterator[str]:
    if isinstance(gallery, str):
        yield f'<p class="note">Not shown: {text(gallery)}.</p>'
        return
    yield (
        f'<p class="note">Captions and the ten photos that trial {text(gallery.trial_id)} finds first among '
        f"{gallery.num_photos:,}. "
        "Green, ✓: the photo asked for. Orange: another photo of the same product, right under the product protocol only.</p>"
    )
    for title, queries, none in (
        ("Spread over the data", gallery.fixed, ""),
        ("Worst misses", gallery.misses, "There is none: a photo of the product is always among the ten."),
        ("Where product and instance protocols disagree", gallery.disagreeing, "They agree on all queries."),
    ):
        yield f"<h3>{title}</h3>" + ("".join(map(_query, queries)) or f"<p>{none}</p>")


def _query(query: Query) -> str:
    answers = "".join(_photo(answer, str(place)) for place, answer in enumerate(query.answers, start=1))
    return (
        f'<div class="query"><div class="words">{text(query.caption)} <span class="note">rank {query.rank:,}</span></div>'
        f'{_photo(query.photo, "asked for")}<div class="photos">{answers}</div></div>'
    )


def _photo(shown: Shown, caption: str) -> str:
    kind = "photo" if shown.is_photo else "product" if shown.is_product else "other"
    found = " ✓" if shown.is_photo and caption.isdigit() else ""
    return f'<figure class="{kind}"><img alt="{kind}" src="{shown.data_uri}"><figcaption>{caption}{found}</figcaption></figure>'
