"""``train``: interrupted runs equal uninterrupted ones bit for bit, and what a run leaves on the disk."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import DivergedError, OutOfMemoryError, StoppedError, UserError
from fashionclip_tune.models.openclip import export_openclip, load_model
from fashionclip_tune.models.weights import read_weights
from fashionclip_tune.storage.checkpoint import newest_checkpoint, strip_training_state
from fashionclip_tune.training import evaluator as run_metrics_module
from fashionclip_tune.training import run as run_module
from fashionclip_tune.training.callbacks import RunCallbacks, TrainResult
from fashionclip_tune.training.history import TIMING, read_history
from fashionclip_tune.training.run import RunPlan, plan_run
from fashionclip_tune.training.train import run_training, train, training_prep
from tests.support.runs import hard, started

TIMES = TIMING
STEPS = (0, 2, 4, 6, 8, 10)


def untimed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """A nested state as {path: tensor or number}."""
    if isinstance(value, dict):
        return {key: leaf for name, part in value.items() for key, leaf in leaves(part, f"{path}/{name}").items()}
    if isinstance(value, list | tuple):
        return leaves(dict(enumerate(value)), path)
    return {path: value}


def assert_same_end(one: Path, other: Path) -> None:
    """Weights, optimizer and scaler, and everything that was reported."""
    first, second = (newest_checkpoint(run)[0] for run in (one, other))
    assert first is not None
    assert second is not None
    assert first.step == second.step
    for ours, theirs in (
        (load_file(first.weights_file), load_file(second.weights_file)),
        (leaves(first.training_state()), leaves(second.training_state())),
    ):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            same = torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key]
            assert same, key
    assert untimed(first.record["history"]) == untimed(second.record["history"])
    assert untimed(read_history(one)) == untimed(read_history(other))


def scalars(run: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def stop_at(step: int, exception: BaseException, seen: list[int] | None = None) -> Callable[[dict[str, Any]], None]:
    def on_eval(row: dict[str, Any]) -> None:
        if seen is not None:
            seen.append(row["step"])
        if row["step"] == step:
            raise exception

    return on_eval


@pytest.fixture(scope="session")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ProjectConfig], Path]:
    """Uninterrupted runs, one a configuration."""
    made: dict[str, Path] = {}

    def run(config: ProjectConfig) -> Path:
        key = json.dumps(config.to_dict(), sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole")
            train(config, made[key])
        return made[key]

    return run


@pytest.mark.parametrize(
    ("name", "loss", "stops"),
    [("tiny-clip", "contrastive", (0, 3, 6, 9)), ("tiny-clip", "siglip", (6,)), ("tiny-sig", "siglip", (3, 6))],
)
def test_stopped_after_any_stage_and_resumed_equals_never_stopped(
    tiny_config: ProjectConfig,
    tmp_path: Path,
    whole_runs: Callable[[ProjectConfig], Path],
    name: str,
    loss: str,
    stops: tuple[int, ...],
) -> None:
    config = hard(tiny_config, name, loss)
    expected = whole_runs(config)
    for stage, step in enumerate(stops):
        exception = (SystemExit, KeyboardInterrupt)[stage % 2]("stop")
        run = tmp_path / str(step)
        with pytest.raises(type(exception)):
            train(config, run, on_eval=stop_at(step, exception))
        torch.rand(stage + 1)
        seen: list[int] = []
        result = train(config, run, on_eval=lambda row, seen=seen: seen.append(row["step"]), resume_from=run)
        assert seen == list(range(step, 10, 3))
        assert_same_end(run, expected)
        assert untimed(result.history) == untimed(read_history(expected))


def test_stopped_at_every_stage_and_not_saving_in_between_equals_never_stopped(
    tiny_config: ProjectConfig, tmp_path: Path, whole_runs: Callable[[ProjectConfig], Path]
) -> None:
    """No checkpoint is due (60 minutes), so each stop has to write its own."""
    config = hard(tiny_config)
    lazy = config.with_overrides({"training.checkpoint_minutes": 60})
    for step in (0, 3, 6, 9):
        with pytest.raises(SystemExit):
            train(lazy, tmp_path, on_eval=stop_at(step, SystemExit()), resume_from=tmp_path)
        assert [row["step"] for row in read_history(tmp_path)] == list(range(0, step + 1, 3))
        found, _ = newest_checkpoint(tmp_path)
        assert (found.step if found else 0) == step
    train(lazy, tmp_path, resume_from=tmp_path)
    assert_same_end(tmp_path, whole_runs(config))
    steps = [step for step, _ in scalars(tmp_path, "recall_at_10")]
    assert steps == [0, 60, 120, 180]


def test_the_number_of_workers_changes_no_bit(
    tiny_config: ProjectConfig, tmp_path: Path, whole_runs: Callable[[ProjectConfig], Path]
) -> None:
    config = hard(tiny_config)
    train(config.with_overrides({"training.num_workers": 2}), tmp_path)
    assert_same_end(tmp_path, whole_runs(config))


@pytest.mark.parametrize(("name", "loss"), [("tiny-clip", "contrastive"), ("tiny-sig", "siglip")])
def test_killed_by_sigkill_within_a_stage_and_resumed_equals_never_stopped(
    tiny_config: ProjectConfig, tmp_path: Path, whole_runs: Callable[[ProjectConfig], Path], name: str, loss: str
) -> None:
    config = hard(tiny_config, name, loss)
    run = tmp_path / "run"
    process = started(config, run, cwd=tmp_path)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    assert not (run / "evaluations" / "step_00000009.json").exists()

    train(config, run, resume_from=run)  # another process, and a warning would be an error
    assert_same_end(run, whole_runs(config))
    assert [step for step, _ in scalars(run, "recall_at_10")] == [0, 60, 120, 180]


@pytest.mark.parametrize(("name", "loss"), [("tiny-clip", "contrastive"), ("tiny-sig", "siglip")])
def test_stopped_by_sigterm_at_any_step_and_resumed_equals_never_stopped(
    tiny_config: ProjectConfig,
    tmp_path: Path,
    whole_runs: Callable[[ProjectConfig], Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    loss: str,
) -> None:
    """In the middle of stages: what was summed up of a stage goes on, too."""
    expected = whole_runs(hard(tiny_config, name, loss))
    config = hard(tiny_config, name, loss).with_overrides({"training.checkpoint_minutes": 60})
    stops = (1, 2, 4, 6, 9)
    attempt_step = run_module.Trainer._attempt_step

    def asked_to_end(self: Any, batch: Any) -> None:
        if self.step + 1 in stops:
            os.kill(os.getpid(), signal.SIGTERM)
        attempt_step(self, batch)

    monkeypatch.setattr(run_module.Trainer, "_attempt_step", asked_to_end)
    before = signal.getsignal(signal.SIGTERM)
    for step in stops[:-1]:
        message = rf"asked to end, after {step} of 9 steps; .*/step_0000000{step} can be resumed from"
        with pytest.raises(StoppedError, match=message):
            train(config, tmp_path, resume_from=tmp_path)
        assert signal.getsignal(signal.SIGTERM) is before
        assert newest_step(tmp_path) == step
    train(config, tmp_path, resume_from=tmp_path)  # asked to end at its last step, it is done
    assert_same_end(tmp_path, expected)
    assert [step for step, _ in scalars(tmp_path, "recall_at_10")] == [0, 60, 120, 180]


def newest_step(run: Path) -> int | None:
    found, _ = newest_checkpoint(run)
    return None if found is None else found.step


def test_sigterm_to_the_whole_group_is_outlived_by_the_loaders_and_ends_the_command_with_a_hint(
    tiny_config: ProjectConfig, tmp_path: Path
) -> None:
    config = hard(tiny_config).with_overrides({"training.num_workers": 1})
    run = tmp_path / "run"
    process = started(config, run, cwd=tmp_path, start_new_session=True)
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate()[0].decode()
    assert process.returncode == 143, output
    stopped, hint = output.splitlines()[-2:]
    assert stopped.startswith("stopped: asked to end, after ")
    command = f"{sys.executable} -m fashionclip_tune train --data {config.dataset_dir} --out {run} --resume --set clip_model="
    assert hint.startswith(f"go on with: {command}")
    assert 3 <= (newest_step(run) or 0) < 9


def test_sigterm_before_the_first_step_leaves_a_run_that_starts(
    tiny_config: ProjectConfig, tmp_path: Path, whole_runs: Callable[[ProjectConfig], Path]
) -> None:
    with pytest.raises(StoppedError, match="after 0 of 10 steps"):
        train(tiny_config, tmp_path, on_eval=lambda row: os.kill(os.getpid(), signal.SIGTERM))
    assert newest_checkpoint(tmp_path) == (None, [])
    train(tiny_config, tmp_path, resume_from=tmp_path)
    assert_same_end(tmp_path, whole_runs(tiny_config))


def test_in_another_thread_a_run_leaves_signals_alone(
    tiny_config: ProjectConfig, tmp_path: Path, whole_runs: Callable[[ProjectConfig], Path]
) -> None:
    """As in a Ray worker."""
    handlers: list[Any] = []
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(train, tiny_config, tmp_path, on_eval=lambda row: handlers.append(signal.getsignal(signal.SIGTERM)))
        run.result()
    assert set(handlers) == {signal.getsignal(signal.SIGTERM)}
    assert_same_end(tmp_path, whole_runs(tiny_config))


def out_of_memory_at(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """The given evaluations (from 1, the zero-shot weights' apart) run out of memory."""
    evaluate, seen = run_metrics_module.evaluate, list[int]()

    def measured(*arguments: Any, **options: Any) -> dict[str, float]:
        seen.append(len(seen) + 1)
        if seen[-1] in calls:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return evaluate(*arguments, **options)

    monkeypatch.setattr(run_metrics_module, "evaluate", measured)


def test_an_evaluation_that_runs_out_of_memory_is_done_again_when_gradients_are_freed(
    tiny_config: ProjectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_runs: Callable[[ProjectConfig], Path]
) -> None:
    out_of_memory_at(monkeypatch, {2})
    train(tiny_config, tmp_path)
    assert_same_end(tmp_path, whole_runs(tiny_config))


def test_an_evaluation_that_does_not_fit_ends_the_run_with_what_to_do(
    tiny_config: ProjectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory_at(monkeypatch, {2, 3})
    with pytest.raises(OutOfMemoryError, match=r"in the evaluation, with evaluation\.batch_size = 64 \(CUDA out.*smaller one"):
        train(tiny_config, tmp_path)
    assert newest_step(tmp_path) == 2


def test_a_model_that_does_not_fit_ends_the_run_as_out_of_memory(
    tiny_config: ProjectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def to(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.nn.Module, "to", to)
    with pytest.raises(OutOfMemoryError, match="cpu has too little memory to hold the model and its optimizer: CUDA out of"):
        train(tiny_config, tmp_path)


def test_out_of_memory_is_in_the_rows_the_curves_and_the_checkpoint(
    tiny_config: ProjectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_runs: Callable[[ProjectConfig], Path]
) -> None:
    expected = read_history(whole_runs(tiny_config))  # before anything runs out
    attempt_step = run_module.Trainer._attempt_step

    def too_large(self: Any, batch: Any) -> None:
        if self.step == 4 and self.micro_batch_size == 16:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        attempt_step(self, batch)

    monkeypatch.setattr(run_module.Trainer, "_attempt_step", too_large)
    with pytest.warns(UserWarning, match="out of memory at step 5 with a micro-batch of 16"), pytest.raises(SystemExit):
        train(tiny_config, tmp_path, on_eval=stop_at(6, SystemExit()))
    result = train(tiny_config, tmp_path, resume_from=tmp_path)  # another warning would be an error
    assert [row["micro_batch_size"] for row in result.history[1:]] == [16, 16, 8, 8, 8]
    assert [value for _, value in scalars(tmp_path, "train/micro_batch_size")] == [16, 16, 8, 8, 8]
    assert [row["loss"] for row in result.history[1:3]] == [row["loss"] for row in expected[1:3]]
    assert [row["loss"] for row in result.history[3:]] == pytest.approx([row["loss"] for row in expected[3:]], rel=1e-3)


def test_collapsed_embeddings_are_warned_about(
    tiny_config: ProjectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collapse(self: Any, batch: Any) -> None:
        self.step += 1
        with torch.no_grad():
            self.network.text_projection.zero_()

    monkeypatch.setattr(run_module.Trainer, "_attempt_step", collapse)
    config = tiny_config.with_overrides({"training.budget_examples": 32})
    with pytest.warns(UserWarning, match=r"collapsed by step 2: all similarities lie within 0,"):
        result = train(config, tmp_path)
    assert result.history[0]["similarity_spread"] > 0.01
    assert result.metrics["similarity_spread"] == 0
    assert result.metrics["recall_at_10"] == pytest.approx(0.5)  # 10 of 20, by chance


def lost_since(tmp_path: Path, config: ProjectConfig, step: int) -> Path:
    """A run that reported all its stages, then lost its machine: the last checkpoint left is of ``step``."""
    run = tmp_path / "lost"
    with pytest.raises(SystemExit):
        train(config, run, on_eval=stop_at(step, SystemExit()))
    checkpoint = run / "checkpoints" / f"step_{step:08d}"
    shutil.copytree(checkpoint, tmp_path / "kept")
    train(config, run, resume_from=run)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    (tmp_path / "kept").rename(checkpoint)
    return run


def test_stages_trained_again_are_compared_and_not_recorded_twice(
    tiny_config: ProjectConfig, tmp_path: Path, whole_runs: Callable[[ProjectConfig], Path]
) -> None:
    run = lost_since(tmp_path, tiny_config, 4)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (run / "evaluations").glob("*.json")}
    seen: list[int] = []
    train(tiny_config, run, on_eval=lambda row: seen.append(row["step"]), resume_from=run)  # a warning would be an error
    assert seen == [4, 6, 8, 10]
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (run / "evaluations").glob("*.json")} == before
    assert_same_end(run, whole_runs(tiny_config))
    assert [step for step, _ in scalars(run, "recall_at_10")] == [16 * step for step in STEPS]


def test_a_stage_that_comes_out_otherwise_is_warned_about(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    run = lost_since(tmp_path, tiny_config, 4)
    altered = run / "evaluations" / "step_00000008.json"
    row = json.loads(altered.read_text())
    row["loss"] += 1e-7
    altered.write_text(json.dumps(row))
    with pytest.warns(UserWarning, match=r"trained again came out otherwise: at step 8, loss was .* hardware\.threads"):
        train(tiny_config, run, resume_from=run)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    tiny_config: ProjectConfig, tmp_path: Path, whole_runs: Callable[[ProjectConfig], Path]
) -> None:
    with pytest.raises(SystemExit):
        train(tiny_config, tmp_path, on_eval=stop_at(6, SystemExit()))
    state = tmp_path / "checkpoints" / "step_00000006" / "training_state.pt"
    state.write_bytes(state.read_bytes()[:-5])
    with pytest.warns(UserWarning, match=r"passed over: .*step_00000006 is damaged: training_state\.pt"):
        train(tiny_config, tmp_path, resume_from=tmp_path)
    assert_same_end(tmp_path, whole_runs(tiny_config))


def test_a_run_whose_checkpoints_are_all_damaged_starts_over_and_keeps_what_it_writes(
    tiny_config: ProjectConfig, tmp_path: Path, whole_runs: Callable[[ProjectConfig], Path]
) -> None:
    train(tiny_config, tmp_path)
    for state in tmp_path.glob("checkpoints/*/training_state.pt"):
        state.write_bytes(b"")
    with pytest.warns(UserWarning, match="passed over"), pytest.raises(SystemExit):
        train(tiny_config, tmp_path, on_eval=stop_at(4, SystemExit()), resume_from=tmp_path)
    found, refused = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, refused) == (4, [])
    train(tiny_config, tmp_path, resume_from=tmp_path)
    assert_same_end(tmp_path, whole_runs(tiny_config))


def relist(checkpoint: Path, name: str) -> None:
    """The record says what the file is now."""
    record_file = checkpoint / "checkpoint.json"
    record = json.loads(record_file.read_text())
    record["files"][name] = xxhash.xxh3_128((checkpoint / name).read_bytes()).hexdigest()
    record_file.write_text(json.dumps(record))


def test_a_checkpoint_with_another_models_weights_makes_way_for_the_one_before(
    tiny_config: ProjectConfig, tmp_path: Path, whole_runs: Callable[[ProjectConfig], Path]
) -> None:
    """Valid files with right hashes, but of tensors that this run's model does not have; then one of another shape."""
    other = whole_runs(replace(tiny_config, clip_model="tiny-sig"))
    with pytest.raises(SystemExit):
        train(tiny_config, tmp_path, on_eval=stop_at(6, SystemExit()))
    newest = tmp_path / "checkpoints" / "step_00000006"
    shutil.copy(other / "checkpoints" / "step_00000010" / "model.safetensors", newest)
    relist(newest, "model.safetensors")
    reason = (
        r"passed over: .*step_00000006 cannot be resumed from: its weights are another model's \(\d+ tensors differ, such as "
    )
    with pytest.warns(UserWarning, match=reason), pytest.raises(SystemExit):
        train(tiny_config, tmp_path, on_eval=stop_at(6, SystemExit()), resume_from=tmp_path)

    weights = load_file(newest / "model.safetensors")
    save_file({**weights, "logit_scale": torch.zeros(3)}, newest / "model.safetensors")
    relist(newest, "model.safetensors")
    reason = r"\(1 tensors differ, such as logit_scale: \(3,\) there, \(\) here\)"
    with pytest.raises(UserError, match=reason):
        train(tiny_config, tmp_path, resume_from=newest)  # nothing before it was offered
    with pytest.warns(UserWarning, match=reason):
        train(tiny_config, tmp_path, resume_from=tmp_path)
    assert_same_end(tmp_path, whole_runs(tiny_config))


def test_another_runs_whole_checkpoint_makes_way_for_an_own_one(
    tiny_config: ProjectConfig, tmp_path: Path, whole_runs: Callable[[ProjectConfig], Path]
) -> None:
    with pytest.raises(SystemExit):
        train(tiny_config, tmp_path, on_eval=stop_at(6, SystemExit()))
    other = whole_runs(tiny_config.with_overrides({"training.learning_rate": 2e-3}))
    shutil.copytree(other / "checkpoints" / "step_00000010", tmp_path / "checkpoints" / "step_00000010")
    with pytest.warns(UserWarning, match=r"passed over: .*step_00000010 is of another run: training\.learning_rate was 0\.002"):
        train(tiny_config, tmp_path, resume_from=tmp_path)
    assert_same_end(tmp_path, whole_runs(tiny_config))


def test_a_setting_that_came_later_counts_as_its_default(
    tiny_config: ProjectConfig, tmp_path: Path, whole_runs: Callable[[ProjectConfig], Path]
) -> None:
    """A checkpoint of a version that had no ``loss.positives``."""
    fingerprint, known = ProjectConfig.fingerprint, set(tiny_config.to_dict()) - {"loss.positives"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProjectConfig, "fingerprint", lambda config, **rest: fingerprint(config, **{"known": known, **rest}))
        with pytest.raises(SystemExit):
            train(tiny_config, tmp_path, on_eval=stop_at(2, SystemExit()))
    record_file = tmp_path / "checkpoints" / "step_00000002" / "checkpoint.json"
    record = json.loads(record_file.read_text())
    del record["config"]["loss.positives"]
    record_file.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"loss\.positives was 'pair', is 'all'"):
        train(tiny_config.with_overrides({"loss.positives": "all"}), tmp_path, resume_from=tmp_path)
    train(tiny_config, tmp_path, resume_from=tmp_path)
    assert_same_end(tmp_path, whole_runs(tiny_config))


