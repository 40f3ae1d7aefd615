"""What a sweep will do, worked out and checked before anything is started."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import optuna

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.config.stored import with_stored
from fashionclip_tune.errors import UserError
from fashionclip_tune.machine.hardware import Machine
from fashionclip_tune.models.architecture import forward_flops, with_default_freeze
from fashionclip_tune.models.named_model import settled
from fashionclip_tune.models.start_facts import StartFacts, facts_of_starts
from fashionclip_tune.tuning.planning.allocation import Allotment, find_site
from fashionclip_tune.tuning.planning.budget import check_batch_sizes, check_known_size, plan_examples
from fashionclip_tune.tuning.planning.dataset import check_batches, describe_data, rows_of_captions
from fashionclip_tune.tuning.planning.disk import DiskPlan, plan_disk
from fashionclip_tune.tuning.planning.forecast import Course, Forecast, forecast, search_terms
from fashionclip_tune.tuning.planning.found import Found, find
from fashionclip_tune.tuning.planning.fresh import FreshSettings
from fashionclip_tune.tuning.planning.gpu_memory import GB, GpuMemory
from fashionclip_tune.tuning.planning.settings import (
    CheckedFlags,
    SweepSettings,
    absolute,
    checked_flags,
    refuse_shared,
)
from fashionclip_tune.tuning.planning.slots import Node, Slots
from fashionclip_tune.tuning.planning.space import SPACES_DIR, SearchSpace, SpaceCheck
from fashionclip_tune.tuning.planning.throughput import decoding_s, model_paces
from fashionclip_tune.tuning.schedulers import FREEZE_THAW, StoppingRule, WaitingRule, stopping_rule
from fashionclip_tune.tuning.study import study
from fashionclip_tune.tuning.study.freeze_thaw import SearchTerms
from fashionclip_tune.tuning.study.policy import ModelQuota, plan_quota, startup_trials

_log = logging.getLogger(__name__)

_SYNC_EVERY_MINUTES = 15.0


@dataclass(frozen=True)
class SweepPlan:
    """A sweep that can be started: everything is found, checked and sized.

    ``settings`` are as the user said them, completed for the record; what is decided by them has fields of its own.
    """

    settings: SweepSettings
    space: SearchSpace
    check: SpaceCheck
    base: ProjectConfig
    allotment: Allotment
    gpu: GpuMemory | None
    num_trials: int
    budget_examples: int
    stage_examples: int
    """Of a trial; each stage ends with an evaluation."""
    sync_every_s: float
    seed: int
    rule: StoppingRule
    quota: ModelQuota | None
    num_shards: int
    num_train: int
    num_valid: int
    data_fingerprint: str
    data: Mapping[str, Any]
    """As ``describe_data`` makes it."""
    starts: Mapping[str, StartFacts]
    """What trials start from, as ``clip_model`` names it."""
    settles_names: bool
    """``clip_model`` names weights, too; not in what an older version began."""
    course: Course
    preset_note: str
    disk: DiskPlan

    @cached_property
    def forecast(self) -> Forecast:
        return forecast(self.course, self.budget_examples, self.stage_examples)

    def after(self, older: Sequence[optuna.trial.FrozenTrial]) -> "SweepPlan":
        """This plan for a sweep that starts with an older one's trials, if any."""
        models = tuple(study.settings(trial)["clip_model"] for trial in older)
        return replace(self, course=replace(self.course, older=models))

    @property
    def slots(self) -> Slots:
        return self.allotment.slots

    def draw(self, trial: optuna.Trial) -> dict[str, Any]:
        """A trial's settings as they are recorded: what the space drew and ``--set`` fixed, model and loss always."""
        drawn = self.space.draw(trial)
        refuse_shared(drawn, f"space {self.space.file}")
        wanted = {**drawn, **self.settings.overrides}
        check_known_size(wanted.get("training.batch_size"), self.stage_examples)
        if self.settles_names:
            start = settled(self.base.with_overrides(wanted))
            self.check.check_start(start)
            wanted |= {"clip_model": start.model_name, "model.pretrained": start.model.pretrained}
        config = self.build(wanted)
        fixed = [path for path in self.settings.overrides if path != "hardware.threads"]
        paths = dict.fromkeys(["clip_model", "loss_function", *drawn, *fixed])
        flat = config.to_dict()
        if config.freeze != self.base.freeze:  # a default for the card, which a resumed sweep may not find again
            paths["freeze.token_embedding"] = None
        return {path: flat[path] for path in paths}

    def build(self, settings: Mapping[str, Any]) -> ProjectConfig:
        """The configuration of a trial with these settings, as they are recorded."""
        given = {**self.space.base, **self.settings.overrides, **settings}
        card_bytes = self.gpu.card.memory_bytes if self.gpu is not None else None
        config = with_stored(self.base, settings, known_models=self.check.config_of_model)
        return self.allotment.fitted(with_default_freeze(config, card_bytes, given))

    @property
    def fitted_configs(self) -> list[ProjectConfig]:
        """Of the draws with which the space was checked, as trials would run them."""
        threads = {"hardware.threads": self.base.hardware.threads}
        return [self.allotment.fitted(config.with_overrides(threads)) for config in self.check.configs]

    @cached_property
    def at_a_time(self) -> dict[str, int]:
        """Trials of each model side by side, at most."""
        return self.allotment.most_at_a_time(self.fitted_configs)

    @property
    def disk_budget_bytes(self) -> int | None:
        """Of the sweep's folder in the results; None: as much as the disk has."""
        return None if self.settings.disk_budget_gb is None else int(self.settings.disk_budget_gb * GB)

    @property
    def may_end_at(self) -> tuple[int, ...]:
        """Examples seen at which a trial may come to its end."""
        return (*self.rule.rungs, self.budget_examples)

    @property
    def num_startup_trials(self) -> int | None:
        """Drawn at random, before TPE; None: another model decides."""
        return None if isinstance(self.rule, WaitingRule) else startup_trials(self.num_trials)

    @property
    def search_terms(self) -> SearchTerms:
        """Of the search that lets trials wait at rungs."""
        keep_paused = self.settings.keep_paused
        assert keep_paused is not None
        return search_terms(self.course, self.budget_examples, self.stage_examples, keep_paused)

    @cached_property
    def fresh(self) -> FreshSettings:
        """New settings of the space."""

        def start_of(named: dict[str, Any]) -> str:
            config = with_stored(self.base, named, known_models=self.check.config_of_model)
            return (settled(config) if self.settles_names else config).model_name

        return FreshSettings(self.space, self.settings.overrides, start_of)


