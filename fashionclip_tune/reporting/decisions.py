"""Why a sweep's trials ran in this order: what its search has decided, in words. HTML, piece by piece.

The records are those of ``sweep.json``, which may be anybody's: what has another form than a decision is left out and counted.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fashionclip_tune.errors import StopReason
from fashionclip_tune.reporting.html import table, text
from fashionclip_tune.reporting.sweep_files import (
    TrialRow,
    end_of,
    figure_or_nothing,
    loss_label,
    paused_at,
    start_of,
    waiting_rungs,
)
from fashionclip_tune.reporting.sweep_view import SweepView

_MOST_UNFOLDED = 20
_POINT = "a point of the space"


@dataclass(frozen=True)
class Candidate:
    """What could run next, and its value and deviation expected at the end of its budget; None: points came first.

    ``trial``: None for settings that no trial has had. ``score``: of running it, by which candidates were compared.
    """

    trial: int | None
    params: Mapping[str, Any]
    expected: float | None
    deviation: float | None
    score: float | None


@dataclass(frozen=True)
class Decision:
    """``place``: 1 for the first. ``reporter``: the trial that stood at a rung; None: a slot was free. ``chosen``: what ran."""

    place: int
    reporter: int | None
    examples_seen: int
    chosen: Candidate | None
    runner_up: Candidate | None
    given_up: tuple[int, ...]


def read_decisions(sweep: Mapping[str, Any]) -> tuple[list[Decision], int]:
    """The decisions of a sweep, in their order, and how many records are none."""
    records = sweep.get("decisions")
    found, records = list[Decision](), records if isinstance(records, list) else []
    for place, record in enumerate(records, start=1):
        try:
            found.append(_decision(place, record))
        except (TypeError, ValueError, KeyError, OverflowError):
            continue
    return found, len(records) - len(found)


def _decision(place: int, record: Any) -> Decision:
    chosen, runner_up = (None if record[name] is None else _candidate(record[name]) for name in ("chosen", "runner_up"))
    reporter = None if record["reporter"] is None else _count(record["reporter"])
    given_up = tuple(_count(number) for number, _ in record["given_up"])
    return Decision(place, reporter, _count(record["examples_seen"]), chosen, runner_up, given_up)


def _candidate(record: Any) -> Candidate:
    trial = None if record["trial"] is None else _count(record["trial"])
    figures = (_figure(record[name]) for name in ("predicted", "deviation", "score"))
    if not isinstance(record["params"], dict):
        raise TypeError
    return Candidate(trial, record["params"], *figures)


def _count(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 10**15:
        raise ValueError
    return int(value)


def _figure(value: Any) -> float | None:
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else None


def why(view: SweepView) -> Iterator[str]:
    """The section; nothing of a sweep whose trials do not wait for one another."""
    decisions, left_out = read_decisions(view.content)
    if not decisions:
        return
    story = _Story(view, decisions)
    yield (
        '<p class="note">A trial that reaches a rung is held against all that wait at one and against new settings. What '
        "promises most for its cost runs, up to its next rung; the others wait, with their states kept, and may go on later "
        "(thawed). Expected is the value at the end of the whole budget, with its deviation, as a model of all learning curves "
        "saw it then. The score goes by both and by the cost: a candidate of which less is expected may be ahead where that is "
        f"less certain, or it has less to go. {view.metric.legend}.</p>"
    )
    yield f"<p>{text(story.summary())}</p>"
    if left_out:
        yield f"<p>{left_out} records of sweep.json are no decisions, and are left out.</p>"
    yield "<h3>What became of each trial</h3>"
    ways = ("trial", "settings", "expected when it went on last", "reached", "its way, with the numbers of decisions")
    yield table(ways, [(cells, "") for cells in story.trials()], numbers=(2, 3))
    headers = (
        "",
        "at a rung",
        f"{view.metric.short} there",
        "ran next",
        "expected of it",
        "expected",
        "score",
        "instead of (the runner-up)",
    )
    rows = [(cells, "") for cells in story.decisions()]
    title = f"{len(rows)} decisions, one a row; the runner-up's score in parts of that of what ran"
    is_open = " open" if len(rows) <= _MOST_UNFOLDED else ""
    yield f"<details{is_open}><summary>{title}</summary>{table(headers, rows, numbers=(0, 2, 4, 5, 6))}</details>"


class _Story:
    """Follows the decisions once, and keeps what each trial has gone through."""

    def __init__(self, view: SweepView, decisions: list[Decision]) -> None:
        self._view = view
        self._rows = {row["trial_id"]: row for row in view.content["trials"]}
        self._rungs = waiting_rungs(view.content)
        decided = {trial.number: trial.user_attrs.get("decision") for trial in view.trials}
        self._new = {place: number for number, place in decided.items() if isinstance(place, int)}
        points = [number for number, place in decided.items() if place is None]
        self._ways: dict[int, list[str]] = {number: [_POINT] for number in points}
        self._last_expected: dict[int, Candidate] = {}
        self._waiting: dict[int, int] = {}
        self._kinds = Counter[str]()
        self._any_chosen = any(decision.chosen is not None for decision in decisions)
        self._told = [self._tell(decision) for decision in decisions]

    def decisions(self) -> list[list[str]]:
        """A row of cells each."""
        return self._told

    def trials(self) -> Iterator[list[str]]:
        for row in self._rows.values():
            number = _number(row)
            expected = self._last_expected.get(number)
            reached = figure_or_nothing(self._reached(row), ".4f")
            way = [*self._ways.get(number, []), *self._end(row, number)]
            yield [row["trial_id"], _settings_of(row), _expected(expected), reached, " · ".join(way)]

    def summary(self) -> str:
        kinds = ("went on at once", "thawed", "new", _POINT, "nothing more")
        counted = ", ".join(f"{self._kinds[kind]} {kind}" for kind in kinds if self._kinds[kind])
        said = f"{len(self._told)} decisions: {counted}."
        if self._kinds["nothing more"]:
            said += " Nothing more: no candidate fitted what all trials together may cost, or the time."
        ends = [
            abs(reached - found.expected) <= 2 * found.deviation
            for row in self._rows.values()
            if (reached := self._reached(row)) is not None
            if (found := self._last_expected.get(_number(row))) is not None
            if found.expected is not None and found.deviation is not None
        ]
        if ends:
            said += (
                f" Of {len(ends)} trials with their whole budget, {sum(ends)} came within two deviations of what was "
                "expected when they went on last."
            )
        return said

    def _tell(self, decision: Decision) -> list[str]:
        number, seen = decision.reporter, decision.examples_seen
        at_a_rung, value = "a slot was free", ""
        if number is not None:
            at_a_rung, value = f"{_id(number)} at {self._rung(seen)}", self._value(number, seen)
            self._waiting[number] = seen
            if decision.chosen is None or decision.chosen.trial != number:
                self._add(number, decision, f"paused at {self._rung(seen)}")
        chosen, runner_up, ran = decision.chosen, decision.runner_up, self._ran(decision)
        for gone in decision.given_up:
            self._add(gone, decision, f"given up at {self._rung(self._waiting.pop(gone, None))}")
        if decision.given_up:
            ran += f"; ended for good: {', '.join(map(_id, decision.given_up))}"
        return [
            str(decision.place),
            at_a_rung,
            value,
            ran,
            _expected(chosen),
            _expected(runner_up),
            "" if chosen is None or runner_up is None else _ratio(runner_up.score, chosen.score),
            "" if runner_up is None else self._in_words(runner_up, decision),
        ]

    def _ran(self, decision: Decision) -> str:
        """What ran, in words; remembered of the trial."""
        chosen = decision.chosen
        if chosen is None:
            # Points come before anything is chosen; without a later choice it cannot be told whether one came.
            is_point = self._any_chosen and not self._kinds.keys() - {_POINT}
            said = kind = _POINT if is_point else "nothing more"
        elif chosen.trial is None:
            kind, number = "new", self._new.get(decision.place - 1)
            said = f"new: {self._params(chosen.params) if number is None else self._named(number)}"
            if number is not None:
                self._ways[number] = [f"new ({decision.place})"]
                self._last_expected[number] = chosen
        else:
            kind = "went on at once" if chosen.trial == decision.reporter else "thawed"
            rung = self._rung(self._waiting.pop(chosen.trial, None))
            verb = "went on" if chosen.trial == decision.reporter else "thawed"
            said = f"{_id(chosen.trial)} {verb} from {rung}"
            self._add(chosen.trial, decision, f"{verb} from {rung}")
            self._last_expected[chosen.trial] = chosen
        self._kinds[kind] += 1
        return said

    def _in_words(self, candidate: Candidate, decision: Decision) -> str:
        if candidate.trial is None:
            return f"new: {self._params(candidate.params)}"
        if candidate.trial == decision.reporter:
            return f"{_id(candidate.trial)}, going on"
        return f"{_id(candidate.trial)}, which waited at {self._rung(self._waiting.get(candidate.trial))}"

    def _add(self, number: int, decision: Decision, what: str) -> None:
        self._ways.setdefault(number, []).append(f"{what} ({decision.place})")

    def _end(self, row: TrialRow, number: int) -> list[str]:
        """How its way ended, where the last decision does not say it."""
        if paused_at(row, self._view.content) is None:
            return ["whole budget" if row["stop_reason"] == StopReason.BUDGET else end_of(row, self._view.content)]
        is_over = row["state"] == "PRUNED" and not any(part.startswith("given up") for part in self._ways.get(number, []))
        return ["ended with the sweep"] if is_over else []

    def _rung(self, examples_seen: int | None) -> str:
        if examples_seen in self._rungs:
            return f"rung {self._rungs.index(examples_seen) + 1}"
        return "a rung" if examples_seen is None else f"{examples_seen:,} examples"

    def _value(self, number: int, examples_seen: int) -> str:
        found = (each for each in self._view.curves.get(_id(number), ()) if each["examples_seen"] == examples_seen)
        return "".join(figure_or_nothing(self._view.metric.of(each), ".4f") for each in found)

    def _reached(self, row: TrialRow) -> float | None:
        """With the whole budget."""
        return self._view.metric.of(row) if row["state"] == "COMPLETE" else None

    def _named(self, number: int) -> str:
        row = self._rows.get(_id(number))
        return _id(number) if row is None else f"{_id(number)}, {_settings_of(row)}"

    def _params(self, params: Mapping[str, Any]) -> str:
        """As the sampler drew them; switches where they are on."""
        starts = self._view.content.get("starts")
        known = starts.items() if isinstance(starts, dict) else ()
        labels = {name: start.get("label", name) for name, start in known if isinstance(start, dict)}
        return ", ".join(filter(None, (_param(name, value, labels) for name, value in params.items())))


def _param(name: str, value: Any, labels: Mapping[str, Any]) -> str:
    name = name.rpartition(".")[2]
    if name == "learning_rate" and isinstance(value, float):
        return f"lr {value:.1e}"
    if isinstance(value, bool):
        return name if value else ""
    if name in ("clip_model", "loss_function"):
        return loss_label(str(labels.get(str(value), value)))
    return f"{name} {value:.2g}" if isinstance(value, float) else f"{name} {value}"


def _settings_of(row: TrialRow) -> str:
    rate = row["config"].get("training.learning_rate")
    words = [start_of(row), loss_label(row["config"].get("loss_function"))]
    return ", ".join(filter(None, [*words, f"lr {rate:.1e}" if isinstance(rate, float) else ""]))


def _expected(candidate: Candidate | None) -> str:
    if candidate is None or candidate.expected is None:
        return ""
    return f"{candidate.expected:.4f}" + ("" if candidate.deviation is None else f" ± {candidate.deviation:.4f}")


def _ratio(score: float | None, of: float | None) -> str:
    return "" if score is None or not of else f"{score / of:.2f}"


def _number(row: TrialRow) -> int:
    return int(row["trial_id"]) if row["trial_id"].isdecimal() else -1


def _id(number: int) -> str:
    return f"{number:04d}"
