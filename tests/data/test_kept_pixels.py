"""Pixels that are kept: the same to the bit, shared, within their limit; what is damaged, torn or outdated is decoded anew."""

import contextlib
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
import pytest
import torch
from PIL import Image
from torch import Tensor

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data import kept_pixels
from fashionclip_tune.data.preprocessing import Preprocessing
from fashionclip_tune.data.reader import decode_pil
from fashionclip_tune.data.shard_cache import ShardStorage
from fashionclip_tune.data.shards import ShardSample, find_dataset, write_split
from fashionclip_tune.evaluation import dataset as dataset_module
from fashionclip_tune.evaluation.dataset import EvaluationSet, evaluation_set, pixel_blocks
from fashionclip_tune.evaluation.encode import embed
from fashionclip_tune.evaluation.evaluate import evaluate
from fashionclip_tune.models.openclip import load_model
from fashionclip_tune.models.precision import PrecisionPlan
from tests.support.disks import Disk

CPU = PrecisionPlan(torch.device("cpu"), None)
PREPARED = Preprocessing(32, (0.5,) * 3, (0.5,) * 3, "shortest", "bicubic")
RECORD = 3 * 32 * 32 + 8


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    torch.set_num_threads(2)
    monkeypatch.setenv("FASHIONCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What has been decoded so far."""
    seen, decode = list[bytes](), dataset_module.decode_pil

    def noting(data: bytes) -> Image.Image:
        seen.append(data)
        return decode(data)

    monkeypatch.setattr(dataset_module, "decode_pil", noting)
    return seen


@dataclass(eq=False)
class Pixels:
    pixels_NCHW: Tensor
    bad: list[tuple[int, str]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pixels) and torch.equal(self.pixels_NCHW, other.pixels_NCHW) and self.bad == other.bad


def all_of(photos: EvaluationSet, batch_size: int = 8) -> Pixels:
    blocks = list(pixel_blocks(photos, batch_size))
    photos.reader.close()
    assert [start for start, _ in blocks] == list(range(0, len(photos), batch_size))
    bad = [(start + slot, reason) for start, block in blocks for slot, reason in block.bad]
    return Pixels(torch.cat([block.pixels_BCHW for _, block in blocks])[: len(photos)], bad)


def photos_of(root: Path, storage: ShardStorage | None = None, prepared: Preprocessing = PREPARED) -> EvaluationSet:
    evaluation_set.cache_clear()
    return evaluation_set(find_dataset(root).train, prepared, storage)


def sample(number: int, photo: bytes) -> ShardSample:
    return ShardSample(key=f"k{number}", jpeg=photo, captions=(f"photo {number}",), product_id=str(number))


def files(scratch: Path) -> list[Path]:
    return sorted(scratch.glob("pixels/*.pixels"))


def test_metrics_and_embeddings_are_the_same_to_the_bit(
    tiny_config: ProjectConfig, garments: Path, decoded: list[bytes], scratch: Path
) -> None:
    loaded = load_model(tiny_config)
    photos = evaluation_set(find_dataset(garments).valid, loaded.preprocessing)
    settings: dict[str, Any] = {"batch_size": 8, "plan": CPU, "max_bad_share": 0.0}
    torch.set_num_threads(1)
    fresh, fresh_pool = evaluate(loaded, photos, **settings).metrics, embed(loaded, photos, all_captions=True, **settings)[0]
    assert len(decoded) == 20  # by the first of the two
    shutil.rmtree(scratch / "pixels")
    before = embed(loaded, photos, all_captions=True, **settings)[0]
    assert len(decoded) == 40
    kept, kept_pool = evaluate(loaded, photos, **settings).metrics, embed(loaded, photos, all_captions=True, **settings)[0]
    assert len(decoded) == 40
    assert kept == fresh
    for pool in (fresh_pool, kept_pool):
        assert torch.equal(pool.images_ND, before.images_ND)
        assert torch.equal(pool.captions_VD, before.captions_VD)


def test_real_photos_are_kept_as_pillow_decodes_them(real_photos: Path, tmp_path: Path, decoded: list[bytes]) -> None:
    """Of many shapes: JPEGs, greys, PNGs with transparency, one that lies on its side."""
    jpegs = [path.read_bytes() for path in sorted((real_photos / "images").glob("*.jpg"))[:60]]
    for number, (mode, form) in enumerate([("L", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("I;16", "PNG"), ("CMYK", "JPEG")]):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(jpegs[number])).convert("L" if mode == "I;16" else mode).convert(mode).save(buffer, form)
        jpegs[number] = buffer.getvalue()
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(jpegs[5])).save(buffer, "JPEG", exif=exif)
    jpegs[5] = buffer.getvalue()
    write_split(tmp_path, "train", [sample(n, jpeg) for n, jpeg in enumerate(jpegs)])
    write_split(tmp_path, "valid", [sample(0, jpegs[0])])
    for mode, interpolation in (("shortest", "bicubic"), ("squash", "bicubic"), ("squash", "bilinear")):
        prepared = Preprocessing(48, (0.5,) * 3, (0.5,) * 3, mode, interpolation)
        photos = photos_of(tmp_path, prepared=prepared)
        found = all_of(photos)
        assert found == all_of(photos)
        assert found.bad == []
        assert all(
            torch.equal(pixels_CHW, prepared.resize(decode_pil(photos.reader.image(number))))
            for number, pixels_CHW in enumerate(found.pixels_NCHW)
        )
    assert len(decoded) == 180