def plan_sweep(
    settings: SweepSettings,
    *,
    find_nodes: Callable[[], Sequence[Node] | None] = lambda: None,
    dry_run: bool = False,
    machine: Machine | None = None,
    begun: Mapping[str, Any] | None = None,
) -> SweepPlan:
    """Resolves and checks everything that can be known before a trial runs.

    Args:
        find_nodes: those of the cluster that the sweep runs on, asked once the flags are known to be right; None: this machine.
        dry_run: ``gpu_memory_gb`` may stand for a card that is not here.
        machine: None: this one.
        begun: the stored content of a sweep that goes on: its examples are those that were planned then.

    Raises:
        UserError: a flag's value, the data, the space, or a budget that does not fit them.
    """
    flags = checked_flags(settings, begun)
    found = find(settings, flags, find_site(settings, find_nodes(), dry_run=dry_run, machine=machine, begun=begun), begun)
    if begun is None:
        check_batch_sizes(settings, found.check.batch_sizes)
        check_batches(found.check.configs, found.check.batch_sizes[-1], found.train)
    if found.space.name == "openclip" and found.site.device == "cpu":
        _log.info("note: the openclip models on a CPU take hours a trial; they are meant for a GPU")
    return _sized(settings, flags, found, goes_on=begun is not None)


