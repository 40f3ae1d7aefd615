import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray for all tests of this process; sweeps use the one that is there."""
    with pytest.MonkeyPatch.context() as patch:
        # Without it Ray writes a token file to the home folder.
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("TUNE_FUNCTION_THREAD_TIMEOUT_S", "600")
        import ray

        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=1,  # logical: nothing is computed there
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
            runtime_env={"env_vars": {"FASHIONCLIP_CACHE": os.environ["FASHIONCLIP_CACHE"]}},
        )
        yield
        ray.shutdown()


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
def run_sweep(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Calls the script with arguments, in this process: (exit status, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["run_sweep.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            script.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def sweep_json(sweep_dir: Path) -> dict:
    return json.loads((sweep_dir / "sweep.json").read_text())