def test_each_way_to_prepare_each_decoder_and_each_content_has_pixels_of_its_own(
    garments: Path, tmp_path: Path, decoded: list[bytes], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def number_decoded(photos: EvaluationSet) -> int:
        before = len(decoded)
        all_of(photos)
        return len(decoded) - before

    copy = tmp_path / "copy"
    shutil.copytree(garments, copy)
    assert number_decoded(photos_of(garments)) == 160
    other_statistics = Preprocessing(32, (0.1,) * 3, (0.2,) * 3, "shortest", "bicubic")
    assert [number_decoded(photos_of(garments, prepared=other_statistics)), number_decoded(photos_of(copy))] == [0, 0]
    for size, mode, interpolation in ((33, "shortest", "bicubic"), (32, "squash", "bicubic"), (32, "shortest", "bilinear")):
        other = Preprocessing(size, (0.5,) * 3, (0.5,) * 3, mode, interpolation)
        assert [number_decoded(photos_of(garments, prepared=other)) for _ in range(2)] == [160, 0]
    kept_pixels._decoders.cache_clear()
    monkeypatch.setattr(PIL, "__version__", "99.0")
    assert [number_decoded(photos_of(garments)) for _ in range(2)] == [160, 0]
    monkeypatch.undo()
    kept_pixels._decoders.cache_clear()


@pytest.mark.parametrize("place", [0, 1_000, RECORD - 8, RECORD - 4, RECORD - 1, 7 * RECORD, 160 * RECORD - 1])
def test_a_damaged_byte_is_found_and_mended(garments: Path, decoded: list[bytes], scratch: Path, place: int) -> None:
    photos = photos_of(garments)
    fresh = all_of(photos)
    (file,) = files(scratch)
    whole = file.read_bytes()
    assert len(whole) == 160 * RECORD
    damaged = bytearray(whole)
    damaged[place] ^= 0x10
    file.write_bytes(damaged)
    decoded.clear()
    assert all_of(photos) == fresh
    assert len(decoded) == 1
    assert file.read_bytes() == whole
    assert all_of(photos) == fresh
    assert len(decoded) == 1


def cut(file: Path, num_bytes: int) -> None:
    os.truncate(file, num_bytes)


def zero(file: Path, num_bytes: int) -> None:
    """As a file system leaves what it had promised to write when the power went."""
    with open(file, "r+b") as opened:
        opened.seek(num_bytes)
        opened.write(bytes(file.stat().st_size - num_bytes))


def swap(file: Path, num_bytes: int) -> None:
    """The records behind so many bytes, in another order."""
    data = file.read_bytes()
    start = -(-num_bytes // RECORD) * RECORD
    file.write_bytes(data[:start] + b"".join(data[i : i + RECORD] for i in range(len(data) - RECORD, start - 1, -RECORD)))


@pytest.mark.parametrize("harm", [cut, zero, swap])
@pytest.mark.parametrize("left", [0, 1, 50, 158])
def test_a_torn_file_is_made_whole(
    garments: Path, decoded: list[bytes], scratch: Path, harm: Callable[[Path, int], None], left: int
) -> None:
    photos = photos_of(garments)
    fresh = all_of(photos)
    (file,) = files(scratch)
    whole = file.read_bytes()
    harm(file, left * RECORD + (0 if harm is swap else 17))
    decoded.clear()
    assert all_of(photos) == fresh
    assert 160 - left - 1 <= len(decoded) <= 160 - left
    assert file.read_bytes() == whole


def test_a_hole_is_no_black_photo(garments: Path, scratch: Path) -> None:
    photos = photos_of(garments)
    kept = kept_pixels.KeptPixels(photos.reader, PREPARED)
    black_CHW, grey_CHW = torch.zeros(3, 32, 32, dtype=torch.uint8), torch.full((3, 32, 32), 99, dtype=torch.uint8)
    kept.write(5, black_CHW)
    found_CHW = grey_CHW.clone()
    assert not kept.read(4, found_CHW)
    assert torch.equal(found_CHW, grey_CHW)
    assert kept.read(5, found_CHW)
    assert torch.equal(found_CHW, black_CHW)


def test_a_photo_that_was_unreadable_once_is_read_the_next_time(
    garments: Path, tmp_path: Path, decoded: list[bytes], scratch: Path
) -> None:
    fresh = all_of(photos_of(garments))
    shutil.rmtree(scratch / "pixels")
    shutil.copytree(garments, tmp_path / "copy")
    photos = photos_of(tmp_path / "copy")
    shard = photos.reader.index.shards[0]
    shard.rename(tmp_path / "away")  # a drive that is gone for a moment
    lost = all_of(photos)
    assert len(lost.bad) == 160
    assert "shard cannot be read" in lost.bad[0][1]
    (tmp_path / "away").rename(shard)
    assert all_of(photos) == fresh


def test_a_photo_that_cannot_be_decoded_is_named_each_time(garments: Path, tmp_path: Path, decoded: list[bytes]) -> None:
    samples = []
    for number in range(20):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 40), (number, 0, 0)).save(buffer, "JPEG")
        samples.append(sample(number, buffer.getvalue()[: 30 if number == 3 else None]))
    write_split(tmp_path, "train", samples)
    write_split(tmp_path, "valid", samples[:1])
    photos = photos_of(tmp_path)
    first, again = all_of(photos), all_of(photos)
    assert first == again
    assert [sample for sample, _ in again.bad] == [3]
    assert again.bad[0][1].startswith("not a decodable image")
    assert len(decoded) == 21


