"""``--metric``: what is maximised is the same in the journal, at rungs, in tables, files, report and ``best/``.

Nothing here starts Ray: folders are those of a small sweep, with another metric's figures put into its evaluations.
"""

import csv
import io
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.evaluation.metric import DEFAULT_METRIC, METRICS
from fashionclip_tune.reporting.comparison import standings
from fashionclip_tune.reporting.page import write_report
from fashionclip_tune.reporting.sweep_files import best_row, ranked, read_sweep
from fashionclip_tune.reporting.tables import ranking_text
from fashionclip_tune.training.history import read_history
from fashionclip_tune.tuning.backend import worker
from fashionclip_tune.tuning.backend.hooks import StudyScheduler, StudySearcher
from fashionclip_tune.tuning.backend.stop_signal import StopSignal
from fashionclip_tune.tuning.console.live_table import Progress
from fashionclip_tune.tuning.persistence.hparams import HParamsTab
from fashionclip_tune.tuning.persistence.record import SweepRecord
from fashionclip_tune.tuning.persistence.retention import keepers
from fashionclip_tune.tuning.planning.settings import SweepSettings, stored_settings
from fashionclip_tune.tuning.schedulers import NO_STOPPING, AshaRule
from fashionclip_tune.tuning.study.search import StoppingSearch
from fashionclip_tune.tuning.study.study import SweepStudy, message, stop_reason
from fashionclip_tune.tuning.trial import TrialPlan
from tests.support.studies import job, open_study
from tests.support.sweep_folders import printed

NAME = "recall_at_1_text_to_image"
METRIC = METRICS[NAME]
_RECALLS = {"0000": 0.2, "0001": 0.8, "0002": 0.6, "0003": 0.4}


@pytest.fixture
def other(small_sweep: Path, tmp_path: Path) -> Path:
    """The small sweep, but of another metric, by which its trials have another order than by recall_at_10."""
    folder = tmp_path / "other"
    shutil.copytree(small_sweep, folder)
    (folder / "best").mkdir()  # as its engine leaves it
    for path in folder.glob("trials/*/evaluations/step_*.json"):
        row, trial_id = json.loads(path.read_text()), path.parents[1].name[:4]
        row[NAME] = _RECALLS[trial_id] if row["step"] else 0.1
        row["recall_at_10"] = 1 - _RECALLS[trial_id]
        path.write_text(json.dumps(row))
    for path in folder.glob("trials/*/*.hparams"):
        path.unlink()
    written(folder)
    return folder


def written(folder: Path, state: str = "FINISHED") -> dict[str, Any]:
    kept = {name: value for name, value in read_sweep(folder).items() if name != "trials"}
    header = {**kept, "name": folder.name, "metric": NAME}
    return SweepRecord(folder, SweepStudy(folder / "study.journal", seed=3, num_startup_trials=5), header).write(state)


def test_rows_have_columns_of_the_metric_beside_those_that_all_sweeps_have(other: Path, small_sweep: Path) -> None:
    content = read_sweep(other)
    assert content["metric"] == NAME
    for row, before in zip(content["trials"][:4], read_sweep(small_sweep)["trials"], strict=False):
        recall = _RECALLS[row["trial_id"]]
        assert (row[NAME], row[f"untouched_{NAME}"], row[f"max_{NAME}"]) == (recall, 0.1, recall)
        assert row["gain"] == recall - 0.1
        assert row["relative_gain"] == pytest.approx(10 * recall - 1)
        assert row["recall_at_10"] == row["max_recall_at_10"] == row["untouched_recall_at_10"] == 1 - recall
        assert row["recall_at_5"] == before["recall_at_5"]
        assert row["recall_at_10_low"] == before["recall_at_10_low"]
        assert row["state"] == before["state"]
    assert content["trials"][4][NAME] is None
    with open(other / "trials.csv") as file:
        table = list(csv.DictReader(file))
    names = (NAME, f"untouched_{NAME}", f"max_{NAME}", f"{NAME}_low", "recall_at_10", "recall_at_5", "gain")
    for line, row in zip(table, content["trials"], strict=True):
        assert {name: line[name] for name in names} == {name: "" if row[name] is None else str(row[name]) for name in names}


def test_a_sweep_of_recall_at_10_has_no_further_columns(small_sweep: Path, tmp_path: Path) -> None:
    (row, *_) = read_sweep(small_sweep)["trials"]
    assert not [name for name in row if name.endswith(("_low", "_high")) and "recall_at_10_" not in name]
    with open(small_sweep / "trials.csv") as file:
        assert sum(name.startswith(("recall_at_", "max_", "untouched_")) for name in next(csv.reader(file))) == 6


def test_the_interval_is_computed_from_the_queries(small_sweep: Path, tmp_path: Path) -> None:
    """Of the trial's last evaluation, where it has ended and its queries are here."""
    shutil.copytree(small_sweep, tmp_path / "it")
    (lost,) = (tmp_path / "it").glob("trials/0002-*/last_queries.npz")
    lost.unlink()
    rows = written(tmp_path / "it")["trials"]
    for row in (rows[0], rows[3]):
        low, high = METRIC.interval(row) or (1.0, 0.0)
        assert low <= row[NAME] <= high
    assert rows[2][NAME] is not None
    assert METRIC.interval(rows[2]) is METRIC.interval(rows[4]) is None


