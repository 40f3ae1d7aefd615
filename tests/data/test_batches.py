"""Training batches: which photos are in step k, what is read of them, and what happens to those that cannot be read."""

import collections
import io
import pickle
import random
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.batches import TrainBatches
from fashionclip_tune.data.dataset import BadSamples, RunShards, run_shards
from fashionclip_tune.data.index import ShardIndex, load_index
from fashionclip_tune.data.loader import train_loader
from fashionclip_tune.data.reader import ShardReader, decode_photo
from fashionclip_tune.data.sampling import epoch_order
from fashionclip_tune.errors import BadDataError, UserError
from fashionclip_tune.models.openclip import LoadedModel, load_model
from tests.support.shards import CAPTIONS, assert_equal, batches, configured, encoded, photo, write_shards


@pytest.fixture(scope="module")
def loaded(cache_of_the_tests: Path) -> LoadedModel:
    return load_model(configured({}))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, cache_of_the_tests: Path) -> ShardIndex:
    return load_index(write_shards(tmp_path_factory.mktemp("shards"), [5, 1, 7]))


# ---- the order of an epoch

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=6)
order_options = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**63),
        "epoch": st.integers(0, 9),
        "shuffle_shards": st.booleans(),
        "shuffle_buffer": st.integers(0, 60),
    }
)


@settings(deadline=None, derandomize=True)
@given(sizes=sizes, options=order_options)
def test_an_epoch_has_every_sample_exactly_once(sizes: list[int], options: dict[str, Any]) -> None:
    order = epoch_order(np.array(sizes), **options)
    assert sorted(order.tolist()) == list(range(sum(sizes)))


@settings(deadline=None, derandomize=True)
@given(sizes=sizes, options=order_options)
def test_samples_stay_in_their_window_of_the_shards_order(sizes: list[int], options: dict[str, Any]) -> None:
    unshuffled = epoch_order(np.array(sizes), **{**options, "shuffle_buffer": 0}).tolist()
    order, window = epoch_order(np.array(sizes), **options).tolist(), options["shuffle_buffer"] or 1
    for start in range(0, len(order), window):
        assert sorted(order[start : start + window]) == sorted(unshuffled[start : start + window])
    # Without a buffer shards are whole, one after the other.
    starts = np.cumsum([0, *sizes])
    shards = [tuple(range(starts[i], starts[i + 1])) for i in range(len(sizes)) if sizes[i]]
    first_of = {shard[0]: shard for shard in shards}
    position = 0
    while position < len(unshuffled):
        shard = first_of.pop(unshuffled[position])
        assert tuple(unshuffled[position : position + len(shard)]) == shard
        position += len(shard)


def test_with_shuffling_off_samples_come_in_the_order_of_the_shards() -> None:
    for epoch in range(3):
        order = epoch_order(np.array([3, 4]), seed=1, epoch=epoch, shuffle_shards=False, shuffle_buffer=0)
        assert order.tolist() == list(range(7))


def test_orders_differ_by_epoch_and_seed_in_shards_and_in_samples() -> None:
    for options in ({"shuffle_shards": True, "shuffle_buffer": 0}, {"shuffle_shards": False, "shuffle_buffer": 100}):
        orders = {
            tuple(epoch_order(np.array([5] * 20), seed=seed, epoch=epoch, **options).tolist())
            for seed in range(4)
            for epoch in range(4)
        }
        assert len(orders) == 16


def test_every_position_is_equally_likely_for_every_sample() -> None:
    counts = np.zeros((6, 6))
    for epoch in range(3_000):
        order = epoch_order(np.array([6]), seed=0, epoch=epoch, shuffle_shards=False, shuffle_buffer=6)
        counts[np.arange(6), order] += 1
    assert abs(counts - 500).max() < 5 * np.sqrt(500)  # five standard deviations


# ---- batches


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    first=st.integers(0, 12),
    num_steps=st.integers(1, 5),
    batch_size=st.integers(1, 13),
    seed=st.integers(0, 5),
    shardshuffle=st.booleans(),
    shuffle_buffer=st.sampled_from([0, 4, 20_000]),
    caption=st.sampled_from(["original", "uniform"]),
    strength=st.sampled_from([0.0, 0.5]),
)
def test_a_loader_started_at_step_k_gives_what_one_started_at_0_gives_from_k_on(
    index: ShardIndex,
    loaded: LoadedModel,
    first: int,
    num_steps: int,
    batch_size: int,
    seed: int,
    shardshuffle: bool,
    shuffle_buffer: int,
    caption: str,
    strength: float,
) -> None:
    overrides = {
        "training__batch_size": batch_size,
        "training__seed": seed,
        "shardshuffle": shardshuffle,
        "training__shuffle_buffer": shuffle_buffer,
        "augmentation__caption": caption,
        "augmentation__image_strength": strength,
    }
    whole = batches(index, loaded, 0, first + num_steps, **overrides)
    assert_equal(batches(index, loaded, first, first + num_steps, **overrides), whole[first:])


