"""What is said at the end of a sweep."""

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import ray

from fashionclip_tune.cli.main import command_parser
from fashionclip_tune.config.section import assignments
from fashionclip_tune.errors import command
from fashionclip_tune.tuning.console.outcome import how_to_go_on
from fashionclip_tune.tuning.persistence.location import SweepCatalog
from fashionclip_tune.tuning.planning.plan import plan_sweep
from fashionclip_tune.tuning.planning.settings import SweepSettings
from tests.tuning.conftest import RunSweep

OWN = ("name", "results", "dry_run", "resume", "refit")
FAST = ("--set", "model.pretrained=none", "--set", "training.batch_size=16", "--samples-per-second", "100")
SPACE = "def space(trial):\n    return {'clip_model': 'tiny-clip', 'training.learning_rate': trial.suggest_float('r', 0, 1)}\n"


@pytest.fixture
def parsed() -> Any:
    """What ``run_sweep.py`` makes of a command line: the settings, and what it is to do with them."""

    def parse(words: Any) -> Any:
        arguments = vars(command_parser().parse_args(["sweep", *map(str, words)]))
        del arguments["run"]
        own = {name: arguments.pop(name) for name in OWN}
        return SweepSettings(overrides=assignments(arguments.pop("set")), **arguments), own

    return parse


def test_the_command_that_goes_on_has_the_settings_in_effect(
    garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parsed: Any
) -> None:
    """Of a first run, and of a later one elsewhere that says less; paths are relative and have blanks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my data").symlink_to(garments)
    (tmp_path / "my space.py").write_text(SPACE)
    machine = (
        "--data",
        "my data",
        "--scratch",
        "fast disk",
        "--scratch-gb",
        "7.5",
        "--sync-every",
        "3",
        "--max-concurrent",
        "1",
    )
    run = ("--disk-budget-gb", "2", "--allow-remote", "--time-budget", "0.1", "--seed", "3")
    given, _ = parsed([*FAST, "--space", "my space.py", *machine, *run])
    first = plan_sweep(given).settings
    recorded = SweepSettings(**json.loads(json.dumps(asdict(first))))
    results = SweepCatalog("My Drive")
    place = results.place("it", first.scratch)
    said = how_to_go_on(place, first)
    assert said.startswith(f"go on with: {command('sweep', '--results', tmp_path / 'My Drive', '--name', 'it', '--resume')} ")
    for part in (
        "--max-concurrent 1",
        "--sync-every 3 ",
        "--allow-remote ",
        "--time-budget 0.1",
        f"--data '{tmp_path}/my data'",
    ):
        assert part in said

    # Started from another folder.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again, own = parsed(shlex.split(said)[5:])
    assert own == {"name": "it", "results": str(tmp_path / "My Drive"), "dry_run": False, "resume": True, "refit": None}
    assert plan_sweep(recorded.resumed(again, "it")).settings == first

    (tmp_path / "elsewhere" / "mine.py").write_text(SPACE)
    less, _ = parsed(["--scratch", "disk", "--space", "mine.py", "--max-concurrent", "2"])
    later = plan_sweep(recorded.resumed(less, "it")).settings
    assert later.time_budget is None
    monkeypatch.chdir(tmp_path)
    again, own = parsed(shlex.split(how_to_go_on(place, later, "--refit", "2"))[5:])
    assert (own["refit"], own["resume"]) == (2, False)
    assert plan_sweep(recorded.resumed(again, "it")).settings == later


def test_each_setting_is_said_again_or_recorded() -> None:
    """A new flag belongs to one of the two: what a resumed sweep would neither keep nor be told is lost."""
    everything = SweepSettings(space="mine.py", overrides={"training.epochs": 2}, **{"data": "d", "scratch": "s"})
    for field in fields(SweepSettings):
        if getattr(everything, field.name) is None:
            everything = replace(everything, **{field.name: True if field.name == "allow_remote" else "3"})
    words = everything.flags_to_go_on()
    said = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
    kept = {field.name for field in fields(SweepSettings)} - said
    assert kept == {
        *("num_trials", "seed", "budget_examples", "scheduler", "grace_examples", "reduction_factor", "preset", "metric"),
        *("min_trials_per_model", "keep_paused", "warm_start", "device", "overrides"),
    }


def interrupted_in(monkeypatch: pytest.MonkeyPatch, where: Any, number: Any) -> None:
    """At this function, which then goes on for a while."""

    def interrupt(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)
        pytest.fail("the signal did nothing")

    monkeypatch.setattr(where, interrupt)


@pytest.fixture
def heeded_ctrl_c() -> Iterator[Any]:
    """Tests that a shell runs in the background inherit that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded_ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "where",
    ["tuning.session.SweepStudy", "tuning.session.export_best", "tuning.console.outcome.write_report"],
)
def test_a_signal_at_any_moment_says_how_to_go_on(
    garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_sweep: RunSweep, where: Any, number: Any
) -> None:
    """Before Ray is there and after it is gone; the trials themselves are left out."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("fashionclip_tune.tuning.session.run_trials", lambda *_, **__: True)
    interrupted_in(monkeypatch, f"fashionclip_tune.{where}", number)
    code, out, err = run_sweep("--data", garments, "--results", tmp_path, "--name", "it", "--device", "cpu", *FAST)
    assert code == 130
    assert err.count("\n") == 1
    assert err.startswith(
        f"interrupted; go on with: {sys.executable} sweeps/run_sweep.py --results {tmp_path} --name it --resume "
    )
    assert (f"no report yet; {sys.executable} sweeps/compare.py" in out) == where.endswith("write_report")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("heeded_ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_ray_starts_is_heeded_once_it_is_there(
    garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_sweep: RunSweep, number: Any
) -> None:
    """``ray.init`` would put a handler of its own in place, for good, and may swallow what that raises."""

    def init(**_: Any) -> None:
        ray._private.utils.set_sigterm_handler(lambda number, frame: sys.exit(number))
        os.kill(os.getpid(), number)
        time.sleep(0.01)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("fashionclip_tune.tuning.backend.runner.ray.is_initialized", lambda: False)
    monkeypatch.setattr("fashionclip_tune.tuning.backend.runner.ray.init", init)
    monkeypatch.setattr("fashionclip_tune.tuning.backend.runner.ray.shutdown", lambda: None)
    monkeypatch.setattr("fashionclip_tune.tuning.backend.runner._ended_with_ray", lambda go_on: nullcontext())
    monkeypatch.setattr("fashionclip_tune.tuning.backend.runner._end_agents_with_us", lambda: None)
    code, out, err = run_sweep("--data", garments, "--results", tmp_path, "--name", "it", "--device", "cpu", *FAST)
    assert (code, err) == (130, "")
    assert f"interrupted; go on with: {sys.executable} sweeps/run_sweep.py --results {tmp_path} --name it --resume " in out
    assert signal.getsignal(signal.SIGTERM) is before
