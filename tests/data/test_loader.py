"""Loader processes that are stuck or die, shards that vanish or come from elsewhere: the same batches, or an error in words."""

import collections
import io
import os
import signal
import tarfile
import threading
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fashionclip_tune.data.batches import TrainBatches
from fashionclip_tune.data.index import ShardIndex, index_path, load_index
from fashionclip_tune.data.loader import train_loader
from fashionclip_tune.data.shard_cache import ShardStorage
from fashionclip_tune.data.shards import RemoteShard
from fashionclip_tune.errors import LoaderError, UserError
from fashionclip_tune.models.openclip import LoadedModel, load_model
from fashionclip_tune.training.stop_request import children_without_sigterm
from tests.support.shards import assert_equal, batches, configured, encoded, write_shards


@pytest.fixture(scope="module")
def loaded(cache_of_the_tests: Path) -> LoadedModel:
    return load_model(configured({}))


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return write_shards(tmp_path, [20, 20, 20])


def workers() -> dict[int, str]:
    """Living processes that this one's fork server has started, with what they are. (Those of a test's Ray are not its.)"""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, *_ = (process / "stat").read_text().rpartition(")")[2].split()
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if int(parent) == forkserver._forkserver._forkserver_pid and state != "Z":
            found[int(process.name)] = f"{state} {command}"
    return found


@pytest.mark.slow
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_workers=st.integers(0, 2),
    batch_size=st.integers(1, 20),
    stage=st.integers(1, 4),
    stop=st.integers(0, 7),
    unique=st.booleans(),
    scratch=st.booleans(),
)
def test_batches_after_a_stop_at_any_stage_equal_those_of_a_run_without_one(
    loaded: LoadedModel,
    tmp_path: Path,
    num_workers: int,
    batch_size: int,
    stage: int,
    stop: int,
    unique: bool,
    scratch: bool,
) -> None:
    if not (tmp_path / "clip_dataset_train.000002.tar").exists():
        write_shards(tmp_path, [20, 20, 20], unreadable=[7, 33])
    index = load_index(sorted(tmp_path.glob("*.tar")))
    first = stop // stage * stage  # the stage that was finished last
    overrides = {
        "training__batch_size": batch_size,
        "training__unique_products": unique,
        "augmentation__caption": "uniform",
        "training__shuffle_buffer": 30,
    }
    whole = batches(index, loaded, 0, first + stage, **overrides)
    if scratch:
        overrides["reading__scratch"] = tmp_path / "scratch"
    resumed = batches(index, loaded, first, first + stage, training__num_workers=num_workers, **overrides)
    assert_equal(resumed, whole[first:])


@pytest.mark.slow
def test_a_stuck_worker_is_named_with_what_it_was_reading_and_ended(shards: list[Path], loaded: LoadedModel) -> None:
    """Though a run's loader processes have SIGTERM blocked, by which torch ends them."""
    forkserver._forkserver._stop()  # of tests before: what it forks blocks what it blocks
    others = workers()  # what tests before have left is not this one's
    index = load_index(shards)
    shards[1].unlink()
    os.mkfifo(shards[1])  # opening it waits for ever, as a mount that hangs does
    config = configured({"training.num_workers": 2, "reading.stall_s": 1.5})
    started = time.monotonic()
    with (
        pytest.raises(
            LoaderError, match=r"no headway for 1\.5 s: loader process \d is at .*clip_dataset_train\.000001\.tar: s0"
        ),
        children_without_sigterm(),
        train_loader(
            config, index, loaded.preprocessing, loaded.tokenizer, first_step=0, total_steps=40, pin_memory=False
        ) as loader,
    ):
        list(loader)
    assert time.monotonic() - started < 120
    deadline = time.monotonic() + 30
    while left := {pid: what for pid, what in workers().items() if pid not in others}:
        assert time.monotonic() < deadline, f"they are waited for when Python exits, for ever: {left}"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_killed_worker_is_reported_with_what_the_others_are_at(shards: list[Path], loaded: LoadedModel) -> None:
    index = load_index(shards)
    config = configured({"training.num_workers": 1, "reading.stall_s": 60})
    others = workers()

    def kill() -> None:
        (own,) = workers().keys() - others.keys()
        os.kill(own, signal.SIGKILL)

    with train_loader(
        config, index, loaded.preprocessing, loaded.tokenizer, first_step=0, total_steps=100_000, pin_memory=False
    ) as loader:
        next(loader)
        threading.Timer(0.2, kill).start()
        with pytest.raises(LoaderError, match=r"^a loader process is gone \(.*\): (no )?loader process"):
            collections.deque(loader, maxlen=0)


