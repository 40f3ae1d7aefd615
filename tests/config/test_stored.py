"""What lets a stored configuration reach out or run commands is the caller's: here are folders that say otherwise."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fashionclip_tune.cli.main import main
from fashionclip_tune.config.choices import BatchNorms
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.config.stored import UNSAID, as_begun, stored_config, with_stored
from fashionclip_tune.errors import UserError
from fashionclip_tune.evaluation.metric import DEFAULT_METRIC
from fashionclip_tune.models.named_model import named_model
from fashionclip_tune.models.openclip import export_openclip, fetch_weights, load_model
from fashionclip_tune.reporting.gallery import make_gallery
from fashionclip_tune.reporting.sweep_files import best_row, read_sweep
from fashionclip_tune.training.callbacks import RunCallbacks
from fashionclip_tune.training.train import run_training, train
from tests.support.tampering import tampered

ROOT = Path(__file__).parents[2]
SETTINGS = ("--set", "device=cpu", "--set", "hardware.threads=1", "--set", "model.pretrained=none")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


@pytest.fixture
def sweep_dir(small_sweep: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_sweep, tmp_path / "small"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """A command in this process: exit status, and all that it said."""

    def call(*arguments: object) -> tuple[int, str]:
        code = 0
        try:
            main([*map(str, arguments)])
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


def compare(*arguments: object) -> str:
    command = [sys.executable, "sweeps/compare.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def test_a_report_of_a_foreign_sweep_runs_nothing(sweep_dir: Path, marker: Path) -> None:
    tampered(sweep_dir, marker)
    said = compare(sweep_dir)
    assert not marker.exists()
    assert "small: what the winner finds is not shown: 'pipe:touch" in said
    assert "must be asked for: --allow-remote" in said
    with pytest.raises(UserError, match="must be asked for: --allow-remote"):
        make_gallery(sweep_dir, best_row(read_sweep(sweep_dir)["trials"], DEFAULT_METRIC) or {})
    assert not marker.exists()


def test_a_report_shows_photos_from_elsewhere_where_its_caller_allows_it(garments: Path, sweep_dir: Path) -> None:
    """As of a sweep that ran with ``--allow-remote``; and that its own files allow it or not makes no difference."""
    for path in sweep_dir.glob("trials/*/checkpoints/step_*/checkpoint.json"):
        record = json.loads(path.read_text())
        record["config"]["valid_shards_pattern"] = f"pipe:cat {garments}/clip_dataset_valid_aug.000000.tar"
        path.write_text(json.dumps(record))
    said = compare(sweep_dir, "--allow-remote")
    assert "is not shown" not in said
    said = compare(sweep_dir)
    assert "the report.html that was there had the winner's photos of small; this one has not (small: 'pipe:cat" in said
    assert "--allow-remote" in said


@pytest.mark.parametrize("what", ["run", "checkpoint", "sweep", "best"])
def test_evaluating_a_foreign_model_runs_nothing(
    garments: Path, sweep_dir: Path, marker: Path, run: Callable[..., tuple[int, str]], what: str
) -> None:
    trial = next(sweep_dir.glob("trials/0000-*"))
    export_openclip(named_model(str(trial), ProjectConfig()).loaded, sweep_dir / "best")
    content = {**read_sweep(sweep_dir), "best": {"trial_id": "0000"}}
    (sweep_dir / "sweep.json").write_text(json.dumps(content))
    places = {
        "run": trial,
        "checkpoint": next(trial.glob("checkpoints/step_*")),
        "sweep": sweep_dir,
        "best": sweep_dir / "best",
    }
    command = ("evaluate", "--model", places[what], "--data", garments, *SETTINGS, "--json", "-")
    before = run(*command)
    tampered(sweep_dir, marker)
    assert run(*command) == before
    assert before[0] == 0
    assert not marker.exists()


def test_training_on_from_a_foreign_run_runs_nothing(
    garments: Path, tiny_config: ProjectConfig, tmp_path: Path, marker: Path, run: Callable[..., tuple[int, str]]
) -> None:
    stopped = tmp_path / "run"
    calls = iter([False] * 5 + [True] * 20)
    with pytest.raises(Exception, match="asked to end"):
        run_training(tiny_config, stopped, RunCallbacks(should_stop=lambda: next(calls)))
    tampered(stopped, marker)
    (checkpoint,) = stopped.glob("checkpoints/step_00000005")
    further = ("--set", "clip_model=tiny-clip", "--set", "training.max_steps=2", "--set", "training.batch_size=16")
    start = ("--set", f"checkpoint_path={checkpoint}", "--set", "should_load_checkpoint=true")
    code, said = run("train", "--data", garments, "--out", tmp_path / "second", *SETTINGS, *further, *start)
    assert code == 0, said
    assert train(tiny_config, stopped, resume_from=stopped).metrics["step"] == 10
    assert not marker.exists()


def test_a_run_on_photos_from_elsewhere_goes_on_where_its_caller_allows_it_again(
    garments: Path, tmp_path: Path, run: Callable[..., tuple[int, str]]
) -> None:
    shards = {split: f"pipe:cat {garments}/clip_dataset_{split}_aug.000000.tar" for split in ("train", "valid")}
    patterns = [text for split, shard in shards.items() for text in ("--set", f"{split}_shards_pattern={shard}")]
    few = ("--set", "clip_model=tiny-clip", "--set", "training.batch_size=16", "--set", "training.max_steps=2")
    command = ("train", "--data", garments, "--out", tmp_path / "run", *SETTINGS, *few, *patterns)
    code, said = run(*command, "--allow-remote")
    assert code == 0, said
    code, said = run(*command, "--resume")
    assert code == 2
    assert "--allow-remote" in said
    assert run(*command, "--resume", "--allow-remote")[0] == 0
    assert run(*command, "--resume", "--set", "reading.allow_remote=true")[0] == 0


@pytest.fixture
def with_code(tmp_path: Path, marker: Path) -> Path:
    """An OpenCLIP folder of tiny-clip whose tokenizer would run code."""
    folder = tmp_path / "with-code"
    export_openclip(load_model(ProjectConfig(clip_model="tiny-clip").with_overrides({"model.pretrained": None})), folder)
    described = json.loads((folder / "open_clip_config.json").read_text())
    described["model_cfg"]["text_cfg"] |= {
        "hf_tokenizer_name": str(folder),
        "tokenizer_kwargs": {"trust_remote_code": True},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}, "model_type": "evil"}')
    (folder / "config.json").write_text("{}")
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    return folder


def test_a_tokenizer_with_code_of_its_own_is_refused(
    sweep_dir: Path, with_code: Path, marker: Path, garments: Path, run: Callable[..., tuple[int, str]]
) -> None:
    trial = next(sweep_dir.glob("trials/0000-*"))
    command = ("evaluate", "--model", trial, "--data", garments, *SETTINGS)
    tampered(sweep_dir, marker, clip_model=f"local-dir:{with_code}")
    for more in ((), ("--allow-remote",)):
        code, said = run(*command, *more)
        assert (code, "trust_remote_code" in said) == (2, True)
    tampered(sweep_dir, marker, clip_model="tiny-clip", **{"model.pretrained": str(with_code)})
    run(*command)
    config = ProjectConfig(clip_model="tiny-clip").with_overrides({"model.pretrained": str(with_code)})
    for use in (load_model, fetch_weights):
        with pytest.raises(UserError, match="trust_remote_code"):
            use(config)
    assert not marker.exists()


def test_what_does_not_speak_of_batch_norms_was_made_when_they_were_updated() -> None:
    assert stored_config({}, allow_remote=False).model.batch_norm is BatchNorms.LEGACY
    assert stored_config(ProjectConfig().to_dict(), allow_remote=False) == ProjectConfig()
    legacy, updating = (ProjectConfig().with_overrides({"model.batch_norm": name}) for name in ("legacy", "update"))
    for before in ({"training.edition": 2}, legacy.to_dict()):
        assert as_begun(ProjectConfig(), before) == legacy
        assert as_begun(updating, before) == updating, "to be refused, not to be changed"
    for before in (ProjectConfig(), updating):
        assert as_begun(ProjectConfig(), before.to_dict()) == ProjectConfig()


def test_what_does_not_speak_of_its_edition_is_of_the_first() -> None:
    assert stored_config({}, allow_remote=False).training.edition == 1
    first = ProjectConfig().with_overrides({"training.edition": 1})
    assert as_begun(ProjectConfig(), {"model.batch_norm": "fixed"}) == first
    assert as_begun(ProjectConfig(), first.to_dict()) == first
    assert as_begun(ProjectConfig(), ProjectConfig().to_dict()) == ProjectConfig()
    assert as_begun(first, ProjectConfig().to_dict()) == first, "to be refused, not to be changed"


def test_the_callers_word_counts_and_the_files_does_not() -> None:
    there = {"reading.allow_remote": True, "training.epochs": 7}
    expected = ProjectConfig().with_overrides({"training.epochs": 7, **UNSAID})
    assert stored_config(there, allow_remote=False) == expected
    assert stored_config({}, allow_remote=True).reading.allow_remote
    allowing = ProjectConfig().with_overrides({"reading.allow_remote": True})
    assert with_stored(allowing, {"reading.allow_remote": False}).reading.allow_remote
    elsewhere = {"clip_model": "hf-hub:somebody/model"}
    assert stored_config(elsewhere, allow_remote=True).model_name == "hf-hub:somebody/model"
    assert with_stored(ProjectConfig(), elsewhere, known_models=["hf-hub:somebody/model"]).model_name.startswith("hf-hub:")
    with pytest.raises(UserError, match=r"clip_model = 'hf-hub:somebody/model' comes from a stored file.*--allow-remote"):
        stored_config(elsewhere, allow_remote=False)
