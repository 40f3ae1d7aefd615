"""A wheel has everything that a sweep needs, in another folder and without the sources."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fashionclip_tune

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a wheel of these sources was installed into."""
    pytest.importorskip("setuptools", reason="setuptools is not installed: nothing builds a wheel")
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    shutil.copytree(ROOT / "fashionclip_tune", sources / "fashionclip_tune", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", folder / "site", sources], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def run(site: Path, cwd: Path, *command: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_console_command_says_its_version_and_lists_all_subcommands(site: Path, tmp_path: Path) -> None:
    said = run(site, tmp_path, sys.executable, site / "bin" / "fashionclip-tune", "--version")
    assert said.stdout == f"fashionclip-tune {fashionclip_tune.__version__}\n", said.stderr
    helped = run(site, tmp_path, sys.executable, "-m", "fashionclip_tune", "--help").stdout
    for name in ("sweep", "compare", "prepare", "synthesize", "pretrain", "train", "evaluate", "export", "probe", "doctor"):
        assert f"\n    {name}" in helped


def test_every_space_is_in_it(site: Path, tmp_path: Path) -> None:
    ended = run(site, tmp_path, sys.executable, "-m", "fashionclip_tune", "sweep", "--space", "nowhere", "--dry-run")
    assert ended.returncode == 2, ended.stdout
    spaces = sorted(path.stem for path in (ROOT / "fashionclip_tune" / "spaces").glob("*.py") if path.stem != "__init__")
    assert all(space in ended.stderr for space in spaces), ended.stderr


def test_a_sweep_is_planned_from_it_and_a_printed_command_is_a_subcommand(site: Path, garments: Path, tmp_path: Path) -> None:
    flags = ("--data", garments, "--results", tmp_path / "results", "--space", "tiny", "--samples-per-second", "100")
    ended = run(site, tmp_path, sys.executable, "-m", "fashionclip_tune", "sweep", *flags, "--dry-run")
    assert ended.returncode == 0, ended.stderr
    assert "starts:" in ended.stdout
    code = "from fashionclip_tune import errors; print(errors.__file__, errors.command('sweep'))"
    said = run(site, tmp_path, sys.executable, "-c", code).stdout
    assert said.startswith(str(site))
    assert said.rstrip().endswith("-m fashionclip_tune sweep")


def test_a_flag_that_a_subcommand_lacks_is_refused_with_the_help_of_that_one() -> None:
    ended = run(ROOT, ROOT, sys.executable, "-m", "fashionclip_tune", "sweep", "--nowhere")
    assert ended.returncode == 2
    assert ended.stderr == (
        "error: unrecognized arguments: --nowhere (python -m fashionclip_tune sweep --help lists what is allowed)\n"
    )
