"""An older sweep's ended trials as the start of a new one, which is also how a finished sweep is extended.

A trial is taken where this sweep could have run it itself: the same data, parameters from the same distributions, and a
configuration that says the same of all that changes numbers (budget and stages among it, since the learning rate's
schedule spans the budget). Only the seed and the number of threads may differ. Trials that failed say nothing and stay out.

The search that lets trials wait also learns from trials on other data, last season's, with budgets of their own: it knows that
each data set has a level of its own, and that a stage is a share of the budget.
"""

import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FixedTrial, FrozenTrial, TrialState

from fashionclip_tune.config.project import ProjectConfig, override_paths
from fashionclip_tune.config.stored import BATCH_NORM, EDITION_PATH, stored_config, with_stored
from fashionclip_tune.errors import StorageError, UserError
from fashionclip_tune.evaluation.metric import metric_of
from fashionclip_tune.models.architecture import may_have_batch_norms
from fashionclip_tune.models.named_model import settled
from fashionclip_tune.storage.folder import RemoteFolder, read_journal
from fashionclip_tune.tuning.persistence.mirror import read_header
from fashionclip_tune.tuning.planning.plan import SweepPlan
from fashionclip_tune.tuning.schedulers import FREEZE_THAW, WaitingRule
from fashionclip_tune.tuning.study.study import STUDY_NAME, settings, with_origin

_MAY_DIFFER = ("training.seed", "hardware.threads")
_SIZES = ("training.budget_examples", "training.stage_examples", "training.epochs")


def older_trials(plan: SweepPlan) -> list[FrozenTrial]:
    """The ended trials of the sweep that the plan names, with their origin; none where it names none.

    Raises:
        UserError: no such sweep, nothing in it has ended, or it is not comparable: says in what.
    """
    if plan.settings.warm_start is None:
        return []
    folder = RemoteFolder(plan.settings.warm_start)
    saved = _about(folder)
    try:
        is_other_data = saved.get("data_fingerprint") != plan.data_fingerprint
        why = f"its data is not {plan.base.dataset_dir}, and only --scheduler {FREEZE_THAW} learns from other data"
        _check_comparable(not is_other_data or isinstance(plan.rule, WaitingRule), why)
        theirs, ours = metric_of(saved).name, plan.settings.maximised.name
        _check_comparable(theirs == ours, f"it maximised {theirs}, this sweep {ours}")
        _check_comparable("base_config" in saved, "it was made by a version that did not record all settings")
        base = stored_config(saved["base_config"], allow_remote=plan.base.reading.allow_remote)
        trials = [trial for trial in _ended(folder) if settings(trial)]
        _check_comparable(bool(trials), "no trial of it has ended with a result")
        for trial in trials:
            _check_trial(trial, base, plan, _SIZES if is_other_data else ())
    except StorageError:
        raise
    except UserError as error:
        raise UserError(f"--warm-start {folder.location} cannot be used: {error}") from error
    own = {"data": saved["data_fingerprint"], "budget_examples": base.training.budget_examples} if is_other_data else {}
    return [with_origin(trial, saved["name"], **own) for trial in trials]


def _about(folder: RemoteFolder) -> dict[str, Any]:
    """What was fixed when the sweep was started."""
    if (header := read_header(folder)) is not None:
        return header
    with suppress(FileNotFoundError, json.JSONDecodeError):
        about: dict[str, Any] = json.loads(folder.read("sweep.json"))
        return about
    raise UserError(f"{folder.location} is no sweep: it has no headers/ and no sweep.json that can be read")


def _ended(folder: RemoteFolder) -> list[FrozenTrial]:
    """From the journal, whole or in the pieces of a durable side; a copy, since the sweep may be running."""
    is_whole = folder.exists("study.journal")
    content = folder.read("study.journal") if is_whole else read_journal(folder)
    _check_comparable(bool(content), "it has no study.journal")
    with tempfile.TemporaryDirectory(prefix="fashionclip-tune-") as scratch:
        journal = Path(scratch) / "study.journal"
        journal.write_bytes(content[: content.rfind(b"\n") + 1])
        study = optuna.load_study(study_name=STUDY_NAME, storage=JournalStorage(JournalFileBackend(str(journal))))
        return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _check_trial(trial: FrozenTrial, base: ProjectConfig, plan: SweepPlan, may_differ: tuple[str, ...]) -> None:
    """Raises UserError unless this sweep could have run the trial, but for settings that may differ."""
    for name, distribution in trial.distributions.items():
        ours = plan.check.distributions.get(name)
        differs = f"parameter {name} was drawn from {distribution}, here it is {ours}: the search knows one set of its values"
        _check_comparable(ours == distribution, f"{differs}; give the space the older one, or leave --warm-start out")
    fixed: Any = FixedTrial(trial.params)
    try:
        ours_config = plan.build(plan.draw(fixed))
    except ValueError as error:
        raise UserError(f"trial {trial.number:04d} has no value for a parameter of {plan.space.file} ({error})") from error
    before, now = settled(with_stored(base, settings(trial))).to_dict(), settled(ours_config).to_dict()
    for path in override_paths(only_fingerprinted=True):
        has_none = path == BATCH_NORM and not may_have_batch_norms(ours_config.model_name)
        means_nothing = has_none or path == EDITION_PATH
        if path not in (*_MAY_DIFFER, *may_differ) and not means_nothing:
            where = f"{path} was {before[path]} in trial {trial.number:04d}, here it is {now[path]}"
            _check_comparable(before[path] == now[path], where)


def _check_comparable(condition: bool, reason: str) -> None:
    if not condition:
        raise UserError(reason)
