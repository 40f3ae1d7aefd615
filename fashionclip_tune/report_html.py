"""One self-contained page about one or more sweeps: nothing is loaded from anywhere, so it can be mailed and kept."""

import warnings
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from plotly.offline import get_plotlyjs

from fashionclip_tune import report_plots
from fashionclip_tune.errors import UserError
from fashionclip_tune.evaluate import OnProgress, counted_as
from fashionclip_tune.gallery import Gallery, make_gallery
from fashionclip_tune.html_parts import answers, figure_or_nothing, plot, section, table, text
from fashionclip_tune.report import Row, compare_trials
from fashionclip_tune.report_data import SweepView, view_sweep

REPORT_NAME = "report.html"
_LOSSES = {"contrastive": "InfoNCE", "siglip": "sigmoid"}
_KS = (1, 5, 10)
_MEGABYTE = 1_000_000
# Whatever a browser would fetch, run or open from elsewhere is refused; plotly compiles its shaders' code at run time.
_POLICY = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'"


def write_report(
    sweep_dirs: Sequence[Path], *, gallery: bool = True, on_progress: OnProgress = lambda done, total: None
) -> Path:
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
    unfinished.write_text(page(views, [_gallery(view, gallery, on_progress) for view in views]), encoding="utf-8")
    unfinished.replace(path)
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
        f"<script>{get_plotlyjs()}</script></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def _body(views: Sequence[SweepView], galleries: Sequence[Gallery | str]) -> Iterator[str]:
    if len(views) > 1:
        yield f"<h1>{len(views)} sweeps side by side</h1>"
        yield section("Best of each", *_side_by_side(views))
    for view, gallery in zip(views, galleries, strict=True):
        yield f'<section class="sweep"><h1>{text(view.name)}</h1><p class="meta">{_about(view)}</p>'
        yield from _winner(view)
        yield section("Ranking", *_ranking(view))
        yield section("Gain over zero-shot", *_gains(view))
        yield section("Learning curves", plot(report_plots.learning_curves(view), "no evaluation yet"))
        yield section("What mattered", *_what_mattered(view))
        yield section("Budget", *_budget(view))
        yield section("Quality against its cost", *_costs(view))
        if view.failures:
            yield section("Failures", *_failures(view.failures))
        yield section("What the winner finds", *answers(gallery))
        yield "</section>"


def _about(view: SweepView) -> str:
    content, rows = view.content, view.content["trials"]
    ended = sum(row["state"] != "RUNNING" for row in rows)
    of = f" of {planned}" if (planned := content.get("settings", {}).get("num_trials")) else ""
    parts = [f"{content['state'].lower()}: {ended}{of} trials ended", f"space {content.get('space', '?')}"]
    parts += [f"seed {content['seed']}"] if "seed" in content else []
    parts += [f"started {content['created'][:16].replace('T', ' ')} UTC"] if "created" in content else []
    parts += [f"{name} {version}" for name, version in content.get("versions", {}).items() if name in ("torch", "optuna")]
    return text(" · ".join(parts))


