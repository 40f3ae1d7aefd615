"""A space that draws the batch size: equal examples for all trials, and what a batch takes of the card and of the time."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.machine.hardware import Machine
from fashionclip_tune.training.optimizer import learning_rate_factor
from fashionclip_tune.training.run import plan_run
from fashionclip_tune.tuning.console.plan_text import plan_lines
from fashionclip_tune.tuning.planning import gpu_memory, throughput
from fashionclip_tune.tuning.planning.allocation import Allotment
from fashionclip_tune.tuning.planning.budget import plan_examples
from fashionclip_tune.tuning.planning.forecast import Course, ModelPace, search_terms
from fashionclip_tune.tuning.planning.plan import SweepPlan, plan_sweep
from fashionclip_tune.tuning.planning.settings import SweepSettings
from fashionclip_tune.tuning.planning.slots import Slots
from fashionclip_tune.tuning.planning.space import check_space, load_space
from fashionclip_tune.tuning.planning.throughput import model_paces
from fashionclip_tune.tuning.study.freeze_thaw import batch_key

ROOT = Path(__file__).parents[3]
GB = 10**9
B32 = ProjectConfig(clip_model="ViT-B-32", device="cuda")
DRAWN = 'trial.suggest_categorical("batch_size", [16, 32, 64, 128])'
RARE = 'trial.suggest_categorical("batch_size", [48, 96]) if trial.suggest_float("x", 0, 1) > 0.9999 else 64'
SELDOM = 'trial.suggest_categorical("batch_size", [16, 24, 48, 96]) if trial.suggest_float("x", 0, 1) > 0.98 else 64'


def space_of(folder: Path, batch_size: str, base: str = "") -> str:
    file = folder / "sizes.py"
    file.write_text(
        f'BASE = {{"clip_model": "tiny-clip", "training.num_workers": 0, {base}}}\n'
        f'def space(trial):\n    return {{"training.batch_size": {batch_size}}}\n'
    )
    return str(file)


def planned(garments: Path, space: str, *, begun: dict[str, Any] | None = None, **flags: Any) -> SweepPlan:
    settings = SweepSettings(data=str(garments), space=space, device="cpu", samples_per_second=100.0, **flags)
    return plan_sweep(settings, begun=begun)


def test_all_trials_see_as_many_photos_between_evaluations_and_in_all_and_warm_up_over_as_many(
    garments: Path, tmp_path: Path
) -> None:
    plan = planned(garments, space_of(tmp_path, DRAWN, '"training.epochs": 80'))
    assert plan.check.batch_sizes == (16, 32, 64, 128)
    configs = [plan.base.with_overrides({"training.batch_size": size}) for size in plan.check.batch_sizes]
    runs = [plan_run(config, plan.num_train) for config in configs]
    assert {run.total_steps * config.training.batch_size for run, config in zip(runs, configs, strict=True)} == {
        plan.budget_examples
    }
    assert {run.stage_steps * config.training.batch_size for run, config in zip(runs, configs, strict=True)} == {
        plan.stage_examples
    }
    for run, config in zip(runs, configs, strict=True):
        warm = sum(learning_rate_factor(step, run.total_steps, config.schedule) < 1 for step in range(run.total_steps // 5))
        peak = min(range(run.total_steps), key=lambda step: -learning_rate_factor(step, run.total_steps, config.schedule))
        wanted = config.schedule.warmup_ratio * plan.budget_examples
        assert abs(peak * config.training.batch_size - wanted) <= config.training.batch_size
        assert warm > 0


def test_flags_that_do_not_fit_name_the_sizes_and_the_nearest_multiples(garments: Path, tmp_path: Path) -> None:
    space = space_of(tmp_path, DRAWN)
    sizes = r"a multiple of 128 \(every batch size in the space: 16, 32, 64, 128\)"
    with pytest.raises(UserError, match=rf"--budget-examples 1000 is not allowed: {sizes}, say 896 or 1024$"):
        planned(garments, space, budget_examples=1000)
    with pytest.raises(UserError, match=rf"--grace-examples 64 is not allowed: {sizes}, say 128$"):
        planned(garments, space, budget_examples=1280, grace_examples=64)
    with pytest.raises(UserError, match=r"a multiple of --grace-examples 512, say 1024 or 1536$"):
        planned(garments, space, budget_examples=1280, grace_examples=512)


def test_a_trial_that_becomes_longer_than_its_epochs_for_the_sizes_sake_is_said(garments: Path, tmp_path: Path) -> None:
    short = planned(garments, space_of(tmp_path, DRAWN, '"training.epochs": 1'))
    assert short.budget_examples == 9 * 128
    (line,) = [line for line in plan_lines(short) if line.startswith("budget:")]
    assert "more than the 160 of its epochs: a stage is a multiple of every batch size, 128 at least" in line
    assert "multiple" not in " ".join(plan_lines(planned(garments, space_of(tmp_path, DRAWN, '"training.epochs": 8'))))


@pytest.mark.parametrize("preset", ["quick", "evening"])
def test_a_presets_stages_fit_all_sizes_and_it_is_said_where_that_makes_them_longer(preset: str) -> None:
    allotment = Allotment(Slots(1, 1, 0), Machine(2, 12 * GB, GB), {}, None, None)
    course = Course(8, allotment, [B32], [ModelPace(5.0, 1.0, 1.0, "stated")], 3, "asha")
    settings, sizes = SweepSettings(preset=preset), (64, 128, 256, 512)
    budget, stage, note = plan_examples(settings, course, batch_sizes=sizes, num_train=260_000, epochs=1)
    assert budget % stage == stage % 512 == 0
    assert "hours at the known rates" in note
    assert ("are not enough: a stage is a multiple of every batch size, 512 at least" in note) == (preset == "quick")
    budget, stage, note = plan_examples(settings, course, batch_sizes=sizes, num_train=200, epochs=1)
    assert (budget, stage) == (9 * 512, 512)
    assert "512 at least" in note


@pytest.mark.parametrize(
    "drawn",
    [
        'trial.suggest_int("batch_size", 16, 128)',
        'int(trial.suggest_float("batch_size", 16, 128))',
        'trial.suggest_int("batch_size", 16, 128) if trial.suggest_float("x", 0, 1) > 0.98 else 64',
    ],
)
def test_a_range_of_sizes_is_refused_with_the_cure_before_anything_is_measured(
    garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: str
) -> None:
    monkeypatch.setattr(throughput, "_measure", lambda config: pytest.fail("something is measured"))
    settings = SweepSettings(data=str(garments), space=space_of(tmp_path, drawn), device="cpu")
    with pytest.raises(
        UserError, match=r"draws training.batch_size from .* to 12[5-8], .*suggest_categorical.*64, 128"
    ) as said:
        plan_sweep(settings)
    assert "\n" not in str(said.value)
    assert len(str(said.value)) < 400


def test_sizes_of_a_branch_that_was_seldom_drawn_count_too(garments: Path, tmp_path: Path) -> None:
    plan = planned(garments, space_of(tmp_path, SELDOM))
    drawn = {settings["training.batch_size"] for settings in plan.check.settings}
    assert drawn < {16, 24, 48, 64, 96}
    assert plan.check.batch_sizes == (16, 24, 48, 64, 96)
    assert plan.stage_examples % 192 == 0
    # A parameter that has the batch size's value now and then is another one.
    another = space_of(tmp_path, '64 if trial.suggest_categorical("layers", [64, 5]) else 1')
    assert planned(garments, another).check.batch_sizes == (64,)
    fixed = planned(garments, space_of(tmp_path, DRAWN), overrides={"training.batch_size": 40})
    assert fixed.check.batch_sizes == (40,)


def test_a_size_that_no_draw_before_the_sweep_had_fails_its_trial_with_what_to_do(garments: Path, tmp_path: Path) -> None:
    plan = planned(garments, space_of(tmp_path, RARE))
    assert plan.check.batch_sizes == (64,)
    with pytest.raises(UserError, match=r"training.batch_size = 48, which none of the draws.* 64 examples.*POINTS"):
        plan.draw(optuna.trial.FixedTrial({"x": 0.99999, "batch_size": 48}))
    assert plan.draw(optuna.trial.FixedTrial({"x": 0.5}))["training.batch_size"] == 64


def test_a_sweep_that_goes_on_keeps_the_examples_that_were_planned_for_it(garments: Path, tmp_path: Path) -> None:
    """As an older version did, that knew the drawn sizes only."""
    space, sizes = space_of(tmp_path, SELDOM), {"budget_examples": 9 * 64, "grace_examples": 64}
    with pytest.raises(UserError, match="--grace-examples 64 is not allowed"):
        planned(garments, space, **sizes)
    plan = planned(garments, space, begun={}, **sizes)
    assert (plan.budget_examples, plan.stage_examples) == (576, 64)


def test_batches_larger_than_the_photos_or_the_unique_products_are_refused_before_anything_starts(
    garments: Path, tmp_path: Path
) -> None:
    sizes = 'trial.suggest_categorical("batch_size", [16, 64, 128])'
    unique = '"training.unique_products": True'
    with pytest.raises(UserError, match=r"128 with training.unique_products is more than the 80 products to train on"):
        planned(garments, space_of(tmp_path, sizes, unique))
    assert planned(garments, space_of(tmp_path, sizes)).check.batch_sizes[-1] == 128
    with pytest.raises(UserError, match=r"training.batch_size = 256 is more than the 160 photos to train on"):
        planned(garments, space_of(tmp_path, 'trial.suggest_categorical("batch_size", [16, 256])'))


def sized(size: int, micro: int | None = None, **changes: Any) -> ProjectConfig:
    return B32.with_overrides({"training.batch_size": size, "training.micro_batch_size": micro, **changes})


def rates_of(*configs: ProjectConfig) -> Sequence[float]:
    paces = model_paces(configs, lambda config: 1, num_valid=100, stated=None)
    assert paces is not None
    return [pace.samples_per_second for pace in paces]


def test_a_batch_that_is_cut_is_planned_slower_by_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checkpointing = {"hardware.gradient_checkpointing": True}
    whole, same, cut, both = rates_of(sized(64), sized(64, 64), sized(512, 64), sized(512, 64, **checkpointing))
    assert same == whole  # a micro-batch as large as the batch is no cut
    # One more forward pass each, but an eighth of the updates.
    assert 3 / 4 < cut / whole < 0.9
    assert 3 / 5 < both / whole < 0.8 * cut / whole + 0.1


def test_a_size_that_probe_did_not_time_goes_by_one_that_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    from fashionclip_tune.profiling.throughput import Pace

    timed = {64: Pace(1200.0, None)}
    monkeypatch.setattr(throughput, "known_pace", lambda config: timed.get(config.training.batch_size))
    whole, cut = rates_of(sized(64), sized(512, 64))
    assert whole == 1200
    assert cut == pytest.approx(900)
    # Timed as a whole, and planned in parts: on a smaller share of the card, or by the user's wish.
    timed[512] = Pace(1200.0, None)
    monkeypatch.setattr(throughput, "known_peak", lambda config: 10 * GB)
    assert rates_of(sized(512), sized(512, 64)) == pytest.approx([1200, 900])
    monkeypatch.setattr(throughput, "known_peak", lambda config: None)
    assert rates_of(sized(512, 64)) == [1200]


def test_each_size_of_a_tiny_tower_is_measured_for_itself(
    tiny_config: ProjectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASHIONCLIP_CACHE", str(tmp_path))
    measured: list[tuple[int, int | None]] = []

    def measure(config: ProjectConfig) -> throughput.Measured:
        training = config.training
        measured.append((training.batch_size, training.micro_batch_size))
        return throughput.Measured(1000.0 / training.batch_size, 1.0, 1.0)

    monkeypatch.setattr(throughput, "_measure", measure)
    pairs = [(16, None), (16, 8), (32, 8)]
    sizes = [{"training.batch_size": size, "training.micro_batch_size": micro} for size, micro in pairs]
    stages = {"training.budget_examples": None, "training.stage_examples": None}
    configs = [tiny_config.with_overrides({**stages, **size}) for size in sizes]
    configs += [config.with_overrides({"freeze.text_tower": True}) for config in configs]
    assert rates_of(*configs) == [1000 / 16, 1000 / 16, 1000 / 32] * 2
    assert measured == pairs


def test_each_size_has_the_micro_batch_that_fits_the_card(
    garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    space = Path(space_of(tmp_path, 'trial.suggest_categorical("batch_size", [64, 128])'))
    space.write_text(space.read_text().replace("tiny-clip", "ViT-B-32"))
    plan = plan_sweep(SweepSettings(data=str(garments), space=str(space), device="cuda", gpu_memory_gb=6.5), dry_run=True)
    fitted = {config.training.batch_size: config.training.micro_batch_size for config in plan.fitted_configs}
    assert fitted == {64: None, 128: 64}
    (shares,) = [line for line in plan_lines(plan) if " at micro-batch " in line]
    assert shares.endswith("at micro-batch 64 of 128")
    assert plan.course.paces is not None
    rates = {
        config.training.batch_size: pace.samples_per_second * plan.allotment.at_a_time(config)
        for config, pace in zip(plan.fitted_configs, plan.course.paces, strict=True)
    }
    assert 3 / 4 < rates[128] / rates[64] < 0.85  # one more forward pass, but half as many updates
    gpu = gpu_memory.GpuMemory(gpu_memory.Card("H", 200 * GB))
    whole, cut = sized(4096, 64), sized(64, 64)
    assert gpu.need(whole).memory_bytes - gpu.need(cut).memory_bytes > 4 * 2 * 4096 * 512 * 4  # its embeddings, at least


def test_the_example_of_the_page_is_a_space(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "spaces.md").read_text()
    code = re.search(r"^ {4}# sizes\.py\n((?: {4}.*\n|\n)+)", page, re.MULTILINE)
    assert code is not None
    file = tmp_path / "sizes.py"
    file.write_text(re.sub(r"^ {4}", "", code.group(1), flags=re.MULTILINE))
    space = load_space(str(file))
    check = check_space(space, lambda drawn: ProjectConfig().with_overrides({**space.base, **drawn}), seed=0)
    assert check.batch_sizes == (64, 128, 256, 512)


def test_the_shipped_spaces_leave_the_size_at_64() -> None:
    for name in ("tiny", "openclip", "published", "fashion"):
        space = load_space(name)
        check = check_space(space, lambda drawn, base=space.base: ProjectConfig().with_overrides({**base, **drawn}), seed=0)
        assert check.batch_sizes == (64,)


def test_the_search_knows_what_each_size_costs() -> None:
    allotment = Allotment(Slots(1, 1, 0), Machine(2, 12 * GB, GB), {}, None, None)
    slow, fast = ModelPace(60.0, 1.0, 1.0, "stated"), ModelPace(100.0, 1.0, 1.0, "stated")
    course = Course(8, allotment, [sized(64), sized(512, 64)], [fast, slow], 3, "asha")
    terms = search_terms(course, 46_080, 5_120, keep_paused=3)
    assert terms.cost_of_batch[batch_key("ViT-B-32", 512)] > 1.5 * terms.cost_of_batch[batch_key("ViT-B-32", 64)]
    same = search_terms(Course(8, allotment, [sized(64)], [fast], 3, "asha"), 46_080, 5_120, keep_paused=3)
    assert same.cost_of_batch == {}
