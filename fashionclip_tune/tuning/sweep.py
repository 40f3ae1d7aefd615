"""A sweep from its settings to its winner: start, resume, finish."""

import platform
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from fashionclip_tune.checkpoint import newest_weights, strip_training_state
from fashionclip_tune.errors import UserError
from fashionclip_tune.model import export_openclip, fetch_weights, load_model, load_weights
from fashionclip_tune.pretraining import pretrain_missing
from fashionclip_tune.report import bad_sample_lines, best_row, ranked, read_sweep, ties_with_best, trials_table, winner_lines
from fashionclip_tune.report_html import write_report
from fashionclip_tune.tiny import TINY_MODELS
from fashionclip_tune.tuning.engine import trial_dir
from fashionclip_tune.tuning.execution import run_trials
from fashionclip_tune.tuning.hparams import columns, write_hparams
from fashionclip_tune.tuning.plan import SweepPlan, SweepSettings, plan_sweep
from fashionclip_tune.tuning.progress import Progress
from fashionclip_tune.tuning.record import SweepRecord
from fashionclip_tune.tuning.study import METRIC, SweepStudy


def sweep(
    settings: SweepSettings, *, results: Path, name: str | None, resume: bool, dry_run: bool, console: Console
) -> dict[str, Any] | None:
    """Starts a sweep, or goes on with an interrupted one, and returns the content of its sweep.json.

    Args:
        settings: None where the plan is to choose; of a resumed sweep they may only repeat what it was started with.
        results: the folder of all sweeps.
        name: the sweep's folder in it; None: the next free one, or with ``resume`` the latest unfinished one.
        resume: go on with an interrupted sweep; with nothing to resume, start.
        dry_run: print the plan only, and return None.

    Raises:
        UserError: anything that the user can put right.
    """

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    if name is not None and (not name or Path(name).name != name):
        raise UserError(f"--name {name!r} is not allowed: one folder name, without slashes")
    results = results.absolute()
    found = _to_resume(results, name) if resume else None
    if found is not None:
        sweep_dir = found
        plan = _saved_plan(sweep_dir, settings, say)
    else:
        sweep_dir = results / name if name is not None else _next_free(results)
        # A sweep that was killed before its first file has left its lock at most: it starts afresh.
        if sweep_dir.exists() and (not resume or any(path.name != ".lock" for path in sweep_dir.iterdir())):
            raise UserError(f"sweep {sweep_dir} exists: add --resume to go on with it, or choose another --name")
        plan = plan_sweep(settings, say)
    for line in (f"sweep:    {sweep_dir}", *plan.lines()):
        say(line)
    if dry_run:
        return None
    if found is not None and (saved := read_sweep(found))["state"] == "FINISHED":
        say("this sweep is finished: nothing to resume")
        _print_result(saved, sweep_dir, console)
        return saved
    _prepare_models(plan, say)
    try:
        sweep_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--results {results} cannot be written to ({error}): choose another folder") from error
    with _only_driver(sweep_dir):
        result = _run(plan, sweep_dir, console)
    _print_result(result, sweep_dir, console)
    _write_report(sweep_dir, say, finished=result["state"] == "FINISHED")
    return result


def _to_resume(results: Path, name: str | None) -> Path | None:
    """The named sweep if it was started at all, or the latest unfinished one."""
    if name is not None:
        return results / name if (results / name / "sweep.json").is_file() else None
    sweeps = [(path.parent, read_sweep(path.parent)) for path in results.glob("*/sweep.json")]
    unfinished = [(content["created"], folder) for folder, content in sweeps if content["state"] != "FINISHED"]
    return max(unfinished)[1] if unfinished else None


def _next_free(results: Path) -> Path:
    number = 1
    while (results / f"sweep-{number:03d}").exists():
        number += 1
    return results / f"sweep-{number:03d}"


def _saved_plan(sweep_dir: Path, given: SweepSettings, say: Any) -> SweepPlan:
    saved = read_sweep(sweep_dir)
    plan = plan_sweep(SweepSettings(**saved["settings"]).resumed(given, sweep_dir.name), say)
    for what, now in (("space_hash", plan.space.content_hash), ("data_fingerprint", plan.data_fingerprint)):
        if saved[what] != now:
            source = plan.space.file if what == "space_hash" else plan.base.dataset_dir
            raise UserError(f"{source} has changed since sweep {sweep_dir.name} was started: put it back, or start a new sweep")
    return plan


def _prepare_models(plan: SweepPlan, say: Any) -> None:
    """Makes or fetches weights once, before trials would do so side by side."""
    configs = plan.check.config_of_model
    for config in configs.values():
        if len(configs) > 1 and config.model.pretrained not in ("default", None) and Path(config.model.pretrained).exists():
            raise UserError(
                f"model.pretrained = {config.model.pretrained} holds one model's weights, the space has {', '.join(configs)}: "
                f"add --set clip_model={config.model_name}"
            )
    pretrain_missing([name for name, config in configs.items() if config.model.pretrained == "default"], say)
    for name, config in configs.items():
        if name not in TINY_MODELS:
            say(f"weights of {name}: from {config.model_cache_dir}, else from the hub")
        fetch_weights(config)


@contextmanager
def _only_driver(sweep_dir: Path) -> Iterator[None]:
    lock = FileLock(sweep_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"sweep {sweep_dir} is being run by another process: wait for it, or stop it") from None
    try:
        yield
    finally:
        lock.release()


