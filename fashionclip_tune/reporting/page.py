"""One self-contained page about one or more sweeps: nothing is loaded from anywhere, so it can be mailed and kept."""

import html
import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from plotly.offline import get_plotlyjs

from fashionclip_tune.errors import UserError
from fashionclip_tune.files import atomic_write
from fashionclip_tune.progress import OnProgress, no_progress
from fashionclip_tune.reporting import costs, decisions, figures, sections
from fashionclip_tune.reporting.comparison import NOT_COMPARABLE, names_of, standing_headers, standings
from fashionclip_tune.reporting.gallery import Gallery, make_gallery
from fashionclip_tune.reporting.html import answers, plot, section, table, text
from fashionclip_tune.reporting.sweep_view import SweepView, view_sweep

_log = logging.getLogger(__name__)

REPORT_NAME = "report.html"
_HEAD_LENGTH = 100_000
# Whatever a browser would fetch, run or open from elsewhere is refused; plotly compiles its shaders' code at run time.
_POLICY = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'"


def write_report(
    sweep_dirs: Sequence[Path],
    *,
    gallery: bool = True,
    allow_remote: bool = False,
    on_progress: OnProgress = no_progress,
) -> Path:
    """Writes ``report.html`` into the first sweep's folder, beside the others' figures where several are given.

    It logs which files could not be read, why photos are missing, and what the report that was there had and this one has not.

    Args:
        gallery: encode the validation photos with each winner's weights and show what it finds.
        allow_remote: for these photos URLs and commands are followed; that a sweep's own files allow it counts for nothing.
        on_progress: called with the numbers of photos encoded for it and in total.

    Raises:
        UserError: a folder is no sweep.
    """
    views = [view_sweep(folder, name) for folder, name in zip(sweep_dirs, names_of(sweep_dirs), strict=True)]
    galleries = [_gallery(view, gallery, allow_remote, on_progress) for view in views]
    path = sweep_dirs[0] / REPORT_NAME
    for line in filter(None, map(sections.torn_line, views)):
        _log.warning(line)
    had, has = _contents_of(path), _contents(views, galleries)
    if gone := [part for part in had if part not in has]:
        why = [f" ({view.name}: {shown})" for view, shown in zip(views, galleries, strict=True) if isinstance(shown, str)]
        _log.warning(f"the {REPORT_NAME} that was there had {', '.join(gone)}; this one has not{''.join(why)}")
    elif gallery:
        for view, shown in zip(views, galleries, strict=True):
            if isinstance(shown, str):
                _log.warning(f"{view.name}: what the winner finds is not shown: {shown}")
    with atomic_write(path, encoding="utf-8") as file:
        file.write(page(views, galleries))
    return path


def _contents(views: Sequence[SweepView], galleries: Sequence[Gallery | str]) -> list[str]:
    """What one report may have and another, made elsewhere or with less at hand, may lack."""
    found = []
    for view, gallery in zip(views, galleries, strict=True):
        parts = {"trials": view.rows, "study": view.trials, "winner's photos": not isinstance(gallery, str)}
        found += [f"the {part} of {view.content['name']}" for part, is_there in parts.items() if is_there]
    return found


def _contents_of(report: Path) -> list[str]:
    """Of a report that is there; nothing of one that cannot be read or is no report of ours."""
    try:
        with open(report, encoding="utf-8") as file:
            found = re.search(r'<meta name="fashionclip-tune" content="([^"]*)">', file.read(_HEAD_LENGTH))
    except (OSError, ValueError):
        return []
    return json.loads(html.unescape(found[1])) if found else []


def _gallery(view: SweepView, wanted: bool, allow_remote: bool, on_progress: OnProgress) -> Gallery | str:
    """What the winner finds, or why it is not shown."""
    if not wanted:
        return "left out by --no-gallery"
    if view.best is None:
        return "no trial has ended with a result"
    if view.content["state"] == "RUNNING":
        return "the sweep is running, and its trials need the device; it is made when the sweep ends"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is unusual about this model has been said when it was trained
            return make_gallery(view.folder, view.best, on_progress, allow_remote=allow_remote)
    except (UserError, OSError, RuntimeError) as error:  # weights or photos are gone, or the device is full
        return str(error)


def page(views: Sequence[SweepView], galleries: Sequence[Gallery | str]) -> str:
    """The HTML text; ``galleries``: one a sweep, or why there is none."""
    title = " and ".join(view.name for view in views)
    body = "\n".join(_body(views, galleries))
    style = files("fashionclip_tune.reporting").joinpath("report.css").read_text()
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="fashionclip-tune" content="{text(json.dumps(_contents(views, galleries)))}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{text(title)}</title><style>{style}</style>'
        "<noscript><style>div:has(> .plotly-graph-div) { display: none; }</style></noscript>"
        f"<script>{get_plotlyjs()}</script></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def _body(views: Sequence[SweepView], galleries: Sequence[Gallery | str]) -> Iterator[str]:
    if len(views) > 1:
        yield f"<h1>{len(views)} sweeps side by side</h1>"
        yield section("Best of each", *_side_by_side(views))
    for view, gallery in zip(views, galleries, strict=True):
        yield f'<section class="sweep"><h1>{text(view.name)}</h1><p class="meta">{sections.about(view)}</p>'
        yield from sections.winner(view)
        yield section("Ranking", *sections.ranking(view))
        yield section("Gain over zero-shot", *sections.gains(view), *sections.starts(view))
        yield section("Learning curves", *sections.curves(view))
        if parts := list(decisions.why(view)):
            yield section("Why these trials", *parts)
        yield section("What mattered", *sections.what_mattered(view))
        yield section("Budget", *sections.budget(view))
        yield section("Quality against its cost", *costs.costs(view))
        if view.failures:
            yield section("Failures", *sections.failures(view.failures))
        yield section("What the winner finds", *answers(gallery))
        yield "</section>"


def _side_by_side(views: Sequence[SweepView]) -> Iterator[str]:
    groups = standings([view.folder for view in views])
    if len(groups) > 1:
        yield f'<p class="note">{NOT_COMPARABLE.capitalize()}.</p>'
    for group in groups:
        yield table(standing_headers([group]), [(each.cells(), "") for each in group], numbers=(3, 4, 5))
    elsewhere = "Its figures are in the table, the intervals below with each sweep's winner."
    yield plot(figures.best_of_each(groups), "no sweep has a result yet", elsewhere)
