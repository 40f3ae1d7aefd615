"""A sweep whose trials wait for one another, as people read it: why each was next, and that a pause is no verdict."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fashionclip_tune.evaluation.metric import DEFAULT_METRIC
from fashionclip_tune.reporting import figures
from fashionclip_tune.reporting.decisions import read_decisions
from fashionclip_tune.reporting.page import write_report
from fashionclip_tune.reporting.sweep_files import end_of, paused_at, read_sweep
from fashionclip_tune.reporting.sweep_view import view_sweep
from fashionclip_tune.reporting.terminal import comparison
from fashionclip_tune.tuning.persistence.hparams import HParamsTab
from tests.support.pages import SCRIPT, SECTIONS, Page
from tests.support.sweep_folders import change_sweep, printed, write_sweep
from tests.support.waiting_sweeps import RUNGS, TERMS, make_waiting_sweep

TITLE = "Why these trials"


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    return make_waiting_sweep(tmp_path / "finished")


@pytest.fixture
def running(tmp_path: Path) -> Path:
    return make_waiting_sweep(tmp_path / "running", "RUNNING")


def page_of(folder: Path) -> Page:
    return Page(write_report([folder], gallery=False))


def rows_below(page: Page, *headers: str) -> list[list[str]]:
    (start,) = (place for place, cells in enumerate(page.rows) if cells[: len(headers)] == list(headers))
    width = len(page.rows[start])
    below = page.rows[start + 1 :]
    end = next((place for place, cells in enumerate(below) if len(cells) != width), len(below))
    return below[:end]


def test_the_report_tells_what_ran_next_why_and_instead_of_what(finished: Path) -> None:
    page = page_of(finished)
    assert page.headings.index(TITLE) == page.headings.index("Learning curves") + 1
    two, three = "tiny-sig, sigmoid, lr 2.0e-03", "tiny-sig, sigmoid, lr 2.0e-03"
    assert rows_below(page, "", "at a rung") == [
        ["1", "0000 at rung 1", "0.2000", "a point of the space", "", "", "", ""],
        ["2", "0001 at rung 1", "0.1500", f"new: 0002, {two}", "0.6000 ± 0.0500", "0.5000 ± 0.1000", "0.50",
         "0000, which waited at rung 1"],
        ["3", "0002 at rung 1", "0.1800", "0000 thawed from rung 1", "0.5000 ± 0.1000", "0.5500 ± 0.0200", "0.25",
         "0002, going on"],
        ["4", "0000 at rung 2", "0.3000", "0000 went on from rung 2", "0.4000 ± 0.1000", "0.3000 ± 0.2000", "0.75",
         "new: tiny-clip, InfoNCE, lr 4.0e-04"],
        ["5", "a slot was free", "", f"new: 0003, {three}; ended for good: 0001", "0.4000 ± 0.1000", "0.4000 ± 0.1000", "0.50",
         "0002, which waited at rung 1"],
    ]  # fmt: skip


def test_each_trial_has_its_way_and_what_was_expected_beside_what_came(finished: Path) -> None:
    page = page_of(finished)
    ways = {cells[0]: cells[2:] for cells in rows_below(page, "trial", "settings")}
    assert ways == {
        "0000": ["0.4000 ± 0.1000", "0.4500", "a point of the space · paused at rung 1 (1) · thawed from rung 1 (3) · "
                 "went on from rung 2 (4) · whole budget"],
        "0001": ["", "", "a point of the space · paused at rung 1 (2) · given up at rung 1 (5)"],
        "0002": ["0.6000 ± 0.0500", "", "new (2) · paused at rung 1 (3) · ended with the sweep"],
        "0003": ["0.4000 ± 0.1000", "", "new (5) · diverged"],
    }  # fmt: skip
    assert "5 decisions: 1 went on at once, 1 thawed, 2 new, 1 a point of the space." in page.text
    assert "Of 1 trials with their whole budget, 1 came within two deviations" in page.text


def test_the_values_are_those_of_the_metric(finished: Path) -> None:
    sweep = read_sweep(finished)
    trials = [{**row, "recall_at_5": 0.225} if row["trial_id"] == "0000" else row for row in sweep["trials"]]
    change_sweep(finished, metric="recall_at_5", trials=trials)
    page = page_of(finished)
    assert [cells[2] for cells in rows_below(page, "", "at a rung")] == ["0.1000", "0.0750", "0.0900", "0.1500", ""]
    assert rows_below(page, "trial", "settings")[0][3] == "0.2250"


def test_without_the_journal_new_trials_are_told_by_their_settings(finished: Path) -> None:
    (finished / "study.journal").unlink()
    page = page_of(finished)
    assert rows_below(page, "", "at a rung")[1][3] == "new: tiny-sig, sigmoid, lr 2.0e-03, augment"
    assert rows_below(page, "trial", "settings")[2][4] == "paused at rung 1 (3) · ended with the sweep"


def test_a_sweep_that_decides_nothing_has_no_such_section(small_sweep: Path, tmp_path: Path) -> None:
    """Neither one of another scheduler nor one of an older version, whose file has no decisions at all."""
    assert read_sweep(small_sweep)["decisions"] == []
    older = write_sweep(tmp_path / "older", [150, 148])
    assert TITLE not in Page(write_report([older], gallery=False)).headings
    assert read_decisions(read_sweep(older)) == ([], 0)
    assert "".join(page_of(older).headings).startswith("".join(SECTIONS))


def test_many_decisions_are_folded_and_all_there(finished: Path) -> None:
    decisions = read_sweep(finished)["decisions"] * 60
    assert "<details open><summary>5 decisions" in write_report([finished], gallery=False).read_text()
    change_sweep(finished, decisions=decisions)
    path = write_report([finished], gallery=False)
    assert "<details><summary>300 decisions" in path.read_text()
    assert [cells[0] for cells in rows_below(Page(path), "", "at a rung")] == [str(place) for place in range(1, 301)]
    assert path.stat().st_size < 6e6


GOOD: dict[str, Any] = {"trial": None, "params": {}, "predicted": 0.5, "deviation": 0.1, "score": 0.1}
RECORD = {"reporter": 0, "examples_seen": 32, "chosen": GOOD, "runner_up": None, "given_up": [], "variance": None}


@pytest.mark.parametrize(
    "change",
    [
        {"reporter": SCRIPT}, {"reporter": [0]}, {"reporter": -1}, {"reporter": 10**40}, {"reporter": 0.5},
        {"examples_seen": None}, {"examples_seen": {}}, {"given_up": None}, {"given_up": [1]}, {"given_up": [["x", "y"]]},
        {"chosen": "x"}, {"chosen": []}, {"chosen": {}}, {"chosen": {**GOOD, "trial": [1]}},
        {"chosen": {**GOOD, "params": [[1, True]]}}, {"chosen": {**GOOD, "predicted": [1]}},
        {"chosen": {**GOOD, "predicted": 10**400}}, {"runner_up": {**GOOD, "deviation": SCRIPT}},
    ],
)  # fmt: skip
def test_what_is_no_decision_is_left_out_and_counted(finished: Path, change: Mapping[str, Any]) -> None:
    records = [{**RECORD, **change}, 7, "decision", None, [], {}, RECORD]
    change_sweep(finished, decisions=records)
    path = write_report([finished], gallery=False)
    assert "6 records of sweep.json are no decisions" in Page(path).text
    assert len(rows_below(Page(path), "", "at a rung")) == 1
    assert SCRIPT not in path.read_text()


@pytest.mark.parametrize("decisions", [7, "x" * 50, {"0": RECORD}, None, True, [None]])
def test_what_is_no_list_of_decisions_is_none(finished: Path, decisions: Any) -> None:
    change_sweep(finished, decisions=decisions)
    assert TITLE not in page_of(finished).headings


def test_a_foreign_sweep_is_shown_as_text_whatever_its_words_and_figures_are(finished: Path) -> None:
    strange = {SCRIPT: SCRIPT, "clip_model": {SCRIPT: [SCRIPT]}, "nested": [SCRIPT], "learning_rate": "high", "none": None}
    figures_ = {"predicted": float("nan"), "deviation": float("inf"), "score": 0}
    records = [{**RECORD, "chosen": {**GOOD, "params": strange, **figures_}, "runner_up": {**GOOD, "params": strange}}]
    records += [{**RECORD, "reporter": 999, "chosen": {**GOOD, "trial": 998}, "given_up": [[997, SCRIPT]]}]
    change_sweep(finished, decisions=records, starts={})
    path = write_report([finished], gallery=False)
    assert SCRIPT not in path.read_text()
    first, second = rows_below(Page(path), "", "at a rung")
    assert f"{SCRIPT} {SCRIPT}" in first[7]
    assert first[4:7] == ["", "0.5000 ± 0.1000", ""]
    assert second[1:4] == ["0999 at rung 1", "", "0998 thawed from a rung; ended for good: 0997"]


@pytest.mark.parametrize("search", [None, 7, [], {}, {"rungs": None}, {"rungs": ["x", {}, [1]]}, {"rungs": {"32": 1}}])
def test_strange_terms_of_a_search_are_none(finished: Path, search: Any) -> None:
    change_sweep(finished, search=search)
    assert "0000 at 32 examples" in page_of(finished).text
    sweep = read_sweep(finished)
    assert [end_of(row, sweep) for row in sweep["trials"]] == ["budget", "rung 1", "rung 1", "diverged"]


def test_a_trial_that_paused_is_said_to_have_everywhere(finished: Path, running: Path) -> None:
    ends = {"0000": "budget", "0001": "paused at rung 1", "0002": "paused at rung 1", "0003": "diverged"}
    for folder, last in ((finished, "diverged"), (running, "running")):
        sweep = read_sweep(folder)
        assert {row["trial_id"]: end_of(row, sweep) for row in sweep["trials"]} == {**ends, "0003": last}
        assert printed(folder).count("paused at rung 1") == 2
        shown = {cells[1]: cells[11] for cells in page_of(folder).rows if len(cells) == 12}
        assert (shown["0001"], shown["0002"]) == ("paused at rung 1", "paused at rung 1")
    assert [row["state"] for row in read_sweep(finished)["trials"]] == ["COMPLETE", "PRUNED", "PRUNED", "PRUNED"]
    assert [row["state"] for row in read_sweep(running)["trials"]] == ["COMPLETE", "PRUNED", "PAUSED", "RUNNING"]
    assert end_of({**read_sweep(running)["trials"][3]}, {**read_sweep(running), "state": "INTERRUPTED"}) == "interrupted"  # type: ignore[typeddict-item]
    with open(running / "trials.csv") as file:
        assert [row["state"] for row in csv.DictReader(file)] == ["COMPLETE", "PRUNED", "PAUSED", "RUNNING"]
    assert "running: 2 of 4 trials ended, 1 paused" in page_of(running).text


def test_a_trial_that_waits_is_at_the_rung_that_it_has_reached() -> None:
    sweep = {"state": "RUNNING", "search": TERMS}
    rows: list[Any] = [{"state": "PAUSED", "stop_reason": None, "examples_seen": seen} for seen in (32, 96, 0)]
    assert [paused_at(row, sweep) for row in rows] == [1, 2, None]
    assert end_of(rows[2], sweep) == "paused", "of a file that says no more"


def test_in_eighty_columns_a_trial_that_paused_has_one_line(finished: Path, running: Path) -> None:
    for folder in (finished, running):
        written = io.StringIO()
        Console(width=80, file=written).print(comparison([folder])[0])
        lines = written.getvalue().splitlines()
        assert max(map(len, lines)) <= 80
        numbers = [line[:4] for line in lines[3:] if not line.startswith(" ")]
        assert numbers[: numbers.index("lr: ")] == ["0000", "0002", "0001", "0003"], "nothing between them"
        assert sum("rung 1 " in line for line in lines) == 2
        assert "rung N: paused there" in " ".join(written.getvalue().split())


def test_what_waits_has_no_end_in_figures_yet(finished: Path, running: Path) -> None:
    def signs(folder: Path) -> list[str]:
        figure = figures.learning_curves(view_sweep(folder))
        assert figure is not None
        return [trace.marker.symbol for trace in figure.data]

    assert signs(finished) == ["circle", "circle-open", "circle-open", "x"]
    assert signs(running) == ["circle", "circle-open", "circle-open", "circle"]
    drawn = figures.budget(view_sweep(running))
    assert drawn is not None
    assert list(drawn.data[0].y) == ["0001", "0000"]
    assert drawn.data[1].name == "saved by pauses"
    assert view_sweep(running).rungs == RUNGS
    text = page_of(finished).text
    assert "paused at a rung: 2" in text
    assert "others were ahead" not in text


def test_a_trial_has_its_row_of_hparams_when_it_has_ended(running: Path) -> None:
    rows = read_sweep(running)["trials"]
    HParamsTab(running, [row["config"] for row in rows], DEFAULT_METRIC).add(rows)
    assert sorted(path.parent.name[:4] for path in running.glob("trials/*/*.hparams")) == ["0000", "0001"]
