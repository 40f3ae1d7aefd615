"""Quality against cost: Pareto fronts over encoding speed, device time and the size of the weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from fashionclip_tune.errors import UserError
from fashionclip_tune.evaluation.metric import Metric
from fashionclip_tune.models.architecture import has_known_text_tower, meta_model
from fashionclip_tune.models.starts import check_architecture, is_described_here
from fashionclip_tune.reporting.equal_cost import architectures_at_equal_cost, headers
from fashionclip_tune.reporting.figures import FAINT, colours, described, styled
from fashionclip_tune.reporting.html import panels, table
from fashionclip_tune.reporting.sweep_files import TrialRow, figure_or_nothing, is_open, start_of
from fashionclip_tune.reporting.sweep_view import SweepView

_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Cost:
    """One kind of cost of all trials that have one, or, with ``more_is_better``, a speed."""

    title: str
    of_trials: Sequence[tuple[float, TrialRow]]
    more_is_better: bool = False


def costs(view: SweepView) -> Iterator[str]:
    known = [cost for cost in _kinds(view) if cost.of_trials]
    if not known:
        yield "<p>No trial has ended yet.</p>"
        return
    yield (
        '<p class="note">The dotted line joins the trials that no other one beats in both. Times and speeds are of the machine '
        "that ran the sweep, beside its other trials; encoding is that of the towers alone, without decoding photos.</p>"
    )
    elsewhere = (
        "Speeds and sizes are in the table below, the time of each trial in <code>trials.csv</code> (device_s, duration_s)."
    )
    yield panels([pareto(view, cost) for cost in known], elsewhere)
    yield _of_each_model(known[1:], view.metric)  # without the time, which is each trial's own
    yield from _at_equal_time(view)


def _of_each_model(shared: Sequence[Cost], metric: Metric) -> str:
    """What all trials of a model have in common, and the best of them."""
    of_model = [{start_of(row): value for value, row in cost.of_trials} for cost in shared]
    best: dict[str, TrialRow] = {}
    for cost in shared:
        for _, row in cost.of_trials:
            best.setdefault(start_of(row), row)
    rows = [
        [model, f"{metric.score(row):.4f}", *(figure_or_nothing(values.get(model), ",.4g") for values in of_model)]
        for model, row in best.items()
    ]
    titles = ("model", f"best {metric.label}", *(cost.title for cost in shared))
    if not rows:
        return ""
    return f"<h3>Of each model</h3>{table(titles, [(row, '') for row in rows], numbers=range(1, len(titles)))}"


def _kinds(view: SweepView) -> Iterator[Cost]:
    rows = [row for row in view.rows if not is_open(row)]
    yield Cost("device time, min", [(row["device_s"] / 60, row) for row in rows])
    models = dict.fromkeys(start_of(row) for row in rows)
    for title, field in (
        ("photos encoded a second", "images_encoded_per_second"),
        ("captions encoded a second", "texts_encoded_per_second"),
    ):
        speeds = {model: view.encoding_speed(model, field) for model in models}
        yield Cost(title, _of_models(rows, speeds), more_is_better=True)
    yield Cost("weights file, MB", _of_models(rows, _weights_mb(view)))


def _of_models(rows: Sequence[TrialRow], value_of: dict[str, float | None]) -> list[tuple[float, TrialRow]]:
    found = ((value_of.get(start_of(row)), row) for row in rows)
    return [(value, row) for value, row in found if value is not None]


def _weights_mb(view: SweepView) -> dict[str, float | None]:
    """Of each architecture's tensors; of one that only the hub knows, as the best trials' files are, where they are."""
    files = sorted(view.folder.glob("trials/*/checkpoints/step_*/model.safetensors"))
    kept = {path.parents[2].name.split("-")[0]: round(path.stat().st_size / _MEGABYTE, 1) for path in files}
    found = {start_of(row): kept[row["trial_id"]] for row in view.rows if row["trial_id"] in kept}
    names = {start_of(row): row["config"]["clip_model"] for row in view.rows}
    return {start: _computed_mb(name) or found.get(start) for start, name in names.items()}


def _computed_mb(model: str) -> float | None:
    """Of the tensors in fp32; None of one that is not known here: the name is of a file, so the hub is not asked."""
    try:
        if not is_described_here(model) or not has_known_text_tower(check_architecture(model)):
            return None
    except UserError:
        return None
    tensors = meta_model(model).state_dict().values()
    num_bytes: int = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return round(num_bytes / _MEGABYTE, 1)


def pareto(view: SweepView, cost: Cost) -> go.Figure:
    """Quality against one cost; the line joins the trials that no other one beats in both."""
    figure = go.Figure()
    front = pareto_front([(each, view.metric.score(row)) for each, row in cost.of_trials], more_is_better=cost.more_is_better)
    figure.add_scatter(
        x=[each for each, _ in front],
        y=[recall for _, recall in front],
        mode="lines",
        line={"color": FAINT, "width": 1.2, "dash": "dot"},
        showlegend=False,
        hoverinfo="skip",
    )
    for model, colour in colours(view).items():
        own = [(each, row) for each, row in cost.of_trials if start_of(row) == model]
        figure.add_scatter(
            x=[each for each, _ in own],
            y=[view.metric.of(row) for _, row in own],
            mode="markers",
            marker={"color": colour, "size": 9, "opacity": 0.8},
            name=model,
            showlegend=bool(own),
            text=[described(row) for _, row in own],
            hovertemplate="%{text}<br>%{x:,.1f}: %{y:.4f}<extra></extra>",
        )
    styled(figure, 320, cost.title, view.metric.label)
    figure.update_xaxes(range=(0, 1.08 * max(each for each, _ in cost.of_trials)))  # from 0: noise is to look small
    figure.update_yaxes(range=_around([view.metric.score(row) for _, row in cost.of_trials]))
    return figure


def _around(values: Sequence[float]) -> tuple[float, float]:
    """The range of an axis, which has some width for a single value, too."""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.1 * high or 0.1
    return low - margin, high + margin


def pareto_front(points: Sequence[tuple[float, float]], *, more_is_better: bool = False) -> list[tuple[float, float]]:
    """Of (cost, quality), those that no other beats in one without losing in the other, cheapest first.

    ``more_is_better``: the first figure is a speed, not a cost.
    """
    front: list[tuple[float, float]] = []
    for cost, quality in sorted(points, key=lambda point: (-point[0] if more_is_better else point[0], -point[1])):
        if not front or quality > front[-1][1]:
            front.append((cost, quality))
    return front


def _at_equal_time(view: SweepView) -> Iterator[str]:
    """What is paid for is time: the best of each architecture within what the one that spent least has spent."""
    limit_s, found = architectures_at_equal_cost(view.content["trials"], view.curves, view.metric)
    if len(found) < 2:
        return
    yield f"<h3>Best of each model within the same {limit_s:,.0f} seconds of the device</h3>"
    yield f'<p class="note">{view.metric.legend}.</p>'
    yield table(headers(view.metric), [(each.cells(), "") for each in found], numbers=(1, 3, 4))
