"""What a sweep will do, worked out and checked before anything is started."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna

from fashionclip_tune.config import ProjectConfig
from fashionclip_tune.dataset import run_shards
from fashionclip_tune.errors import UserError
from fashionclip_tune.machine import Machine, this_machine
from fashionclip_tune.precision import choose_device
from fashionclip_tune.tuning.allotment import Allotment, allot, with_default_freeze
from fashionclip_tune.tuning.budget import plan_budget
from fashionclip_tune.tuning.changes import describe_data
from fashionclip_tune.tuning.disk import DiskPlan, plan_disk
from fashionclip_tune.tuning.forecast import Course, Forecast, forecast
from fashionclip_tune.tuning.owned import refuse_owned, refuse_shared, require_positive
from fashionclip_tune.tuning.presets import preset_budget, preset_trials
from fashionclip_tune.tuning.quota import ModelQuota, plan_quota
from fashionclip_tune.tuning.rates import model_paces
from fashionclip_tune.tuning.resources import Node, Slots, cluster_nodes, plan_cluster_slots
from fashionclip_tune.tuning.shares import GB, Card, GpuMemory, find_card
from fashionclip_tune.tuning.source import data_location, load_data
from fashionclip_tune.tuning.space import SPACES_DIR, SearchSpace, SpaceCheck, check_space, load_space
from fashionclip_tune.tuning.stopping_rule import StoppingRule, check_scheduler, stopping_rule

_MAX_STARTUP_TRIALS = 10
_SYNC_EVERY_MINUTES = 15.0
_HERE = ("gpus_per_trial", "gpu_memory_gb", "samples_per_second")
# Flags that a resumed sweep keeps.
_KEPT = (
    *("num_trials", "min_trials_per_model", "seed", "budget_examples", "scheduler", "grace_examples", "reduction_factor"),
    "preset",
)
_READING = ("allow_remote", "scratch", "scratch_gb")


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """A sweep as its flags say; None: chosen by ``plan_sweep``, which returns them all filled in."""

    data: str | None = None
    """Folder of shards; None: the embedded synthetic garments."""
    space: str | None = None
    num_trials: int | None = None
    max_concurrent: int | None = None
    seed: int | None = None
    budget_examples: int | None = None
    scheduler: str | None = None
    grace_examples: int | None = None
    reduction_factor: int | None = None
    min_trials_per_model: int | None = None
    warm_start: str | None = None
    """Folder of an older sweep whose trials come first; None: none."""
    gpus_per_trial: float | None = None
    gpu_memory_gb: float | None = None
    """Of a card, at most, in 10**9 bytes; None: all that it has."""
    preset: str | None = None
    time_budget: float | None = None
    """Minutes, of this run of the program; never taken over from an earlier one."""
    samples_per_second: float | None = None
    """A trial's training rate as the user states it; None: measured or estimated."""
    device: str | None = None
    allow_remote: bool | None = None
    scratch: str | None = None
    scratch_gb: float | None = None
    sync_every: float | None = None
    disk_budget_gb: float | None = None
    """Of the sweep's folder in the results."""
    address: str | None = None
    """Of a running Ray cluster; None: this machine."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Of ``--set``: hold for all trials, whatever the space says."""

    def resumed(self, given: "SweepSettings", name: str) -> "SweepSettings":
        """These settings of a sweep that goes on, with what may change: where its data lies, and how much runs at a time.

        Raises:
            UserError: another flag was given that differs from what the sweep was started with.
        """
        for flag in _KEPT:
            now, before = getattr(given, flag), getattr(self, flag)
            if now is not None and now != before:
                raise _differs(name, "--" + flag.replace("_", "-"), before, now)
        if given.device not in (None, "auto", self.device):
            raise _differs(name, "--device", self.device, given.device)
        if given.space is not None and self.space is not None and load_space(given.space).file != load_space(self.space).file:
            raise _differs(name, "--space", self.space, given.space)
        if given.warm_start is not None and _absolute(given.warm_start) != self.warm_start:
            raise _differs(name, "--warm-start", self.warm_start, given.warm_start)
        for path, value in given.overrides.items():
            if self.overrides.get(path) != value:
                raise _differs(name, "--set", f"{path}={self.overrides.get(path)}", f"{path}={value}")
        may_change = ("data", "max_concurrent", *_HERE, "sync_every", "disk_budget_gb", "address", *_READING)
        changes = {flag: getattr(given, flag) for flag in may_change if getattr(given, flag) is not None}
        return replace(self, **changes, time_budget=given.time_budget)


def _differs(name: str, flag: str, before: object, now: object) -> UserError:
    return UserError(f"sweep {name} was started with {flag} {before}, not {now}: a resumed sweep keeps its settings")


