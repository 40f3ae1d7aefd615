"""A run's reports and weights on the durable side, kept before they are made."""

import json
from pathlib import Path

from filelock import FileLock

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.models.named_model import starting_point
from fashionclip_tune.storage.folder import RemoteFolder
from fashionclip_tune.training.history import Row
from fashionclip_tune.training.remote_state import RemoteState
from fashionclip_tune.tuning.persistence.fencing import FencingCheck
from fashionclip_tune.tuning.trial import DurablePlan


class RunSync:
    """Keeps on the durable side what a run's reports are about, before they are made."""

    def __init__(
        self, plan: DurablePlan, config: ProjectConfig, run_dir: Path, name: str, budget_bytes: int | None = None
    ) -> None:
        """
        Args:
            name: the run's place on the durable side.
            budget_bytes: of all that the sweep may hold there.
        """
        self._name = name
        self._folder = RemoteFolder(plan.location)
        self._folder.guard(FencingCheck(self._folder, plan.writer))
        if budget_bytes is not None:
            self._folder.keep_below(budget_bytes)
        self._kept_at = plan.kept_at
        self._run_dir = run_dir
        turn = FileLock(plan.turn) if plan.turn is not None else None
        self.run = RemoteState(self._folder, name, starting_point(config), sync_every_s=plan.sync_every_s, turn=turn)

    def keep(self, row: Row) -> None:
        """The figures at once; the weights where the run may end with this report."""
        step = f"step_{row['step']:08d}"
        checkpoint = self._run_dir / "checkpoints" / step
        if row["examples_seen"] in self._kept_at and checkpoint.is_dir():
            self.run.put_weights(checkpoint)
        self._folder.put(f"{self._name}/evaluations/{step}.json", json.dumps(row, indent=2).encode())
