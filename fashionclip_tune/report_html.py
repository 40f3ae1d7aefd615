"""One self-contained page about one or more sweeps: nothing is loaded from anywhere, so it can be mailed and kept."""

import warnings
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from plotly.offline import get_plotlyjs

from fashionclip_tune import report_costs, report_plots, report_sections
from fashionclip_tune.errors import UserError
from fashionclip_tune.evaluate import counted_as
from fashionclip_tune.gallery import Gallery, make_gallery
from fashionclip_tune.html_parts import answers, plot, section, table, text
from fashionclip_tune.progress_bars import OnProgress, no_progress
from fashionclip_tune.report import compare_trials
from fashionclip_tune.report_data import SweepView, view_sweep

REPORT_NAME = "report.html"
# Whatever a browser would fetch, run or open from elsewhere is refused; plotly compiles its shaders' code at run time.
_POLICY = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'"


def write_report(sweep_dirs: Sequence[Path], *, gallery: bool = True, on_progress: OnProgress = no_progress) -> Path:
    """Writes ``report.html`` into the first sweep's folder, beside the others' figures where several are given.

    Args:
        gallery: encode the validation photos with each winner's weights and show what it finds.
        on_progress: called with the numbers of photos encoded for it and in total.

    Raises:
        UserError: a folder is no sweep.
    """
    views = [view_sweep(folder) for folder in sweep_dirs]
    path = sweep_dirs[0] / REPORT_NAME
    unfinished = path.with_name(f".{REPORT_NAME}.tmp")
    try:
        unfinished.write_text(page(views, [_gallery(view, gallery, on_progress) for view in views]), encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)  # of a full disk
    return path


def _gallery(view: SweepView, wanted: bool, on_progress: OnProgress) -> Gallery | str:
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
            return make_gallery(view.folder, view.best, on_progress)
    except (UserError, OSError, RuntimeError) as error:  # weights or photos are gone, or the device is full
        return str(error)


def page(views: Sequence[SweepView], galleries: Sequence[Gallery | str]) -> str:
    """The HTML text; ``galleries``: one a sweep, or why there is none."""
    title = " and ".join(view.name for view in views)
    body = "\n".join(_body(views, galleries))
    style = files("fashionclip_tune").joinpath("report.css").read_text()
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
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
        yield f'<section class="sweep"><h1>{text(view.name)}</h1><p class="meta">{report_sections.about(view)}</p>'
        yield from report_sections.winner(view)
        yield section("Ranking", *report_sections.ranking(view))
        yield section("Gain over zero-shot", *report_sections.gains(view))
        yield section("Learning curves", *report_sections.curves(view))
        yield section("What mattered", *report_sections.what_mattered(view))
        yield section("Budget", *report_sections.budget(view))
        yield section("Quality against its cost", *report_costs.costs(view))
        if view.failures:
            yield section("Failures", *report_sections.failures(view.failures))
        yield section("What the winner finds", *answers(gallery))
        yield "</section>"


def _side_by_side(views: Sequence[SweepView]) -> Iterator[str]:
    with_best = sorted(
        ((view, view.best) for view in views if view.best is not None), key=lambda pair: -pair[1]["recall_at_10"]
    )
    rows = []
    for view, best in with_best:
        behind = ""
        if view is not with_best[0][0]:
            test = compare_trials(with_best[0][0].folder, with_best[0][1], view.folder, best)
            behind = "other queries" if test is None else f"{test.difference:.4f}, {'tie' if test.is_tie else 'real'}"
        gain = "" if best.get("gain") is None else f"{best['gain']:+.4f}"
        counted = counted_as(best) if best.get("protocol") else ""
        cells = [text(view.name), best["trial_id"], text(best["config"]["clip_model"]), f"{best['recall_at_10']:.4f}", gain,
                 text(counted), behind]  # fmt: skip
        rows.append((cells, ""))
    yield table(("sweep", "trial", "model", "Recall@10", "gain", "counted as", "behind the first"), rows, numbers=(3, 4))
    elsewhere = "Its figures are in the table, the intervals below with each sweep's winner."
    yield plot(report_plots.best_of_each(views), "no sweep has a result yet", elsewhere)
