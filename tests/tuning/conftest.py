import importlib.util
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.disks import Disk

ROOT = Path(__file__).parents[2]
RunSweep = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray for all tests of this process; sweeps use the one that is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("TUNE_FUNCTION_THREAD_TIMEOUT_S", "600")
        from fashionclip_tune.tuning.backend.guarded_ray import own_ray

        with own_ray(
            num_cpus=2,
            num_gpus=1,  # logical: nothing is computed there
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
            runtime_env={"env_vars": {"FASHIONCLIP_CACHE": os.environ["FASHIONCLIP_CACHE"]}},
        ):
            yield


@pytest.fixture
def script() -> ModuleType:
    """``sweeps/run_sweep.py``."""
    spec = importlib.util.spec_from_file_location("run_sweep", ROOT / "sweeps" / "run_sweep.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture
def run_sweep(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunSweep:
    """Calls the script with arguments, in this process: (exit status, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["run_sweep.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            script.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def sweep_json(sweep_dir: Path) -> dict[str, Any]:
    return json.loads((sweep_dir / "sweep.json").read_text())


@pytest.fixture
def ended(garments: Path, tmp_path: Path) -> Path:
    """A sweep with two trials as it ends, made without Ray: its header, and a winner that is a setting alone."""

    from fashionclip_tune.config.section import assignments
    from fashionclip_tune.tuning.persistence.location import SweepLocation
    from fashionclip_tune.tuning.persistence.record import sweep_header
    from fashionclip_tune.tuning.planning.plan import plan_sweep
    from fashionclip_tune.tuning.planning.settings import SweepSettings

    folder = tmp_path / "it"
    folder.mkdir()
    fixed = assignments(["model.pretrained=none", "training.batch_size=16"])
    sizes = {"num_trials": 2, "budget_examples": 96, "grace_examples": 48, "samples_per_second": 100.0}
    settings = SweepSettings(data=str(garments), overrides=fixed, **sizes)
    plan = plan_sweep(settings)
    best = {"trial_id": "0000", "config": {"clip_model": "tiny-sig", "loss_function": "siglip", "training.learning_rate": 1e-3}}
    best["metrics"] = {"recall_at_10": 0.5, "recall_at_5": 0.25}
    row = {"trial_id": "0000", "state": "COMPLETE", "stop_reason": "budget", "examples_seen": 96, "step": 6, "gain": None}
    row |= {"config": best["config"], **best["metrics"], "message": None, "duration_s": 1.0, "device_s": 1.0}
    content = {
        **sweep_header(plan, SweepLocation(str(folder), folder, None)),
        "state": "FINISHED",
        "zero_shot": {},
        "trials": [row],
    }
    (folder / "sweep.json").write_text(json.dumps({**content, "best": best}))
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk", megabytes=20)  # a checkpoint of a tiny tower has 9 to 13 MB
    yield disk
    subprocess.run(["umount", "--lazy", disk.folder], check=True)