def test_a_caller_stops_a_run_at_any_step(
    tiny_config: ProjectConfig, tmp_path: Path, whole_runs: Callable[[ProjectConfig], Path]
) -> None:
    """From another thread, as in a Ray worker: no signal is needed."""
    config = tiny_config.with_overrides({"training.checkpoint_minutes": 60})
    for last, step in pairwise((0, 1, 4, 7)):
        answers = iter([False] * (step - last) + [True])
        callbacks = RunCallbacks(should_stop=answers.__next__)
        with ThreadPoolExecutor(1) as pool, pytest.raises(StoppedError, match=f"asked to end, after {step} of 10 steps"):
            pool.submit(run_training, config, tmp_path, callbacks, resume_from=tmp_path).result()
        assert newest_step(tmp_path) == step
    train(config, tmp_path, resume_from=tmp_path)
    assert_same_end(tmp_path, whole_runs(tiny_config))


def test_a_finished_run_that_is_resumed_reports_its_last_row_and_changes_nothing(
    tiny_config: ProjectConfig, tmp_path: Path
) -> None:
    first = train(tiny_config, tmp_path)
    seen: list[dict[str, Any]] = []
    again = train(tiny_config, tmp_path, on_eval=seen.append, resume_from=tmp_path)
    assert seen == [first.metrics]
    assert again.history == first.history
    assert again.checkpoint == first.checkpoint
    assert [step for step, _ in scalars(tmp_path, "recall_at_10")] == [16 * step for step in STEPS]


