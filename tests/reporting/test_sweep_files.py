"""What people read of a sweep: ranking, intervals, and which trials are not told apart from the best."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fashionclip_tune.errors import UserError
from fashionclip_tune.evaluation.metric import DEFAULT_METRIC
from fashionclip_tune.evaluation.protocols import QUERIES_FILE
from fashionclip_tune.models import hub
from fashionclip_tune.reporting.comparison import names_of, standings
from fashionclip_tune.reporting.page import write_report
from fashionclip_tune.reporting.sweep_files import best_row, read_sweep, refit_lines, ties_with_best, zero_shot_lines
from fashionclip_tune.reporting.terminal import winner_lines
from tests.support.sweep_folders import change_sweep, printed, trial_row, write_sweep


def test_the_hub_is_not_asked_for_what_a_foreign_sweep_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()
    monkeypatch.setattr(hub, "model_info", lambda repository, **how: asked.append(repository))
    folder = write_sweep(tmp_path / "one", [40, 30])  # below zero-shot
    rows = json.loads((folder / "sweep.json").read_text())["trials"]
    for each, name in zip(rows, ("hf-hub:somebody/beacon", 'hf-hub:x/y") or evil("'), strict=True):
        each["config"]["clip_model"] = name
    change_sweep(folder, trials=rows)
    assert 'load them: open_clip.create_model_and_transforms("hf-hub:somebody/beacon")' in printed(folder)
    assert "hf-hub:somebody/beacon" in write_report([folder], gallery=False).read_text()
    change_sweep(folder, trials=rows[1:], best={**read_sweep(folder)["best"], "trial_id": "0001"})
    assert "load them" not in printed(folder)
    assert asked == []


def test_trials_inside_chance_of_the_best_are_called_ties(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "one", [150, 148, 60])
    assert ties_with_best(folder, json.loads((folder / "sweep.json").read_text())["trials"], DEFAULT_METRIC) == {"0001"}
    text = printed(folder)
    lines = {line[:4]: line for line in text.splitlines() if line[:4].isdigit()}
    assert "budget, tie" in lines["0001"]
    assert "tie" not in lines["0000"] + lines["0002"]
    assert "0.060" in lines["0000"], "half the interval's width"
    assert "+0.5000 +200 " in lines["0000"]
    assert "+0.0500  +20 " in lines["0002"]
    assert "recall_at_10: instance among 1,200 photos, 190 texts" in text
    assert "not told apart from it (paired test over products, p at least 0.05): 0001" in text
    assert "95 % interval 0.7000 to 0.8200 over products; protocol instance among 1,200 photos, 190 texts" in text
    assert "zero-shot tiny-clip: recall_at_10 0.2500; gain +0.5000 (+200.0%)" in text


def test_mistakes_and_want_of_memory_are_told(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "one", [150, 148, 60])
    sweep = json.loads((folder / "sweep.json").read_text())
    ends = (("FAIL", "error"), ("PRUNED", "out_of_memory"), ("PRUNED", "rung_1"))
    for trial, (state, reason) in zip(sweep["trials"], ends, strict=True):
        trial |= {"state": state, "stop_reason": reason, "message": f"why {reason}"}
    (folder / "sweep.json").write_text(json.dumps(sweep))
    text = printed(folder)
    assert "failed: trial 0000 (error): why error" in text
    assert "failed: trial 0001 (out_of_memory): why out_of_memory" in text
    assert "why rung_1" not in text


def test_a_trial_that_came_to_nothing_is_not_the_best_one() -> None:
    """Its 0 is what the search learns from, not a result; an ended trial with 0 is one."""
    ends = [("PRUNED", "diverged"), ("PRUNED", "out_of_memory"), ("FAIL", "error")]
    rows = [{**trial_row(number, 0.0, state=state), "stop_reason": reason} for number, (state, reason) in enumerate(ends)]
    assert best_row(rows, DEFAULT_METRIC) is None
    rows.append(trial_row(7, 0.0))
    best = best_row(rows, DEFAULT_METRIC)
    assert best is not None
    assert best["trial_id"] == "0007"


@pytest.mark.parametrize("kept_step", [8, 10])
def test_queries_of_another_stage_or_a_damaged_file_are_not_compared(tmp_path: Path, kept_step: int) -> None:
    folder = write_sweep(tmp_path / "one", [150, 148, 147], kept_step=kept_step)
    (damaged,) = folder.glob(f"trials/0002-*/{QUERIES_FILE}")
    damaged.write_bytes(damaged.read_bytes()[:100])
    rows = json.loads((folder / "sweep.json").read_text())["trials"]
    assert ties_with_best(folder, rows, DEFAULT_METRIC) == ({"0001"} if kept_step == 10 else set())


def test_the_best_of_several_sweeps_are_compared_on_the_same_queries_only(tmp_path: Path) -> None:
    folders = [
        write_sweep(tmp_path / "ahead", [150]),
        write_sweep(tmp_path / "close", [100, 149]),
        write_sweep(tmp_path / "weaker", [60]),
        write_sweep(tmp_path / "elsewhere", [140], data="other"),
    ]
    text = printed(*folders)
    table = text[text.index("best of each sweep") :]
    by_name = {name: next(line for line in table.splitlines() if name in line) for name in ("close", "weaker", "elsewhere")}
    first = next(line for line in table.splitlines() if "ahead" in line)
    assert first.split()[3:6] == ["0.7500", "+0.5000", "+200"]
    assert first.endswith("instance among 1,200 photos, 190 texts")
    assert "0.0050, tie" in by_name["close"]
    assert "0.4500, real" in by_name["weaker"]
    assert "tie" not in by_name["weaker"]
    assert "other queries" in by_name["elsewhere"]


def test_sweeps_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    folders = [write_sweep(tmp_path / place / "sweep-001", [right]) for place, right in (("a/x", 150), ("b/x", 149), ("c", 60))]
    folders.append(write_sweep(tmp_path / "c" / "other", [40]))
    assert names_of(folders) == ["a/x/sweep-001", "b/x/sweep-001", "c/sweep-001", "other"]
    assert names_of(folders[2:]) == ["sweep-001", "other"]
    assert names_of([folders[0]] * 2) == ["sweep-001"] * 2, "one folder given twice"
    change_sweep(folders[3], name="sweep-001")
    assert names_of(folders[2:]) == ["sweep-001", "other"], "a folder that was given another name"
    text = printed(*folders[:2])
    assert "a/x/sweep-001 (finished), best first" in text
    assert "\nb/x/sweep-001 0000" in text


def test_sweeps_on_other_galleries_are_not_ranked_among_one_another(tmp_path: Path) -> None:
    folders = [write_sweep(tmp_path / name, [right]) for name, right in (("few", 160), ("many", 40), ("many-more", 60))]
    for folder, photos in zip(folders, ("aa", "bb", "bb"), strict=True):
        change_sweep(folder, data_fingerprint=f"train:{photos}")
    groups = standings(folders)
    assert [[each.sweep for each in group] for group in groups] == [["few"], ["many-more", "many"]]
    assert [each.behind for each in groups[1]] == ["", "0.1000, real"]
    assert groups[0][0].counted == "instance among 1,200 photos, 190 texts (photos aa)"
    table = printed(*folders)
    assert "recalls are not comparable" in table
    assert table.index("\nfew ") < table.index("\nmany-more ") < table.index("\nmany ")
    assert "not comparable" not in printed(*folders[1:])


@pytest.mark.parametrize("content", ["[]", '{"name": "x"}', '{"name": "x", "state": 1, "best": 1, "trials": 1}', "{", "\x00"])
def test_another_file_in_the_place_of_a_sweeps_is_said_to_be_that(tmp_path: Path, content: str) -> None:
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(UserError, match="is no sweep"):
        read_sweep(tmp_path)


def below_zero_shot(small_sweep: Path, folder: Path) -> dict[str, Any]:
    """A sweep all of whose trials are a little below the weights that they started from."""
    shutil.copytree(small_sweep, folder)
    sweep = read_sweep(folder)
    best = sweep["best"]["metrics"]["recall_at_10"]
    for number, row in enumerate(sweep["trials"]):
        row["untouched_recall_at_10"], row["protocol"] = best + 0.01 * (number + 1), "instance"
        row["config"] |= {"clip_model": "ViT-B-32", "model.pretrained": "laion400m_e32" if number else "openai"}
        row["start"] = "ViT-B-32"
    (folder / "sweep.json").write_text(json.dumps(sweep))
    return sweep


def test_a_winner_below_zero_shot_is_said_to_be_and_the_better_weights_are_named(small_sweep: Path, tmp_path: Path) -> None:
    sweep = below_zero_shot(small_sweep, tmp_path / "sweep")
    recall, top = sweep["best"]["metrics"]["recall_at_10"], sweep["trials"][-1]["untouched_recall_at_10"]
    said = " ".join(winner_lines(sweep, tmp_path / "sweep"))
    for words in (
        f"the winner, trial {sweep['best']['trial_id']}, is below zero-shot: recall_at_10 {recall:.4f}, but {top:.4f}",
        "of the zero-shot weights of ViT-B-32 (model.pretrained = laion400m_e32)",
        'load them: open_clip.create_model_and_transforms("ViT-B-32", pretrained="laion400m_e32", force_quick_gelu=True)',
    ):
        assert words in said
    page = write_report([tmp_path / "sweep"], gallery=False).read_text()
    assert "is below zero-shot: recall_at_10" in page
    longer = {**sweep, "refit": {"times": 2, "examples_seen": 64, "metrics": sweep["best"]["metrics"]}}
    assert any("the refit is below zero-shot" in line for line in refit_lines(longer, tmp_path))
    better = {**longer, "refit": {**longer["refit"], "metrics": {**sweep["best"]["metrics"], "recall_at_10": top}}}
    assert not any("below zero-shot" in line for line in refit_lines(better, tmp_path))
    said = " ".join(winner_lines(better, tmp_path / "sweep"))
    assert "The refit is not" in said
    assert "load them" not in said


def test_zero_shot_is_of_one_protocol_and_of_the_weights_that_were_loaded(small_sweep: Path, tmp_path: Path) -> None:
    sweep = below_zero_shot(small_sweep, tmp_path / "sweep")
    metrics = sweep["best"]["metrics"]
    assert zero_shot_lines(sweep, "it", {**metrics, "protocol": "product"}) == []
    for row in sweep["trials"]:
        row["config"].pop("model.pretrained")
    weights = tmp_path / "own.safetensors"
    started = {"should_load_checkpoint": True, "checkpoint_path": str(weights)}
    assert str(weights) in " ".join(zero_shot_lines({**sweep, "base_config": started}, "it", metrics))


def test_a_winner_above_zero_shot_is_not(small_sweep: Path, tmp_path: Path) -> None:
    sweep = below_zero_shot(small_sweep, tmp_path / "sweep")
    for row in sweep["trials"]:
        row["untouched_recall_at_10"] = sweep["best"]["metrics"]["recall_at_10"]
    assert "below zero-shot" not in " ".join(winner_lines(sweep, tmp_path / "sweep"))
    assert zero_shot_lines({"trials": []}, "it", {"recall_at_10": 0.5}) == []


def test_names_with_brackets_are_shown_whole(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "one [a]", [150, 148])
    sweep = json.loads((folder / "sweep.json").read_text())
    for trial, start in zip(sweep["trials"], ("shop [v1]", "[/x]"), strict=True):
        trial["start"] = start
    (folder / "sweep.json").write_text(json.dumps(sweep))
    text = printed(folder)
    assert all(name in text for name in ("one [a] (finished)", "shop [v1]", "[/x]"))
