"""Of two drivers the one that started last writes; the other one stops before it writes next."""

import json
import platform
from pathlib import Path
from typing import Any

import pytest

from fashionclip_tune.errors import StorageError
from fashionclip_tune.storage.folder import RemoteFolder
from fashionclip_tune.tuning.persistence import fencing as writer_module
from fashionclip_tune.tuning.persistence.fencing import FencingCheck, register, sign_off


@pytest.fixture(autouse=True)
def look_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_LOOKED_EVERY_S", 0.0)


def on(host: str, monkeypatch: pytest.MonkeyPatch, folder: RemoteFolder, run_dir: str = "/scratch/it") -> Any:
    monkeypatch.setattr(platform, "node", lambda: host)
    return register(folder, Path(run_dir))


def test_the_one_before_writes_and_removes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost, here = RemoteFolder(tmp_path), RemoteFolder(tmp_path)
    first, before = on("lost", monkeypatch, lost)
    assert before is None
    lost.guard(FencingCheck(lost, first.name))
    lost.put("state", b"old")
    second, before = on("here", monkeypatch, here)
    assert before == first
    assert str(before).startswith("lost (process ")
    here.guard(FencingCheck(here, second.name))
    for change in (lambda: lost.put("journal", b"x"), lambda: lost.remove("state")):
        with pytest.raises(StorageError, match=r"is written by another machine now, here \(process \d+, started 20"):
            change()
    here.put("state", b"new")
    assert lost.read("state") == b"new"  # reading is free
    assert not lost.exists("journal")


def test_who_has_signed_off_or_ran_in_this_folder_is_not_worth_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RemoteFolder(tmp_path)
    first, _ = on("one", monkeypatch, folder)
    second, before = on("one", monkeypatch, folder)
    assert before is None
    assert second.name > first.name
    sign_off(folder, second)
    third, before = on("two", monkeypatch, folder)
    assert before is None
    assert third.name > second.name


def test_two_scratch_folders_on_one_host_are_two_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither has the lock of the other's folder."""
    folder = RemoteFolder(tmp_path)
    first, _ = on("one", monkeypatch, folder, "/scratch/it")
    assert on("one", monkeypatch, folder, "/other/it")[1] == first


def test_of_two_that_start_at_once_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [RemoteFolder(tmp_path) for _ in range(2)]
    monkeypatch.setattr(writer_module, "_newest", lambda folder: None)  # neither sees the other
    writers = [on(f"host-{number}", monkeypatch, folder)[0] for number, folder in enumerate(folders)]
    monkeypatch.undo()
    refused = 0
    for folder, one in zip(folders, writers, strict=True):
        try:
            FencingCheck(folder, one.name)()
        except StorageError:
            refused += 1
    assert refused == 1


def test_a_torn_file_still_says_that_there_is_a_later_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RemoteFolder(tmp_path)
    first, _ = on("one", monkeypatch, folder)
    second, _ = on("two", monkeypatch, folder)
    path = tmp_path / "writers" / f"{second.name}.json"
    path.write_text(json.dumps({"name": second.name})[:5])
    with pytest.raises(StorageError, match="a machine of unknown name"):
        FencingCheck(folder, first.name)()


def test_looks_are_rare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_LOOKED_EVERY_S", 10.0)
    folder, looks = RemoteFolder(tmp_path), []
    first, _ = on("one", monkeypatch, folder)
    monkeypatch.setattr(writer_module, "_newest", lambda folder: looks.append(1))
    check = FencingCheck(folder, first.name)
    for _ in range(100):
        check()
    assert len(looks) == 1


def test_nothing_is_removed_on_the_word_of_an_earlier_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks the other machine has taken over, and it is to find the state that it goes on from."""
    monkeypatch.setattr(writer_module, "_LOOKED_EVERY_S", 1000.0)
    overtaken = RemoteFolder(tmp_path)
    first, _ = on("one", monkeypatch, overtaken)
    overtaken.guard(FencingCheck(overtaken, first.name))
    overtaken.put("state", b"old")
    on("two", monkeypatch, RemoteFolder(tmp_path))
    overtaken.put("journal", b"read past")  # a later writer's pieces go before it
    with pytest.raises(StorageError, match="is written by another machine now, two"):
        overtaken.remove("state")
    assert overtaken.read("state") == b"old"
