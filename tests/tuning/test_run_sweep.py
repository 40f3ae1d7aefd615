"""The script's errors and its dry run: nothing here starts Ray."""

import re
from pathlib import Path
from typing import Any

import pytest

from fashionclip_tune.machine.hardware import available_cores
from tests.tuning.conftest import RunSweep

FAST = ("--set", "model.pretrained=none", "--set", "training.batch_size=16")


def refused(result: Any, *said: Any) -> Any:
    code, _, err = result
    assert code == 2
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert err.count("\n") == 1, f"more than one line: {err}"
    for part in said:
        assert part in err
    return err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--space", "nonsense"], ["nonsense", "tiny", "openclip", "published"]),
        (["--scheduler", "pbt"], ["--scheduler 'pbt'", "asha, asha-stopping, median or none", "settings midway"]),
        (["--scheduler", "bohb"], ["--scheduler 'bohb'", "asha, asha-stopping, median or none", "wait for each other"]),
        (["--metric", "recall@10"], ["--metric 'recall@10'", "recall_at_5, recall_at_5_text_to_image", "evaluation.protocol"]),
        (["--min-trials-per-model", "2"], ["--min-trials-per-model 2", "with --scheduler asha", "choose another scheduler"]),
        (["--keep-paused", "-1"], ["--keep-paused -1", "at least 0"]),
        (["--keep-paused", "2", "--scheduler", "median"], ["--keep-paused", "--scheduler median", "do not wait"]),
        (["--scheduler", "none", "--min-trials-per-model", "-1"], ["--min-trials-per-model -1", "at least 0"]),
        (["--scheduler", "median", "--min-trials-per-model", "9"], ["--min-trials-per-model 9", "2 models", "at most 8"]),
        (
            ["--scheduler", "none", "--min-trials-per-model", "1", "--space", "published"],
            ["--min-trials-per-model 1", "no categorical parameter"],
        ),
        (["--warm-start", "nowhere"], ["nowhere is no sweep"]),
        (["--disk-budget-gb", "0.001"], ["--disk-budget-gb 0.001 is too little", "one trial at a time"]),
        (["--num-trials", "0"], ["--num-trials 0", "at least 1"]),
        (["--max-concurrent", "0"], ["--max-concurrent 0", "at least 1"]),
        (["--reduction-factor", "1"], ["--reduction-factor 1", "at least 2"]),
        (["--gpus-per-trial", "1.5"], ["--gpus-per-trial 1.5", "at most 1"]),
        (["--preset", "weekend"], ["--preset 'weekend'", "quick, evening, night"]),
        (["--gpu-memory-gb", "0"], ["--gpu-memory-gb 0", "above 0"]),
        (["--time-budget", "-1"], ["--time-budget -1", "above 0"]),
        (["--refit", "2"], ["--refit", "--name NAME"]),
        (["--refit", "2", "--name", "gone"], ["--refit: no sweep gone in ", "there is none"]),
        *(
            ([flag, value], [flag, f"'{value}' is not allowed: a number expected"])
            for flag, value in (
                *(("--sync-every", "nan"), ("--disk-budget-gb", "nan"), ("--time-budget", "inf"), ("--scratch-gb", "inf")),
                *(("--gpus-per-trial", "nan"), ("--gpu-memory-gb", "inf"), ("--samples-per-second", "many")),
            )
        ),
        (["--device", "tpu"], ["tpu", "auto, cpu or cuda"]),
        (["--set", "training.lerning_rate=1"], ["training.lerning_rate", "training.learning_rate"]),
        (["--set", "training.learning_rate=fast"], ["training.learning_rate = 'fast'", "a number expected"]),
        (["--set", "training.epochs"], ["PATH=VALUE"]),
        (["--set", "train_shards_pattern=nothing.{000000..000003}.tar"], ["nothing.{000000..000003}.tar", "none of its files"]),
        (["--set", "train_shards_pattern=pipe:cat x.tar"], ["pipe:cat x.tar", "runs a command", "--allow-remote"]),
        (["--set", "reading.allow_remote=true"], ["reading.allow_remote", "use --allow-remote"]),
        (["--scratch-gb", "0"], ["reading.scratch_gb = 0.0", "above 0"]),
        (["--budget-examples", "100"], ["--budget-examples 100", "multiple of 16", "say 96"]),
        (["--budget-examples", "96", "--grace-examples", "64"], ["--grace-examples 64", "say 64 or 128"]),
        (["--set", "training.batch_size=500"], ["500", "160 photos"]),
        (["--set", "clip_model=ViT-B-31"], ["ViT-B-31", "ViT-B-32"]),
        (["--set", "freeze.image_blocks=99"], ["freeze.image_blocks = 99 is not possible", "has 3 there", "0 to 3"]),
        (["--set", "freeze.text_blocks=3"], ["freeze.text_blocks = 3 is not possible", "has 2 there", "0 to 2"]),
        (
            ["--set", "clip_model=RN50", "--set", "model.patch_dropout=0.5"],
            ["model.patch_dropout = 0.5 is not possible", "RN50 is no vision transformer"],
        ),
        (
            ["--set", "clip_model=RN50", "--set", "optimizer.layer_decay=0.5"],
            ["optimizer.layer_decay = 0.5 is not possible", "the image tower is no plain transformer", "allowed is 1"],
        ),
        (["--set", "training.budget_examples=640"], ["training.budget_examples", "--budget-examples"]),
        (["--set", "device=cpu"], ["--device"]),
        (["--num-trials", "many"], ["--num-trials", "many"]),
        (["--name", "a/b"], ["'a/b'", "without slashes"]),
        (["--device", "cuda:1"], ["cuda:1", "CUDA_VISIBLE_DEVICES"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_flag_is_one_line_that_says_what_is_allowed(
    run_sweep: RunSweep, garments: Path, tmp_path: Path, arguments: Any, said: Any
) -> None:
    base = () if "training.batch_size" in " ".join(arguments) else FAST
    result = run_sweep("--data", garments, "--results", tmp_path / "results", *base, *arguments)
    refused(result, *said)
    assert not (tmp_path / "results").exists(), "something was started"


def test_a_folder_without_shards_is_refused(run_sweep: RunSweep, tmp_path: Path) -> None:
    refused(run_sweep("--data", tmp_path / "nowhere"), "nowhere", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(run_sweep("--data", tmp_path / "empty"), "empty", "clip_dataset_train.000000.tar", "prepare")


def test_a_url_must_be_allowed_and_there(run_sweep: RunSweep) -> None:
    """Nothing listens on port 1."""
    refused(run_sweep("--data", "http://127.0.0.1:1/shards"), "http://127.0.0.1:1/shards", "--allow-remote")
    refused(run_sweep("--data", "ftp://127.0.0.1/shards", "--allow-remote"), "is not allowed: a path, or one of https")
    refused(run_sweep("--data", "http://127.0.0.1:1/shards", "--allow-remote"), "shards/dataset.json", "cannot be read")


RATE = """def space(trial):
    return {'training.learning_rate': trial.suggest_float('learning_rate', 1e-5, 1e-2, log=True)}
"""


BLOCKS = """def space(trial):
    model = trial.suggest_categorical('model', ['ViT-B-32', 'tiny-clip'])
    return {'clip_model': model, 'freeze.image_blocks': trial.suggest_int('blocks', 0, 4)}
"""


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "def space(trial):\n    return {'training.epochs': trial.suggest_int('epochs', 0, 1)}",
            ["draws training.epochs", "--budget-examples"],
        ),
        ("def space(trial):\n    return {'clip_model': 'ViT-Z'}", ["ViT-Z", "ViT-B-32"]),
        # Of the second model only, and only in some draws.
        (BLOCKS, ["freeze.image_blocks = 4 is not possible: tiny-clip has 3 there"]),
        ("def space(trial):\n    return {'learning_rate': 1e-3}", ["'learning_rate' is no setting", "training.learning_rate"]),
        ("def space(trial):\n    return 3", ["returned int", "dict"]),
        ("def space(trial):\n    return 1 / 0", ["ZeroDivisionError", "line 2"]),
        ("import not_there", ["not_there", "line 1"]),
        ("BASE = {}", ["no function space(trial)"]),
        ("BASE = 3\ndef space(trial):\n    return {}", ["BASE is a dict"]),
        ("BASE = {'training.seed': 1}\ndef space(trial):\n    return {}", ["BASE", "training.seed", "--seed"]),
        ("def space(trial):\n    return {'training.max_steps': 10}", ["training.max_steps", "--budget-examples"]),
        ("POINTS = [{'rate': 1e-3}]\n" + RATE, ["'rate'", "not drawn", "learning_rate"]),
        ("POINTS = [{'learning_rate': 5.0}]\n" + RATE, ["learning_rate = 5.0", "1e-05..0.01 log"]),
    ],
)
def test_a_wrong_space_is_refused_before_anything_starts(
    run_sweep: RunSweep, garments: Path, tmp_path: Path, source: Any, said: Any
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(source)
    refused(run_sweep("--data", garments, "--space", file, "--results", tmp_path / "results"), "mine.py", *said)
    assert not (tmp_path / "results").exists()


def test_weights_that_cannot_be_fetched_say_where_they_were_looked_for_and_how_to_bring_them(
    run_sweep: RunSweep, garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where openclip_cache/ is looked for
    result = run_sweep("--data", garments, "--space", "published", "--results", tmp_path / "results")
    err = refused(result, "laion2b_s34b_b", str(tmp_path / "openclip_cache"), "--set clip_model=")
    assert "laion/CLIP" in err
    assert not (tmp_path / "results").exists()


def test_an_existing_name_needs_resume(run_sweep: RunSweep, garments: Path, tmp_path: Path) -> None:
    (tmp_path / "results" / "mine").mkdir(parents=True)
    refused(run_sweep("--data", garments, "--results", tmp_path / "results", "--name", "mine"), "mine exists", "--resume")


def test_a_dry_run_prints_the_plan_and_starts_nothing(run_sweep: RunSweep, garments: Path, tmp_path: Path) -> None:
    code, out, err = run_sweep("--data", garments, "--results", tmp_path / "results", "--num-trials", "12", "--dry-run", *FAST)
    assert (code, err) == (0, "")
    # about 3 epochs of 160 photos, in nine stages of whole batches of 16.
    for part in (
        "space:    tiny: clip_model tiny-clip|tiny-sig; loss_function contrastive|siglip; learning_rate 0.0001..0.01 log; ",
        "160 photos to train on, 20 to evaluate on",
        "2 shards",
        "trials:   12",
        "budget:   432 examples a trial (2.7 epochs), evaluated every 48",
        "rungs at 48, 144 examples",
        "losses:   InfoNCE, sigmoid\n",
        "trials wait there, and what promises most for its cost goes on",
        "metric:   recall_at_10, protocol instance",
    ):
        assert part in out
    assert not (tmp_path / "results").exists()
    chosen = ("--metric", "recall_at_1_image_to_text", "--set", "evaluation.protocol=product")
    _, out, _ = run_sweep("--data", garments, "--results", tmp_path / "results", "--dry-run", *FAST, *chosen)
    assert "metric:   recall_at_1_image_to_text, protocol product" in out


def test_a_dry_run_plans_for_a_card_that_is_not_here(
    run_sweep: RunSweep, garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = (
        "--data",
        garments,
        "--results",
        tmp_path / "results",
        "--set",
        "training.batch_size=16",
    )
    card = ("--gpu-memory-gb", "15.8")  # which asks for a card, and so for the space openclip
    code, out, err = run_sweep(*arguments, *card, "--preset", "evening", "--dry-run")
    assert (code, err) == (0, "")
    for part in (
        "trials:   30",
        "on cuda",
        "machine:  a card of 15.8 GB, which is not here, beside ",
        f"{available_cores()} cores and ",
        "of host memory, as this machine has",
        "ViT-B-16-SigLIP2-256: ",
        "of 15.8 GB (estimate)",
        "host RAM: at most",
        "10 passes over the data",
        "examples/s a trial (estimate for a T4)",
        "cut first",
    ):
        assert part in out
    assert "frozen" not in out
    more = ("--disk-budget-gb", "60")
    code, out, _ = run_sweep(*arguments, *card, *more, "--dry-run")
    assert code == 0
    assert re.search(r"disk:     at most \d\d\.\d GB in the results \(with", out)
    large = ("--set", "clip_model=ViT-B-16-SigLIP2-256", "--set", "training.micro_batch_size=1")
    more = (*large, "--gpus-per-trial", "0.25")
    refused(run_sweep(*arguments, *card, *more, "--dry-run"), "SigLIP2-256 needs", "--gpus-per-trial 0.25 allows 4.0 of")
    refused(run_sweep(*arguments, *card, "--device", "cpu", "--dry-run"), "--gpu-memory-gb", "--device cpu")
    refused(run_sweep(*arguments, "--device", "cuda", *card), "--device cuda", "--device cpu")
    assert not (tmp_path / "results").exists()


def test_a_resumed_sweep_keeps_its_card_and_takes_a_time_budget_of_its_own() -> None:
    from fashionclip_tune.tuning.planning.settings import SweepSettings

    before = SweepSettings(gpu_memory_gb=15.8, time_budget=30.0, preset="evening", max_concurrent=2)
    now = before.resumed(SweepSettings(max_concurrent=1), "it")
    assert (now.gpu_memory_gb, now.time_budget, now.max_concurrent) == (15.8, None, 1)
    assert before.resumed(SweepSettings(time_budget=5.0), "it").time_budget == 5
    with pytest.raises(ValueError, match="--preset evening, not night"):
        before.resumed(SweepSettings(preset="night"), "it")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--scheduler", "median"], "stopping: median, judged every 48 examples"),
        (["--scheduler", "none"], "stopping: none: every trial runs to its budget"),
        (
            ["--scheduler", "asha-stopping", "--min-trials-per-model", "5"],
            "at least 5 trials for each start, in turns of like cost",
        ),
        (["--min-trials-per-model", "0"], "losses:   InfoNCE, sigmoid\n"),
        (["--set", "clip_model=tiny-sig"], "losses:   InfoNCE, sigmoid\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_the_plan_says_how_trials_are_stopped_and_shared_out(
    run_sweep: RunSweep, garments: Path, tmp_path: Path, flags: Any, said: Any
) -> None:
    arguments = ("--data", garments, "--results", tmp_path / "results", "--num-trials", "12", "--dry-run")
    code, out, err = run_sweep(*arguments, *FAST, *flags)
    assert (code, err) == (0, "")
    assert said in out


def test_the_openclip_space_starts_from_the_five_published_settings() -> None:
    """What it can say of them is what the space ``published`` says; the rest of that recipe belongs to its BASE."""
    from fashionclip_tune.tuning.planning.space import load_space
    from fashionclip_tune.tuning.study.draws import draw_points

    openclip, published = load_space("openclip"), load_space("published")
    ours = [each.settings for each in draw_points(openclip.draw, 0, 0, openclip.points)]
    theirs = [each.settings for each in draw_points(published.draw, 0, 0, published.points)]
    assert len(ours) == len(theirs) == 5
    for point, setting in zip(ours, theirs, strict=True):
        assert {name: point[name] for name in setting} == setting
        more = {name: value for name, value in point.items() if name not in setting}
        assert more == {"loss.positives": "pair", "training.learning_rate": 1e-5, "optimizer.layer_decay": 1.0}
        assert published.base["training.learning_rate"] == 1e-5


def test_a_space_may_call_the_architecture_as_it_likes(run_sweep: RunSweep, garments: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def space(trial):\n    return {'clip_model': trial.suggest_categorical('m', ['ViT-B-16', 'tiny-sig', 'ViT-B-32'])}\n"
    )
    arguments = ("--data", garments, "--space", tmp_path / "mine.py", "--num-trials", "36", "--dry-run")
    code, out, err = run_sweep(*arguments, *FAST, "--scheduler", "asha-stopping")
    assert (code, err) == (0, "")
    assert "at least 6 trials for each start, in turns of like cost" in out


def test_a_space_of_points_alone_has_as_many_trials(run_sweep: RunSweep, garments: Path, tmp_path: Path) -> None:
    """More would repeat them; who asks for more gets it."""
    (tmp_path / "mine.py").write_text(
        "POINTS = [{'s': name} for name in ('a', 'b', 'c')]\n"
        "RATES = {'a': 0.1, 'b': 0.2, 'c': 0.3}\n"
        "def space(trial):\n    return {'training.learning_rate': RATES[trial.suggest_categorical('s', list(RATES))]}\n"
    )
    (tmp_path / "more.py").write_text(
        (tmp_path / "mine.py").read_text().replace("'abc'", "'abcc '").replace("0.3}", "0.3, ' ': 1}")
    )
    for space, flags, expected in (
        ("mine", (), 3), ("mine", ("--preset", "evening"), 3), ("mine", ("--num-trials", "5"), 5), ("more", (), 16)
    ):  # fmt: skip
        arguments = (
            "--data",
            garments,
            "--space",
            tmp_path / f"{space}.py",
            "--dry-run",
            "--samples-per-second",
            "100",
            *flags,
        )
        code, out, err = run_sweep(*arguments, *FAST)
        assert (code, err) == (0, "")
        assert f"trials:   {expected}, " in out


def test_a_preset_keeps_its_budget_beside_a_stage_of_ones_own(run_sweep: RunSweep, garments: Path) -> None:
    """Ten passes over the 160 photos here, as without the flag; one epoch was what became of it."""
    arguments = (
        "--data",
        garments,
        "--preset",
        "evening",
        "--space",
        "tiny",
        "--dry-run",
        "--samples-per-second",
        "1e6",
        *FAST,
    )
    code, out, _ = run_sweep(*arguments)
    assert (code, "budget:   1,584 examples a trial (9.9 epochs), evaluated every 176" in out) == (0, True)
    code, out, _ = run_sweep(*arguments, "--grace-examples", "64")
    assert (code, "budget:   1,600 examples a trial (10.0 epochs), evaluated every 64" in out) == (0, True)


def test_compare_without_a_sweep_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import runpy

    monkeypatch.setattr("sys.argv", ["compare.py"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(Path(__file__).parents[2] / "sweeps" / "compare.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert said.startswith("error: the following arguments are required: RESULTS/NAME")
    assert said.count("\n") == 1


def test_resume_with_nothing_to_resume_plans_a_new_sweep(run_sweep: RunSweep, garments: Path, tmp_path: Path) -> None:
    code, out, _ = run_sweep("--data", garments, "--results", tmp_path / "results", "--resume", "--dry-run", *FAST)
    assert code == 0
    assert "sweep-001" in out


def test_a_product_in_both_training_and_evaluation_is_told_before_anything_starts(run_sweep: RunSweep, tmp_path: Path) -> None:
    from fashionclip_tune.data.shards import ShardSample, write_split

    def photos(products: Any) -> Any:
        return [ShardSample(key=name, jpeg=b"x", captions=(name,), product_id=name) for name in products]

    write_split(tmp_path, "train", photos([f"P{number}" for number in range(40)]))
    write_split(tmp_path, "valid", photos(["P7", "Q1", "P8"]))
    code, out, _ = run_sweep("--data", tmp_path, "--dry-run", *FAST)
    assert code == 0
    assert "2 products are in both training and evaluation, such as 'P7'" in out
