import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fashionclip_tune.errors import UserError
from fashionclip_tune.machine.hardware import this_machine
from fashionclip_tune.tuning.planning.plan import SweepPlan, plan_sweep
from fashionclip_tune.tuning.planning.settings import SweepSettings


def cache_dir(garments: Path, **settings: Any) -> Path:
    chosen = SweepSettings(
        data=str(garments), space="tiny", budget_examples=1152, device="cpu", samples_per_second=100.0, **settings
    )
    return plan_sweep(chosen).base.model_cache_dir


def test_base_weights_are_kept_on_the_local_disk_unless_they_are_here(
    garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "drive").mkdir()
    monkeypatch.chdir(tmp_path / "drive")
    scratch = str(tmp_path / "scratch")
    assert cache_dir(garments) == tmp_path / "drive" / "openclip_cache"
    assert cache_dir(garments, scratch=scratch) == tmp_path / "scratch" / "openclip_cache"
    (tmp_path / "drive" / "openclip_cache").mkdir()
    assert cache_dir(garments, scratch=scratch) == tmp_path / "drive" / "openclip_cache"


def test_a_sweep_says_that_captions_have_a_gap(many_captions: Path, logged: Sequence[str]) -> None:
    settings = SweepSettings(
        data=str(many_captions), space="tiny", budget_examples=1152, device="cpu", samples_per_second=100.0
    )
    plan_sweep(settings)
    (line,) = (line for line in logged if "gap" in line)
    assert line.startswith("warning: 1 photo has a gap in the numbers of its captions, such as clip_dataset_train")


def test_fewer_trials_run_side_by_side_where_the_disk_has_no_room_for_more(garments: Path) -> None:
    machine = replace(this_machine(), cores=2)

    def planned(disk_budget_gb: float | None, scheduler: str = "none", keep_paused: int | None = None) -> SweepPlan:
        settings = SweepSettings(
            data=str(garments),
            space="tiny",
            budget_examples=1152,
            device="cpu",
            samples_per_second=100.0,
            max_concurrent=2,
            disk_budget_gb=disk_budget_gb,
            scheduler=scheduler,
            keep_paused=keep_paused,
        )
        return plan_sweep(settings, machine=machine)

    free = planned(None)
    two, one = (free.disk.local_bytes(counts) / 1e9 for counts in (free.at_a_time, dict.fromkeys(free.at_a_time, 1)))
    assert free.slots.count == 2
    assert planned(two * 1.01).slots.count == 2
    cut = planned((one + two) / 2)
    assert cut.slots.count == 1
    assert any("--disk-budget-gb" in note for note in cut.allotment.cuts)
    with pytest.raises(UserError, match="is too little: one trial at a time takes up to"):
        planned(one / 2)
    # Where trials wait, fewer of them do before fewer run; not where it is said how many.
    assert [planned(size, "asha").settings.keep_paused for size in (None, two * 1.01)] == [3, 0]
    assert planned(two * 1.01, "asha").slots.count == 2
    some = planned(two + 0.06, "asha").settings.keep_paused
    assert some is not None
    assert 0 < some < 3
    assert planned(None, "asha").disk.local_bytes(free.at_a_time) / 1e9 > two + 0.06
    with pytest.raises(UserError, match="is too little: one trial at a time takes up to"):
        planned(one * 1.01, "asha", keep_paused=3)


def test_a_sweep_measures_as_its_data_want_unless_told_otherwise(garments: Path, tmp_path: Path, logged: Sequence[str]) -> None:
    for file in garments.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "dataset.json").unlink()
    (tmp_path / "dataset.json").write_text(
        json.dumps(json.loads((garments / "dataset.json").read_text()) | {"protocol": "product"})
    )

    def protocol(begun: SweepPlan | None = None, **settings: Any) -> str:
        given = {"data": str(tmp_path), "space": "tiny", "budget_examples": 1152, "device": "cpu", "samples_per_second": 100.0}
        recorded = None if begun is None else {"base_config": begun.base.to_dict(), "starts": {}}
        return plan_sweep(SweepSettings(**{**given, **settings}), begun=recorded).base.evaluation.protocol.value

    assert protocol() == "product"
    assert sum("measured by the protocol product, as the data set's dataset.json says" in line for line in logged) == 1
    assert protocol(overrides={"evaluation.protocol": "instance"}) == "instance"
    assert protocol(data=str(garments)) == "instance"
    before = plan_sweep(
        SweepSettings(data=str(garments), space="tiny", budget_examples=1152, device="cpu", samples_per_second=100.0)
    )
    assert protocol(before) == "instance"  # a sweep that began before the data said so