@dataclass(frozen=True)
class SweepPlan:
    """A sweep that can be started: everything is found, checked and sized."""

    settings: SweepSettings
    space: SearchSpace
    check: SpaceCheck
    base: ProjectConfig
    allotment: Allotment
    gpu: GpuMemory | None
    num_trials: int
    seed: int
    rule: StoppingRule
    quota: ModelQuota | None
    num_shards: int
    num_train: int
    num_valid: int
    data_fingerprint: str
    data: Mapping[str, Any]
    """As ``describe_data`` makes it."""
    forecast: Forecast
    preset_note: str
    disk: DiskPlan

    @property
    def slots(self) -> Slots:
        return self.allotment.slots

    def draw(self, trial: optuna.Trial) -> dict[str, Any]:
        """A trial's settings as they are recorded: what the space drew and ``--set`` fixed, model and loss always."""
        drawn = self.space.draw(trial)
        refuse_shared(drawn, f"space {self.space.file}")
        config = self.build({**drawn, **self.settings.overrides})
        fixed = [path for path in self.settings.overrides if path != "hardware.threads"]
        paths = dict.fromkeys(["clip_model", "loss_function", *drawn, *fixed])
        flat = config.to_dict()
        if config.freeze != self.base.freeze:  # a default for the card, which a resumed sweep may not find again
            paths["freeze.token_embedding"] = None
        return {path: flat[path] for path in paths}

    def build(self, settings: Mapping[str, Any]) -> ProjectConfig:
        """The configuration of a trial with these settings."""
        given = {**self.space.base, **self.settings.overrides, **settings}
        config = with_default_freeze(self.base.with_overrides(settings), self.gpu, given)
        return self.allotment.fitted(config)

    @property
    def fitted_configs(self) -> list[ProjectConfig]:
        """Of the draws with which the space was checked, as trials would run them."""
        return [self.allotment.fitted(config.with_overrides(self.settings.overrides)) for config in self.check.configs]

    @property
    def sync_every_s(self) -> float:
        assert self.settings.sync_every is not None
        return 60 * self.settings.sync_every

    @property
    def may_end_at(self) -> tuple[int, ...]:
        """Examples seen at which a trial may come to its end."""
        assert self.base.training.budget_examples is not None
        return (*self.rule.rungs, self.base.training.budget_examples)

    @cached_property
    def num_startup_trials(self) -> int:
        """Random trials before TPE takes over: a third of the sweep, at most Optuna's ten."""
        return min(_MAX_STARTUP_TRIALS, math.ceil(self.num_trials / 3))


def plan_sweep(
    settings: SweepSettings, say: Callable[[str], None], *, dry_run: bool = False, machine: Machine | None = None
) -> SweepPlan:
    """Resolves and checks everything that can be known before a trial runs.

    Args:
        dry_run: ``gpu_memory_gb`` may stand for a card that is not here.
        machine: None: this one.

    Raises:
        UserError: a flag's value, the data, the space, or a budget that does not fit them.
    """
    scheduler, reduction_factor, num_trials, seed = _checked_flags(settings)
    nodes = cluster_nodes(settings.address) if settings.address is not None else None
    card = find_card(settings.gpu_memory_gb, may_be_imaginary=dry_run)
    device = _device(settings.device or "auto", nodes, card if settings.device == "cuda" else None)
    gpu = GpuMemory(card) if device == "cuda" and card is not None and nodes is None else None
    space = load_space(settings.space or ("tiny" if device == "cpu" else "openclip"))
    data_dir = data_location(settings.data)
    scratch = str(Path(settings.scratch).absolute()) if settings.scratch else None
    reading = {"allow_remote": settings.allow_remote, "scratch": scratch, "scratch_gb": settings.scratch_gb}
    owned: dict[str, Any] = {"device": device, "dataset_root": data_dir, "training.seed": seed}
    owned |= {f"reading.{name}": value for name, value in reading.items() if value is not None}
    base = _base_config(settings, space, owned)

    shards = run_shards(base)
    train, valid = load_data(base, shards, say)

    def build(drawn: dict[str, Any]) -> ProjectConfig:
        refuse_shared(drawn, f"space {space.file}")
        given = {**space.base, **drawn, **settings.overrides}
        return with_default_freeze(base.with_overrides({**drawn, **settings.overrides}), gpu, given)

    check = check_space(space, build, seed)
    largest = check.batch_sizes[-1]
    if largest > len(train):
        raise UserError(f"training.batch_size = {largest} is more than the {len(train)} photos to train on in {data_dir}")
    wanted: dict[str, Any] = {
        "device": device,
        "num_trials": num_trials,
        "max_concurrent": settings.max_concurrent,
        "gpus_per_trial": settings.gpus_per_trial,
    }
    if nodes is None:
        allotment = allot(check.configs, machine=machine or this_machine(), gpu=gpu, **wanted)
    else:
        slots = plan_cluster_slots(nodes, **wanted)
        allotment = Allotment(slots, this_machine(), None, None, settings.gpus_per_trial)
    fixed = {"hardware.threads": allotment.slots.threads, **settings.overrides}
    base = base.with_overrides({"hardware.threads": fixed["hardware.threads"]})
    sizes: dict[str, Any] = {"batch_sizes": check.batch_sizes, "num_train": len(train)}
    budget, stage = plan_budget(
        settings.budget_examples,
        settings.grace_examples,
        epochs=base.training.epochs,
        reduction_factor=reduction_factor,
        **sizes,
    )
    quota = plan_quota(
        settings.min_trials_per_model,
        parameter=check.model_parameter,
        models=check.models_by_cost(),
        num_trials=num_trials,
    )
    paces = model_paces(
        [allotment.fitted(config.with_overrides(fixed)) for config in check.configs],
        allotment.at_a_time,
        num_valid=len(valid),
        stated=settings.samples_per_second,
        say=say,
    )
    course = Course(num_trials, allotment, check.configs, paces, reduction_factor, scheduler)
    preset_note = ""
    if settings.preset is not None and settings.budget_examples is None and settings.grace_examples is None:
        budget, stage, preset_note = preset_budget(settings.preset, course, **sizes)
    base = base.with_overrides({"training.budget_examples": budget, "training.stage_examples": stage})
    if space.name == "openclip" and device == "cpu":
        say("note: the openclip models on a CPU take hours a trial; they are meant for a GPU")
    filled_in = replace(
        settings,
        data=str(data_dir) if settings.data else None,
        space=space.name if space.file.parent == SPACES_DIR else str(space.file),
        num_trials=num_trials,
        seed=seed,
        budget_examples=budget,
        scheduler=scheduler,
        grace_examples=stage,
        reduction_factor=reduction_factor,
        gpu_memory_gb=settings.gpu_memory_gb if gpu is None else gpu.card.memory_bytes / GB,
        min_trials_per_model=quota.min_trials if quota else 0,
        warm_start=_absolute(settings.warm_start) if settings.warm_start else None,
        device=device,
        scratch=scratch,
        sync_every=_SYNC_EVERY_MINUTES if settings.sync_every is None else settings.sync_every,
        overrides=fixed,
    )
    return SweepPlan(
        settings=filled_in,
        space=space,
        check=check,
        base=base,
        allotment=allotment,
        gpu=gpu,
        num_trials=num_trials,
        seed=seed,
        rule=stopping_rule(scheduler, stage_examples=stage, budget_examples=budget, reduction_factor=reduction_factor),
        quota=quota,
        num_shards=len(shards.train) + len(shards.valid),
        num_train=len(train),
        num_valid=len(valid),
        data_fingerprint=f"{train.fingerprint}:{valid.fingerprint}",
        data=describe_data(train, valid),
        forecast=forecast(course, budget, stage),
        preset_note=preset_note,
        disk=plan_disk([allotment.fitted(config.with_overrides(fixed)) for config in check.configs], num_trials),
    )


