"""Disk of a sweep, planned before it starts and watched while it runs (``--disk-budget-gb``)."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

from fashionclip_tune.config.options import FreezeConfig
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.models.architecture import without_numbers
from fashionclip_tune.models.towers import prepare_towers
from fashionclip_tune.storage.checkpoint import STATE_NAME, WEIGHTS_NAME, keep_newest
from fashionclip_tune.storage.folder import DurableFolder
from fashionclip_tune.training.callbacks import RoomFor, any_room
from fashionclip_tune.tuning.planning.gpu_memory import GB, is_described_here, weights_bytes

KEPT_PER_MODEL = 3
"""Ended trials of an architecture, the best ones, that keep their weights."""
_TRIAL_BYTES = 10**6  # evaluations, queries, TensorBoard's events with their pictures
# Where a sweep runs: the last two checkpoints and the one that is being written.
_LOCAL_STATES = 3


@dataclass(frozen=True)
class ModelBytes:
    """Of one architecture in fp32: all weights, and those that are trained.

    ``copies``: what a training state has of the trained ones: Adam's two moments, and they themselves where an average of them
    is what counts.
    """

    weights: int
    trained: int
    copies: int = 2

    @property
    def state(self) -> int:
        """Of a checkpoint."""
        return self.weights + self.copies * self.trained

    @property
    def durable_state(self) -> int:
        """Without what the base model's own files hold."""
        return (1 + self.copies) * self.trained

    @property
    def durable_weights(self) -> int:
        """In half precision."""
        return self.trained // 2

    @property
    def durable_run(self) -> int:
        """Of a trial that runs, when nothing is being written."""
        return self.durable_state + self.durable_weights


@dataclass(frozen=True)
class DiskPlan:
    """Bytes at the most, of a sweep with these architectures.

    ``at_a_time``: how many trials of each run side by side. Each has its part of the machine, so that no mix of architectures
    takes more than as many as fit of the one whose trials take most together.
    """

    models: dict[str, ModelBytes]
    num_trials: int

    def local_bytes(self, at_a_time: Mapping[str, int]) -> int:
        """Where the sweep runs: whole states of running trials, weights of the best, the winner twice while it is written."""
        kept = sum(KEPT_PER_MODEL * each.weights for each in self.models.values())
        running = max(at_a_time[name] * _LOCAL_STATES * each.state for name, each in self.models.items())
        return running + kept + self.winner_bytes(is_durable=False) + self.num_trials * _TRIAL_BYTES

    def durable_bytes(self, at_a_time: Mapping[str, int]) -> int:
        """What is kept to survive: states and weights of running trials, weights of the best, the winner.

        One trial at a time has its next state beside its last, while it writes it. The winner is written when none runs.
        """
        kept = sum(KEPT_PER_MODEL * each.durable_weights for each in self.models.values())
        models = self.models.items()
        grown = max(at_a_time[name] * each.durable_run for name, each in models) + max(each.durable_state for _, each in models)
        ended = max(at_a_time[name] * each.durable_weights for name, each in models) + self.winner_bytes(is_durable=True)
        return kept + max(grown, ended) + self.num_trials * _TRIAL_BYTES

    def winner_bytes(self, *, is_durable: bool) -> int:
        """In fp32; where the sweep runs, beside the one before it until it is whole."""
        return (1 if is_durable else 2) * max(each.weights for each in self.models.values())

    @property
    def one_at_a_time(self) -> dict[str, int]:
        return dict.fromkeys(self.models, 1)


def plan_disk(configs: Iterable[ProjectConfig], num_trials: int) -> DiskPlan:
    """Of each architecture the configuration with the largest state counts."""
    models: dict[str, ModelBytes] = {}
    for config in configs:
        found = _model_bytes(config)
        if config.model_name not in models or found.state > models[config.model_name].state:
            models[config.model_name] = found
    return DiskPlan(models, num_trials)


def _model_bytes(config: ProjectConfig) -> ModelBytes:
    copies = 2 if config.optimizer.ema_decay is None else 3
    if not is_described_here(config):
        return ModelBytes(weights_bytes(config), weights_bytes(config), copies)
    return ModelBytes(*_counted(config.model_name, config.freeze), copies)


