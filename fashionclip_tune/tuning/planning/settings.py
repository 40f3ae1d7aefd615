"""A sweep as its flags say it: what may be said, what flags own, presets."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.config.start_names import HUB_PREFIX
from fashionclip_tune.errors import UserError
from fashionclip_tune.evaluation.metric import DEFAULT_METRIC, Metric, metric_named
from fashionclip_tune.storage.urls import scheme_of
from fashionclip_tune.tuning.planning.space import SearchSpace
from fashionclip_tune.tuning.schedulers import BEGUN_ASHA, FREEZE_THAW, check_scheduler

# Equal budgets are what makes trials comparable, and the slots are planned for one device.
_OWNED_BY_FLAGS = {
    "training.budget_examples": "--budget-examples",
    "training.max_steps": "--budget-examples",
    "training.stage_examples": "--grace-examples",
    "training.checkpoint_interval": "--grace-examples",
    "training.seed": "--seed",
    "device": "--device",
    "hardware.device_share": "--gpus-per-trial",
    "dataset_root": "--data",
    "reading.allow_remote": "--allow-remote",
    "reading.scratch": "--scratch",
    "reading.scratch_gb": "--scratch-gb",
}


def refuse_owned(settings: Mapping[str, Any], where: str) -> None:
    for path, flag in _OWNED_BY_FLAGS.items():
        if path in settings:
            raise UserError(f"{where} sets {path}, which is the same for all trials of a sweep: use {flag}")


def refuse_shared(drawn: Mapping[str, Any], where: str) -> None:
    refuse_owned(drawn, where)
    if "training.epochs" in drawn:
        raise UserError(f"{where} draws training.epochs, the same for all trials of a sweep: use BASE or --budget-examples")
    if "evaluation.protocol" in drawn:
        raise UserError(f"{where} draws evaluation.protocol, the same for all trials of a sweep: use BASE or --set")


def require_positive(flag: str, value: float | None, unit: str) -> None:
    if value is not None and not value > 0:
        raise UserError(f"{flag} {value:g} is not allowed: {unit}, above 0")


_DEFAULT_TRIALS = 16


@dataclass(frozen=True)
class Preset:
    num_trials: int
    first_rung: int
    """Examples; the second rung has three times as many, the budget nine times."""
    hours: float
    """Where the known rates need more, the rungs come closer."""


PRESETS = {
    "quick": Preset(8, 1_800, 0.5),
    "evening": Preset(30, 16_000, 6.0),
    "night": Preset(30, 29_000, 11.0),
}


def preset_trials(name: str | None) -> int:
    """Raises UserError where there is no such preset."""
    if name is None:
        return _DEFAULT_TRIALS
    if name not in PRESETS:
        raise UserError(f"--preset {name!r} is not allowed: {', '.join(PRESETS)}")
    return PRESETS[name].num_trials


# Flags that a resumed sweep keeps; of trials it may get more.
_KEPT = (
    *("num_trials", "min_trials_per_model", "keep_paused", "seed", "budget_examples", "scheduler", "grace_examples"),
    *("reduction_factor", "preset", "metric"),
)
# Flags that belong to the machine at hand.
_MAY_CHANGE = (
    *("data", "max_concurrent", "gpus_per_trial", "gpu_memory_gb", "samples_per_second", "sync_every", "disk_budget_gb"),
    *("address", "allow_remote", "scratch", "scratch_gb"),
)
HERE = "local"
"""As an address: this machine alone, where a sweep that goes on was on a cluster before."""


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
    metric: str | None = None
    """What of a trial's last evaluation is maximised: a name of ``METRICS``."""
    grace_examples: int | None = None
    reduction_factor: int | None = None
    min_trials_per_model: int | None = None
    keep_paused: int | None = None
    """Trials of each start that may wait at a time; None: three, or as many as the disk budget leaves room for."""
    warm_start: str | None = None
    """Folder of an older sweep, or its address, whose trials come first; None: none."""
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
    """Of a running Ray cluster; None, or ``local``: this machine."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Of ``--set``: hold for all trials, whatever the space says."""

    def __post_init__(self) -> None:
        """What ``--set`` says of places is recorded by where they are: a sweep may go on from another folder."""
        named = {path: self.overrides[path] for path in ("clip_model", "model.pretrained") if path in self.overrides}
        known = ProjectConfig().with_overrides(named).to_dict()
        places = {path: known[path] for path in named if known[path] is not None}
        object.__setattr__(self, "overrides", {**self.overrides, **places})

    @property
    def maximised(self) -> Metric:
        """Raises UserError for a metric that is not there."""
        return metric_named(self.metric or DEFAULT_METRIC.name)

    @property
    def cluster(self) -> str | None:
        """The address, where it is not this machine."""
        return None if self.address == HERE else self.address

    def resumed(self, given: "SweepSettings", name: str) -> "SweepSettings":
        """These settings of a sweep that goes on, with what may change: where its data lies, and how much runs at a time.

        These settings come from a file, which may be anyone's: what reaches out counts only where it is given.

        Raises:
            UserError: another flag was given that differs from what the sweep was started with, or one was not that reaches
                out.
        """
        for flag in _KEPT:
            now, before = getattr(given, flag), getattr(self, flag)
            is_extended = flag == "num_trials" and None not in (now, before) and now > before
            if now is not None and now != before and not is_extended:
                raise _differs(name, "--" + flag.replace("_", "-"), before, now)
        if given.device not in (None, "auto", self.device):
            raise _differs(name, "--device", self.device, given.device)
        # The same file may lie elsewhere now: that its content is the same is checked like the data's.
        space = given.space if _is_file(given.space) and _is_file(self.space) else self.space
        if given.space is not None and self.space is not None and given.space != space:
            raise _differs(name, "--space", self.space, given.space)
        if given.warm_start is not None and absolute(given.warm_start) != self.warm_start:
            raise _differs(name, "--warm-start", self.warm_start, given.warm_start)
        for path, value in given.overrides.items():
            if path not in self.overrides:
                raise _differs(name, "--set", None, f"{path}={value}")
            if self.overrides[path] != value:
                raise _differs(name, "--set", f"{path}={self.overrides[path]}", f"{path}={value}")
        self._check_said_again(given, name)
        changes = {flag: getattr(given, flag) for flag in (*_MAY_CHANGE, "num_trials") if getattr(given, flag) is not None}
        changes |= {"address": given.cluster, "allow_remote": given.allow_remote}
        return replace(self, **changes, space=space, time_budget=given.time_budget)

    def _check_said_again(self, given: "SweepSettings", name: str) -> None:
        how = "what reaches out is not taken from its files: give this flag again"
        if self.cluster is not None and given.address is None:
            raise UserError(
                f"sweep {name} was started with --address {self.address}, and {how}, or --address {HERE} to go on with it "
                "on this machine"
            )
        model = self.overrides.get("clip_model")
        if _is_elsewhere(model) and given.overrides.get("clip_model") != model and not given.allow_remote:
            raise UserError(f"sweep {name} was started with --set clip_model={model}, and {how}")
        if self.warm_start is not None and scheme_of(self.warm_start) is not None and given.warm_start is None:
            raise UserError(f"sweep {name} was started with --warm-start {self.warm_start}, and {how}")

    def flags_to_go_on(self) -> list[str]:
        """What is to be said again for a later run of the sweep to have these settings: what is this machine's, or this run's.

        The rest is recorded with the sweep, and ``resumed`` keeps it.
        """
        again = {flag: getattr(self, flag) for flag in (*_MAY_CHANGE, "time_budget")}
        if self.scratch is None:
            del again["sync_every"]
        if _is_file(self.space):
            again["space"] = self.space
        if self.warm_start is not None and scheme_of(self.warm_start) is not None:
            again["warm_start"] = self.warm_start
        words: list[str] = []
        for flag, value in again.items():
            if value is not None and value is not False:
                words += ["--" + flag.replace("_", "-"), *([] if value is True else [str(value).removesuffix(".0")])]
        if _is_elsewhere(model := self.overrides.get("clip_model")):
            words += ["--set", f"clip_model={model}"]
        return words


