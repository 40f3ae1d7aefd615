"""What a sweep that goes on says to flags that differ from those it was started with."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fashionclip_tune.errors import UserError
from fashionclip_tune.tuning.planning.settings import SweepSettings, stored_settings
from tests.tuning.conftest import RunSweep

STARTED = SweepSettings(num_trials=16, seed=0, device="cuda", space="tiny", overrides={"training.batch_size": 64})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_trials": 12}, "with --num-trials 16, not 12: a resumed sweep keeps its settings"),
        ({"seed": 1}, "with --seed 0, not 1: a resumed sweep keeps its settings$"),
        ({"preset": "evening"}, "without --preset evening: "),
        ({"warm_start": "old"}, "without --warm-start old: "),
        ({"overrides": {"training.batch_size": 32}}, "with --set training.batch_size=64, not training.batch_size=32: "),
        ({"overrides": {"training.epochs": 5}}, "without --set training.epochs=5: "),
    ],
)  # fmt: skip
def test_a_flag_that_differs_is_refused_with_what_was_given(given: Any, said: Any) -> None:
    with pytest.raises(UserError, match=f"sweep it was started {said}"):
        STARTED.resumed(SweepSettings(**given), "it")


def test_the_same_flags_again_change_nothing() -> None:
    again = SweepSettings(num_trials=16, device="auto", overrides={"training.batch_size": 64})
    assert STARTED.resumed(again, "it") == STARTED


def test_a_sweep_of_a_gpu_is_not_sent_to_the_cpu(run_sweep: RunSweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There its settings would refuse it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "it").mkdir()
    record = {
        "state": "INTERRUPTED",
        "created": "2026-01-01",
        "settings": {"device": "cuda", "num_trials": 16},
        "two_tiers": False,
    }
    (tmp_path / "it" / "sweep.json").write_text(json.dumps(record))
    code, _, err = run_sweep("--results", tmp_path, "--resume")
    assert code == 2
    assert err.startswith("error: sweep it was started on a GPU, and torch sees none here: go on with it where there is one")
    assert "--device cpu" not in err
    code, _, err = run_sweep("--results", tmp_path, "--refit", "2", "--name", "other")
    assert (code, err) == (2, f"error: --refit: no sweep other in {tmp_path}: there are it\n")


def test_places_are_recorded_by_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    relative = {"clip_model": "local-dir:start", "model.pretrained": "start/weights.pt", "training.batch_size": "16"}
    monkeypatch.chdir(tmp_path)
    settings = SweepSettings(overrides=relative)
    assert settings.overrides == {
        "clip_model": f"local-dir:{tmp_path / 'start'}",
        "model.pretrained": str(tmp_path / "start" / "weights.pt"),
        "training.batch_size": "16",
    }
    assert settings.resumed(SweepSettings(overrides=relative), "it").overrides == settings.overrides
    for kept in (
        {"clip_model": "ViT-B-32", "model.pretrained": "none"},
        {"model.pretrained": None},
        {"model.pretrained": "openai"},
    ):
        assert SweepSettings(overrides=kept).overrides == kept


def test_a_hub_name_that_a_sweep_recorded_is_given_again_by_the_caller() -> None:
    recorded = stored_settings({**asdict(SweepSettings()), "overrides": {"clip_model": "hf-hub:somebody/model"}}, "shop")
    with pytest.raises(UserError, match="give this flag again"):
        recorded.resumed(SweepSettings(), "shop")
    again = SweepSettings(overrides={"clip_model": "hf-hub:somebody/model"})
    assert recorded.resumed(again, "shop").overrides == again.overrides
    assert again.flags_to_go_on()[-2:] == ["--set", "clip_model=hf-hub:somebody/model"]
