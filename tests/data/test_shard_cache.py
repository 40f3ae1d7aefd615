"""Copies of shards: whole or not there, within their limit, shared by processes, given up when nothing comes."""

import contextlib
import hashlib
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from fashionclip_tune.data.shard_cache import CopyError, Prefetcher, ShardDigest, ShardStorage, copy_first
from fashionclip_tune.data.shards import RemoteShard
from fashionclip_tune.files import cache_dir
from fashionclip_tune.storage.folder import RemoteFolder


def write(path: Path, num_bytes: int = 5_000) -> tuple[Path, ShardDigest]:
    data = os.urandom(num_bytes)
    path.write_bytes(data)
    return path, ShardDigest(hashlib.blake2b(data, digest_size=16).hexdigest(), num_bytes)


def copies(folder: Path) -> list[Path]:
    return sorted(folder.glob("shards/*.tar"))


def test_without_scratch_a_local_shard_is_read_where_it_is(tmp_path: Path) -> None:
    shard, content = write(tmp_path / "a.tar")
    assert not ShardStorage().copies(shard)
    assert ShardStorage().path(shard, content) == shard


def test_with_scratch_it_is_copied_once_and_found_again_whatever_becomes_of_it(tmp_path: Path) -> None:
    shard, content = write(tmp_path / "a.tar")
    storage = ShardStorage(tmp_path / "scratch")
    copy = storage.path(shard, content)
    assert copy.read_bytes() == shard.read_bytes()
    assert copy != shard
    before = copy.stat().st_ino
    shard.unlink()
    assert storage.path(tmp_path / "elsewhere.tar", content) == copy  # the content counts, not the name
    assert copy.stat().st_ino == before


def test_a_shard_that_is_not_what_its_index_says_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    shard, content = write(tmp_path / "a.tar")
    write(shard, content.num_bytes)
    storage = ShardStorage(tmp_path / "scratch")
    with pytest.raises(CopyError, match=r"a\.tar: 5,000 bytes with checksum .* its index says 5,000 with .*: changed since"):
        storage.path(shard, content)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CopyError, match=r"a\.tar: 4,999 bytes"):
        storage.path(shard, content)
    assert not list(tmp_path.glob("scratch/shards/*.part"))
    assert not copies(tmp_path / "scratch")


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CopyError, match=r"nowhere\.tar.*No such file"):
        ShardStorage(tmp_path / "scratch").path(tmp_path / "nowhere.tar", ShardDigest("0" * 32, 1))


def test_the_limit_holds_and_what_was_used_longest_ago_makes_room(tmp_path: Path) -> None:
    storage = ShardStorage(tmp_path / "scratch", max_bytes=3_000)
    shards = [write(tmp_path / f"{number}.tar", 1_000) for number in range(6)]
    paths = []
    for number, (shard, content) in enumerate(shards[:3]):
        paths.append(storage.path(shard, content))
        os.utime(paths[-1], (1_000 + number, 1_000 + number))
    storage.path(*shards[0])  # used again: now the newest
    for shard, content in shards[3:5]:
        storage.path(shard, content)
        assert sum(path.stat().st_size for path in copies(tmp_path / "scratch")) <= 3_000
    assert paths[0].exists()
    assert not paths[1].exists()
    assert not paths[2].exists()


def test_an_open_copy_stays_readable_after_it_has_made_room(tmp_path: Path) -> None:
    storage = ShardStorage(tmp_path / "scratch", max_bytes=1_500)
    (first, content), second = write(tmp_path / "a.tar", 1_000), write(tmp_path / "b.tar", 1_000)
    with open(storage.path(first, content), "rb") as file:
        storage.path(*second)
        assert len(copies(tmp_path / "scratch")) == 1
        assert file.read() == first.read_bytes()


def test_what_a_killed_process_left_half_copied_is_overwritten_or_removed(tmp_path: Path) -> None:
    storage = ShardStorage(tmp_path / "scratch", max_bytes=10_000)
    shard, content = write(tmp_path / "a.tar")
    folder = tmp_path / "scratch" / "shards"
    folder.mkdir(parents=True)
    (folder / f"{content.checksum}.part").write_bytes(b"x" * 9_000)
    assert storage.path(shard, content).read_bytes() == shard.read_bytes()
    left = folder / "0123.part"
    left.write_bytes(b"x" * 9_000)
    os.utime(left, (time.time() - 7_200,) * 2)
    storage.path(*write(tmp_path / "b.tar"))
    assert not left.exists()


def _copy_all(scratch: Path, shards: list[tuple[Path, ShardDigest]], rounds: int) -> None:
    storage = ShardStorage(scratch, max_bytes=3_500)
    for number in range(rounds):
        shard, content = shards[(number * 7) % len(shards)]
        for _ in range(20):
            try:
                with open(storage.path(shard, content), "rb") as file:
                    assert hashlib.blake2b(file.read(), digest_size=16).hexdigest() == content.checksum
                break
            except FileNotFoundError:  # made room between the two calls
                continue


