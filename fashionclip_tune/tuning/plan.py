"""What a sweep will do, worked out and checked before anything is started."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna

from fashionclip_tune.config import ProjectConfig
from fashionclip_tune.dataset import run_shards
from fashionclip_tune.errors import UserError
from fashionclip_tune.precision import choose_device
from fashionclip_tune.tuning import asha
from fashionclip_tune.tuning.budget import plan_budget
from fashionclip_tune.tuning.changes import describe_data
from fashionclip_tune.tuning.resources import Slots, plan_slots
from fashionclip_tune.tuning.source import data_location, load_data
from fashionclip_tune.tuning.space import SPACES_DIR, SearchSpace, SpaceCheck, check_space, load_space

SCHEDULERS = ("asha", "none")
_MAX_STARTUP_TRIALS = 10
_READING = ("allow_remote", "scratch", "scratch_gb")
# Equal budgets are what makes trials comparable, and the slots are planned for one device.
_OWNED_BY_FLAGS = {
    "training.budget_examples": "--budget-examples",
    "training.max_steps": "--budget-examples",
    "training.stage_examples": "--grace-examples",
    "training.checkpoint_interval": "--grace-examples",
    "training.seed": "--seed",
    "device": "--device",
    "dataset_root": "--data",
    "reading.allow_remote": "--allow-remote",
    "reading.scratch": "--scratch",
    "reading.scratch_gb": "--scratch-gb",
}


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
    gpus_per_trial: float | None = None
    device: str | None = None
    allow_remote: bool | None = None
    scratch: str | None = None
    scratch_gb: float | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Of ``--set``: hold for all trials, whatever the space says."""

    def resumed(self, given: "SweepSettings", name: str) -> "SweepSettings":
        """These settings of a sweep that goes on, with what may change: where its data lies, and how much runs at a time.

        Raises:
            UserError: another flag was given that differs from what the sweep was started with.
        """
        for flag in ("num_trials", "seed", "budget_examples", "scheduler", "grace_examples", "reduction_factor"):
            now, before = getattr(given, flag), getattr(self, flag)
            if now is not None and now != before:
                raise _differs(name, "--" + flag.replace("_", "-"), before, now)
        if given.device not in (None, "auto", self.device):
            raise _differs(name, "--device", self.device, given.device)
        if given.space is not None and self.space is not None and load_space(given.space).file != load_space(self.space).file:
            raise _differs(name, "--space", self.space, given.space)
        for path, value in given.overrides.items():
            if self.overrides.get(path) != value:
                raise _differs(name, "--set", f"{path}={self.overrides.get(path)}", f"{path}={value}")
        may_change = ("data", "max_concurrent", "gpus_per_trial", *_READING)
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
    rung_levels: tuple[int, ...]
    reduction_factor: int
    num_shards: int
    num_train: int
    num_valid: int
    data_fingerprint: str
    data: Mapping[str, Any]
    """As ``describe_data`` makes it."""

    def draw(self, trial: optuna.Trial) -> dict[str, Any]:
        """A trial's settings as they are recorded: what the space drew and ``--set`` fixed, model and loss always."""
        drawn = self.space.draw(trial)
        _refuse_shared(drawn, f"space {self.space.file}")
        config = self.build({**drawn, **self.settings.overrides})
        fixed = [path for path in self.settings.overrides if path != "hardware.threads"]
        paths = dict.fromkeys(["clip_model", "loss_function", *drawn, *fixed])
        flat = config.to_dict()
        return {path: flat[path] for path in paths}

    def build(self, settings: Mapping[str, Any]) -> ProjectConfig:
        """The configuration of a trial with these settings."""
        return self.base.with_overrides(settings)

    @cached_property
    def num_startup_trials(self) -> int:
        """Random trials before TPE takes over: a third of the sweep, at most Optuna's ten."""
        return min(_MAX_STARTUP_TRIALS, math.ceil(self.num_trials / 3))

    def lines(self) -> list[str]:
        """The plan for people."""
        budget, stage = self.base.training.budget_examples, self.base.training.stage_examples
        assert budget is not None
        assert stage is not None
        stopping = "none: every trial runs to its budget"
        if self.rung_levels:
            rungs = ", ".join(f"{rung:,}" for rung in self.rung_levels)
            stopping = f"{self.settings.scheduler}, rungs at {rungs} examples, the best 1/{self.reduction_factor} go on"
        gpu = f", {self.slots.gpus_per_trial:g} GPU" if self.slots.gpus_per_trial else ""
        return [
            f"space:    {self.space.name}: {'; '.join(self.check.parameters)} (100 draws are valid configurations)",
            f"models:   {', '.join(self.check.config_of_model)}; losses: {', '.join(self.check.losses)}",
            f"data:     {self.base.dataset_dir}: {self.num_shards} shards, {self.num_train:,} photos to train on,"
            f" {self.num_valid:,} to evaluate on",
            f"trials:   {self.num_trials}, {self.slots.count} side by side, each {self.slots.cpus_per_trial:g} CPU{gpu}"
            f" on {self.base.device}",
            f"budget:   {budget:,} examples a trial ({budget / self.num_train:.1f} epochs), evaluated every {stage:,}",
            f"stopping: {stopping}",
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
    device = choose_device(settings.device or "auto").type
    space = load_space(settings.space or ("tiny" if device == "cpu" else "openclip"))
    slots = plan_slots(
        device=device,
        num_trials=num_trials,
        max_concurrent=settings.max_concurrent,
        gpus_per_trial=settings.gpus_per_trial,
    )
    data_dir = data_location(settings.data, say)
    scratch = str(Path(settings.scratch).absolute()) if settings.scratch else None
    reading = {"allow_remote": settings.allow_remote, "scratch": scratch, "scratch_gb": settings.scratch_gb}
    owned: dict[str, Any] = {"device": device, "dataset_root": data_dir, "training.seed": seed}
    owned |= {f"reading.{name}": value for name, value in reading.items() if value is not None}
    base = _base_config(settings, space, slots, owned)
    fixed = {"hardware.threads": base.hardware.threads, **settings.overrides}

    shards = run_shards(base)
    train, valid = load_data(base, shards, say)

    def build(drawn: dict[str, Any]) -> ProjectConfig:
        _refuse_shared(drawn, f"space {space.file}")
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
        gpus_per_trial=slots.gpus_per_trial or None,
        device=device,
        scratch=scratch,
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
        reduction_factor=reduction_factor,
        num_shards=len(shards.train) + len(shards.valid),
        rung_levels=tuple(asha.rungs(stage, budget, reduction_factor)) if scheduler == "asha" else (),
        num_train=len(train),
        num_valid=len(valid),
        data_fingerprint=f"{train.fingerprint}:{valid.fingerprint}",
        data=describe_data(train, valid),
    )