@pytest.mark.slow
def test_two_workers_give_the_batches_of_none(index: ShardIndex, loaded: LoadedModel) -> None:
    overrides = {"augmentation__caption": "uniform", "training__seed": 3, "training__batch_size": 5}
    assert_equal(
        batches(index, loaded, 2, 9, training__num_workers=2, **overrides),
        batches(index, loaded, 0, 9, training__num_workers=0, **overrides)[2:],
    )


@pytest.mark.parametrize("batch_size", [1, 3, 5, 12, 13])
def test_batches_run_across_epoch_borders_with_every_sample_once_an_epoch(
    index: ShardIndex, loaded: LoadedModel, batch_size: int
) -> None:
    num_steps = -(-3 * 13 // batch_size)
    read = batches(index, loaded, 0, num_steps, training__batch_size=batch_size)
    assert {len(batch.keys) for batch in read} == {batch_size}
    keys = [key for batch in read for key in batch.keys]
    epochs = [keys[start : start + 13] for start in (0, 13, 26)]
    assert [sorted(epoch) for epoch in epochs] == [index.keys.tolist()] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_each_row_has_the_photo_and_the_caption_of_its_key(index: ShardIndex, loaded: LoadedModel) -> None:
    for batch in batches(index, loaded, 0, 6):
        expected = np.stack([np.array(Image.open(io.BytesIO(photo(int(key[1:])))))[0, 0] for key in batch.keys])
        assert batch.images_BCHW.dtype == torch.uint8
        assert batch.images_BCHW.shape == (4, 3, 32, 24)  # their own shape: nothing was resized
        for corner in (batch.images_BCHW[:, :, 0, 0], batch.images_BCHW[:, :, 31, 23]):
            assert np.abs(corner.numpy().astype(int) - expected).max() <= 2
        assert torch.equal(batch.tokens_BL, loaded.tokenizer([CAPTIONS[0].format(key=key) for key in batch.keys]))


def test_uniform_draws_every_caption_of_every_sample_about_equally_often(index: ShardIndex, loaded: LoadedModel) -> None:
    counts: collections.Counter[tuple[str, int]] = collections.Counter()
    tokens = {
        (key, i): tuple(loaded.tokenizer([caption.format(key=key)])[0].tolist())
        for key in index.keys.tolist()
        for i, caption in enumerate(CAPTIONS)
    }
    assert len(set(tokens.values())) == 39
    for batch in batches(index, loaded, 0, 60, augmentation__caption="uniform", training__batch_size=13):
        for key, row in zip(batch.keys, batch.tokens_BL.tolist(), strict=True):
            (choice,) = (i for i in range(3) if tokens[key, i] == tuple(row))
            counts[key, choice] += 1
    by_choice = [sum(counts[key, i] for key in index.keys.tolist()) for i in range(3)]
    assert sum(by_choice) == 780
    assert all(abs(count - 260) < 5 * np.sqrt(780 * 2 / 9) for count in by_choice)
    assert len(counts) == 39  # 60 draws each: none of a sample's captions is missed


@pytest.mark.parametrize("caption", ["uniform", "weighted"])
def test_training_draws_from_all_captions_however_many(many_captions: Path, loaded: LoadedModel, caption: str) -> None:
    index = load_index(sorted(many_captions.glob("*train*.tar")))
    reader = ShardReader(index)
    known = {key: reader.captions(sample) for sample, key in enumerate(index.keys.tolist())}
    reader.close()
    tokens = {key: [tuple(row.tolist()) for row in loaded.tokenizer(captions)] for key, captions in known.items()}
    drawn: collections.Counter[tuple[int, int]] = collections.Counter()  # how many there were, and which it was
    for batch in batches(index, loaded, 0, 40, augmentation__caption=caption, training__batch_size=80):
        for key, row in zip(batch.keys, batch.tokens_BL.tolist(), strict=True):
            drawn[len(tokens[key]), tokens[key].index(tuple(row))] += 1
    assert drawn.keys() == {(count, number) for count in range(1, 8) for number in range(count)}
    of_seven = [drawn[7, number] for number in range(7)]
    shares = [1 / 7] * 7 if caption == "uniform" else [1 / 2, *[1 / 12] * 6]
    for count, share in zip(of_seven, shares, strict=True):
        assert abs(count - sum(of_seven) * share) < 5 * np.sqrt(sum(of_seven) * share)


def test_a_sample_with_fewer_captions_has_each_of_its_own_drawn(tmp_path: Path, loaded: LoadedModel) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in {"k.jpg": photo(1), "k.txt0.txt": b" first\n", "k.txt2.txt": b"third"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index = load_index([path])
    reader = ShardReader(index)
    assert reader.captions(0) == ["first", "third"]
    reader.close()
    read = batches(index, loaded, 0, 40, training__batch_size=1, augmentation__caption="uniform")
    assert {tuple(batch.tokens_BL[0].tolist()) for batch in read} == {
        tuple(row.tolist()) for row in loaded.tokenizer(["first", "third"])
    }


def test_a_batch_larger_than_the_data_set_is_refused(index: ShardIndex, loaded: LoadedModel) -> None:
    with pytest.raises(UserError, match=r"^training\.batch_size = 14 is more than the 13 photos of the training set$"):
        batches(index, loaded, 0, 1, training__batch_size=14)


def test_files_are_closed_when_the_block_ends_whether_or_not_it_was_read_to_the_end(
    index: ShardIndex, loaded: LoadedModel
) -> None:
    def open_files() -> list[str]:
        return [str(link.resolve()) for link in Path("/proc/self/fd").iterdir() if link.resolve().suffix == ".tar"]

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc")
    with train_loader(
        configured({}), index, loaded.preprocessing, loaded.tokenizer, first_step=0, total_steps=9, pin_memory=False
    ) as loader:
        next(loader)
        assert open_files()
    assert not open_files()


# ---- samples that cannot be read


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, cache_of_the_tests: Path) -> ShardIndex:
    return load_index(write_shards(tmp_path_factory.mktemp("damaged"), [10, 10], unreadable=[3, 14]))


def test_an_undecodable_photo_is_replaced_the_same_way_each_time_and_named(damaged: ShardIndex, loaded: LoadedModel) -> None:
    read = batches(damaged, loaded, 0, 10, augmentation__caption="uniform")
    assert_equal(batches(damaged, loaded, 0, 10, augmentation__caption="uniform"), read)
    assert_equal(batches(damaged, loaded, 4, 10, augmentation__caption="uniform"), read[4:])
    keys = [key for batch in read for key in batch.keys]
    assert len(keys) == 40
    assert not {"s003", "s014"} & set(keys)
    bad = [bad for batch in read for bad in batch.bad]
    assert {(bad.shard, bad.key) for bad in bad} == {
        ("clip_dataset_train.000000.tar", "s003"),
        ("clip_dataset_train.000001.tar", "s014"),
    }
    assert len(bad) >= 4  # two epochs, two of them in each
    assert {bad.kind for bad in bad} == {"not a decodable image"}


def test_a_replacement_brings_its_own_caption(damaged: ShardIndex, loaded: LoadedModel) -> None:
    for batch in batches(damaged, loaded, 0, 5):
        assert torch.equal(batch.tokens_BL, loaded.tokenizer([CAPTIONS[0].format(key=key) for key in batch.keys]))


def test_replacements_differ_from_step_to_step(damaged: ShardIndex, loaded: LoadedModel) -> None:
    """Else a bad photo would make one other count double in all epochs."""
    keys = collections.Counter(key for batch in batches(damaged, loaded, 0, 100) for key in batch.keys)  # 20 epochs
    extra = {key: count - 20 for key, count in keys.items()}
    assert sum(extra.values()) == 40
    assert max(extra.values()) < 12


def test_a_data_set_without_any_readable_photo_ends_instead_of_searching_for_ever(tmp_path: Path, loaded: LoadedModel) -> None:
    index = load_index(write_shards(tmp_path, [6], unreadable=range(6)))
    with pytest.raises(BadDataError, match=r"photos in a row cannot be read, such as clip_dataset_train.000000.tar: s00\d"):
        batches(index, loaded, 0, 1)


def test_bad_samples_are_counted_once_each_and_fatal_above_the_share(damaged: ShardIndex, loaded: LoadedModel) -> None:
    bad = [batch.bad for batch in batches(damaged, loaded, 0, 10)]
    allowed = BadSamples(damaged, max_share=0.1)
    for found in bad:
        allowed.add(found)
    assert sorted(allowed.found) == [("clip_dataset_train.000000.tar", "s003"), ("clip_dataset_train.000001.tar", "s014")]
    strict = BadSamples(damaged, max_share=0.09)
    with pytest.raises(BadDataError) as error:  # noqa: PT012
        for found in bad:
            strict.add(found)
    message = str(error.value)
    assert message.startswith(
        "2 of 20 samples cannot be read, more than training.max_bad_share = 0.09 allows (2 not a decodable image):\n"
    )
    assert "clip_dataset_train.000000.tar: s003: not a decodable image" in message
    assert "clip_dataset_train.000001.tar: s014: not a decodable image" in message


def test_samples_that_the_index_found_bad_count_towards_the_share(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [9])
    with tarfile.open(shards[0], "a") as tar:
        tar.addfile(tarfile.TarInfo("s999.jpg"), io.BytesIO())
    index = load_index(shards)
    assert len(BadSamples(index, max_share=0.1).found) == 1
    with pytest.raises(BadDataError, match=r"1 of 10 samples.*\n  clip_dataset_train.000000.tar: s999: no caption"):
        BadSamples(index, max_share=0.099)


# ---- decoding

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quarters() -> np.ndarray:
    """[48, 32, 3]: red and green above blue and white."""
    pixels = np.zeros((48, 32, 3), dtype=np.uint8)
    pixels[:24, :16], pixels[:24, 16:], pixels[24:, :16], pixels[24:, 16:] = RED, GREEN, BLUE, WHITE
    return pixels


# How an upright photo is stored so that a viewer, told this EXIF orientation, shows it upright.
STORED = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: np.rot90(pixels, 2),
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, 1),
    7: lambda pixels: np.rot90(pixels.transpose(1, 0, 2), 2),
    8: lambda pixels: np.rot90(pixels, -1),
}


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_decoded_upright(image_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](quarters())))
    decoded = decode_photo(encoded(stored, image_format, exif=exif, quality=95))
    assert decoded.shape == (3, 48, 32)
    for (row, column), colour in {(8, 5): RED, (8, 26): GREEN, (40, 5): BLUE, (40, 26): WHITE}.items():
        assert np.abs(decoded[:, row, column].numpy().astype(int) - colour).max() <= 6