def test_samples_of_a_shard_that_vanishes_or_is_cut_are_replaced_and_named(shards: list[Path], loaded: LoadedModel) -> None:
    index = load_index(shards)
    data = TrainBatches(configured({}), index, loaded.preprocessing, loaded.tokenizer)
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:4_096])
    read = [data[step] for step in range(15)]
    data.close()
    reasons = {bad.shard: bad.kind for batch in read for bad in batch.bad}
    assert reasons == {shards[0].name: "shard cannot be read", shards[1].name: "shard cut off since it was indexed"}
    keys = {key for batch in read for key in batch.keys}
    assert not keys & {f"s{number:03d}" for number in range(20)}
    assert "No such file" in next(bad.reason for batch in read for bad in batch.bad if bad.shard == shards[0].name)


def test_a_replacement_has_no_product_that_is_in_the_batch(tmp_path: Path, loaded: LoadedModel) -> None:
    index = load_index(write_shards(tmp_path, [30], unreadable=range(10)))
    read = batches(index, loaded, 0, 12, training__batch_size=18, training__unique_products=True)
    assert any(batch.bad for batch in read)
    product_of = dict(zip(index.keys.tolist(), index.product_ids.tolist(), strict=True))
    for batch in read:
        assert len({product_of[key] for key in batch.keys}) == 18


def test_a_limit_below_what_a_window_draws_from_is_refused(shards: list[Path], loaded: LoadedModel, tmp_path: Path) -> None:
    config = configured({"reading.scratch": tmp_path / "scratch", "reading.scratch_gb": 1e-5})
    with pytest.raises(UserError, match=r"reading\.scratch_gb = 1e-05 is too little: .* draws from 3 shards at a time"):
        TrainBatches(config, load_index(shards), loaded.preprocessing, loaded.tokenizer)


def test_a_limit_smaller_than_the_data_gives_the_same_batches_and_holds(
    shards: list[Path], loaded: LoadedModel, tmp_path: Path
) -> None:
    index = load_index(shards)
    limit = 2 * max(content.num_bytes for content in index.contents)
    options = {"training__shuffle_buffer": 10, "training__batch_size": 10}
    scratch = {"reading__scratch": tmp_path / "scratch", "reading__scratch_gb": limit / 1e9}
    assert_equal(batches(index, loaded, 0, 18, **options, **scratch), batches(index, loaded, 0, 18, **options))
    assert sum(path.stat().st_size for path in tmp_path.glob("scratch/shards/*.tar")) <= limit


@pytest.mark.parametrize("with_index", [False, True])
def test_shards_behind_a_url_give_the_batches_of_local_ones(
    served: tuple[Path, str], loaded: LoadedModel, tmp_path: Path, with_index: bool
) -> None:
    folder, url = served
    local = write_shards(folder, [20, 20])
    here = load_index(local)
    if not with_index:
        for shard in local:
            index_path(shard).unlink()
    remote = tuple(RemoteShard(f"{url}/{shard.name}") for shard in local)
    storage = ShardStorage(tmp_path / "scratch")
    index = load_index(remote, storage)
    assert index.fingerprint == here.fingerprint
    # An index beside the shards spares fetching them before they are needed; without one they are kept when they are.
    assert len(list(tmp_path.glob("scratch/shards/*.tar"))) == (0 if with_index else 2)
    assert_equal(
        batches(index, loaded, 0, 10, reading__scratch=tmp_path / "scratch", reading__allow_remote=True),
        batches(here, loaded, 0, 10),
    )