def _run(plan: SweepPlan, sweep_dir: Path, console: Console) -> dict[str, Any]:
    header = _header(plan, sweep_dir)
    study = SweepStudy(
        sweep_dir / "study.journal",
        seed=plan.seed,
        num_startup_trials=plan.num_startup_trials,
        points=plan.space.points,
    )
    record = SweepRecord(sweep_dir, study, header)
    record.write("RUNNING")
    closed: set[str] = set()
    hparams = columns(plan.check.settings)
    assert plan.settings.budget_examples
    assert plan.settings.grace_examples
    with Progress(
        console,
        num_trials=plan.num_trials,
        side_by_side=plan.slots.count,
        budget_examples=plan.settings.budget_examples,
        stage_examples=plan.settings.grace_examples,
    ) as progress:

        def on_event() -> None:
            sweep = record.write("RUNNING")
            progress.show(sweep)
            _close_ended(sweep_dir, sweep["trials"], hparams, closed)

        completed = run_trials(
            study,
            plan.draw,
            plan.build,
            sweep_dir=sweep_dir,
            num_trials=plan.num_trials,
            slots=plan.slots,
            rung_levels=plan.rung_levels,
            reduction_factor=plan.reduction_factor,
            on_event=on_event,
        )
        _close_ended(sweep_dir, record.rows(), hparams, closed)
        _export_best(plan, sweep_dir, record.rows())
        result = record.write("FINISHED" if completed else "INTERRUPTED")
        progress.show(result)
    return result


def _header(plan: SweepPlan, sweep_dir: Path) -> dict[str, Any]:
    """What does not change in the life of a sweep; kept from its first start."""
    if (sweep_dir / "sweep.json").is_file():
        changing = ("state", "best", "zero_shot", "trials")
        return {name: value for name, value in read_sweep(sweep_dir).items() if name not in changing}
    packages = ("torch", "open_clip_torch", "ray", "optuna")
    return {
        "name": sweep_dir.name,
        "created": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
        "metric": METRIC,
        "mode": "max",
        "seed": plan.settings.seed,
        "space": plan.space.name,
        "space_hash": plan.space.content_hash,
        "data_fingerprint": plan.data_fingerprint,
        "settings": asdict(plan.settings),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _close_ended(sweep_dir: Path, rows: list[dict[str, Any]], hparams: dict[str, bool], closed: set[str]) -> None:
    """Drops optimizer states of trials that are over, and adds them to TensorBoard's table, once their worker has let go."""
    for row in rows:
        if row["state"] == "RUNNING" or not row["config"] or row["trial_id"] in closed:
            continue
        folder = trial_dir(sweep_dir, int(row["trial_id"]), row["config"])
        if folder.is_dir():
            try:
                with FileLock(folder / ".lock", timeout=0):
                    strip_training_state(folder)
                    write_hparams(folder, row, hparams)
            except Timeout:
                continue
            (folder / ".lock").unlink(missing_ok=True)
        closed.add(row["trial_id"])


def _export_best(plan: SweepPlan, sweep_dir: Path, rows: list[dict[str, Any]]) -> None:
    best = best_row(rows)
    if best is None:
        return
    weights = newest_weights(trial_dir(sweep_dir, int(best["trial_id"]), best["config"]))
    if weights is None or weights.parent.name != f"step_{best['step']:08d}":
        # Only where checkpoints are not written at every stage: its worker was killed before it could write the last one.
        warnings.warn(f"the weights of trial {best['trial_id']} at step {best['step']} were lost: no best/", stacklevel=2)
        return
    loaded = load_model(plan.build(best["config"]))
    load_weights(loaded.network, weights)
    unfinished, final = sweep_dir / ".best.tmp", sweep_dir / "best"
    shutil.rmtree(unfinished, ignore_errors=True)
    export_openclip(loaded, unfinished)
    shutil.rmtree(final, ignore_errors=True)
    unfinished.rename(final)


def _print_result(result: dict[str, Any], sweep_dir: Path, console: Console) -> None:
    rows = ranked(result["trials"])
    ties = ties_with_best(sweep_dir, rows)
    console.print(trials_table(rows, f"{result['name']}, best first", ties))
    for line in winner_lines(result, sweep_dir, ties):
        console.print(line, highlight=False, soft_wrap=True)
    for row in result["trials"]:
        if row["state"] == "FAIL":
            console.print(
                f"failed: trial {row['trial_id']} ({row['stop_reason']}): {row['message']}", highlight=False, soft_wrap=True
            )
    for line in bad_sample_lines(sweep_dir):
        console.print(line, highlight=False, soft_wrap=True)
    if result["state"] == "INTERRUPTED":
        results = sweep_dir.parent
        console.print(
            f"interrupted; go on with: python sweeps/run_sweep.py --results {results} --name {sweep_dir.name} --resume",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"curves: tensorboard --logdir {sweep_dir / 'trials'}", highlight=False, soft_wrap=True)


def _write_report(sweep_dir: Path, say: Any, *, finished: bool) -> None:
    """With the winner's photos where the sweep has ended; who pressed Ctrl-C is not to wait for them."""
    try:
        say(f"report: {write_report([sweep_dir], gallery=finished)}")
    except OSError as error:  # a full disk: the sweep's own files are there
        say(f"no report ({error}); python sweeps/compare.py {sweep_dir} makes it")