def _base_config(settings: SweepSettings, space: SearchSpace, slots: Slots, owned: Mapping[str, Any]) -> ProjectConfig:
    """What all trials share. Later ones win: defaults of a sweep, the space's BASE, ``--set``, what flags own."""
    _refuse_owned(space.base, f"BASE of {space.file}")
    _refuse_owned(settings.overrides, "--set")
    defaults = {"training.checkpoint_minutes": 0, "hardware.threads": slots.threads}
    base = ProjectConfig().with_overrides({**defaults, **space.base, **settings.overrides, **owned})
    # A loader process a core that the training itself leaves free; on a GPU it needs little of its own.
    workers = min(base.training.num_workers, int(slots.cpus_per_trial) - (base.device == "cpu"))
    changes = {"training.num_workers": max(0, workers), "model.cache_dir": base.model_cache_dir.absolute()}
    return base.with_overrides(changes)


def _refuse_owned(settings: Mapping[str, Any], where: str) -> None:
    for path, flag in _OWNED_BY_FLAGS.items():
        if path in settings:
            raise UserError(f"{where} sets {path}, which is the same for all trials of a sweep: use {flag}")


def _refuse_shared(drawn: Mapping[str, Any], where: str) -> None:
    _refuse_owned(drawn, where)
    if "training.epochs" in drawn:
        raise UserError(f"{where} draws training.epochs, the same for all trials of a sweep: use BASE or --budget-examples")
    if "evaluation.protocol" in drawn:
        raise UserError(f"{where} draws evaluation.protocol, the same for all trials of a sweep: use BASE or --set")


def _checked_flags(settings: SweepSettings) -> tuple[str, int, int, int]:
    scheduler = settings.scheduler or "asha"
    if scheduler not in SCHEDULERS:
        raise UserError(f"--scheduler {scheduler!r} is not allowed: {' or '.join(SCHEDULERS)}")
    reduction_factor = 3 if settings.reduction_factor is None else settings.reduction_factor
    if reduction_factor < 2:
        raise UserError(f"--reduction-factor {reduction_factor} is not allowed: at least 2")
    num_trials = 16 if settings.num_trials is None else settings.num_trials
    if num_trials < 1:
        raise UserError(f"--num-trials {num_trials} is not allowed: at least 1")
    seed = settings.seed or 0
    if seed < 0:
        raise UserError(f"--seed {seed} is not allowed: at least 0")
    return scheduler, reduction_factor, num_trials, seed
