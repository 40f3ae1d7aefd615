"""What does not change in the life of a sweep, and stands at the head of its sweep.json."""

import platform
import subprocess
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fashionclip_tune.report import read_sweep
from fashionclip_tune.tuning.place import Place
from fashionclip_tune.tuning.plan import SweepPlan
from fashionclip_tune.tuning.study import METRIC


def sweep_header(plan: SweepPlan, place: Place) -> dict[str, Any]:
    """Of a sweep that goes on, as it was at its first start."""
    if (place.run_dir / "sweep.json").is_file():
        changing = ("state", "best", "zero_shot", "trials")
        return {name: value for name, value in read_sweep(place.run_dir).items() if name not in changing}
    packages = ("torch", "open_clip_torch", "ray", "optuna")
    return {
        "name": place.shown.rpartition("/")[2],
        "created": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
        "metric": METRIC,
        "mode": "max",
        "seed": plan.settings.seed,
        "space": plan.space.name,
        "space_hash": plan.space.content_hash,
        "space_text": plan.space.text,
        "data_fingerprint": plan.data_fingerprint,
        "data": plan.data,
        "settings": asdict(plan.settings),
        "base_config": plan.base.to_dict(),
        "plan": plan.forecast.as_json(),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
