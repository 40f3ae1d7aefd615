"""What ``probe`` keeps of a card is what a sweep's plan for it goes by: a T4 that is made up, its measuring part replaced."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fashionclip_tune.cli.main import main
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.models.architecture import meta_model
from fashionclip_tune.profiling import probe
from fashionclip_tune.profiling import throughput as pace
from fashionclip_tune.profiling.memory import MemoryEstimate
from fashionclip_tune.profiling.roofline import Passes, passes_of
from fashionclip_tune.tuning.console.plan_text import plan_lines
from fashionclip_tune.tuning.planning import gpu_memory as shares
from fashionclip_tune.tuning.planning import throughput as rates
from fashionclip_tune.tuning.planning.plan import SweepPlan, plan_sweep
from fashionclip_tune.tuning.planning.settings import SweepSettings

GB = 10**9
MODELS = ("ViT-B-32", "ViT-B-16", "ViT-B-16-SigLIP2-256")
PEAKS = {"ViT-B-32": {"64": 4 * GB}, "ViT-B-16": {"64": 9 * GB}, "ViT-B-16-SigLIP2-256": {"64": None, "32": 11 * GB}}
ALONE = {"ViT-B-32": 400.0, "ViT-B-16": 150.0, "ViT-B-16-SigLIP2-256": 110.0}


@pytest.fixture
def t4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As far as torch is asked what there is; nothing is computed on it."""
    monkeypatch.setenv("FASHIONCLIP_CACHE", str(tmp_path / "cache"))
    card = SimpleNamespace(name="Tesla T4", total_memory=int(15.8 * GB))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: False)
        patch.setattr(torch.cuda, "get_device_properties", lambda *_: card)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
        patch.setattr(rates, "passes_of", count_without_a_card)
        yield


def count_without_a_card(*of: Any) -> Passes:
    """torch, told that there is a card, would look for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        return passes_of(*of)


def planned(garments: Path, **changes: object) -> SweepPlan:
    settings = SweepSettings(data=str(garments), space="openclip", preset="quick", **changes)
    return plan_sweep(settings, dry_run=True)


def probe_as_a_user_does(monkeypatch: pytest.MonkeyPatch) -> list[ProjectConfig]:
    """All but the measuring itself: neither weights nor a card are needed for it."""
    measured: list[ProjectConfig] = []

    def peak(config: ProjectConfig, loaded: object, plan: object, size: int) -> int | None:
        if config not in measured:
            measured.append(config)
        return PEAKS[config.model_name][str(size)]

    def paces(config: ProjectConfig, count: int, **_: object) -> list[float]:
        return [ALONE[config.model_name] * (0.6 if count == 2 else 1.0)] * count

    monkeypatch.setattr(probe, "load_random_model", lambda config: SimpleNamespace(network=meta_model(config.model_name)))
    monkeypatch.setattr(probe, "_estimate", lambda *_: MemoryEstimate(*[0] * 9))
    monkeypatch.setattr(probe, "_measure", peak)
    monkeypatch.setattr(pace, "run_side_by_side", paces)
    for model in MODELS:
        main(["probe", "--set", f"clip_model={model}"])
    return measured


@pytest.mark.usefixtures("t4")
def test_a_plan_goes_by_what_probe_measured_of_each_model(
    garments: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = probe_as_a_user_does(monkeypatch)
    assert [config.freeze.token_embedding for config in measured] == [False, False, False]
    assert "two trials side by side: +20%" in capsys.readouterr().out
    monkeypatch.setattr(shares, "_estimate_bytes", lambda config, rows: pytest.fail(f"{config.model_name} is estimated"))
    plan = planned(garments)
    assert plan.gpu is not None
    needs = {name: plan.gpu.need(config) for name, config in plan.check.config_of_model.items()}
    assert {name: need.source for name, need in needs.items()} == dict.fromkeys(MODELS, "measured")
    assert [need.memory_bytes for need in needs.values()] == [4 * GB, 9 * GB, 11 * GB]
    assert needs[MODELS[2]].micro_batch_size == 32
    assert {pace.source for pace in plan.course.paces or ()} == {"measured by probe"}
    # Three of ViT-B-32 share the card: each has a third of what two have together.
    assert plan.at_a_time["ViT-B-32"] == 3
    assert plan.forecast.samples_per_second == pytest.approx({**ALONE, "ViT-B-32": 2 * 0.6 / 3 * ALONE["ViT-B-32"]})


@pytest.mark.usefixtures("t4")
def test_what_a_user_says_of_the_token_embedding_is_what_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(probe, "probe", lambda config: measured.append(config) or probe.ProbeReport("T4", 1, ()))
    for table in ("true", "false"):
        main(["probe", "--set", "clip_model=ViT-B-16-SigLIP2-256", "--set", f"freeze.token_embedding={table}"])
    assert [config.freeze.token_embedding for config in measured] == [True, False]


@pytest.mark.usefixtures("t4")
def test_where_memory_depends_on_what_is_drawn_each_share_has_its_line_and_its_hours(
    garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        'BASE = {"clip_model": "ViT-B-32", "training.batch_size": 64}\n'
        "def space(trial):\n"
        '    return {"freeze.text_tower": trial.suggest_categorical("freeze", [False, True])}\n'
    )
    monkeypatch.setattr(shares, "_estimate_bytes", lambda config, rows: (5 if config.freeze.text_tower else 9) * GB)
    settings = SweepSettings(data=str(garments), space=str(file), budget_examples=576)
    plan = plan_sweep(settings, dry_run=True)
    lines = plan_lines(plan)
    (trials,) = [line for line in lines if line.startswith("trials:")]
    assert "at most 3 side by side" in trials
    one, three = [line for line in lines if "loader processes" in line]
    assert "1.00 GPU, 1 side by side: 9.0 of 15.8 GB (estimate)" in one
    assert "0.33 GPU, 3 side by side: 5.0 of 15.8 GB (estimate)" in three
    # Three share the card's time; without a backward pass through the text tower each would be faster.
    assert plan.course.paces is not None
    pairs = zip(plan.course.configs, plan.course.paces, strict=True)
    found = {config.freeze.text_tower: round(pace.samples_per_second) for config, pace in pairs}
    assert found[False] / 3 < found[True] < found[False] / 2
    (said,) = [line for line in lines if line.startswith("rates:")]
    assert f"{found[True]} to {found[False]} examples/s a trial" in said


def test_nothing_is_downloaded_or_pretrained_to_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASHIONCLIP_CACHE", str(tmp_path))  # no pretrained towers there
    monkeypatch.setattr("open_clip.get_tokenizer", lambda *_, **__: pytest.fail("a tokenizer is looked for"))
    main(["probe", "--set", "clip_model=tiny-clip", "--set", "training.batch_size=4"])
    assert "micro-batch     4  estimate" in capsys.readouterr().out
