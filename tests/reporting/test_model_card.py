"""The winner's card: metadata that the hub reads, figures that are the sweep's, lines that run."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.models.named_model import named_model
from fashionclip_tune.models.openclip import export_openclip
from fashionclip_tune.reporting.model_card import model_card


@pytest.fixture
def sweep(small_sweep: Path) -> dict[str, Any]:
    return json.loads((small_sweep / "sweep.json").read_text())


def best_of(sweep: dict[str, Any]) -> Any:
    return next(row for row in sweep["trials"] if row["trial_id"] == sweep["best"]["trial_id"])


def test_its_head_and_its_figures_are_the_sweeps(sweep: dict[str, Any]) -> None:
    known = {"license": "apache-2.0", "base_model": ["laion/one", "shop/two"]}
    sweep["data"] = {"train": {"photos": 160, "products": 80}, "valid": {"photos": 20, "products": 10}}
    best = best_of(sweep)
    text = model_card(sweep, best, known)
    card = ModelCard(text)
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == ["laion/one", "shop/two"]
    (result,) = card.data.eval_results
    assert result.metric_value == round(best["recall_at_10"], 4)
    assert f"| this model | {best['recall_at_10']:.4f} | {best['recall_at_10_low']:.4f} to " in text
    assert "Fine-tuned from laion/one, shop/two on 160 photos of 80 products" in text
    assert f"| `loss_function` | {best['config']['loss_function']} |" in text


@pytest.mark.parametrize(
    "value", ["a|b\nc", "---\nlicense: mit\n---", "<script>", '": {', 1e-5, None, True, "ünïcode"], ids=range(8)
)
def test_it_is_one_card_whatever_a_setting_or_a_name_is(sweep: dict[str, Any], value: object) -> None:
    sweep["name"] = str(value)
    best = best_of(sweep)
    best["config"]["model.pretrained"] = value
    card = ModelCard(model_card(sweep, best, {}))
    assert card.data.to_dict()["library_name"] == "open_clip"
    assert card.data.get("license") is None
    assert "## Settings" in card.text


def test_a_sweep_of_an_older_version_has_one(sweep: dict[str, Any]) -> None:
    best = {name: value for name, value in best_of(sweep).items() if "_low" not in name and "untouched" not in name}
    text = model_card({"name": "old", "trials": [best]}, best, {})
    assert "the weights it started from" not in text
    assert ModelCard(text).data.model_name == "old"


def test_its_lines_find_photos_without_this_package(sweep: dict[str, Any], small_sweep: Path, tmp_path: Path) -> None:
    best = best_of(sweep)
    (run,) = small_sweep.glob(f"trials/{best['trial_id']}-*")
    export_openclip(named_model(str(run), ProjectConfig()).loaded, tmp_path / "best")
    (code,) = re.findall(r"```python\n(.*?)```", model_card(sweep, best, {}), re.DOTALL)
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.effect_noise((40, 40), 40 + number).convert("RGB").save(tmp_path / "photos" / f"{number}.jpg")
    code = code.replace("PATH/OF/THIS/FOLDER", str(tmp_path / "best"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