@pytest.mark.slow
def test_processes_share_copies_within_the_limit_and_none_is_ever_half(tmp_path: Path) -> None:
    shards = [write(tmp_path / f"{number}.tar", 1_000) for number in range(6)]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_copy_all, args=(tmp_path / "scratch", shards, 120)) for _ in range(3)]
    for process in processes:
        process.start()
    largest = 0
    while any(process.is_alive() for process in processes):
        there, sizes = copies(tmp_path / "scratch"), []
        for path in there:
            with contextlib.suppress(FileNotFoundError):
                sizes.append(path.stat().st_size)
        # One that went and one that came while these were looked at were never there together.
        if copies(tmp_path / "scratch") == there:
            largest = max(largest, sum(sizes))
        time.sleep(0.002)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert 1_000 <= largest <= 3_500


def test_a_source_from_which_nothing_comes_is_given_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "silent.tar")
    storage = ShardStorage(tmp_path / "scratch", stall_s=0.3)
    started = time.monotonic()
    with pytest.raises(CopyError, match=r"silent\.tar: no byte came for 0\.3 s"):
        storage.path(tmp_path / "silent.tar", ShardDigest("0" * 32, 10))
    with pytest.raises(CopyError, match=r"no byte came for 0\.3 s"):
        storage.path(RemoteShard("pipe:sleep 60"), ShardDigest("1" * 32, 10))
    assert time.monotonic() - started < 5


def test_whoever_waits_for_another_s_copy_hears_of_headway_and_gets_it(tmp_path: Path) -> None:
    """The other one writes slowly, but it writes."""
    data = os.urandom(3 << 20)
    content = ShardDigest(hashlib.blake2b(data, digest_size=16).hexdigest(), len(data))
    (tmp_path / "data").write_bytes(data)
    slow = RemoteShard(f"pipe:for i in 0 1 2; do dd if={tmp_path}/data bs=1M skip=$i count=1 2>/dev/null; sleep 0.2; done")
    storage, calls = ShardStorage(cache_dir() / "s", stall_s=1.0), []
    first = threading.Thread(target=storage.path, args=(slow, content))
    first.start()
    time.sleep(0.1)
    path = storage.path(slow, content, on_wait=lambda: calls.append(1))
    first.join()
    assert path.read_bytes() == data
    assert calls


def test_a_url_is_copied_to_the_cache_and_an_error_of_the_server_is_one_line(served: tuple[Path, str]) -> None:
    folder, url = served
    shard, content = write(folder / "a.tar")
    copy = ShardStorage().path(RemoteShard(f"{url}/a.tar"), content)
    assert copy.read_bytes() == shard.read_bytes()
    assert copy.is_relative_to(cache_dir())
    with pytest.raises(CopyError, match=r"/b\.tar"):
        ShardStorage().path(RemoteShard(f"{url}/b.tar"), ShardDigest("0" * 32, 5))


@pytest.mark.filterwarnings("ignore")  # the server's own
def test_a_shard_is_copied_from_object_storage_without_commands(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    shard, content = write(tmp_path / "a.tar", 9_000_000)  # more than one request
    RemoteFolder(bucket).put_file("a b's.tar", shard)
    copy = ShardStorage(tmp_path / "scratch").path(RemoteShard(f"{bucket}/a b's.tar"), content)
    assert copy.read_bytes() == shard.read_bytes()
    with pytest.raises(CopyError, match=r"/nowhere\.tar"):
        ShardStorage(tmp_path / "scratch").path(RemoteShard(f"{bucket}/nowhere.tar"), ShardDigest("0" * 32, 5))


def test_shards_wanted_ahead_are_copied_in_their_order_and_an_error_stops_none(tmp_path: Path) -> None:
    shards = [write(tmp_path / f"{number}.tar") for number in range(3)]
    ahead = Prefetcher(ShardStorage(tmp_path / "scratch"))
    ahead.want([shards[0], (tmp_path / "nowhere.tar", ShardDigest("0" * 32, 1)), *shards[1:]])
    deadline = time.monotonic() + 10
    while len(copies(tmp_path / "scratch")) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    ahead.close()
    assert {path.stem for path in copies(tmp_path / "scratch")} == {content.checksum for _, content in shards}


def test_what_is_needed_first_is_copied_as_far_as_it_fits_and_it_is_told_how_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fashionclip_tune.data.shard_cache._SHOWN_EVERY_S", 0.001)
    shards = [write(tmp_path / f"{number}.tar", 2_000) for number in range(4)]
    lost = (tmp_path / "nowhere.tar", ShardDigest("0" * 32, 1))
    storage, told = ShardStorage(tmp_path / "scratch", max_bytes=6_001), list[tuple[int, int]]()
    copy_first(storage, [shards[0], lost, shards[0], *shards[1:]], lambda *progress: told.append(progress))
    assert {path.stem for path in copies(tmp_path / "scratch")} == {content.checksum for _, content in shards[:3]}
    assert told == sorted(told)
    assert told[-1] == (4, 4)
    copy_first(
        ShardStorage(), shards, lambda *progress: pytest.fail("local shards are read where they are") if progress[1] else None
    )


def test_copying_ends_where_the_caller_asks_for_it(tmp_path: Path) -> None:
    slow, fifo = tmp_path / "slow.tar", ShardDigest("1" * 32, 1_000)
    os.mkfifo(slow)  # from which nothing comes: it is waited for
    waiting = [(slow, fifo), *(write(tmp_path / f"{number}.tar") for number in range(8))]

    def stop(done: int, total: int) -> None:
        if done == 8:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        copy_first(ShardStorage(tmp_path / "scratch", stall_s=1), waiting, stop)
    assert len(copies(tmp_path / "scratch")) == 8
