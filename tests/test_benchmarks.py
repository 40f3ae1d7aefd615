"""The benchmarks: what they count, on figures small enough to count by hand."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.resilience import lose_machine, started_processes
from benchmarks.search import search_table
from benchmarks.speed import gpu, plan_beside_fact, t4_plans
from fashionclip_tune.files import write_json
from fashionclip_tune.training.history import TIMING

ROOT = Path(__file__).parents[1]


def test_a_table_of_curves_reads_back_and_loses_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "curves.csv"
    rows = [
        {"examples_seen": 0, "recall_at_10": 0.1, "recall_at_5": 0.05, "loss": None, "device_s": 1.0},
        {"examples_seen": 100, "recall_at_10": 0.2, "recall_at_5": 0.1, "loss": 1.5, "device_s": 3.0},
    ]
    for number in range(2):
        search_table.append_curve(path, number, {"learning_rate": 0.1 * number}, rows)
    with open(path, "a") as file:
        file.write('2,"{""learning_')
    assert search_table.num_curves(path) == 2
    table = search_table.read_table(path)
    assert table.parameters == [{"learning_rate": 0.0}, {"learning_rate": 0.1}]
    assert table.examples_seen_S == [0, 100]
    assert table.recall_NS.tolist() == [[0.1, 0.2]] * 2
    assert table.device_s_NS.tolist() == [[1.0, 3.0]] * 2


def test_gpu_sees_gradients_that_are_not_equal_and_says_what_failed() -> None:
    import torch

    assert gpu.relative_difference(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])) == pytest.approx(1 / 34**0.5)
    assert gpu.tasks(("card", "bits", "run"), ("A", "B")) == [("card", ""), ("bits", "A"), ("bits", "B"), ("run", "A")]
    found = gpu.measure("bits", "no-such-model", "cuda", time.monotonic() + 60)
    assert "Error: " in found["failed"]
    assert gpu.measure("bits", "tiny-clip", "cuda", time.monotonic() - 1) == {"failed": "no time was left"}


def test_gpu_prints_the_tables_of_the_results() -> None:
    measured = json.loads((ROOT / "results" / "gpu_nvidia_h200.json").read_text())
    page = (ROOT / "results" / "README.md").read_text()
    rates = {
        "step A": {"as trained": 1234.5, "wall_s": 9.0},
        "step B": {"failed": "Error: no"},
        "peaks B": {"failed": "Error: no"},
    }
    *steps, _, _, _ = gpu.tables(rates)
    assert steps == ["| model | step | samples/s |", "|---|---|---|", "| A | as trained | 1,234 |"]
    peaks = [line.rsplit(" | ", 1)[0] for line in gpu.tables(measured) if line.startswith("| ViT")]
    assert len(peaks) == 18
    assert all(f"\n{line} | " in page for line in peaks), "all but the estimates, which have changed since"


def test_machines_are_lost_under_way_only_and_compared_but_for_the_times(tmp_path: Path) -> None:
    drawn = []

    def lose(number: Any, share: Any) -> Any:
        drawn.append((number, share))
        return None if len(drawn) == 2 else number != 3

    assert lose_machine.lose_under_way(3, 5, lose) == ([True, True, False], 1)
    assert [number for number, _ in drawn] == [1, 2, 2, 3], "the one that was over is drawn again"
    assert all(0 <= share < 1 for _, share in drawn)
    assert len({share for _, share in drawn}) == 4

    for results, speed in ((tmp_path / "whole", 100.0), (tmp_path / "lost", 200.0)):
        row = {"step": 0, "recall_at_10": 0.5, **dict.fromkeys(TIMING, speed)}
        write_json(results / "it" / "trials" / "0000-tiny" / "evaluations" / "step_00000000.json", row)
        write_json(results / "it" / "sweep.json", {"state": "FINISHED", "best": None, "trials": [row]})
    assert lose_machine.is_over(tmp_path / "lost")
    assert not lose_machine.is_over(tmp_path)
    whole, lost = (lose_machine.outcome(tmp_path / name / "it") for name in ("whole", "lost"))
    assert lose_machine.differences(lost, whole) == []


def test_a_plan_for_a_t4_is_made_of_stated_figures_anywhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASHIONCLIP_CACHE", "put back: the script sets it")
    for name in ("run_shards", "load_data", "rows_of_captions"):
        monkeypatch.setattr(t4_plans.found, name, getattr(t4_plans.found, name))  # put back, too
    monkeypatch.setattr(t4_plans.planning, "rows_of_captions", t4_plans.planning.rows_of_captions)
    t4_plans.main(["--preset", "quick", "--max-concurrent", "1", "--memory-gb", "12.7", "--train", "50000"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "trials:   8, at most 1 side by side, on cuda"
    assert any(line.startswith("host RAM: at most") and " of 12.7 GB" in line for line in lines)
    assert any("examples a trial (0.3 epochs), evaluated every" in line for line in lines)
    assert sum("(estimate for a T4)" in line for line in lines) == 3


def test_a_plan_stands_beside_what_came() -> None:
    rows = [
        {"config": {"clip_model": "tiny"}, "examples_seen": seen, "stop_reason": end, "samples_per_second": 50.0}
        for seen, end in ((100, "rung_1"), (300, "budget"))
    ]
    plan = {"hours": 1 / 60, "examples": 500.0, "trials_to_budget": 2.0, "samples_per_second": {"tiny": 40.0}}
    sweep = {"state": "FINISHED", "elapsed_s": 90.0, "trials": rows, "plan": plan}
    found = list(plan_beside_fact.compared(sweep))
    assert [each[1:] for each in found] == [(1, 1.5), (500, 400), (2, 1), (40, 50)]


def kill_sweep(out: Path, *flags: str) -> tuple[str, list[dict[str, str]]]:
    """What the script prints, and its table."""
    command = [sys.executable, "-m", "benchmarks", "kill_sweep", "--out", out, *flags]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(out / "kills.csv", newline="") as file:
        return done.stdout, list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_killed_trials_with_loader_processes_leave_none_and_lose_nothing(garments: Path, tmp_path: Path) -> None:
    printed, rows = kill_sweep(tmp_path, "--data", garments, "--kills", "2", "--workers", "2", "--trials", "1", "--seed", "255")
    assert [row["kind"] for row in rows] == ["worker", "driver", "end"]
    assert [(row["workers"], row["left"], row["violations"]) for row in rows] == [("2", "0", "")] * 3
    assert all(float(row["gone_after_s"]) <= 10 for row in rows)
    assert "1 with one slot and compared with one that was never stopped; 0 violations" in printed


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_toy_trials_are_killed_too(garments: Path, tmp_path: Path) -> None:
    _, rows = kill_sweep(tmp_path, "--data", garments, "--toy", "--kills", "1", "--trials", "1")
    assert [(row["left"], row["violations"]) for row in rows] == [("0", "")] * 2


def test_what_is_left_running_is_found_and_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(started_processes, "GONE_WITHIN_S", 0.3)
    environment = {**os.environ, **started_processes.marked("here")}
    with subprocess.Popen(["sleep", "60"], env=environment) as process:
        leaving = started_processes.Leaving(lambda: started_processes.running("here"))
        assert leaving.violation() == f"left running after 0.3 s: {process.pid} sleep 60"
        assert leaving.gone_after_s is None
        assert process.pid in [pid for pid, _ in started_processes.running_below(os.getpid())]
        process.kill()
    leaving = started_processes.Leaving(lambda: started_processes.running("here"))
    assert leaving.violation() == ""
    assert leaving.gone_after_s < 0.3
