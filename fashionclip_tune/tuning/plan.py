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
from fashionclip_tune.precision import choose_device
from fashionclip_tune.tuning.budget import plan_budget
from fashionclip_tune.tuning.owned import refuse_owned, refuse_shared
from fashionclip_tune.tuning.quota import ModelQuota, plan_quota
from fashionclip_tune.tuning.resources import Node, Slots, cluster_nodes, plan_cluster_slots, plan_slots
from fashionclip_tune.tuning.source import data_location, load_data
from fashionclip_tune.tuning.space import SPACES_DIR, SearchSpace, SpaceCheck, check_space, load_space
from fashionclip_tune.tuning.stopping_rule import StoppingRule, check_scheduler, stopping_rule

_MAX_STARTUP_TRIALS = 10
_SYNC_EVERY_MINUTES = 15.0
# Flags that a resumed sweep keeps.
_KEPT = ("num_trials", "min_trials_per_model", "seed", "budget_examples", "scheduler", "grace_examples", "reduction_factor")
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
    device: str | None = None
    allow_remote: bool | None = None
    scratch: str | None = None
    scratch_gb: float | None = None
    sync_every: float | None = None
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
        may_change = ("data", "max_concurrent", "gpus_per_trial", "sync_every", "address", *_READING)
        return replace(self, **{flag: getattr(given, flag) for flag in may_change if getattr(given, flag) is not None})


def _differs(name: str, flag: str, before: object, now: object) -> UserError:
    return UserError(f"sweep {name} was started with {flag} {before}, not {now}: a resumed sweep keeps its settings")


@dataclass(frozen=True)
class SweepPlan:
    """A sweep that can be started: everything is found, checked and sized."""

    settings: SweepSettings
    space: SearchSpace
    check: SpaceCheck
    base: ProjectConfig
    slots: Slots
    num_trials: int
    seed: int
    rule: StoppingRule
    quota: ModelQuota | None
    num_shards: int
    num_train: int
    num_valid: int
    data_fingerprint: str

    def draw(self, trial: optuna.Trial) -> dict[str, Any]:
        """A trial's settings as they are recorded: what the space drew and ``--set`` fixed, model and loss always."""
        drawn = self.space.draw(trial)
        refuse_shared(drawn, f"space {self.space.file}")
        config = self.build({**drawn, **self.settings.overrides})
        fixed = [path for path in self.settings.overrides if path != "hardware.threads"]
        paths = dict.fromkeys(["clip_model", "loss_function", *drawn, *fixed])
        flat = config.to_dict()
        return {path: flat[path] for path in paths}

    def build(self, settings: Mapping[str, Any]) -> ProjectConfig:
        """The configuration of a trial with these settings."""
        return self.base.with_overrides(settings)

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

    def lines(self) -> list[str]:
        """The plan for people."""
        budget, stage = self.base.training.budget_examples, self.base.training.stage_examples
        assert budget is not None
        assert stage is not None
        gpu = f", {self.slots.gpus_per_trial:g} GPU" if self.slots.gpus_per_trial else ""
        return [
            f"space:    {self.space.name}: {'; '.join(self.check.parameters)} (100 draws are valid configurations)",
            f"models:   {', '.join(self.check.config_of_model)}; losses: {', '.join(self.check.losses)}"
            + (f"; at least {self.quota.min_trials} trials each, {self.quota.models[0]} first" if self.quota else ""),
            f"data:     {self.base.dataset_dir}: {self.num_shards} shards, {self.num_train:,} photos to train on,"
            f" {self.num_valid:,} to evaluate on",
            f"trials:   {self.num_trials}, {self.slots.count} side by side, each {self.slots.cpus_per_trial:g} CPU{gpu}"
            f" on {self.base.device}",
            f"budget:   {budget:,} examples a trial ({budget / self.num_train:.1f} epochs), evaluated every {stage:,}",
            f"stopping: {self.rule}",
            f"metric:   recall_at_10, protocol {self.base.evaluation.protocol.value}",
        ]


