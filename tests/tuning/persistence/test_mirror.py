import json
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from pyarrow import fs

from fashionclip_tune.errors import StorageError
from fashionclip_tune.storage.folder import RemoteFolder
from fashionclip_tune.tuning.persistence.mirror import SweepMirror
from fashionclip_tune.tuning.persistence.record import SweepRecord
from fashionclip_tune.tuning.study.study import SweepStudy


def space(trial: optuna.Trial) -> dict[str, Any]:
    rate = trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)
    return {"clip_model": "tiny-clip", "loss_function": "contrastive", "training.learning_rate": rate}


def mirrored(tmp_path: Path, machine: str) -> tuple[SweepMirror, Path]:
    """A machine that goes on with the sweep, if there is one."""
    run_dir = tmp_path / machine
    mirror = SweepMirror(RemoteFolder(tmp_path / "drive"), run_dir)
    if mirror.is_started():
        mirror.take_over()
    return mirror, run_dir


def study(mirror: SweepMirror, run_dir: Path) -> SweepStudy:
    run_dir.mkdir(exist_ok=True)
    return SweepStudy(run_dir / "study.journal", seed=0, num_startup_trials=1, on_append=mirror.append_journal)


def told(study: SweepStudy) -> list[Any]:
    return [(trial.number, trial.params, trial.intermediate_values, trial.state) for trial in study.trials()]


@pytest.fixture
def begun(tmp_path: Path) -> Any:
    """A sweep of two trials on the first machine: its mirror, folder and study."""
    mirror, run_dir = mirrored(tmp_path, "first")
    mirror.start({"name": "it", "created": "now"})
    first = study(mirror, run_dir)
    for stage in (100, 200):
        number, _ = first.suggest(space)
        first.record_stage(number, stage, 0.5)
    return mirror, run_dir, first


def test_another_machine_knows_all_that_was_recorded(tmp_path: Path, begun: Any) -> None:
    _, run_dir, first = begun
    mirror, other_dir = mirrored(tmp_path, "second")
    assert mirror.restore()
    assert (other_dir / "study.journal").read_bytes() == (run_dir / "study.journal").read_bytes()
    assert told(study(mirror, other_dir)) == told(first)
    sweep = json.loads((other_dir / "sweep.json").read_text())
    assert (sweep["name"], sweep["state"], sweep["trials"]) == ("it", "RUNNING", [])


def test_every_record_is_durable_before_the_call_that_makes_it_returns(tmp_path: Path, begun: Any) -> None:
    _, run_dir, first = begun
    for stage in range(300, 900, 100):
        first.record_stage(0, stage, 0.25)
        other, other_dir = mirrored(tmp_path, f"after-{stage}")
        assert other.restore()
        assert (other_dir / "study.journal").read_bytes() == (run_dir / "study.journal").read_bytes()


def test_a_torn_piece_and_what_follows_it_are_not_believed(tmp_path: Path, begun: Any) -> None:
    _, run_dir, _ = begun
    pieces = sorted((tmp_path / "drive" / "journal").iterdir())
    torn = pieces[-2]
    torn.write_bytes(torn.read_bytes()[:-5])
    mirror, other_dir = mirrored(tmp_path, "second")
    assert mirror.restore()
    expected = (run_dir / "study.journal").read_bytes()[: int(torn.name.partition("-")[0])]
    assert (other_dir / "study.journal").read_bytes() == expected
    # What is written instead stands beside the torn one, and a third machine finds it.
    second = study(mirror, other_dir)
    second.record_stage(0, 900, 0.75)
    third, third_dir = mirrored(tmp_path, "third")
    assert third.restore()
    assert told(study(third, third_dir)) == told(second)


def test_a_machine_that_comes_back_goes_on_where_it_was_unless_another_has_gone_on_since(tmp_path: Path, begun: Any) -> None:
    _, _, first = begun
    last = sorted((tmp_path / "drive" / "journal").iterdir())[-1]
    last.unlink()  # as if it had died between the two
    back, _ = mirrored(tmp_path, "first")
    assert back.restore()
    back.append_journal()
    other, other_dir = mirrored(tmp_path, "second")
    assert other.restore()
    assert told(study(other, other_dir)) == told(first)
    study(other, other_dir).record_stage(0, 900, 0.75)
    assert not mirrored(tmp_path, "first")[0].restore()


def append(mirror: SweepMirror, run_dir: Path, line: str) -> None:
    with open(run_dir / "study.journal", "a") as journal:
        journal.write(f"{line}\n")
    mirror.append_journal()