def test_a_server_without_the_shard_is_an_error_in_one_line(served: tuple[Path, str]) -> None:
    with pytest.raises(UserError, match=r"shard http://127.*/none\.tar cannot be read: "):
        load_index([RemoteShard(f"{served[1]}/none.tar")])


def test_a_pipe_is_indexed_and_read(shards: list[Path], loaded: LoadedModel) -> None:
    remote = tuple(RemoteShard(f"pipe:cat {shard}") for shard in shards)
    index: ShardIndex = load_index(remote)
    assert [shard.name for shard in index.shards] == [shard.name for shard in shards]
    assert_equal(batches(index, loaded, 0, 5), batches(load_index(shards), loaded, 0, 5))


def test_a_tar_with_every_kind_of_damage_trains_on_what_is_whole_and_names_the_rest(
    tmp_path: Path, loaded: LoadedModel
) -> None:
    def jpeg(mode: str = "RGB", **options: Any) -> bytes:
        return encoded(Image.new(mode, (40, 30)), "JPEG", **options)

    turned = Image.Exif()
    turned[0x0112] = 6
    whole = {
        "plain": jpeg(),
        "cmyk": jpeg("CMYK"),
        "grey": jpeg("L"),
        "turned": jpeg(exif=turned),
        "palette": encoded(Image.new("P", (40, 30)), "PNG"),
        "sixteen bits": encoded(Image.new("I;16", (40, 30)), "PNG"),
        "alpha": encoded(Image.new("RGBA", (40, 30)), "WEBP"),
    }
    bomb = bytearray(jpeg())
    frame = bomb.index(b"\xff\xc0")
    bomb[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"  # 65,535 x 65,535 pixels
    undecodable = {
        "cut": (jpeg()[:200], "not a decodable image"),
        "text": (b"no image", "not a decodable image"),
        "bomb": (bytes(bomb), "image too large"),
    }
    members = [(f"{key}.jpg", data) for key, data in whole.items()]
    members += [(f"{key}.jpg", data) for key, (data, _) in undecodable.items()]
    members += [(f"{key}.txt", f"caption of {key}".encode()) for key in [*whole, *undecodable]]
    members += [("no caption.jpg", jpeg()), ("blank.jpg", jpeg()), ("blank.txt", b" "), ("latin.jpg", jpeg())]
    members += [("latin.txt", "caf\u00e9".encode("latin-1")), ("no image.txt", b"caption")]
    members += [("twice.jpg", jpeg()), ("twice.jpg", jpeg()), ("twice.txt", b"caption")]
    shards = [tmp_path / f"clip_dataset_train.{number:06d}.tar" for number in range(3)]
    with tarfile.open(shards[0], "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    shards[1].write_bytes(shards[0].read_bytes()[:1_500])  # ends within the second photo
    shards[2].write_bytes(b"")
    index = load_index(shards)
    read = batches(index, loaded, 0, 8, training__batch_size=5)
    assert {key for batch in read for key in batch.keys} == set(whole)
    named = [*index.bad, *(bad for batch in read for bad in batch.bad)]
    found = {bad.key: bad.kind for bad in named if bad.shard == shards[0].name}
    assert found == {key: kind for key, (_, kind) in undecodable.items()} | {
        "no caption": "no caption",
        "blank": "caption txt is empty or not UTF-8",
        "latin": "caption txt is empty or not UTF-8",
        "no image": "no image",
        "twice": "two images under one key",
    }
    broken = {bad.shard for bad in index.bad if bad.kind == "not a readable tar from there on"}
    assert broken == {shards[1].name, shards[2].name}
