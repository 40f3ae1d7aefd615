"""The notebook runs from its first cell to its last, as a user runs it."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from fashionclip_tune.cli.main import command_parser

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "fashion_sweep.ipynb"
PLOTLY = "application/vnd.plotly.v1+json"


def notebook() -> Any:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install -e '.[dev]'")
    return nbformat.read(NOTEBOOK, as_version=4)


def put_weights_in_the_cache() -> None:
    """Random ones: how the tiny towers are pretrained, for a minute, has tests of its own."""
    from fashionclip_tune.config.project import ProjectConfig
    from fashionclip_tune.models.openclip import export_openclip, load_model
    from fashionclip_tune.models.tiny import TINY_MODELS, pretrained_tiny_dir

    for name in TINY_MODELS:
        config = ProjectConfig(clip_model=name).with_overrides({"model.pretrained": None})
        export_openclip(load_model(config), pretrained_tiny_dir(name))


def shown(cell: Any, mime: str) -> list[Any]:
    return [output.data[mime] for output in cell.outputs if mime in output.get("data", {})]


def test_the_notebook_is_kept_without_outputs() -> None:
    code = [cell for cell in notebook().cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert NOTEBOOK.stat().st_size < 20_000


def run_sweep_flags(command: str) -> dict[str, Any]:
    parsed = command_parser().parse_args(["sweep", *shlex.split(command)])
    return {name: value for name, value in vars(parsed).items() if name != "name"}


def test_the_recipe_for_a_notebook_service_is_the_same_everywhere() -> None:
    command = re.compile(r"run_sweep\.py ((?:\\\n|[^\n])*)")
    blocks = [command.findall((ROOT / path).read_text()) for path in ("README.md", "docs/t4.md")]
    commands = [next(block for block in found if "--disk-budget-gb" in block).replace("\\\n", " ") for found in blocks]
    cells = [cell.source for cell in notebook().cells if cell.cell_type == "code"]
    (work,) = re.findall(r'on Colab: Path\("([^"]+)"\)', "\n".join(cells))
    (flags,) = re.findall(r'^# FLAGS = "([^"]+)"', "\n".join(cells), re.MULTILINE)
    commands.append(f"--data {work}/shards --results {work}/results {flags} --resume")
    readme, t4, colab = (run_sweep_flags(command) for command in commands)
    assert readme == t4 == colab
    assert (readme["space"], readme["preset"], readme["disk_budget_gb"]) == ("openclip", "evening", 8)
    assert readme["results"].startswith("/content/drive/MyDrive/")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_notebook_goes_from_shards_to_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install -e '.[dev]'")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install -e '.[dev]'")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("FASHIONCLIP_CACHE", str(tmp_path / "cache"))
    put_weights_in_the_cache()
    ran = notebook()
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(ran, timeout=400, resources=resources).execute()

    sweep = tmp_path / "fashion_sweep" / "results" / "notebook"
    assert (sweep / "best" / "open_clip_model.safetensors").is_file()
    assert (sweep / "report.html").is_file()
    code = [cell for cell in ran.cells if cell.cell_type == "code"]
    figures = [figure for cell in code if ".show()" in cell.source for figure in shown(cell, PLOTLY)]
    assert [len(figure["data"]) > 0 for figure in figures] == [True] * 3
    (ranking,) = [table for cell in code for table in shown(cell, "text/markdown")]
    assert ranking.count("tiny-") >= 6
    (answers,) = [page for cell in code if "make_gallery" in cell.source for page in shown(cell, "text/html")]
    assert answers.count("data:image/jpeg;base64,") == 4 * 11
    assert len(shown(code[-1], "image/png")) == 5
    assert [output.text for cell in code for output in cell.outputs if output.get("name") == "stderr"] == []
    text = "".join(output.text for cell in code for output in cell.outputs if output.output_type == "stream")
    assert "Traceback" not in text
    assert "\x1b" not in text, "a table that is redrawn, or colours"
