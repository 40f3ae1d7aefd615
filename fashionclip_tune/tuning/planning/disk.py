"""Disk of a sweep, planned before it starts and watched while it runs (``--disk-budget-gb``)."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.kept_pixels import PART_OF_LIMIT, record_bytes
from fashionclip_tune.models.architecture import planned_network
from fashionclip_tune.models.start_facts import StartFacts
from fashionclip_tune.models.token_rows import USUAL_ROWS, TokenRows, untrained_tables
from fashionclip_tune.storage.checkpoint import keep_newest
from fashionclip_tune.storage.folder import RemoteFolder
from fashionclip_tune.training.callbacks import RoomFor, any_room
from fashionclip_tune.tuning.planning.gpu_memory import is_described_here, weights_bytes

KEPT_PER_MODEL = 3
"""Ended trials of an architecture, the best ones, that keep their weights."""
_TRIAL_BYTES = 10**6  # evaluations, queries, TensorBoard's events with their pictures
# Where a sweep runs: the last two checkpoints and the one that is being written.
_LOCAL_STATES = 3


@dataclass(frozen=True)
class ModelBytes:
    """Of one architecture in fp32: the weights of a checkpoint, and those that are trained.

    ``copies``: what a training state has of the trained ones: Adam's two moments, and they themselves where an average of them
    is what counts. ``tables``: what a run keeps once, of which checkpoints have the trained rows only.
    """

    weights: int
    trained: int
    copies: int = 2
    tables: int = 0

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

    ``keep_paused``: of each as many may wait with their state; in the durable folder with the one that was synced, if any, or,
    without ``keeps_paused_states``, with their weights alone.
    ``at_a_time``: how many trials of each run side by side. Each has its part of the machine, so that no mix of architectures
    takes more than as many as fit of the one whose trials take most together.
    """

    models: dict[str, ModelBytes]
    num_trials: int
    keep_paused: int = 0
    keeps_paused_states: bool = True

    def local_bytes(self, at_a_time: Mapping[str, int]) -> int:
        """Where the sweep runs: whole states of trials that run or wait, weights of the best, the winner twice while it is
        written."""
        kept = sum(KEPT_PER_MODEL * (each.weights + each.tables) for each in self.models.values())
        kept += sum(self.keep_paused * (each.state + each.tables) for each in self.models.values())
        running = max(at_a_time[name] * (_LOCAL_STATES * each.state + each.tables) for name, each in self.models.items())
        return running + kept + 2 * self._winner_bytes + self.num_trials * _TRIAL_BYTES

    def durable_bytes(self, at_a_time: Mapping[str, int]) -> int:
        """What is kept to survive: states and weights of trials that run or wait, weights of the best, the winner.

        One trial at a time has its next state beside its last, while it writes it. The winner is written when none runs.
        """
        kept = sum(KEPT_PER_MODEL * each.durable_weights for each in self.models.values())
        kept += self.keep_paused * sum(
            each.durable_run if self.keeps_paused_states else each.durable_weights for each in self.models.values()
        )
        models = self.models.items()
        grown = max(at_a_time[name] * each.durable_run for name, each in models) + max(each.durable_state for _, each in models)
        ended = max(at_a_time[name] * each.durable_weights for name, each in models) + self._winner_bytes
        return kept + max(grown, ended) + self.num_trials * _TRIAL_BYTES

    @property
    def _winner_bytes(self) -> int:
        """In fp32; where the sweep runs, it is there twice until it is whole."""
        return max(each.weights + each.tables for each in self.models.values())


def plan_disk(configs: Iterable[ProjectConfig], num_trials: int, clip_rows: int = USUAL_ROWS, keep_paused: int = 0) -> DiskPlan:
    """Of each architecture the configuration with the largest state counts. ``clip_rows``: as for ``planned_network``."""
    models: dict[str, ModelBytes] = {}
    for config in configs:
        found = _model_bytes(config, clip_rows)
        if config.model_name not in models or found.state > models[config.model_name].state:
            models[config.model_name] = found
    return DiskPlan(models, num_trials, keep_paused)


def decoded_bytes(starts: Iterable[StartFacts], num_photos: int, scratch_gb: float) -> int:
    """At most, of photos to evaluate on that are kept decoded: once for each way in which some start wants them prepared."""
    sizes = [size for size, _ in {(start.image_size, start.resizing) for start in starts}]
    return min(sum(num_photos * record_bytes(size) for size in sizes), int(PART_OF_LIMIT * scratch_gb * 1e9))


def _model_bytes(config: ProjectConfig, clip_rows: int) -> ModelBytes:
    copies = 2 if config.optimizer.ema_decay is None else 3
    if not is_described_here(config):
        return ModelBytes(weights_bytes(config), weights_bytes(config), copies)
    plain = ProjectConfig(clip_model=config.clip_model, freeze=config.freeze)
    weights, trained, tables = _counted(plain.with_overrides({"training.edition": config.training.edition}), clip_rows)
    return ModelBytes(weights, trained, copies, tables)


@lru_cache(maxsize=64)
def _counted(config: ProjectConfig, clip_rows: int) -> tuple[int, int, int]:
    """Bytes of a checkpoint's weights, of the trained ones, and of the tables beside it."""
    network = planned_network(config, clip_rows)
    rows = [each.trained_UD for each in network.modules() if isinstance(each, TokenRows)]  # kept though they be frozen
    trained = sum(each.nbytes for each in network.parameters() if each.requires_grad or any(each is row for row in rows))
    weights = sum(each.nbytes for each in (*network.parameters(), *network.buffers()))
    return weights, trained, sum(each.nbytes for each in untrained_tables(network).values())


def room_within(budget_bytes: int | None, sweep_dir: Path, run_dir: Path) -> RoomFor:
    """For the checkpoints of a run in a sweep's folder; None: as much as the disk has.

    Who writes has the others wait, so that they see what is there.
    """
    if budget_bytes is None:
        return any_room
    folder = RemoteFolder(sweep_dir)
    folder.keep_below(budget_bytes)
    turn = FileLock(sweep_dir / ".disk.lock")

    @contextmanager
    def room_for(num_bytes: int) -> Iterator[None]:
        with turn:
            name = f"{run_dir.relative_to(sweep_dir).as_posix()}/checkpoints/next"
            folder.require_room(name, num_bytes, lambda: keep_newest(run_dir))
            yield

    return room_for