def test_of_a_shard_that_changed_under_a_run_nothing_is_kept(garments: Path, tmp_path: Path, scratch: Path) -> None:
    """Its photos, read by the offsets of the old one, would be believed when the old one is put back."""
    shutil.copytree(garments, tmp_path / "copy")
    photos = photos_of(tmp_path / "copy")
    shard = photos.reader.index.shards[0]
    original, data = shard.read_bytes(), bytearray(shard.read_bytes())
    (offset, size), (other, other_size) = (photos.reader.index.image_spans[sample] for sample in (0, 1))
    span = max(int(size), int(other_size))
    data[offset : offset + span] = data[other : other + span]  # the first photo is now the second one
    shard.write_bytes(data)
    with pytest.warns(UserWarning, match=r"decoded at each evaluation: .* has changed since it was indexed"):
        changed = all_of(photos)
    assert not files(scratch)
    time.sleep(0.02)  # for another time of change
    shard.write_bytes(original)
    restored = all_of(photos_of(tmp_path / "copy"))
    assert restored == all_of(photos_of(garments))
    assert restored != changed


def test_from_a_shard_that_changes_while_it_is_read_nothing_more_is_kept(garments: Path, tmp_path: Path, scratch: Path) -> None:
    torch.set_num_threads(1)
    shutil.copytree(garments, tmp_path / "copy")
    photos = photos_of(tmp_path / "copy")
    shard = photos.reader.index.shards[0]
    blocks = pixel_blocks(photos, 8)
    next(blocks)
    time.sleep(0.1)  # for those that are decoded ahead
    data = bytearray(shard.read_bytes())
    for offset, size in photos.reader.index.image_spans[40:]:
        data[offset : offset + size] = bytes(size)
    shard.write_bytes(data)
    with pytest.warns(UserWarning, match="has changed since it was indexed"):
        assert sum(len(block.bad) for _, block in blocks) == 120
    photos.reader.close()
    (file,) = files(scratch)
    written = file.read_bytes()
    assert written[:RECORD] != bytes(RECORD)
    assert written[24 * RECORD :] == bytes(136 * RECORD)


def test_what_a_full_disk_takes_is_decoded(
    garments: Path, tmp_path: Path, decoded: list[bytes], request: pytest.FixtureRequest
) -> None:
    fresh = all_of(photos_of(garments))
    torch.set_num_threads(1)
    disk = Disk(tmp_path / "disk", megabytes=4)
    request.addfinalizer(lambda: subprocess.run(["umount", "--lazy", disk.folder], check=True))
    photos = photos_of(garments, ShardStorage(disk.folder))
    blocks = pixel_blocks(photos, 8)
    found = [next(blocks)]
    filler = disk.folder / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4_096))
    with pytest.warns(UserWarning, match="decoded at each evaluation: No space left on device"):
        found += list(blocks)
    photos.reader.close()
    assert torch.equal(torch.cat([block.pixels_BCHW for _, block in found]), fresh.pixels_NCHW)
    decoded.clear()
    with pytest.warns(UserWarning, match="decoded at each evaluation: No space left on device"):
        assert all_of(photos) == fresh
    assert 0 < len(decoded) < 160
    filler.unlink()
    assert all_of(photos) == fresh
    decoded.clear()
    assert all_of(photos) == fresh
    assert not decoded