def grey_16_bits() -> Image.Image:
    return Image.fromarray(np.full((30, 20), 0x8000, dtype=np.uint16))


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (encoded(Image.new("CMYK", (20, 30), (0, 255, 255, 0))), RED),
        (encoded(Image.new("L", (20, 30), 100)), (100, 100, 100)),
        (encoded(Image.new("RGB", (20, 30), RED), progressive=True), RED),
        (encoded(Image.new("RGB", (20, 30), RED), "PNG"), RED),
        (encoded(Image.new("RGBA", (20, 30), (255, 0, 0, 255)), "PNG"), RED),
        (encoded(Image.new("RGB", (20, 30), RED).convert("P"), "PNG"), RED),
        (encoded(Image.new("LA", (20, 30), (100, 255)), "PNG"), (100, 100, 100)),
        (encoded(Image.new("1", (20, 30), 1), "PNG"), WHITE),
        (encoded(grey_16_bits(), "PNG"), (128, 128, 128)),
        (encoded(Image.new("RGB", (20, 30), RED), "WEBP"), RED),
        (encoded(Image.new("RGB", (20, 30), RED), "GIF", save_all=True, append_images=[Image.new("RGB", (20, 30), BLUE)]), RED),
        (encoded(Image.new("RGB", (20, 30), RED), "TIFF"), RED),
    ],
    ids=[
        "cmyk",
        "grey",
        "progressive",
        "png",
        "alpha",
        "palette",
        "grey alpha",
        "bits",
        "16 bits",
        "webp",
        "animation",
        "tiff",
    ],
)
def test_every_kind_of_photo_becomes_three_channels_of_bytes(data: bytes, colour: tuple[int, int, int]) -> None:
    decoded = decode_photo(data)
    assert (decoded.dtype, decoded.shape) == (torch.uint8, (3, 30, 20))
    assert np.abs(decoded[:, 15, 10].numpy().astype(int) - colour).max() <= 6


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xd8\xff", b"no image", photo(1)[:-40], encoded(Image.new("RGB", (200, 200), RED), "PNG")[:-30]],
    ids=["empty", "only a start", "text", "cut JPEG", "cut PNG"],
)
def test_what_is_no_whole_image_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a decodable image"):
        decode_photo(data)