def test_a_stage_ends_with_evaluation_then_checkpoint_then_record_then_callback(
    tiny_config: ProjectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    evaluate, save = run_metrics_module.evaluate, run_module.save_checkpoint

    def evaluated(*arguments: Any, **options: Any) -> Any:
        order.append("evaluation")
        return evaluate(*arguments, **options)

    def saved(*arguments: Any) -> Any:
        order.append("checkpoint")
        assert not (tmp_path / "evaluations" / "step_00000002.json").exists()
        return save(*arguments)

    def on_eval(row: dict[str, Any]) -> None:
        order.append("callback")
        assert read_history(tmp_path)[-1] == row
        if row["step"]:
            found, _ = newest_checkpoint(tmp_path)
            assert found is not None
            assert found.record["history"][-1] == row

    monkeypatch.setattr(run_metrics_module, "evaluate", evaluated)
    monkeypatch.setattr(run_module, "save_checkpoint", saved)
    train(tiny_config.with_overrides({"training.budget_examples": 32}), tmp_path, on_eval=on_eval)
    assert order == ["callback", "evaluation", "checkpoint", "callback"]


def test_a_callback_that_changes_its_row_changes_no_record(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    config = tiny_config.with_overrides({"training.budget_examples": 32})
    result = train(config, tmp_path, on_eval=dict.clear)
    assert [row["step"] for row in result.history] == [0, 2]
    found, _ = newest_checkpoint(tmp_path)
    assert found is not None
    assert [row["step"] for row in found.record["history"]] == [0, 2]


def test_checkpoints_are_written_when_due_and_at_the_end(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    lazy = tiny_config.with_overrides({"training.checkpoint_minutes": 60})
    seen: list[list[str]] = []
    train(lazy, tmp_path, on_eval=lambda row: seen.append([path.name for path in tmp_path.glob("checkpoints/step_*")]))
    assert seen == [[], [], [], [], [], ["step_00000010"]]


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("training.learning_rate", 2e-3, r"training\.learning_rate was 0\.001, is 0\.002"),
        ("augmentation.caption", "uniform", r"augmentation\.caption was 'original', is 'uniform'"),
        ("loss_function", "siglip", r"loss_function was 'contrastive', is 'siglip'"),
        ("clip_model", "tiny-sig", r"clip_model was 'tiny-clip', is 'tiny-sig'"),
        ("training.budget_examples", 320, r"training\.budget_examples was 160, is 320"),
        ("hardware.threads", 2, r"hardware\.threads was 1, is 2"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused_with_what_changed(
    tiny_config: ProjectConfig, whole_runs: Callable[[ProjectConfig], Path], path: str, value: Any, reason: str
) -> None:
    run = whole_runs(tiny_config)
    before = sorted((file, file.stat().st_mtime_ns) for file in run.rglob("*"))
    try:
        with pytest.raises(UserError, match=reason):
            train(tiny_config.with_overrides({path: value}), run, resume_from=run)
    finally:
        torch.set_num_threads(1)
    assert sorted((file, file.stat().st_mtime_ns) for file in run.rglob("*")) == before


def test_settings_that_change_no_number_may_change_on_resume(
    tiny_config: ProjectConfig, tmp_path: Path, garments: Path, whole_runs: Callable[[ProjectConfig], Path]
) -> None:
    """Another folder for run and data, too: what counts is what is in them."""
    with pytest.raises(SystemExit):
        train(tiny_config, tmp_path / "here", on_eval=stop_at(4, SystemExit()))
    (tmp_path / "here").rename(tmp_path / "there")
    shutil.copytree(garments, tmp_path / "data")
    elsewhere = replace(tiny_config, dataset_root=tmp_path / "data").with_overrides({"training.checkpoint_minutes": 3})
    train(elsewhere, tmp_path / "there", resume_from=tmp_path / "there")
    assert_same_end(tmp_path / "there", whole_runs(tiny_config))


def test_other_data_under_the_same_name_is_refused(
    tiny_config: ProjectConfig, tmp_path: Path, garments: Path, whole_runs: Callable[[ProjectConfig], Path]
) -> None:
    shutil.copytree(garments, tmp_path / "data")
    shutil.copy(garments / "clip_dataset_test_aug.000000.tar", tmp_path / "data" / "clip_dataset_valid_aug.000000.tar")
    with pytest.raises(UserError, match="its data or its first weights have changed"):
        train(replace(tiny_config, dataset_root=tmp_path / "data"), tmp_path, resume_from=whole_runs(tiny_config))


def test_a_folder_with_a_run_in_it_is_refused_unless_it_is_resumed(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        train(tiny_config, tmp_path, on_eval=stop_at(0, SystemExit()))
    with pytest.raises(UserError, match=f"{tmp_path} holds a run already"):
        train(tiny_config, tmp_path)
    train(tiny_config, tmp_path, resume_from=tmp_path)
    strip_training_state(tmp_path)
    with pytest.raises(UserError, match="holds a run already"):
        train(tiny_config, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, RunPlan(5 * 1000 // 64, 500)),
        ({"training.epochs": 1, "training.batch_size": 300}, RunPlan(3, 500)),
        ({"training.epochs": 1, "training.batch_size": 2000}, RunPlan(1, 500)),
        ({"training.max_steps": 7}, RunPlan(7, 500)),
        ({"training.max_steps": 7, "training.checkpoint_interval": 3}, RunPlan(7, 3)),
        ({"training.max_steps": 7, "training.stage_examples": 640}, RunPlan(7, 10)),
        ({"training.max_steps": 7, "training.budget_examples": 640, "training.stage_examples": 128}, RunPlan(10, 2)),
        ({"training.budget_examples": 64000}, RunPlan(1000, 500)),
    ],
)
def test_budget_goes_before_steps_and_steps_before_epochs(overrides: dict[str, Any], expected: RunPlan) -> None:
    assert plan_run(ProjectConfig().with_overrides(overrides), 1000) == expected


def test_the_last_stage_may_be_shorter(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    config = tiny_config.with_overrides(
        {
            "training.budget_examples": None,
            "training.stage_examples": None,
            "training.max_steps": 5,
            "training.checkpoint_interval": 2,
        }
    )
    result = train(config, tmp_path)
    assert [row["step"] for row in result.history] == [0, 2, 4, 5]
    assert [row["examples_seen"] for row in result.history] == [0, 32, 64, 80]
    assert [row["epoch"] for row in result.history] == [0, 0.2, 0.4, 0.5]


def test_training_shards_evaluated_too_have_rows_of_their_own(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    config = replace(
        tiny_config,
        train_eval_shards_pattern="clip_dataset_train_aug.{000000..000000}.tar",
        valid_eval_shards_pattern="clip_dataset_test_aug.000000.tar",
    ).with_overrides({"training.budget_examples": 32})
    result = train(config, tmp_path)
    for row in result.history:
        assert (row["train_num_pairs"], row["num_pairs"]) == (160, 20)
        # 160 photos are harder to tell apart than 20
        assert 0 <= row["train_recall_at_10"] < row["recall_at_10"] <= 1
    assert [step for step, _ in scalars(tmp_path, "train_eval/train_recall_at_10")] == [0, 32]


def test_what_a_run_leaves(tiny_config: ProjectConfig, whole_runs: Callable[[ProjectConfig], Path]) -> None:
    run = whole_runs(tiny_config)
    assert ProjectConfig.from_dict(json.loads((run / "config.json").read_text())) == tiny_config
    assert [path.name for path in sorted((run / "evaluations").glob("*.json"))] == [f"step_{step:08d}.json" for step in STEPS]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000008", "step_00000010", "token_table"]
    rows = read_history(run)
    assert [row["examples_seen"] for row in rows] == [16 * step for step in STEPS]
    durations = [row["duration_s"] for row in rows]
    assert durations == sorted(durations)
    on_device = [row["device_s"] for row in rows]
    assert on_device[0] > 0
    assert all(earlier < later for earlier, later in pairwise(on_device))
    assert on_device[-1] < durations[-1], "loading a model and writing checkpoints is no work on the device"
    for tag, expected in (("recall_at_10", rows), ("train/loss", rows[1:])):
        steps, values = zip(*scalars(run, tag), strict=True)
        name = tag.rpartition("/")[2]
        assert list(steps) == [row["examples_seen"] for row in expected]
        assert values == pytest.approx([row[name] for row in expected])
    assert rows[-1]["loss"] < rows[1]["loss"]
    found, _ = newest_checkpoint(run)
    assert found is not None
    assert found.record["tokenizer"] == "openai/clip, 32 tokens"
    assert found.record["preprocessing"]["resize_mode"] == "squash"
    assert ProjectConfig.from_dict(found.record["config"]) == tiny_config


def test_durations_go_on_where_the_last_life_stopped(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        train(tiny_config, tmp_path, on_eval=stop_at(4, SystemExit()))
    result = train(tiny_config, tmp_path, resume_from=tmp_path)
    for seconds in ("duration_s", "device_s"):
        durations = [row[seconds] for row in result.history]
        assert all(earlier < later for earlier, later in pairwise(durations))


def test_a_killed_run_has_taken_what_its_evaluations_say(
    tiny_config: ProjectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that each look at puts a second forward: what was lost is the stage that was not evaluated."""

    def die(what: str, done: int, total: int) -> None:
        if (what, done) == ("training", 6):
            raise SystemExit

    def device_s(step: int) -> float:
        seconds = json.loads((tmp_path / "evaluations" / f"step_{step:08d}.json").read_text())["device_s"]
        return float(seconds)

    ticks = iter(range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    config = tiny_config.with_overrides({"training.stage_examples": 64, "training.budget_examples": 192})
    with pytest.raises(SystemExit):
        run_training(config, tmp_path, RunCallbacks(on_progress=die))
    assert newest_step(tmp_path) == 4
    first_stage_s = device_s(4) - device_s(0)
    train(config, tmp_path, resume_from=tmp_path)
    assert device_s(8) == device_s(4) + first_stage_s
    assert device_s(12) == device_s(8) + first_stage_s

    # On another machine, after a state of an earlier stage.
    row = tmp_path / "evaluations" / "step_00000012.json"
    row.write_text(json.dumps({**json.loads(row.read_text()), "device_s": 1000.0}))
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000012")
    assert train(config, tmp_path, resume_from=tmp_path).metrics["device_s"] > 1000


def test_a_second_on_half_a_device_counts_as_half_a_second_of_it(
    tiny_config: ProjectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that each look at puts a second forward, so that stages take equal times."""
    per_stage = {}
    for share in (1.0, 0.5):
        ticks = iter(range(10**6))
        monkeypatch.setattr("time.perf_counter", lambda ticks=ticks: float(next(ticks)))
        config = tiny_config.with_overrides({"hardware.device_share": share})
        result = train(config, tmp_path / str(share))
        per_stage[share] = [later["device_s"] - earlier["device_s"] for earlier, later in pairwise(result.history)]
    assert per_stage[0.5] == [seconds / 2 for seconds in per_stage[1.0]]


def first_row(config: ProjectConfig, run: Path) -> dict[str, Any]:
    with pytest.raises(SystemExit):
        train(config, run, on_eval=stop_at(0, SystemExit()))
    return read_history(run)[0]


@pytest.mark.parametrize("loss", ["contrastive", "siglip"])
def test_a_run_can_start_from_another_ones_checkpoint_or_from_an_openclip_folder(
    tiny_config: ProjectConfig, tmp_path: Path, loss: str
) -> None:
    config = replace(tiny_config, loss_function=loss)
    first: TrainResult = train(config, tmp_path / "first")
    loaded = load_model(config)
    loaded.network.load_state_dict(read_weights(first.checkpoint / "model.safetensors"))
    export_openclip(loaded, tmp_path / "folder")
    places = {
        "checkpoint": first.checkpoint,
        "file": first.checkpoint / "model.safetensors",
        "folder": tmp_path / "folder",
        "published": tmp_path / "published.pt",
    }
    trained = {f"module.{key}": tensor for key, tensor in loaded.network.state_dict().items()}
    torch.save({"epoch": 3, "model_state_dict": trained, "loss": 0.5}, places["published"])
    for name, place in places.items():
        row = first_row(replace(config, should_load_checkpoint=True, checkpoint_path=place), tmp_path / name)
        assert row["recall_at_10"] == first.metrics["recall_at_10"] != first.history[0]["recall_at_10"]


def test_a_loss_that_is_no_number_ends_the_run_and_leaves_its_last_good_checkpoint(
    tiny_config: ProjectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info_nce = run_module.Trainer._loss

    def breaks_at_step_5(self: Any, *inputs: torch.Tensor | None) -> torch.Tensor:
        return info_nce(self, *inputs) * (torch.nan if self.step == 4 else 1)

    monkeypatch.setattr(run_module.Trainer, "_loss", breaks_at_step_5)
    with pytest.raises(DivergedError, match=r"the loss is nan at step 5, logit scale \d+\.\d+; its batch: (\w+, ){15}\w+$"):
        train(tiny_config, tmp_path)
    assert [row["step"] for row in read_history(tmp_path)] == [0, 2, 4]
    found, _ = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 4


def test_the_published_example_runs_in_the_working_directory(
    tmp_path: Path, garments: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fashionclip_tune import LossFunctionOptions, TrainingConfig

    monkeypatch.chdir(tmp_path)
    config = ProjectConfig(
        clip_model="tiny-sig",
        loss_function=LossFunctionOptions.SIGLIP,
        on_colab=False,
        device="cpu",
        dataset_root=garments,
        training=TrainingConfig(
            batch_size=64, num_workers=0, learning_rate=1e-5, checkpoint_interval=500, max_steps=None, epochs=1
        ),
        train_shards_pattern="clip_dataset_train_aug.{000000..000000}.tar",
        valid_shards_pattern="clip_dataset_valid_aug.{000000..000000}.tar",
        train_eval_shards_pattern="clip_dataset_train_aug.{000000..000000}.tar",
        valid_eval_shards_pattern="clip_dataset_valid_aug.{000000..000000}.tar",
        shardshuffle=False,
    ).with_overrides({"model.pretrained": None, "hardware.threads": 1})
    training_prep(config).train()
    assert sorted(path.name for path in config.checkpoint_dir.iterdir()) == ["best_00000002", "step_00000002", "token_table"]
    assert [json.loads(path.read_text())["step"] for path in sorted(config.evaluation_dir.glob("*.json"))] == [0, 2]
    assert config.checkpoint_dir.parent == tmp_path
    lines = capsys.readouterr().out.splitlines()
    assert "zero-shot weights" in lines[0]
    assert "recall_at_10" in lines[1]
    assert "zero-shot" in lines[2]
    assert lines[-1].startswith("best weights: ")


def test_training_prep_refuses_what_cannot_be_trained(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mount Google Drive"):
        training_prep(replace(tiny_config, on_colab=True))
    with pytest.raises(UserError, match=r"clip_dataset_train\.000000\.tar"):
        training_prep(replace(tiny_config, train_shards_pattern="clip_dataset_train.{000000..000003}.tar"))
    with pytest.raises(UserError, match="does not exist"):
        training_prep(replace(tiny_config, dataset_root=tmp_path / "nowhere"))


def test_a_gap_in_the_captions_is_said_once_where_a_run_begins(
    tiny_config: ProjectConfig, many_captions: Path, tmp_path: Path
) -> None:
    config = tiny_config.with_overrides({"dataset_root": str(many_captions), "training.budget_examples": 32})
    with pytest.warns(
        UserWarning, match="1 photo has a gap in the numbers of its captions, such as clip_dataset_train"
    ) as said:
        train(config, tmp_path / "run")
    (message,) = (str(warning.message) for warning in said if "captions" in str(warning.message))
    assert message.endswith(": no txt2.txt: all that are there are used")
