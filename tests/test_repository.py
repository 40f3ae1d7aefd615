"""Promises of the repository as a whole: what it imports, what it installs, what it carries."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import fashionclip_tune

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[1]


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_environment_yml_names_the_dependencies_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip_section,) = (entry["pip"] for entry in dependencies if isinstance(entry, dict))
    packages = [line for line in pip_section if line != "--editable ."]
    assert "--editable ." in pip_section
    assert sorted(packages) == sorted(project["dependencies"] + project["optional-dependencies"]["dev"])
    assert [entry for entry in dependencies if isinstance(entry, str)] == [f"python{project['requires-python']}", "pip"]


def test_no_image_but_one_screenshot_and_no_archive_but_the_formats_is_tracked() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    tracked = [Path(ROOT, name) for name in listed.stdout.decode().split("\0") if name]
    assert ROOT / "pyproject.toml" in tracked
    suffixes = r"\.(jpe?g|png|gif|bmp|webp|tiff?|avif|tar|t?gz|xz|zip|npz|npy|h5|safetensors|pt|pth|ckpt|parquet)$"
    starts = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"\x1f\x8b", b"PK\x03\x04", b"\x89HDF")
    screenshot = ROOT / "docs" / "report.png"  # of a sweep on synthetic garments
    assert screenshot.stat().st_size < 200_000
    formats = ROOT / "tests" / "formats"  # sweep folders of earlier versions, on synthetic garments
    for path in tracked:
        if path == screenshot or path.parent == formats:
            continue
        assert not re.search(suffixes, path.name, re.IGNORECASE), path
        if path.is_file():
            head = path.read_bytes()[:512]
            assert not head.startswith(starts), path
            assert head[257:262] != b"ustar", path


def test_only_tuning_imports_ray_and_only_tuning_and_report_import_optuna() -> None:
    """Every module below ``tuning`` is imported in one process, those that may import more last."""
    code = """
import importlib, json, pkgutil, sys
import fashionclip_tune
found = [module.name for module in pkgutil.walk_packages(fashionclip_tune.__path__, "fashionclip_tune.")
         if not module.name.startswith(("fashionclip_tune.tuning", "fashionclip_tune.__main__", "fashionclip_tune.spaces"))]
found.sort(key=lambda name: name in %s)
imported = {}
for name in found:
    importlib.import_module(name)
    imported[name] = [package for package in ("ray", "optuna") if package in sys.modules]
print(json.dumps(imported))
"""
    # The page reads the study; the others by way of the first.
    parts = ("sweep_view", "figures", "decisions", "sections", "costs", "page")
    with_optuna = [f"fashionclip_tune.reporting.{part}" for part in parts]
    imported = json.loads(python(code % with_optuna))
    rooms = {"fashionclip_tune.training.train", "fashionclip_tune.cli.main", "fashionclip_tune.reporting.sweep_files"}
    assert rooms <= set(imported)
    assert {name: packages for name, packages in imported.items() if "ray" in packages} == {}
    assert [name for name, packages in imported.items() if "optuna" in packages and name not in with_optuna] == []


def test_torch_has_all_that_is_asked_of_it() -> None:
    """By name, in lines that only run on a GPU too."""
    import torch

    asked = dict[Any, Any]()
    for path in (path for folder in ("fashionclip_tune", "benchmarks", "sweeps") for path in ROOT.glob(f"{folder}/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [f"{node.module}.{each.name}" for each in node.names]
            asked |= {name: f"{path.relative_to(ROOT)}:{node.lineno}" for name in names if re.fullmatch(r"torch(\.\w+)+", name)}
    assert {"torch.cuda.set_per_process_memory_fraction", "torch.cuda.is_bf16_supported"} <= asked.keys()
    for name, where in asked.items():
        parts = name.split(".")[1:]
        found = torch
        for part in parts:
            if isinstance(found, ModuleType) and not hasattr(found, part):
                importlib.import_module(f"{found.__name__}.{part}")
            assert hasattr(found, part), f"{where}: torch {torch.__version__} has no {name}"
            found = getattr(found, part)


def test_the_package_itself_imports_without_torch() -> None:
    assert (
        python("import sys, fashionclip_tune; print('torch' in sys.modules, 'open_clip' in sys.modules)").split()
        == ["False"] * 2
    )


def test_public_names_are_importable_from_the_package() -> None:
    from fashionclip_tune import (
        ClipModelOptions,
        LossFunctionOptions,
        ProjectConfig,
        TrainingConfig,
        losses,
        metrics,
        train,
        training_prep,
    )

    assert {option.name: option.value for option in ClipModelOptions} == {
        "ViT_B_32": "ViT-B-32",
        "ViT_B_16": "ViT-B-16",
        "ViT_SigLIP_2_16": "ViT-B-16-SigLIP2-256",
    }
    assert {option.name for option in LossFunctionOptions} == {"CONTRASTIVE", "SIGLIP"}
    assert isinstance(ProjectConfig().training, TrainingConfig)
    functions = (train, training_prep, metrics.retrieval_recall, losses.info_nce, losses.sigmoid_bce)
    assert all(callable(function) for function in functions)
    with pytest.raises(AttributeError, match="has no attribute 'tranining'"):
        fashionclip_tune.tranining  # noqa: B018