@pytest.mark.parametrize("what", ["limit", "disk"])
def test_where_there_is_no_room_it_is_said_and_files_in_use_stay(
    garments: Path, tmp_path: Path, decoded: list[bytes], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits_one = 160 * RECORD + 100
    storage = ShardStorage(tmp_path / "scratch", max_bytes=2 * fits_one if what == "limit" else 10**9)
    if what == "disk":
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * fits_one))
    first, other = photos_of(garments, storage), Preprocessing(32, (0.5,) * 3, (0.5,) * 3, "squash", "bicubic")
    fresh = all_of(first)
    (file,) = files(tmp_path / "scratch")
    for _ in range(2):
        decoded.clear()
        with pytest.warns(UserWarning, match=r"takes at most half of reading\.scratch_gb = .*, and half of what is free"):
            all_of(photos_of(garments, storage, other))
        assert len(decoded) == 160
        assert files(tmp_path / "scratch") == [file]
    decoded.clear()
    assert all_of(photos_of(garments, storage)) == fresh
    assert not decoded
    # What nobody has used for an hour makes room.
    os.utime(file, (time.time() - 3_700,) * 2)
    all_of(photos_of(garments, storage, other))
    assert len(files(tmp_path / "scratch")) == 1
    assert files(tmp_path / "scratch") != [file]


def test_what_nobody_has_used_for_a_week_goes_when_another_comes(garments: Path, scratch: Path) -> None:
    all_of(photos_of(garments))
    (file,) = files(scratch)
    os.utime(file, (time.time() - 8 * 86_400,) * 2)
    all_of(photos_of(garments))  # used again
    assert file.stat().st_mtime > time.time() - 100
    os.utime(file, (time.time() - 8 * 86_400,) * 2)
    all_of(photos_of(garments, prepared=Preprocessing(16, (0.5,) * 3, (0.5,) * 3, "squash", "bicubic")))
    assert len(files(scratch)) == 1
    assert not file.exists()


@pytest.mark.parametrize("made", ["a file", "closed"])
def test_a_cache_that_cannot_be_written_costs_time_only(
    garments: Path, scratch: Path, tmp_path: Path, made: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = all_of(photos_of(garments))
    shutil.rmtree(scratch / "pixels")
    if made == "a file":
        (scratch / "pixels").touch()
    else:
        (scratch / "pixels").symlink_to(tmp_path / "nowhere")
    with pytest.warns(UserWarning, match="decoded at each evaluation: (File exists|Not a directory)"):
        assert all_of(photos_of(garments)) == fresh


READER = """
import hashlib, sys, time, warnings
import torch
from fashionclip_tune.data.preprocessing import Preprocessing
from fashionclip_tune.data.shards import find_dataset
from fashionclip_tune.evaluation import dataset
from pathlib import Path
torch.set_num_threads(2)
decode = dataset.decode_pil
dataset.decode_pil = lambda data: (time.sleep(float(sys.argv[2])), decode(data))[1]
prepared = Preprocessing(32, (0.5,) * 3, (0.5,) * 3, "shortest", "bicubic")
photos = dataset.evaluation_set(find_dataset(Path(sys.argv[1])).train, prepared)
print("ready", flush=True)
sys.stdin.readline()
warnings.simplefilter("error")
print(hashlib.sha256(b"".join(block.pixels_BCHW.numpy().tobytes() for _, block in dataset.pixel_blocks(photos, 8))).hexdigest())
"""


@contextlib.contextmanager
def readers(garments: Path, count: int, pause: float) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that read all photos, and wait so many seconds before they decode one; they begin together."""
    command = [sys.executable, "-c", READER, str(garments), str(pause)]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    try:
        assert [process.stdout and process.stdout.readline() for process in started] == ["ready\n"] * count
        for process in started:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def digest(found: Pixels) -> str:
    return hashlib.sha256(found.pixels_NCHW.numpy().tobytes()).hexdigest()


@pytest.mark.slow
def test_processes_side_by_side_have_the_same_pixels(garments: Path, scratch: Path, decoded: list[bytes]) -> None:
    with readers(garments, 2, 0.002) as started:
        found = [process.communicate(timeout=200)[0].strip() for process in started]
    kept = all_of(photos_of(garments))
    assert not decoded
    assert found == [digest(kept)] * 2
    shutil.rmtree(scratch / "pixels")
    assert all_of(photos_of(garments)) == kept


@pytest.mark.slow
def test_of_a_killed_process_only_whole_photos_are_believed(garments: Path, scratch: Path, decoded: list[bytes]) -> None:
    with readers(garments, 1, 0.02) as (process,):
        deadline = time.monotonic() + 200
        while not (found := files(scratch)) or found[0].stat().st_blocks < 300:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    kept = all_of(photos_of(garments))
    assert 0 < len(decoded) < 160
    shutil.rmtree(scratch / "pixels")
    assert all_of(photos_of(garments)) == kept