@lru_cache(maxsize=64)
def _counted(name: str, freeze: FreezeConfig) -> tuple[int, int]:
    """Bytes of all weights, and of the trained ones."""
    config = ProjectConfig(clip_model=name, freeze=freeze)
    network = without_numbers(name)
    prepare_towers(network, config)
    trained = sum(each.numel() * each.element_size() for each in network.parameters() if each.requires_grad)
    return weights_bytes(config), trained


class DiskBudget:
    """Lets no trial start beside others that could take a sweep over its budget; each large write is checked again.

    A trial that would be alone may always start: by the plan it fits, and what is not as planned is found when it writes.
    """

    def __init__(self, budget_bytes: int, plan: DiskPlan, folder: DurableFolder, *, is_durable: bool) -> None:
        """
        Args:
            folder: the sweep's, which the budget is of; from now on it refuses what would pass it.
            is_durable: that is the durable side.

        Raises:
            UserError: not even one trial at a time fits.
        """
        self.budget_bytes = budget_bytes
        self.folder = folder
        self._plan = plan
        self._is_durable = is_durable
        needed = (plan.durable_bytes if is_durable else plan.local_bytes)(plan.one_at_a_time)
        if needed > budget_bytes:
            raise UserError(
                f"--disk-budget-gb {budget_bytes / GB:g} is too little: one trial at a time takes up to {needed / GB:.1f} GB; "
                "raise it, or choose smaller models or frozen towers (--set clip_model=..., --set freeze.text_tower=true)"
            )
        folder.keep_below(budget_bytes)

    def has_room(self, number: int, model: str, running: Sequence[tuple[int, str]], ended: Collection[int]) -> bool:
        """Whether a trial may start, or go on, beside running ones, given as number and model."""
        if not running:
            return True
        models = [self._plan.models[each] for each in (model, *(each for _, each in running))]
        winner = self._plan.winner_bytes(is_durable=self._is_durable)
        if self._is_durable:
            grown = sum(each.durable_run for each in models) + max(each.durable_state for each in models)
            finished = sum(each.durable_weights for each in models) + winner
        else:
            grown = _LOCAL_STATES * sum(each.state for each in models)
            finished = sum(each.weights for each in models) + winner
        growing = {number, *(each for each, _ in running)}
        return used_bytes(self.folder.sizes(), growing, ended) + max(grown, finished) <= self.budget_bytes


def used_bytes(sizes: Mapping[str, int], growing: Collection[int], ended: Collection[int]) -> int:
    """Of a sweep's files, but for the winner, trials that may grow yet, and what goes of those that have ended.

    A trial's process holds its folder until it begins the next one, or ends: till then its state is there still.
    """
    total, newest_weights = 0, dict[int, tuple[str, int]]()
    for name, size in sizes.items():
        top, *below = name.split("/")
        number = int(below[0].split("-")[0]) if top == "trials" and len(below) > 1 else -1
        if top == "best" or number in growing:
            continue
        if number not in ended:
            total += size
        elif below[1] == "checkpoints" and below[-1] == WEIGHTS_NAME:
            newest_weights[number] = max(newest_weights.get(number, ("", 0)), (name, size))
        elif below[1] != "state" and below[-1] != STATE_NAME:
            total += size
    return total + sum(size for _, size in newest_weights.values())


def room_within(budget_bytes: int | None, sweep_dir: Path, run_dir: Path) -> RoomFor:
    """For the checkpoints of a run in a sweep's folder; None: as much as the disk has.

    Who writes has the others wait, so that they see what is there.
    """
    if budget_bytes is None:
        return any_room
    folder = DurableFolder(sweep_dir)
    folder.keep_below(budget_bytes)
    turn = FileLock(sweep_dir / ".disk.lock")

    @contextmanager
    def room_for(num_bytes: int) -> Iterator[None]:
        with turn:
            name = f"{run_dir.relative_to(sweep_dir).as_posix()}/checkpoints/next"
            folder.require_room(name, num_bytes, lambda: keep_newest(run_dir))
            yield

    return room_for