def _sized(settings: SweepSettings, flags: CheckedFlags, found: Found, *, goes_on: bool) -> SweepPlan:
    """The plan for what was found: each trial's part of the machine, its examples, the hours and the disk."""
    check = found.check
    if settings.num_trials is None and check.num_points is not None:
        flags = flags._replace(num_trials=check.num_points)  # more would only repeat them
    num_trials = flags.num_trials
    keep_paused = flags.keep_paused
    disk = plan_disk(check.configs, num_trials, rows_of_captions(found.base, found.train), keep_paused)
    allotment, disk = _within_disk(settings, found, num_trials, disk)
    fixed = {"hardware.threads": allotment.slots.threads, **settings.overrides}
    threads = fixed["hardware.threads"]
    configs = [allotment.fitted(config.with_overrides({"hardware.threads": threads})) for config in check.configs]
    waits = flags.scheduler == FREEZE_THAW
    quota = plan_quota(
        0 if waits else settings.min_trials_per_model,
        parameter=check.model_parameter,
        models=check.choices(),
        num_trials=num_trials,
        cost=lambda choice: forward_flops(check.start_of_choice[choice]),
        start_of=check.start_of_choice,
    )
    rate, num_valid = settings.samples_per_second, len(found.valid)
    paces = model_paces(configs, allotment.at_a_time, num_valid=num_valid, stated=rate)
    course = Course(
        num_trials,
        allotment,
        check.configs,
        paces,
        flags.reduction_factor,
        flags.scheduler,
        num_points=len(found.space.points),
        quota=quota,
        decoding_s=decoding_s(configs, allotment.slots.cpus_per_trial, num_valid),
    )
    budget, stage, preset_note = plan_examples(
        settings,
        course,
        batch_sizes=check.batch_sizes,
        num_train=len(found.train),
        epochs=found.base.training.epochs,
        goes_on=goes_on,
    )
    examples = {"training.budget_examples": budget, "training.stage_examples": stage}
    if stage % found.base.training.batch_size:  # which no trial has: each draws its own
        examples["training.batch_size"] = check.batch_sizes[0]
    chosen = replace(settings, budget_examples=budget, grace_examples=stage, overrides=fixed, **flags._asdict())
    chosen = replace(chosen, min_trials_per_model=quota.min_trials if quota else 0, keep_paused=disk.keep_paused)
    return SweepPlan(
        settings=_filled_in(chosen, found),
        space=found.space,
        check=check,
        base=found.base.with_overrides({"hardware.threads": threads, **examples}),
        allotment=allotment,
        gpu=found.site.gpu,
        num_trials=num_trials,
        budget_examples=budget,
        stage_examples=stage,
        sync_every_s=60 * (_SYNC_EVERY_MINUTES if settings.sync_every is None else settings.sync_every),
        seed=flags.seed,
        rule=stopping_rule(
            flags.scheduler, stage_examples=stage, budget_examples=budget, reduction_factor=flags.reduction_factor
        ),
        quota=quota,
        num_shards=found.num_shards,
        num_train=len(found.train),
        num_valid=num_valid,
        data_fingerprint=f"{found.train.fingerprint}:{found.valid.fingerprint}",
        data=describe_data(found.train, found.valid),
        starts=facts_of_starts(check.config_of_model),
        settles_names=found.settles_names,
        course=course,
        preset_note=preset_note,
        disk=disk,
    )


def _within_disk(settings: SweepSettings, found: Found, num_trials: int, disk: DiskPlan) -> tuple[Allotment, DiskPlan]:
    """The machine divided among as many trials at a time as fit ``--disk-budget-gb``, with those that wait beside them.

    In the durable folder they wait without their states before fewer do, and fewer wait before fewer run.

    Raises:
        UserError: not even one trial fits.
    """
    configs = found.check.configs
    allotment = wanted = found.site.divide(configs, settings, num_trials)
    if settings.disk_budget_gb is None:
        return allotment, disk

    def needed_gb() -> float:
        needed = disk.local_bytes if settings.scratch is None else disk.durable_bytes
        return needed(allotment.most_at_a_time(configs)) / GB

    if settings.scratch is not None and needed_gb() > settings.disk_budget_gb:
        disk = replace(disk, keeps_paused_states=False)
    while settings.keep_paused is None and disk.keep_paused and needed_gb() > settings.disk_budget_gb:
        disk = replace(disk, keep_paused=disk.keep_paused - 1)
    while needed_gb() > settings.disk_budget_gb:
        if allotment.slots.count == 1:
            raise UserError(
                f"--disk-budget-gb {settings.disk_budget_gb:g} is too little: one trial at a time takes up to "
                f"{needed_gb():.1f} GB; raise it, "
                " or choose smaller models or frozen towers (--set clip_model=..., --set freeze.text_tower=true)"
            )
        allotment = found.site.divide(configs, replace(settings, max_concurrent=allotment.slots.count - 1), num_trials)
    if allotment is wanted:
        return allotment, disk
    cut = f"{wanted.slots.count} trials at a time would need more than --disk-budget-gb {settings.disk_budget_gb:g}"
    return replace(allotment, cuts=(*allotment.cuts, f"{cut}: {allotment.slots.count}")), disk


def _filled_in(settings: SweepSettings, found: Found) -> SweepSettings:
    """As they are recorded: for a later life of the sweep, which may be started from another folder."""
    space, gpu = found.space, found.site.gpu
    return replace(
        settings,
        data=str(found.base.dataset_dir) if settings.data else None,
        space=space.name if space.file.parent == SPACES_DIR else str(space.file),
        gpu_memory_gb=settings.gpu_memory_gb if gpu is None else gpu.card.memory_bytes / GB,
        warm_start=absolute(settings.warm_start) if settings.warm_start else None,
        device=found.site.device,
        scratch=absolute(settings.scratch) if settings.scratch else None,
        sync_every=_SYNC_EVERY_MINUTES if settings.sync_every is None else settings.sync_every,
    )