def _winner(view: SweepView) -> Iterator[str]:
    """What a reader wants to know first: how good, how much better than before, and whether that is real."""
    best = view.best
    if best is None:
        yield "<p>No trial has ended with a result yet.</p>"
        return
    low, high = best.get("recall_at_10_low"), best.get("recall_at_10_high")
    interval = "" if low is None else f"95 % interval {low:.4f} to {high:.4f}"
    cards = [("Recall@10 of the winner", f"{best['recall_at_10']:.4f}", interval, "")]
    if (base := best.get("untouched_recall_at_10")) is not None:
        apart = (
            "no interval known"
            if low is None
            else "its interval lies above that"
            if low > base
            else "zero-shot is inside its interval"
        )
        relative = "" if best["relative_gain"] is None else f" ({best['relative_gain']:+.1%})"
        good = "good" if low is not None and low > base else "bad" if best["gain"] < 0 else ""
        cards.append(("Gain over zero-shot", f"{best['gain']:+.4f}", f"from {base:.4f}{relative}; {apart}", good))
    compared = sum(test is not None for test in view.tests.values())
    figure = f"{len(view.ties)} ties" if len(view.ties) > 1 else "1 tie" if view.ties else "yes" if compared else "unknown"
    said = f"of {compared} other trials, compared query by query" if compared else "no other trial was asked the same queries"
    cards.append(("Is it ahead of the others?", figure, said, ""))
    yield (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><div class="label">{label}</div><div class="figure {kind}">{value}</div>'
            f'<div class="small">{text(small)}</div></div>'
            for label, value, small, kind in cards
        )
        + "</div>"
    )
    settings = ", ".join(f"{name}={_short(value)}" for name, value in best["config"].items())
    counted = f" Counted as {text(counted_as(best))}." if best.get("protocol") else ""
    yield f"<p>Trial {best['trial_id']}: <code>{text(settings)}</code>.{counted}</p>"
    if (view.folder / "best").is_dir():
        call = f'open_clip.create_model_and_transforms("local-dir:{view.folder / "best"}")'
        yield f"<p>Load it: <code>{text(call)}</code></p>"


def _ranking(view: SweepView) -> Iterator[str]:
    if not view.rows:
        yield "<p>No trial has a score yet.</p>"
        return
    yield (
        '<p class="note">By the last evaluation. A difference is called real where a paired test over products gives p below '
        "0.05, else a tie; the interval of each figure alone is wider than that of a difference.</p>"
    )
    headers = ("", "trial", "model", "loss", "lr", "Recall@10", "95 % interval", "behind the best", "", "gain", "photos", "end")
    rows = []
    for place, row in enumerate(view.rows, start=1):
        is_best = view.best is not None and row["trial_id"] == view.best["trial_id"]
        low, high = row.get("recall_at_10_low"), row.get("recall_at_10_high")
        test = view.tests.get(row["trial_id"])
        verdict = '<span class="tag best">best</span>' if is_best else ""
        if test is not None:
            verdict = '<span class="tag tie">tie</span>' if test.is_tie else '<span class="tag real">real</span>'
        rate = row["config"].get("training.learning_rate")
        cells = [
            str(place),
            row["trial_id"],
            text(row["config"].get("clip_model", "")),
            _LOSSES.get(row["config"].get("loss_function", ""), ""),
            "" if rate is None else f"{rate:.1e}",
            f"{row['recall_at_10']:.4f}",
            "" if low is None else f"{low:.4f} to {high:.4f}",
            "" if test is None else f"{test.difference:.4f} ({_p(test.p_value)})",
            verdict,
            "" if row.get("gain") is None else f"{row['gain']:+.4f}",
            f"{row['examples_seen']:,}",
            text((row["stop_reason"] or "running").replace("_", " ")),
        ]
        rows.append((cells, "best" if is_best else ""))
    yield table(headers, rows, numbers=(4, 5, 6, 7, 9, 10))
    yield f"<details><summary>Every recall, with its protocol and gallery</summary>{_all_recalls(view)}</details>"


def _all_recalls(view: SweepView) -> str:
    headers = ["trial", "protocol", "direction", *(f"R@{k}" for k in _KS), "median rank", "queries", "gallery"]
    rows = []
    for row in view.rows:
        last = view.curves[row["trial_id"]][-1] if view.curves[row["trial_id"]] else {}
        for title, name, queries, gallery in (
            ("text to image", "text_to_image", "text", "photos"),
            ("image to text", "image_to_text", "image", "texts"),
        ):
            recalls = [last.get(f"recall_at_{k}_{name}") for k in _KS]
            size = last.get(f"num_gallery_{'images' if gallery == 'photos' else 'texts'}")
            cells = [
                row["trial_id"],
                str(last.get("protocol", "")),
                title,
                *("" if recall is None else f"{recall:.4f}" for recall in recalls),
                figure_or_nothing(last.get(f"median_rank_{name}"), "g"),
                figure_or_nothing(last.get(f"num_{queries}_queries"), ","),
                "" if size is None else f"{size:,} {gallery}",
            ]
            rows.append((cells, ""))
    return table(headers, rows, numbers=range(3, 9))


