from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from fashionclip_tune.errors import StorageError, UserError
from fashionclip_tune.storage import folder as durable
from fashionclip_tune.storage.folder import RemoteFolder


@pytest.fixture(params=["folder", "object store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A folder, or a store that knows no folders, no renames and no appending."""
    if request.param == "folder":
        return RemoteFolder(tmp_path / "drive")
    return RemoteFolder("bucket/sweep", fs._MockFileSystem())


def test_what_was_put_is_listed_and_read_back(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(range(256)) * 40_000)  # several chunks
    folder.put("journal/000.jsonl", b"one\n")
    folder.put_file("trials/a/weights", tmp_path / "big")
    assert folder.sizes() == {"journal/000.jsonl": 4, "trials/a/weights": 10_240_000}
    assert folder.sizes("journal") == {"journal/000.jsonl": 4}
    assert folder.read("journal/000.jsonl") == b"one\n"
    folder.fetch("trials/a/weights", tmp_path / "copies" / "weights")
    assert (tmp_path / "copies" / "weights").read_bytes() == (tmp_path / "big").read_bytes()
    assert folder.exists("journal/000.jsonl")
    assert not folder.exists("journal/001.jsonl")
    assert folder.folders() == ["journal", "trials"]
    folder.remove("journal/000.jsonl")
    assert folder.sizes("journal") == {}


def test_nothing_there_is_no_error_but_when_it_is_read(folder: Path, tmp_path: Path) -> None:
    assert (folder.sizes(), folder.folders(), folder.sizes("journal")) == ({}, [], {})
    with pytest.raises(FileNotFoundError):
        folder.read("header.json")
    with pytest.raises(FileNotFoundError):
        folder.fetch("header.json", tmp_path / "header.json")


def test_a_file_is_emptied_before_it_is_deleted(tmp_path: Path) -> None:
    """A drive's trash keeps what it was when it was deleted: a second name of the same file sees it."""
    folder = RemoteFolder(tmp_path / "drive")
    folder.put("state", b"x" * 1000)
    (tmp_path / "trash").hardlink_to(tmp_path / "drive" / "state")
    folder.remove("state")
    assert (tmp_path / "trash").read_bytes() == b""


def test_a_file_that_does_not_fit_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RemoteFolder(tmp_path / "drive")
    folder.put("state", b"x" * 1_000_000)
    (tmp_path / "new").write_bytes(b"y" * 3_000_000)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(durable.time, "sleep", lambda seconds: pytest.fail("it is not tried again"))
    monkeypatch.setattr(durable.shutil, "disk_usage", lambda path: usage(10**7, 0, 2_000_000))
    with pytest.raises(StorageError, match="is full: weights takes 3 MB, 2 MB are free: make room"):
        folder.put_file("weights", tmp_path / "new")
    assert folder.sizes() == {"state": 1_000_000}
    folder.put_file("state", tmp_path / "new")  # in the place of what is there
    monkeypatch.setattr(durable.shutil, "disk_usage", lambda path: usage(0, 0, 0))  # it cannot say
    folder.put_file("weights", tmp_path / "new")
    assert sum(folder.sizes().values()) == 6_000_000


def test_a_hiccup_is_waited_out_in_reading_and_removing_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, waits = RemoteFolder(tmp_path / "drive"), []
    folder.put("a/b", b"b")

    def hide() -> None:
        (tmp_path / "drive" / "a").rename(tmp_path / "hidden")
        (tmp_path / "drive" / "a").write_bytes(b"no folder")

    def come_back(seconds: Any) -> None:
        waits.append(seconds)
        (tmp_path / "drive" / "a").unlink()
        (tmp_path / "hidden").rename(tmp_path / "drive" / "a")

    monkeypatch.setattr(durable.time, "sleep", come_back)
    for action in (lambda: folder.read("a/b"), lambda: folder.fetch("a/b", tmp_path / "b"), lambda: folder.remove("a/b")):
        hide()
        action()
    assert len(waits) == 3
    assert folder.sizes() == {}
    folder.remove("a/b")  # by another process already

    monkeypatch.setattr(durable.time, "sleep", lambda seconds: None)
    folder.put("a/b", b"b")
    hide()
    with pytest.raises(StorageError, match=r"drive cannot be reached \(a/b: .*bring it back"):
        folder.read("a/b")


def test_a_hiccup_is_waited_out_and_a_failure_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drive, waits = tmp_path / "drive", []

    def mounted_again_at_the_third_wait(seconds: Any) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            drive.unlink()

    drive.write_bytes(b"no folder")
    monkeypatch.setattr(durable.time, "sleep", mounted_again_at_the_third_wait)
    RemoteFolder(drive).put("a", b"a")
    assert (drive / "a").read_bytes() == b"a"
    assert waits == sorted(waits)

    (tmp_path / "other").write_bytes(b"no folder")
    with pytest.raises(StorageError, match=r"other cannot be written to \(b: .*--resume"):
        RemoteFolder(tmp_path / "other").put("b", b"b")
    assert len(waits) == 6


def test_an_address_of_no_known_kind_is_refused() -> None:
    with pytest.raises(UserError, match="nfs://x/y cannot be opened"):
        RemoteFolder("nfs://x/y")


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were to be waited."""
    waited: list[float] = []
    monkeypatch.setattr(durable.time, "sleep", waited.append)
    return waited


def test_a_budget_is_kept_at_each_write_and_small_files_pass(folder: Path, tmp_path: Path, no_waiting: None) -> None:
    (tmp_path / "weights").write_bytes(b"x" * 3_000_000)
    folder.keep_below(7_000_000)
    folder.put_file("trials/a/weights", tmp_path / "weights")
    folder.put_file("trials/b/weights", tmp_path / "weights")
    folder.put_file("trials/b/weights", tmp_path / "weights")  # in place of itself
    with pytest.raises(
        StorageError, match=r"the disk budget of 0\.007 GB is used up: .* has 0\.006 GB beside trials/c/weights, whi"
    ):
        folder.put_file("trials/c/weights", tmp_path / "weights")
    assert folder.sizes() == {"trials/a/weights": 3_000_000, "trials/b/weights": 3_000_000}
    folder.put("journal/0", b"x" * 1_000_000)  # else a sweep could not record that it stops


def test_what_is_obsolete_goes_before_a_write_is_refused(folder: Path, no_waiting: None) -> None:
    freed = []

    def free() -> None:
        freed.append("old")
        folder.remove("old")

    folder.keep_below(7_000_000)
    folder.put("old", b"x" * 3_000_000)
    folder.put("new", b"x" * 1_000_000)
    folder.require_room("state", 3_000_000, free)
    assert freed == [], "there was room"
    folder.require_room("state", 4_000_000, free)
    assert freed == ["old"]
    assert sum(no_waiting) == 0


def test_others_are_given_time_to_free_what_they_hold(folder: Path, no_waiting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.keep_below(5_000_000)
    folder.put("ended", b"x" * 3_000_000)
    monkeypatch.setattr(durable.time, "sleep", lambda seconds: folder.remove("ended") if seconds > 1 else None)
    folder.require_room("state", 4_000_000)
    folder.put("ended", b"x" * 3_000_000)
    monkeypatch.setattr(durable.time, "sleep", no_waiting.append)
    with pytest.raises(StorageError, match="go on with a larger --disk-budget-gb"):
        folder.require_room("state", 4_000_000)
    assert 10 < sum(no_waiting) < 60