def _device(wanted: str, nodes: Sequence[Node] | None, imaginary: Card | None) -> str:
    if wanted not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {wanted!r} is not allowed: auto, cpu or cuda (CUDA_VISIBLE_DEVICES chooses GPUs)")
    if nodes is not None and wanted == "auto":
        return "cuda" if any(node.gpus for node in nodes) else "cpu"
    if nodes is not None or imaginary is not None:
        return wanted
    return choose_device(wanted).type


def _absolute(folder: str) -> str:
    return str(Path(folder).absolute())


def _base_config(settings: SweepSettings, space: SearchSpace, owned: Mapping[str, Any]) -> ProjectConfig:
    """What all trials share. Later ones win: defaults of a sweep, the space's BASE, ``--set``, what flags own."""
    refuse_owned(space.base, f"BASE of {space.file}")
    refuse_owned(settings.overrides, "--set")
    base = ProjectConfig().with_overrides({"training.checkpoint_minutes": 0, **space.base, **settings.overrides, **owned})
    return base.with_overrides({"model.cache_dir": base.model_cache_dir.absolute()})


def _checked_flags(settings: SweepSettings) -> tuple[str, int, int, int]:
    scheduler = settings.scheduler or "asha"
    check_scheduler(scheduler)
    reduction_factor = 3 if settings.reduction_factor is None else settings.reduction_factor
    if reduction_factor < 2:
        raise UserError(f"--reduction-factor {reduction_factor} is not allowed: at least 2")
    num_trials = preset_trials(settings.preset) if settings.num_trials is None else settings.num_trials
    if num_trials < 1:
        raise UserError(f"--num-trials {num_trials} is not allowed: at least 1")
    if settings.sync_every is not None and settings.sync_every < 0:
        raise UserError(f"--sync-every {settings.sync_every:g} is not allowed: minutes, at least 0")
    for flag, value, unit in (
        ("--gpu-memory-gb", settings.gpu_memory_gb, "GB of one card"),
        ("--time-budget", settings.time_budget, "minutes"),
        ("--samples-per-second", settings.samples_per_second, "a trial's training rate"),
    ):
        require_positive(flag, value, unit)
    seed = settings.seed or 0
    if seed < 0:
        raise UserError(f"--seed {seed} is not allowed: at least 0")
    return scheduler, reduction_factor, num_trials, seed
