"""pip itself, asked what it would install beside the packages of a notebook service. Nothing is downloaded or installed."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from importlib.metadata import distribution, distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
Installed = Mapping[str, tuple[str, Sequence[str]]]  # version and requirements by name
# Some of what a notebook service has, and the requirements by which they hold each other where they are.
NOTEBOOK: Installed = {
    "torch": ("2.6.0+cu124", ()),
    "torchvision": ("0.21.0+cu124", ("torch==2.6.0",)),
    "torchaudio": ("2.6.0+cu124", ("torch==2.6.0",)),
    "transformers": ("4.51.3", ("huggingface-hub<1.0,>=0.30.0", "tokenizers<0.22,>=0.21")),
    "huggingface_hub": ("0.30.2", ()),
    "tokenizers": ("0.21.1", ("huggingface-hub<1.0,>=0.16.4",)),
    "timm": ("1.0.15", ("torch", "torchvision")),
    "safetensors": ("0.5.3", ()),
    "numpy": ("2.0.2", ()),
    "pandas": ("2.2.2", ("numpy>=1.23.2",)),
    "pillow": ("11.2.1", ()),
    "pyarrow": ("18.1.0", ()),
    "h5py": ("3.13.0", ("numpy>=1.19.3",)),
    "tensorboard": ("2.18.0", ()),
    "plotly": ("5.24.1", ()),
    "filelock": ("3.18.0", ()),
    "rich": ("13.9.4", ()),
}


@pytest.fixture(scope="module")
def offered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index: all that is installed here as wheels of metadata alone, torch as it is here among them."""
    folder = tmp_path_factory.mktemp("wheels")
    for each in distributions():
        if each.name == "fashionclip-tune":
            continue
        stem = f"{each.name.replace('-', '_')}-{each.version}"
        with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{stem}.dist-info/METADATA", each.read_text("METADATA") or "")
            wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{stem}.dist-info/RECORD", "")
    return folder


def installs(there: Installed, offered: Path, folder: Path) -> dict[str, str]:
    """What ``pip install -e .`` would install where these are installed: versions by name."""
    site, project = folder / "site", folder / "project"
    for name, (version, requires) in there.items():
        info = site / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        (info / "RECORD").write_text("")
    pip = distribution("pip").locate_file("pip")
    (site / "pip").symlink_to(str(pip))
    # A copy: to say what it is, setuptools writes beside the package.
    (project / "fashionclip_tune").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, project)
    options = ["--dry-run", "--no-build-isolation", "--no-index", "--find-links", offered, "--report", folder / "report.json"]
    done = subprocess.run(
        [sys.executable, "-S", "-m", "pip", "install", *map(str, options), "-e", str(project)],  # -S: what is here is not there
        env={**os.environ, "PYTHONPATH": str(site), "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((folder / "report.json").read_text())
    return {each["metadata"]["name"].lower(): each["metadata"]["version"] for each in report["install"]}


def with_torch(torch: str, torchvision: str) -> Installed:
    pinned = (f"torch=={torch.partition('+')[0]}",)
    others = {name: each for name, each in NOTEBOOK.items() if "torch" not in name}
    return {**others, "torch": (torch, ()), "torchvision": (torchvision, pinned)}


@pytest.mark.parametrize("there", [NOTEBOOK, with_torch("2.4.1+cu121", "0.19.1+cu121")], ids=["torch 2.6", "torch 2.4"])
def test_a_notebook_service_keeps_its_torch(offered: Path, tmp_path: Path, there: Installed) -> None:
    wanted = installs(there, offered, tmp_path)
    assert not {"torch", "torchvision", "torchaudio", "numpy", "pillow", "transformers"} & wanted.keys(), wanted
    assert {"fashionclip-tune", "ray", "optuna", "open_clip_torch", "webdataset", "plotly"} <= wanted.keys()


def test_a_torch_that_is_too_old_would_be_replaced(offered: Path, tmp_path: Path) -> None:
    """So that the test above could fail: pip sees what is installed there, and has a newer torch to offer."""
    wanted = installs(with_torch("2.3.1+cu121", "0.18.1+cu121"), offered, tmp_path)
    assert wanted["torch"] == distribution("torch").version
    assert wanted["torchvision"] == distribution("torchvision").version