def test_the_ranking_the_winner_and_what_is_kept_go_by_it(other: Path) -> None:
    rows = read_sweep(other)["trials"]
    assert [row["trial_id"] for row in ranked(rows, METRIC)] == ["0001", "0002", "0003", "0000"]
    assert [row["trial_id"] for row in ranked(rows, DEFAULT_METRIC)] == ["0000", "0003", "0002", "0001"]
    best = best_row(rows, METRIC)
    assert best is not None
    assert best["trial_id"] == read_sweep(other)["best"]["trial_id"] == "0001"
    same_start = [{**row, "start": "one", "config": {"clip_model": "one"}} for row in rows]
    assert keepers(same_start, METRIC) == {"0001", "0002", "0003"}
    assert keepers(same_start, DEFAULT_METRIC) == {"0000", "0003", "0002"}


def test_what_a_terminal_shows_goes_by_it(other: Path, small_sweep: Path) -> None:
    text = printed(other)
    assert f" {NAME}: instance among" in text
    assert "R@1 t2i" in text
    assert f"R@1 t2i: {NAME}. " in text
    assert [line[:4] for line in text.splitlines() if line[:4].isdigit()] == ["0001", "0002", "0003", "0000"]
    assert (
        f"best: trial 0001, {read_sweep(other)['trials'][1]['start']}, {NAME} 0.8000, recall_at_10 0.2000, recall_at_5" in text
    )
    assert f"{NAME} 0.1000; gain +0.7000 (+700.0%)" in text
    assert "R@10: recall_at_10, mean of both directions. " in printed(small_sweep)


def test_a_winner_below_its_zero_shot_is_so_by_the_metric(other: Path) -> None:
    content = read_sweep(other)
    for row in content["trials"]:
        row[f"untouched_{NAME}"] = 0.9
    (other / "sweep.json").write_text(json.dumps(content))
    assert f"trial 0001, is below zero-shot: {NAME} 0.8000, but 0.9000 of the zero-shot weights" in printed(other)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_live_table_goes_by_it(other: Path, terminal: bool) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=160, height=40, color_system=None)
    sizes = {"num_trials": 5, "side_by_side": 1, "budget_examples": 96, "stage_examples": 32, "expected_examples": 60.0}
    with Progress(console, **sizes) as progress:
        progress.show({**read_sweep(other), "elapsed_s": 9.0})
    said = ("R@1 t2i", "best so far: trial 0001") if terminal else (f"examples  {NAME} 0.8000", f"{NAME} 0.2000")
    assert all(part in output.getvalue() for part in said)


def test_the_page_goes_by_it(other: Path, small_sweep: Path) -> None:
    page = write_report([other], gallery=False).read_text()
    for part in (f"maximises {NAME}", "Recall@1 text to image of the winner", "zero-shot R@1 t2i", ">0.8000<"):
        assert part in page
    shown = page[page.index("<body>") :]
    assert "Recall@10" not in shown
    assert "R@10</th>" in shown, "every recall is in a table of its own"
    assert f"maximises {DEFAULT_METRIC.name}" not in write_report([small_sweep], gallery=False).read_text()


def test_sweeps_of_different_metrics_are_not_compared(other: Path, small_sweep: Path) -> None:
    groups = standings([other, small_sweep])
    assert [[each.sweep for each in group] for group in groups] == [["other"], ["small"]]
    assert [group[0].metric for group in groups] == [METRIC, DEFAULT_METRIC]
    assert groups[0][0].counted.startswith(f"{NAME}, instance among")
    assert groups[1][0].counted.startswith("recall_at_10, instance among")
    text = printed(other, small_sweep)
    table = text[text.index("best of each sweep") :]
    assert "recalls are not comparable" in table
    assert "recall  " in table
    assert f"R@1 t2i: {NAME}. R@10: recall_at_10, mean of both directions. " in table
    lines = ranking_text([other, small_sweep], "csv").splitlines()
    assert lines[0] == ("sweep,trial,model,loss,learning rate,R@5,R@10,R@1 t2i,low,high,zero-shot,gain,gain %,tie,counted as")
    assert f'"{NAME}, instance among' in lines[1]
    alone = ranking_text([other], "markdown")
    assert "| R@5 | R@10 | R@1 t2i | low | high | zero-shot R@1 t2i | gain |" in alone
    assert alone.splitlines()[-1].startswith(f"{NAME}: instance among")
    write_report([other, small_sweep], gallery=False)


def test_hparams_names_the_curve_that_tensorboard_has(other: Path) -> None:
    rows = read_sweep(other)["trials"]
    HParamsTab(other, [row["config"] for row in rows], METRIC).add(rows)
    (folder,) = other.glob("trials/0001-*")
    (added,) = folder.glob("*.hparams")
    tag = f"recall_by_direction/{NAME}"
    assert tag.encode() in added.read_bytes()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert tag in events.Tags()["scalars"]


