"""Whose weights ``best/`` has is what it says itself: ``sweep.json`` goes on while it stays."""

import json
from pathlib import Path
from typing import Any

from fashionclip_tune import train
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.files import write_json
from fashionclip_tune.models.named_model import exported_trial, started_from
from fashionclip_tune.reporting.sweep_files import load_line
from fashionclip_tune.tuning.persistence.export import export_best


def test_the_winner_of_a_sweep_that_goes_on_is_taken_for_no_later_one(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    config = tiny_config.with_overrides({"training.budget_examples": 32})
    result = train(config, tmp_path / "trials" / "0003-tiny-clip-contrastive")
    drawn = {"clip_model": "tiny-clip", "loss_function": "contrastive"}
    row: Any = {"trial_id": "0003", "config": drawn, "start": "tiny-clip", "step": result.history[-1]["step"]}
    export_best(tmp_path, row, lambda drawn: config, None)
    later = tmp_path / "trials" / "0004-tiny-sig-contrastive"
    later.mkdir()
    write_json(later / "config.json", config.with_overrides({"clip_model": "tiny-sig"}).to_dict())
    best = tmp_path / "best"
    for state in ("RUNNING", "FINISHED"):
        write_json(tmp_path / "sweep.json", {"state": state, "best": {"trial_id": "0004"}})
        for place in (tmp_path, best):
            found = started_from(f"local-dir:{place}", allow_remote=False)
            assert found is not None
            assert found.model_name == "tiny-clip"
        assert f'load it: open_clip.create_model_and_transforms("local-dir:{best}")' in load_line(tmp_path, "0003")
        assert "which has trial 0003: that is written when the sweep ends" in load_line(tmp_path, "0004")

    (best / "trial.json").unlink()  # as an older version left it
    assert exported_trial(best) == "0004"
    write_json(tmp_path / "sweep.json", {**json.loads((tmp_path / "sweep.json").read_text()), "state": "RUNNING"})
    assert exported_trial(best) is None
    assert started_from(f"local-dir:{best}", allow_remote=False) is None
    assert "does not say whose weights it has" in load_line(tmp_path, "0004")