def test_what_an_overtaken_machine_wrote_before_it_noticed_does_not_count(
    tmp_path: Path, begun: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, late_dir, _ = begun
    other, other_dir = mirrored(tmp_path, "second")
    assert other.restore()
    append(late, late_dir, "late one")  # it has looked a moment ago
    append(other, other_dir, "this one")  # where the other one wrote, of the same length
    append(late, late_dir, "late two")
    third, third_dir = mirrored(tmp_path, "third")
    assert third.restore()
    assert (third_dir / "study.journal").read_text().endswith("}\nthis one\n")
    monkeypatch.setattr("fashionclip_tune.tuning.persistence.fencing.time.monotonic", lambda: math.inf)
    with pytest.raises(StorageError, match="is written by another machine now"):
        append(other, other_dir, "this two")


@pytest.mark.parametrize(("copy", "known_s"), [(None, 0.0), ('{"elapsed_s": 40', 0.0), ('{"elapsed_s": 40.5}', 40.5)])
def test_the_time_of_a_lost_machine_counts_as_far_as_it_is_known(tmp_path: Path, begun: Any, copy: Any, known_s: Any) -> None:
    if copy is not None:
        (tmp_path / "drive" / "sweep.json").write_text(copy)
    mirror, other_dir = mirrored(tmp_path, "second")
    assert mirror.restore()
    content = SweepRecord(other_dir, study(mirror, other_dir), json.loads((other_dir / "sweep.json").read_text())).write(
        "RUNNING"
    )
    assert known_s < content["elapsed_s"] < known_s + 30


@pytest.mark.parametrize("late", ["first", "second"])
def test_of_two_that_start_one_name_at_once_one_is_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: Any
) -> None:
    """Neither saw the other when it planned; whichever writes last, settings and journal are of the same one."""
    mirrors = {machine: mirrored(tmp_path, machine) for machine in ("first", "second")}
    for mirror, _ in mirrors.values():
        mirror.take_over()
    for machine in sorted(mirrors, key=lambda machine: machine == late):
        mirror, run_dir = mirrors[machine]
        run_dir.mkdir()
        mirror.start({"name": "it", "created": machine})
        append(mirror, run_dir, f"{machine} one")
    (lost, lost_dir), (won, won_dir) = mirrors["first"], mirrors["second"]
    monkeypatch.setattr("fashionclip_tune.tuning.persistence.fencing.time.monotonic", lambda: math.inf)  # the next look
    append(won, won_dir, "second two")
    with pytest.raises(StorageError, match="is written by another machine now"):
        append(lost, lost_dir, "first two")
    monkeypatch.undo()
    third, third_dir = mirrored(tmp_path, "third")
    assert third.restore()
    assert json.loads((third_dir / "sweep.json").read_text())["created"] == "second"
    assert (third_dir / "study.journal").read_text() == "second one\nsecond two\n"


def test_of_two_that_register_at_once_the_earlier_one_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = mirrored(tmp_path, "first")
    second, _ = mirrored(tmp_path, "second")
    put = first.folder.put
    monkeypatch.setattr(first.folder, "put", lambda name, content: (put(name, content), second.take_over()))
    with pytest.raises(StorageError, match="is written by another machine now"):
        first.take_over()
    second.start({"created": "now"})


def test_evaluations_and_curves_come_along_but_torn_ones(tmp_path: Path, begun: Any) -> None:
    evaluations = tmp_path / "drive" / "trials" / "0000-tiny-clip-contrastive" / "evaluations"
    evaluations.mkdir(parents=True)
    (evaluations / "step_00000001.json").write_text('{"step": 1}')
    (evaluations / "step_00000002.json").write_text('{"step": 2')
    (evaluations.parent / "events.out.tfevents.1").write_text("of the trial, which had ended")
    state = evaluations.parent / "state" / "step_00000001"
    state.mkdir(parents=True)
    (state / "checkpoint.json").write_text("{}")
    mirror, other_dir = mirrored(tmp_path, "second")
    assert mirror.restore()
    trial = other_dir / "trials" / "0000-tiny-clip-contrastive"
    copied = {str(path.relative_to(trial)) for path in (other_dir / "trials").rglob("*") if path.is_file()}
    assert copied == {"evaluations/step_00000001.json", "events.out.tfevents.1"}