def test_postscript_in_a_shard_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands EPS files to Ghostscript, which runs what is written in them."""
    ghostscript, ran = tmp_path / "gs", tmp_path / "ran"
    ghostscript.write_text(f"#!/bin/sh\necho >{ran}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # else Pillow remembers an earlier search
    image = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(ValueError, match="not a decodable image"):
        decode_photo(image)
    assert not ran.exists()


def damaged_photos(num: int) -> Iterator[bytes]:
    rng = random.Random(0)
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = [encoded(pixels, name, exif=exif) for name in ("JPEG", "PNG", "WEBP")] + [encoded(pixels, "GIF")]
    for _ in range(num):
        data = bytearray(rng.choice(whole))
        for _ in range(rng.choice([1, 3, 10])):
            data[rng.randrange(min(len(data), rng.choice([60, 400, 10**6])))] = rng.randrange(256)
        yield bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)


def test_damaged_photos_are_decoded_or_refused_but_nothing_else_happens() -> None:
    """torchvision's PNG decoder ends the process on some of these."""
    outcomes: collections.Counter[str] = collections.Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damage that it can live with
        for data in damaged_photos(800):
            try:
                decoded = decode_photo(data)
                assert decoded.dtype == torch.uint8
                assert decoded.ndim == 3
                assert len(decoded) == 3
                outcomes["decoded"] += 1
            except ValueError as error:
                assert str(error).startswith(("not a decodable image (", "image too large ("))  # noqa: PT017
                outcomes["refused"] += 1
    assert outcomes["decoded"] > 100
    assert outcomes["refused"] > 100