def stored_settings(saved: Mapping[str, Any], name: str) -> SweepSettings:
    """What a sweep's file says; of use through ``resumed`` only.

    Raises:
        UserError: it is of another version, or damaged.
    """
    try:
        return SweepSettings(**{"metric": DEFAULT_METRIC.name, **saved})  # before there was a choice
    except TypeError as error:
        raise UserError(f"the settings that are recorded with sweep {name} are not of this version ({error})") from error


def _is_elsewhere(model: object) -> bool:
    return str(model).startswith(HUB_PREFIX)


def _is_file(space: str | None) -> bool:
    return space is not None and space.endswith(".py")


def _differs(name: str, flag: str, before: object, now: object) -> UserError:
    if before is None:
        return UserError(f"sweep {name} was started without {flag} {now}: a resumed sweep keeps its settings")
    return UserError(f"sweep {name} was started with {flag} {before}, not {now}: a resumed sweep keeps its settings")


_KEEP_PAUSED = 3


class CheckedFlags(NamedTuple):
    """What is chosen by the flags alone, before machine and data are looked at."""

    scheduler: str
    reduction_factor: int
    num_trials: int
    seed: int
    keep_paused: int
    metric: str


def checked_flags(settings: SweepSettings, begun: Mapping[str, Any] | None = None) -> CheckedFlags:
    """Raises UserError for a value that no machine and no data would make right. ``begun``: as for ``plan_sweep``."""
    scheduler = settings.scheduler or FREEZE_THAW
    check_scheduler(scheduler)
    if begun is not None and "search" not in begun and scheduler == FREEZE_THAW:
        scheduler = BEGUN_ASHA  # what it meant when the sweep began
    reduction_factor = 3 if settings.reduction_factor is None else settings.reduction_factor
    if reduction_factor < 2:
        raise UserError(f"--reduction-factor {reduction_factor} is not allowed: at least 2")
    num_trials = preset_trials(settings.preset) if settings.num_trials is None else settings.num_trials
    if num_trials < 1:
        raise UserError(f"--num-trials {num_trials} is not allowed: at least 1")
    if scheduler == FREEZE_THAW and settings.min_trials_per_model:
        raise UserError(
            f"--min-trials-per-model {settings.min_trials_per_model} is not allowed with --scheduler {FREEZE_THAW}, whose "
            "model shares trials out: leave it out, or choose another scheduler"
        )
    if settings.keep_paused is not None and settings.keep_paused < 0:
        raise UserError(f"--keep-paused {settings.keep_paused} is not allowed: at least 0")
    if settings.keep_paused and scheduler != FREEZE_THAW:
        raise UserError(f"--keep-paused is not allowed with --scheduler {scheduler}: its trials do not wait")
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
    keep_paused = 0 if scheduler != FREEZE_THAW else _KEEP_PAUSED if settings.keep_paused is None else settings.keep_paused
    return CheckedFlags(scheduler, reduction_factor, num_trials, seed, keep_paused, settings.maximised.name)


