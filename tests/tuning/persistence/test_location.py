import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fashionclip_tune.errors import UserError
from fashionclip_tune.tuning.persistence.location import SweepCatalog
from fashionclip_tune.tuning.session import driving


def write(results: Any, name: Any, *, state: Any = "RUNNING", created: Any = "2026-01-01") -> None:
    (results / name).mkdir(parents=True, exist_ok=True)
    (results / name / "sweep.json").write_text(json.dumps({"state": state, "created": created, "name": name}))


def test_the_latest_unfinished_sweep_is_gone_on_with(tmp_path: Path) -> None:
    assert SweepCatalog(str(tmp_path / "none")).to_resume(None) is None
    write(tmp_path, "old", created="2026-01-01")
    write(tmp_path, "newer", created="2026-01-03")
    write(tmp_path, "newest", created="2026-01-05", state="FINISHED")
    (tmp_path / "no sweep").mkdir()
    results = SweepCatalog(str(tmp_path))
    assert results.to_resume(None)[0] == "newer"
    assert results.to_resume("old")[1]["created"] == "2026-01-01"
    assert results.to_resume("no sweep") is None


def test_of_a_sweep_in_two_folders_what_was_written_first_holds(tmp_path: Path) -> None:
    """What is rewritten for people may have been torn when the machine was lost."""
    (tmp_path / "it" / "headers").mkdir(parents=True)
    (tmp_path / "it" / "headers" / "000001-a.json").write_text('{"created": "2026-01-01"}')
    (tmp_path / "it" / "sweep.json").write_text('{"state": "RUNN')
    _, saved = SweepCatalog(str(tmp_path)).to_resume("it")
    assert (saved["state"], saved["created"], saved["two_tiers"]) == ("RUNNING", "2026-01-01", True)
    write(tmp_path, "it", state="FINISHED")
    assert SweepCatalog(str(tmp_path)).to_resume("it")[1]["state"] == "FINISHED"


def test_names_of_new_sweeps(tmp_path: Path) -> None:
    results = SweepCatalog(str(tmp_path))
    assert results.new(None, may_be_begun=False) == "sweep-001"
    write(tmp_path, "sweep-001")
    assert results.new(None, may_be_begun=False) == "sweep-002"
    with pytest.raises(UserError, match="sweep-001 exists: add --resume"):
        results.new("sweep-001", may_be_begun=False)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".lock").touch()
    with pytest.raises(UserError, match="exists"):
        results.new("killed", may_be_begun=False)
    assert results.new("killed", may_be_begun=True) == "killed"
    for name, text in (("writers", "{}"), ("headers", '{"created": "20')):  # the machine went while its header was written
        (tmp_path / "lost" / name).mkdir(parents=True)
        (tmp_path / "lost" / name / "000001-a.json").write_text(text)
    assert results.to_resume("lost") is None
    assert results.new("lost", may_be_begun=True) == "lost"
    assert not results.place("lost", str(tmp_path / "scratch")).mirror.is_started()
    for name in ("", "a/b", ".."):
        with pytest.raises(UserError, match="is not allowed: one folder name"):
            results.new(name, may_be_begun=False)


def test_a_sweep_stays_in_as_many_folders_as_it_was_started_in(tmp_path: Path) -> None:
    results, scratch = SweepCatalog(str(tmp_path / "results")), str(tmp_path / "scratch")
    one = results.place("it", None)
    assert (one.run_dir, one.mirror) == (tmp_path / "results" / "it", None)
    assert results.place("it", scratch, {"two_tiers": False}).mirror is None
    two = results.place("it", scratch)
    assert two.run_dir.is_relative_to(scratch)
    assert two.readable == tmp_path / "results" / "it"
    assert SweepCatalog(str(tmp_path / "others")).place("it", scratch).run_dir != two.run_dir
    with pytest.raises(UserError, match="add --scratch DIR"):
        results.place("it", None, {"two_tiers": True})
    with pytest.raises(UserError, match="add --scratch DIR"):
        SweepCatalog(f"file://{tmp_path}").place("it", None)


def started(place: Any) -> str:
    """What a driver is told that planned a new sweep at ``place`` when there was none."""
    with pytest.raises(UserError) as refused, driving(place, is_new=True):
        pytest.fail("it must not begin")
    return str(refused.value)


def test_a_new_sweep_does_not_go_on_in_one_that_came_meanwhile(tmp_path: Path) -> None:
    """Its settings are others, and its plan is made."""
    results = SweepCatalog(str(tmp_path))
    one, two = results.place("one", None), results.place("two", str(tmp_path / "scratch"))
    write(tmp_path, "one")
    assert "one was started by another process meanwhile: give another --name" in started(one)
    results.place("two", str(tmp_path / "elsewhere")).mirror.start({"created": "2026-01-01"})
    assert "two was started by another process meanwhile: give another --name" in started(two)


def test_a_new_sweep_does_not_go_on_in_what_one_of_its_name_left_in_the_scratch_folder(
    tmp_path: Path, logged: Sequence[str]
) -> None:
    place = SweepCatalog(str(tmp_path)).place("it", str(tmp_path / "scratch"))
    write(place.run_dir.parent, place.run_dir.name)
    assert f"{place.run_dir} has a sweep of this name, of which {tmp_path}/it knows nothing" in started(place)
    (place.run_dir / "sweep.json").unlink()
    with driving(place, is_new=True):
        assert place.mirror.writer.startswith("000001-")
    assert logged == []