def test_real_photos_are_decoded_as_pillow_decodes_them(real_photos: Path) -> None:
    paths = sorted((real_photos / "images").iterdir())[::1_000]
    assert paths
    for path in paths:
        decoded, expected = decode_photo(path.read_bytes()), np.array(Image.open(path).convert("RGB")).transpose(2, 0, 1)
        assert decoded.shape == expected.shape
        assert np.abs(decoded.numpy().astype(int) - expected).mean() < 1


# ---- which shards


def test_patterns_choose_shards_and_what_is_not_given_is_found(tmp_path: Path) -> None:
    names = [f"clip_dataset_{split}.{number:06d}.tar" for split in ("train", "valid") for number in range(4)]
    for name in names:
        (tmp_path / name).touch()
    train, valid = tuple(tmp_path / name for name in names[:4]), tuple(tmp_path / name for name in names[4:])
    config = ProjectConfig(dataset_root=tmp_path)
    assert run_shards(config) == RunShards(train, valid, ())
    pattern = "clip_dataset_{}.{{000001..000002}}.tar"
    some = config.with_overrides(
        {"train_shards_pattern": pattern.format("train"), "valid_shards_pattern": pattern.format("valid")}
    )
    assert run_shards(some) == RunShards(train[1:3], valid[1:3], ())
    evaluated = {"train_eval_shards_pattern": names[3], "valid_eval_shards_pattern": names[4]}
    assert run_shards(some.with_overrides(evaluated)) == RunShards(train[1:3], valid[:1], train[3:])
    assert run_shards(config.with_overrides(evaluated)) == RunShards(train, valid[:1], train[3:])


def test_a_reader_opens_files_anew_in_another_process(index: ShardIndex, loaded: LoadedModel) -> None:
    batches_here = TrainBatches(configured({}), index, loaded.preprocessing, loaded.tokenizer)
    first = batches_here[0]
    copied: TrainBatches = pickle.loads(pickle.dumps(batches_here))
    batches_here.close()
    assert_equal([copied[0]], [first])
    copied.close()


def test_a_photo_that_claims_to_be_huge_is_refused_before_it_is_decoded() -> None:
    """The frame header says 60,000 x 60,000: ten gigabytes, were it believed."""
    data = bytearray(encoded(Image.new("RGB", (48, 32))))
    start = data.index(b"\xff\xc0")
    assert data[start + 5 : start + 9] == bytes([0, 32, 0, 48])
    data[start + 5 : start + 9] = (60_000).to_bytes(2, "big") * 2
    with pytest.raises(ValueError, match="60000 x 60000 pixels"):
        decode_photo(bytes(data))


def test_a_side_longer_than_a_jpegs_is_refused_before_it_is_decoded() -> None:
    """Few pixels, but resizing takes memory by the longer side; its PNG has 400 bytes."""
    with pytest.raises(ValueError, match="1 x 65536 pixels, more than the 65,535 a side"):
        decode_photo(encoded(Image.new("RGB", (1, 65_536)), "PNG"))
    assert decode_photo(encoded(Image.new("RGB", (1, 65_535)), "PNG")).shape == (3, 65_535, 1)