def write(run_dir: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text(text)


def test_tables_and_winner_are_copied_for_people(tmp_path: Path, begun: Any) -> None:
    mirror, run_dir, _ = begun
    write(run_dir, {"sweep.json": "{}", "trials.csv": "{}", "best/open_clip_config.json": "{}"})
    mirror.publish()
    (run_dir / "trials.csv").write_text("newer")
    mirror.publish(not_before_s=60)
    assert (tmp_path / "drive" / "best" / "open_clip_config.json").read_text() == "{}"
    assert (tmp_path / "drive" / "trials.csv").read_text() == "{}"
    mirror.publish()
    assert (tmp_path / "drive" / "trials.csv").read_text() == "newer"


def test_only_what_has_changed_is_written_and_that_it_is_finished_last(
    tmp_path: Path, begun: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, run_dir, _ = begun
    trial = run_dir / "trials" / "0000-tiny-clip-contrastive"
    write(run_dir, {"sweep.json": "RUNNING", "best/weights": "w", f"trials/{trial.name}/config.json": "{}"})
    written, put_file = [], mirror.folder.put_file
    monkeypatch.setattr(mirror.folder, "put_file", lambda name, source: (written.append(name), put_file(name, source)))
    mirror.publish()
    mirror.publish_run(trial)
    assert written == ["best/weights", "sweep.json", f"trials/{trial.name}/config.json"]
    written.clear()
    mirror.publish()
    mirror.publish_run(trial)  # as when a trial is one of the best no more
    assert written == []
    write(run_dir, {"best/tokenizer": "t", "sweep.json": "FINISHED"})
    mirror.publish()
    assert written == ["best/tokenizer", "sweep.json"]


def test_a_winner_leaves_no_file_of_the_one_before(tmp_path: Path, begun: Any) -> None:
    mirror, run_dir, _ = begun
    write(run_dir, {"best/weights": "w", "best/tokenizer": "t", "refit/best/weights": "r"})
    mirror.publish()
    (run_dir / "best" / "tokenizer").unlink()
    mirror.publish()
    assert sorted(name for name in mirror.folder.sizes() if "best/" in name) == ["best/weights", "refit/best/weights"]


def test_a_finished_sweep_is_brought_to_another_machine_for_people(tmp_path: Path, begun: Any) -> None:
    mirror, run_dir, _ = begun
    trial = "trials/0000-tiny-clip-contrastive"
    files = {"sweep.json": '{"state": "FINISHED"}', "best/weights": "w", "refit/best/weights": "r"}
    write(run_dir, {**files, f"{trial}/events.out.tfevents.1": "e"})
    mirror.publish()
    mirror.publish_run(run_dir / trial)
    mirror.folder.put("refit/evaluations/step_00000001.json", b"{}")
    mirror.folder.put(f"{trial}/weights/step_00000001.safetensors", b"w")
    other, other_dir = mirrored(tmp_path, "second")
    assert other.restore()
    other.fetch_for_people()
    assert {name: (other_dir / name).read_text() for name in files} == files
    found = {str(path.relative_to(other_dir)) for path in other_dir.rglob("*") if path.is_file()} - files.keys()
    assert found == {"study.journal", f"{trial}/events.out.tfevents.1", "refit/evaluations/step_00000001.json"}


def test_a_key_of_an_object_store_that_climbs_is_no_file_of_the_sweep(tmp_path: Path) -> None:
    """A key is any text: joined to the local folder, these lead out of it."""
    store, run_dir = fs._MockFileSystem(), tmp_path / "scratch" / "sweeps" / "it"
    folder = RemoteFolder("bucket/it", store)
    climbing = ("best/../../escaped", "trials/evaluations/../../../escaped.json", "refit/evaluations/../../../../escaped.json")
    for name in ("best/weights", "best/./dotted", *climbing):
        store.create_dir(f"bucket/it/{name}".rpartition("/")[0], recursive=True)
        folder.put(name, b"{}")
    mirror = SweepMirror(folder, run_dir)
    mirror.fetch_evaluations()
    mirror.fetch_for_people()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [run_dir / "best" / "weights"]
    assert folder.sizes() == {"best/weights": 2}
    assert RemoteFolder("bucket/it/best", store).folders() == []


def test_a_refit_elsewhere_leaves_the_winner_as_it_is_and_knows_the_refit_before(
    tmp_path: Path, begun: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, run_dir, _ = begun
    write(run_dir, {"best/model.safetensors": "winner", "refit/config.json": "{}", "sweep.json": "{}"})
    mirror.publish_run(run_dir / "refit")
    mirror.publish()
    other, other_dir = mirrored(tmp_path, "second")
    assert other.restore()
    other.fetch_for_people()
    assert (other_dir / "refit" / "config.json").is_file()
    written, put_file = [], other.folder.put_file
    monkeypatch.setattr(other.folder, "put_file", lambda name, path: (written.append(name), put_file(name, path)))
    write(other_dir, {"refit/best/model.safetensors": "refit", "sweep.json": '{"refit": 4}'})
    other.publish()
    assert written == ["refit/best/model.safetensors", "sweep.json"]