def plan_sweep(settings: SweepSettings, say: Callable[[str], None]) -> SweepPlan:
    """Resolves and checks everything that can be known before a trial runs.

    Raises:
        UserError: a flag's value, the data, the space, or a budget that does not fit them.
    """
    scheduler, reduction_factor, num_trials, seed = _checked_flags(settings)
    if settings.device not in (None, "auto", "cpu", "cuda"):
        raise UserError(f"--device {settings.device!r} is not allowed: auto, cpu or cuda (CUDA_VISIBLE_DEVICES chooses GPUs)")
    nodes = cluster_nodes(settings.address) if settings.address is not None else None
    device = _device(settings.device or "auto", nodes)
    space = load_space(settings.space or ("tiny" if device == "cpu" else "openclip"))
    wanted: dict[str, Any] = {
        "device": device,
        "num_trials": num_trials,
        "max_concurrent": settings.max_concurrent,
        "gpus_per_trial": settings.gpus_per_trial,
    }
    slots = plan_slots(**wanted) if nodes is None else plan_cluster_slots(nodes, **wanted)
    data_dir = data_location(settings.data, say)
    scratch = str(Path(settings.scratch).absolute()) if settings.scratch else None
    reading = {"allow_remote": settings.allow_remote, "scratch": scratch, "scratch_gb": settings.scratch_gb}
    owned: dict[str, Any] = {"device": device, "dataset_root": data_dir, "training.seed": seed}
    owned["hardware.device_share"] = slots.gpus_per_trial or 1.0
    owned |= {f"reading.{name}": value for name, value in reading.items() if value is not None}
    base = _base_config(settings, space, slots, owned)
    fixed = {"hardware.threads": base.hardware.threads, **settings.overrides}

    shards = run_shards(base)
    train, valid = load_data(base, shards, say)

    def build(drawn: dict[str, Any]) -> ProjectConfig:
        refuse_shared(drawn, f"space {space.file}")
        return base.with_overrides({**drawn, **fixed})

    check = check_space(space, build, seed)
    largest = check.batch_sizes[-1]
    if largest > len(train):
        raise UserError(f"training.batch_size = {largest} is more than the {len(train)} photos to train on in {data_dir}")
    budget, stage = plan_budget(
        settings.budget_examples,
        settings.grace_examples,
        epochs=base.training.epochs,
        batch_sizes=check.batch_sizes,
        num_train=len(train),
        reduction_factor=reduction_factor,
    )
    base = base.with_overrides({"training.budget_examples": budget, "training.stage_examples": stage})
    quota = plan_quota(
        settings.min_trials_per_model,
        parameter=check.model_parameter,
        models=check.models_by_cost(),
        num_trials=num_trials,
    )
    if space.name == "openclip" and device == "cpu":
        say("note: the openclip models on a CPU take hours a trial; they are meant for a GPU")
    filled_in = replace(
        settings,
        data=str(data_dir) if settings.data else None,
        space=space.name if space.file.parent == SPACES_DIR else str(space.file),
        num_trials=num_trials,
        max_concurrent=slots.count,
        seed=seed,
        budget_examples=budget,
        scheduler=scheduler,
        grace_examples=stage,
        reduction_factor=reduction_factor,
        min_trials_per_model=quota.min_trials if quota else 0,
        warm_start=_absolute(settings.warm_start) if settings.warm_start else None,
        gpus_per_trial=slots.gpus_per_trial or None,
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
        slots=slots,
        num_trials=num_trials,
        seed=seed,
        rule=stopping_rule(scheduler, stage_examples=stage, budget_examples=budget, reduction_factor=reduction_factor),
        quota=quota,
        num_shards=len(shards.train) + len(shards.valid),
        num_train=len(train),
        num_valid=len(valid),
        data_fingerprint=f"{train.fingerprint}:{valid.fingerprint}",
    )


def _device(wanted: str, nodes: Sequence[Node] | None) -> str:
    if nodes is None:
        return choose_device(wanted).type
    if wanted == "auto":
        return "cuda" if any(node.gpus for node in nodes) else "cpu"
    return wanted


def _absolute(folder: str) -> str:
    return str(Path(folder).absolute())


def _base_config(settings: SweepSettings, space: SearchSpace, slots: Slots, owned: Mapping[str, Any]) -> ProjectConfig:
    """What all trials share. Later ones win: defaults of a sweep, the space's BASE, ``--set``, what flags own."""
    refuse_owned(space.base, f"BASE of {space.file}")
    refuse_owned(settings.overrides, "--set")
    defaults = {"training.checkpoint_minutes": 0, "hardware.threads": slots.threads}
    base = ProjectConfig().with_overrides({**defaults, **space.base, **settings.overrides, **owned})
    # A loader process a core that the training itself leaves free; on a GPU it needs little of its own.
    workers = min(base.training.num_workers, int(slots.cpus_per_trial) - (base.device == "cpu"))
    changes = {"training.num_workers": max(0, workers), "model.cache_dir": base.model_cache_dir.absolute()}
    return base.with_overrides(changes)


def _checked_flags(settings: SweepSettings) -> tuple[str, int, int, int]:
    scheduler = settings.scheduler or "asha"
    check_scheduler(scheduler)
    reduction_factor = 3 if settings.reduction_factor is None else settings.reduction_factor
    if reduction_factor < 2:
        raise UserError(f"--reduction-factor {reduction_factor} is not allowed: at least 2")
    num_trials = 16 if settings.num_trials is None else settings.num_trials
    if num_trials < 1:
        raise UserError(f"--num-trials {num_trials} is not allowed: at least 1")
    if settings.sync_every is not None and settings.sync_every < 0:
        raise UserError(f"--sync-every {settings.sync_every:g} is not allowed: minutes, at least 0")
    seed = settings.seed or 0
    if seed < 0:
        raise UserError(f"--seed {seed} is not allowed: at least 0")
    return scheduler, reduction_factor, num_trials, seed
