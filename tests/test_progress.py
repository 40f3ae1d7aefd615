"""What is seen of long work, on a terminal and elsewhere."""

import io
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from fashionclip_tune import progress as progress_bars
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.dataset import run_shards
from fashionclip_tune.progress import messages_on, phase_bars, progress_bar
from fashionclip_tune.training.callbacks import RunCallbacks
from fashionclip_tune.training.train import run_training


def console_for(terminal: bool) -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    return Console(file=written, force_terminal=terminal, width=100, color_system=None), written


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time."""
    clock = [0.0]
    monkeypatch.setattr(progress_bars.time, "monotonic", lambda: clock[0])

    def set_time(seconds: float) -> None:
        clock[0] = seconds

    return set_time


def test_elsewhere_a_line_comes_after_a_while_and_then_now_and_then(now: Callable[[float], None]) -> None:
    console, written = console_for(terminal=False)
    with progress_bar("encoding photos", console) as on_progress:
        for second in range(101):
            now(second)
            on_progress(12 * second, 1200)
    shares = [int(line.split()[-3].replace(",", "")) for line in written.getvalue().splitlines()]
    assert written.getvalue().splitlines()[0] == "encoding photos: 60 of 1,200"
    assert shares == [60, 300, 540, 780, 1020]


def test_what_is_over_soon_is_not_mentioned(now: Callable[[float], None]) -> None:
    console, written = console_for(terminal=False)
    with phase_bars(console) as on_phase:
        for round_ in range(40):
            for done in range(5):
                now(4 * round_ + done / 2)
                on_phase("encoding photos", done, 4)
    assert written.getvalue() == ""


def test_work_that_takes_turns_is_counted_on(now: Callable[[float], None]) -> None:
    console, written = console_for(terminal=False)
    with phase_bars(console) as on_phase:
        for step in range(60):
            now(step)
            on_phase("training", step, 60)
            on_phase("encoding photos", 1, 4)
            on_phase("encoding photos", 4, 4)
    assert written.getvalue().splitlines() == ["training: 5 of 60", "training: 25 of 60", "training: 45 of 60"]


def test_a_terminal_shows_one_bar_at_a_time_and_leaves_nothing() -> None:
    console, written = console_for(terminal=True)
    with phase_bars(console) as on_phase:
        on_phase("training", 3, 8)
        console.print("a line above")
        on_phase("encoding photos", 64, 600)
        console.print("another line")
    drawn = written.getvalue()
    assert "training" in drawn
    assert "3/8" in drawn
    assert "64/600" in drawn
    assert drawn.endswith("\x1b[2K"), "the bar's own line is erased"


def test_a_run_tells_of_each_step_and_of_the_photos_it_encodes(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    config = tiny_config.with_overrides({"training.budget_examples": 64, "evaluation.batch_size": 8, "training.seed": 6})
    run_training(config, tmp_path / "run", RunCallbacks(on_progress=lambda *what: told.append(what)))
    assert [done for what, done, total in told if what == "training"] == [0, 1, 2, 3]
    assert {total for what, _, total in told if what == "training"} == {4}
    assert [(done, total) for what, done, total in told if what == "encoding photos"] == [(8, 20), (16, 20), (20, 20)] * 3


def test_a_run_tells_of_the_shards_that_it_waits_for(
    tiny_config: ProjectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fashionclip_tune.data.shard_cache._SHOWN_EVERY_S", 0.001)
    monkeypatch.setattr("fashionclip_tune.data.dataset._indexes", {})
    told: list[tuple[str, int, int]] = []
    config = tiny_config.with_overrides({"training.budget_examples": 32, "reading.scratch": tmp_path / "scratch"})
    run_training(config, tmp_path / "run", RunCallbacks(on_progress=lambda *what: told.append(what)))
    shards = run_shards(config)
    num_shards = len(shards.train) + len(shards.valid)
    phases = list(dict.fromkeys(what for what, *_ in told))
    assert phases[:2] == ["indexing shards", "copying shards"]
    assert [(done, total) for what, done, total in told if what == "copying shards"][-1] == (num_shards, num_shards)
    assert len(list((tmp_path / "scratch" / "shards").glob("*.tar"))) == num_shards


def test_messages_of_the_package_are_printed_once_as_they_are(capfd: pytest.CaptureFixture[str]) -> None:
    """Also where a library has given the root logger a handler, as open_clip does."""
    console, written = console_for(terminal=False)
    logger, root = logging.getLogger("fashionclip_tune.tuning.sweep"), logging.StreamHandler()
    logging.getLogger().addHandler(root)
    try:
        with messages_on(console):
            logger.info("[red]weights[/red] of ViT-B-32: " + "a long path " * 20)
            logger.debug("of no interest")
        logger.info("nobody asked")
    finally:
        logging.getLogger().removeHandler(root)
    assert written.getvalue() == "[red]weights[/red] of ViT-B-32: " + "a long path " * 20 + "\n"
    assert capfd.readouterr() == ("", "")
