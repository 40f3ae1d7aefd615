"""The notebook runs from its first cell to its last, as a user runs it."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "fashion_sweep.ipynb"


def notebook() -> Any:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install -e '.[dev]'")
    return nbformat.read(NOTEBOOK, as_version=4)


def put_weights_in_the_cache() -> None:
    """Random ones: how the tiny towers are pretrained, for a minute, has tests of its own."""
    from fashionclip_tune.config import ProjectConfig
    from fashionclip_tune.model import export_openclip, load_model
    from fashionclip_tune.tiny import TINY_MODELS, pretrained_tiny_dir

    for name in TINY_MODELS:
        config = ProjectConfig(clip_model=name).with_overrides({"model.pretrained": None})
        export_openclip(load_model(config), pretrained_tiny_dir(name))


def mime_types(cell: Any) -> set[str]:
    return {mime for output in cell.outputs for mime in output.get("data", {})}


def test_the_notebook_is_kept_without_outputs() -> None:
    code = [cell for cell in notebook().cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert NOTEBOOK.stat().st_size < 20_000


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
    figures = [cell for cell in code if ".show()" in cell.source]
    assert [mime_types(cell) for cell in figures] == [{"application/vnd.plotly.v1+json"}] * 3
    assert all(output.data["application/vnd.plotly.v1+json"]["data"] for cell in figures for output in cell.outputs)
    (ranking,) = [cell for cell in code if "ranking_text" in cell.source]
    assert ranking.outputs[0].data["text/markdown"].count("tiny-") >= 6
    (answers,) = [cell for cell in code if "make_gallery" in cell.source]
    assert answers.outputs[0].data["text/html"].count("data:image/jpeg;base64,") == 4 * 11
    assert "image/png" in mime_types(code[-1])
    text = "".join(output.text for cell in code for output in cell.outputs if output.output_type == "stream")
    assert "Traceback" not in text
    assert "\x1b" not in text, "a table that is redrawn, or colours"
    assert sys.executable not in text
