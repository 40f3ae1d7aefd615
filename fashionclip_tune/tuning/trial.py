"""A trial as everyone knows it: its plan, its share of the machine, its folder."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fashionclip_tune.evaluation.metric import DEFAULT_METRIC
from fashionclip_tune.reporting.sweep_files import TrialRow, start_of


@dataclass(frozen=True)
class Share:
    """Of one trial: what Ray is asked for, and of the card's memory what it may take and what it needs (None: no limit)."""

    gpus: float
    cpus: float
    gpu_memory_bytes: int | None = None
    gpu_needed_bytes: int | None = None


@dataclass(frozen=True)
class DurablePlan:
    """Where and when a trial keeps what is to outlive its machine."""

    location: str
    sync_every_s: float
    kept_at: tuple[int, ...]
    """Examples seen at which a trial may end: there its weights are kept before it reports."""
    writer: str
    """The driver that this trial is of; once there is a later one, the trial writes no more."""
    turn: str | None = None
    """A lock file: one trial of a machine at a time has its state there twice."""


@dataclass(frozen=True)
class TrialPlan:
    """What a worker needs to know about a trial."""

    number: int
    trial_dir: str
    config: dict[str, Any]
    durable: DurablePlan | None = None
    share: Share = Share(0.0, 1.0)
    disk_budget_bytes: int | None = None
    """Of all that the sweep's folder in the results may hold; asked at each large write."""
    metric: str = DEFAULT_METRIC.name
    """What of an evaluation is the trial's value."""

    def to_ray(self) -> dict[str, Any]:
        # As text: Ray would take dots in the keys for nesting.
        return {"plan": json.dumps(asdict(self))}

    @classmethod
    def from_ray(cls, ray_config: dict[str, Any]) -> "TrialPlan":
        plan = json.loads(ray_config["plan"])
        durable, share = plan.pop("durable"), Share(**plan.pop("share"))
        return cls(**plan, durable=durable and DurablePlan(**durable), share=share)


def trial_dir(sweep_dir: Path, number: int, start: str, loss_function: str) -> Path:
    """``SWEEP/trials/0007-vit-b-32-siglip``; ``start``: the short name of what the trial starts from."""
    name = f"{number:04d}-{start}-{loss_function}".lower()
    # A folder's path may be longer than a name can be.
    return sweep_dir / "trials" / name.replace("/", "-").encode()[:200].decode(errors="ignore")


def dir_of(sweep_dir: Path, row: TrialRow) -> Path:
    """The same of a row of sweep.json."""
    return trial_dir(sweep_dir, int(row["trial_id"]), start_of(row), row["config"]["loss_function"])