def _gains(view: SweepView) -> Iterator[str]:
    """As the published table: a row a model and loss, each with its best trial."""
    best_of: dict[tuple[str, str], Row] = {}
    for row in view.rows:
        if row.get("untouched_recall_at_10") is not None:
            best_of.setdefault((row["config"]["clip_model"], row["config"].get("loss_function", "")), row)
    if not best_of:
        yield "<p>The untouched weights have not been evaluated.</p>"
        return
    rows = []
    for (model, loss), row in best_of.items():
        relative = "" if row["relative_gain"] is None else f"{row['relative_gain']:+.2%}"
        figures = [f"{row['untouched_recall_at_10']:.4f}", f"{row['recall_at_10']:.4f}", f"{row['step']:,}", relative]
        rows.append(([f"{text(model)} ({_LOSSES.get(loss, text(loss))})", *figures, row["trial_id"]], ""))
    yield table(("model (loss)", "zero-shot R@10", "best R@10", "at step", "gain", "trial"), rows, numbers=range(1, 5))


def _what_mattered(view: SweepView) -> Iterator[str]:
    found = view.importance
    if found is not None:
        yield (
            f'<p class="note">PED-ANOVA over {found.num_trials} trials, by Recall@10 after {found.examples_seen:,} photos, '
            "which all of them saw. Of few trials it is a hint, no proof.</p>"
        )
    yield plot(report_plots.importances(view), "too few trials to tell (or no study.journal)")
    yield "<h3>Settings of all trials</h3>"
    yield plot(report_plots.parallel_coordinates(view), "at least two trials that differ are needed")


def _budget(view: SweepView) -> Iterator[str]:
    ended = [row for row in view.content["trials"] if row["state"] in ("COMPLETE", "PRUNED") and row["examples_seen"]]
    if not ended:
        yield "<p>No trial has ended yet.</p>"
        return
    spent, whole = sum(row["examples_seen"] for row in ended), len(ended) * view.budget_examples
    hours = sum(row["duration_s"] for row in ended) / 3600
    stopped = sum((row["stop_reason"] or "").startswith("rung_") for row in ended)
    yield (
        f"<p>{len(ended)} trials trained on {spent:,} photos of {whole:,} that they might have: {1 - spent / whole:.0%} was "
        f"saved, {stopped} trials were stopped at a rung. Time of all trials together: {hours:.2f} h.</p>"
    )
    yield plot(report_plots.budget(view), "")


def _costs(view: SweepView) -> Iterator[str]:
    yield (
        '<p class="note">The dotted line joins the trials that no other one beats in both. Time and speed are of training on '
        "the machine that ran it; how fast a model encodes was not measured.</p>"
    )
    yield plot(report_plots.pareto(view, _weights_mb(view)), "no trial has ended yet")


def _weights_mb(view: SweepView) -> dict[str, float]:
    found = sorted(view.folder.glob("trials/*/checkpoints/*/model.safetensors"))
    return {path.parents[2].name.split("-")[0]: round(path.stat().st_size / _MEGABYTE, 1) for path in found}


def _failures(rows: Sequence[Row]) -> Iterator[str]:
    cells = [
        [row["trial_id"], text(row["config"].get("clip_model", "")), (row["stop_reason"] or "").replace("_", " "),
         f"{row['examples_seen']:,}", text(row.get("message") or "")]
        for row in rows
    ]  # fmt: skip
    yield table(("trial", "model", "reason", "photos", "message"), [(each, "") for each in cells], numbers=(3,))


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
    yield plot(report_plots.best_of_each(views), "no sweep has a result yet")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p {value:.3f}"