def absolute(folder: str) -> str:
    return str(Path(folder).absolute()) if scheme_of(folder) is None else folder


def base_config(settings: SweepSettings, space: SearchSpace, device: str, seed: int, data: Path | str) -> ProjectConfig:
    """What all trials share. Later ones win: defaults of a sweep, the space's BASE, ``--set``, what flags own."""
    refuse_owned(space.base, f"BASE of {space.file}")
    refuse_owned(settings.overrides, "--set")
    scratch = absolute(settings.scratch) if settings.scratch else None
    reading = {"allow_remote": settings.allow_remote, "scratch": scratch, "scratch_gb": settings.scratch_gb}
    owned: dict[str, Any] = {"device": device, "dataset_root": data, "training.seed": seed}
    owned |= {f"reading.{name}": value for name, value in reading.items() if value is not None}
    base = ProjectConfig().with_overrides({"training.checkpoint_minutes": 0, **space.base, **settings.overrides, **owned})
    return base.with_overrides({"model.cache_dir": _weights_cache(base)})


def _weights_cache(base: ProjectConfig) -> Path:
    """On the local disk, since the folder that a sweep is started in may be a drive's; but one that is there is used."""
    here = base.model_cache_dir.absolute()
    if base.reading.scratch is None or base.model.cache_dir is not None or here.is_dir():
        return here
    return base.reading.scratch / here.name