def reported(trial_id: int, study: Any, search: Any, **row: Any) -> str:
    plan = TrialPlan(trial_id, "somewhere", ProjectConfig(clip_model="tiny-clip").to_dict(), metric=NAME)
    scheduler, trial = StudyScheduler(study, search, StopSignal()), SimpleNamespace(config=plan.to_ray())
    return str(scheduler.on_trial_result(None, trial, row))


def test_the_journal_and_the_rungs_go_by_it(tmp_path: Path) -> None:
    """By recall_at_10 each of the three would be decided the other way."""
    study = open_study(tmp_path)
    search = StoppingSearch(study, AshaRule((100,), 3), 3)
    searcher = StudySearcher(study, search, job(tmp_path, 3, metric=NAME), StopSignal())
    assert searcher.metric == NAME
    numbers = [TrialPlan.from_ray(searcher.suggest(name) or {}) for name in "abc"]
    assert [plan.metric for plan in numbers] == [NAME] * 3
    for number, (recall, other) in enumerate(((0.5, 0.1), (0.7, 0.0), (0.2, 0.9))):
        said = reported(number, study, search, examples_seen=100, recall_at_10=other, **{NAME: recall})
        assert said == ("STOP" if number == 2 else "CONTINUE")
    trials = study.trials()
    assert [trial.intermediate_values for trial in trials] == [{100: 0.5}, {100: 0.7}, {100: 0.2}]
    assert (trials[2].state, stop_reason(trials[2])) == (TrialState.PRUNED, "rung_1")


def test_a_value_that_is_no_number_is_named(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    study.suggest(lambda trial: {"clip_model": "tiny-clip", "loss_function": "contrastive"})
    assert (
        reported(0, study, StoppingSearch(study, NO_STOPPING, 1), examples_seen=32, recall_at_10=0.5, **{NAME: math.nan})
        == "STOP"
    )
    assert message(study.trials()[0]) == f"{NAME} is nan after 32 examples"


def test_a_trial_that_fails_at_once_reports_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray ends a sweep of which a result lacks its metric."""
    results: list[dict[str, Any]] = []
    monkeypatch.setattr(worker, "run_training", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(worker.tune, "report", results.append)
    worker.run_trial(
        TrialPlan(0, str(tmp_path / "trial"), ProjectConfig(clip_model="tiny-clip").to_dict(), metric=NAME).to_ray()
    )
    assert results[0][NAME] == 0.0
    assert results[0]["stop_reason"] == "error"


def test_a_sweep_that_goes_on_keeps_it() -> None:
    started = SweepSettings(metric=NAME, seed=0, device="cpu")
    assert started.resumed(SweepSettings(metric=NAME), "it") == started.resumed(SweepSettings(), "it") == started
    with pytest.raises(UserError, match=f"sweep it was started with --metric {NAME}, not recall_at_10: a resumed sweep keeps"):
        started.resumed(SweepSettings(metric="recall_at_10"), "it")


def test_a_sweep_from_before_there_was_a_choice_maximises_recall_at_10() -> None:
    older = stored_settings({"seed": 0, "device": "cpu"}, "it")
    assert older.resumed(SweepSettings(metric="recall_at_10"), "it").maximised == DEFAULT_METRIC
    with pytest.raises(UserError, match="started with --metric recall_at_10, not recall_at_5"):
        older.resumed(SweepSettings(metric="recall_at_5"), "it")


def test_a_search_that_weighs_values_is_told_how_certain_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_sweep: Path
) -> None:
    """By the queries of that evaluation alone; what is recorded of the evaluation stays as it is."""
    (trial,) = small_sweep.glob("trials/0000-*")
    shutil.copytree(trial, tmp_path / "trial")
    rows, results = read_history(trial), list[dict[str, Any]]()

    def run_training(config: Any, out_dir: Path, callbacks: Any, *, resume_from: Path) -> None:
        for row in rows[-2:]:
            callbacks.on_evaluation(row)

    monkeypatch.setattr(worker, "run_training", run_training)
    monkeypatch.setattr(worker.tune, "report", results.append)
    config = ProjectConfig(clip_model="tiny-clip").to_dict()
    for name in (NAME, DEFAULT_METRIC.name):
        worker.run_trial(TrialPlan(0, str(tmp_path / "trial"), config, metric=name).to_ray())
    earlier, last, *unchanged = results
    assert earlier == rows[-2], "whose queries are not kept"
    assert unchanged == rows[-2:]
    low, high = METRIC.interval(last) or (1.0, 0.0)
    assert low <= last[NAME] <= high
    assert {name: last[name] for name in rows[-1]} == rows[-1]
    told: list[Any] = []
    search = SimpleNamespace(goes_on=lambda number, examples_seen, variance: told.append(variance))
    study = open_study(tmp_path)
    study.suggest(lambda trial: {"clip_model": "tiny-clip", "loss_function": "contrastive"})
    for row in (earlier, last):
        reported(0, study, search, **row)
    assert told == [None, pytest.approx(((high - low) / 3.92) ** 2)]
