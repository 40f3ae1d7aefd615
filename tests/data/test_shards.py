"""How a data set's shards are found, and which patterns are refused."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from fashionclip_tune.data.shards import (
    RemoteShard,
    ShardSample,
    expand_pattern,
    find_dataset,
    shard_name,
    write_dataset_json,
    write_split,
)
from fashionclip_tune.errors import UserError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


def names(paths: Iterable[Path]) -> list[str]:
    return [path.name for path in paths]


def touch_split(folder: Path, split: str, num_shards: int, *, augmented: bool = False) -> list[str]:
    made = [shard_name(split, number, augmented=augmented) for number in range(num_shards)]
    touch(folder, *made)
    return made


def test_dataset_json_decides_over_the_names_of_files(tmp_path: Path) -> None:
    touch_split(tmp_path, "train", 5)
    touch_split(tmp_path, "test", 5)
    touch(tmp_path, "mine-0.tar", "mine-1.tar", "held-out.tar")
    splits = {"train": {"shards": ["mine-1.tar", "mine-0.tar"]}, "valid": {"shards": ["held-out.tar"]}}
    write_dataset_json(tmp_path, splits, source="test")
    found = find_dataset(tmp_path)
    assert found.root == tmp_path
    assert found.train == (tmp_path / "mine-1.tar", tmp_path / "mine-0.tar")
    assert found.valid == (tmp_path / "held-out.tar",)
    assert found.test == ()


def test_without_dataset_json_the_names_decide_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    train, valid, test = (touch_split(tmp_path, split, 12) for split in ("train", "valid", "test"))
    touch(tmp_path, "clip_dataset_train.1.tar", "clip_dataset_train.000099.tar.tmp", "clip_dataset_dev.000000.tar", "x.tar")
    found = find_dataset(tmp_path)
    assert (names(found.train), names(found.valid), names(found.test)) == (train, valid, test)


def test_augmented_shards_are_preferred_split_by_split(tmp_path: Path) -> None:
    touch_split(tmp_path, "train", 3)
    augmented = touch_split(tmp_path, "train", 2, augmented=True)
    plain = touch_split(tmp_path, "valid", 2)
    found = find_dataset(tmp_path)
    assert (names(found.train), names(found.valid)) == (augmented, plain)


@pytest.mark.parametrize("augmented", [False, True])
def test_33_valid_shards_and_no_test_shards_are_fashion_gen(tmp_path: Path, augmented: bool) -> None:
    touch_split(tmp_path, "train", 1, augmented=augmented)
    valid = touch_split(tmp_path, "valid", 33, augmented=augmented)
    found = find_dataset(tmp_path)
    assert names(found.valid) == valid[:7]
    assert names(found.test) == valid[7:]


@pytest.mark.parametrize(("num_valid", "num_test"), [(32, 0), (34, 0), (33, 1)])
def test_other_numbers_of_shards_are_taken_as_they_are(tmp_path: Path, num_valid: int, num_test: int) -> None:
    touch_split(tmp_path, "train", 1)
    valid, test = touch_split(tmp_path, "valid", num_valid), touch_split(tmp_path, "test", num_test)
    found = find_dataset(tmp_path)
    assert (names(found.valid), names(found.test)) == (valid, test)


def test_33_valid_shards_named_by_dataset_json_stay_one_split(tmp_path: Path) -> None:
    train, valid = touch_split(tmp_path, "train", 1), touch_split(tmp_path, "valid", 33)
    write_dataset_json(tmp_path, {"train": {"shards": train}, "valid": {"shards": valid}}, source="test")
    assert names(find_dataset(tmp_path).valid) == valid


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        find_dataset(tmp_path / "nowhere")
    touch(tmp_path, "file")
    with pytest.raises(UserError, match="file does not exist: give a folder"):
        find_dataset(tmp_path / "file")


@pytest.mark.parametrize(("present", "missing"), [((), "train"), (("valid",), "train"), (("train",), "valid")])
def test_missing_splits_are_named_with_the_way_to_make_them(tmp_path: Path, present: tuple[str, ...], missing: str) -> None:
    for split in present:
        touch_split(tmp_path, split, 2)
    with pytest.raises(UserError, match=rf"has no shards named clip_dataset_{missing}\.000000\.tar .*prepare --table"):
        find_dataset(tmp_path)


def test_a_shard_that_dataset_json_names_must_be_there(tmp_path: Path) -> None:
    shards = touch_split(tmp_path, "train", 2) + touch_split(tmp_path, "valid", 1)
    splits = {"train": {"shards": [*shards[:2], "lost.tar"]}, "valid": {"shards": shards[2:]}}
    write_dataset_json(tmp_path, splits, source="test")
    with pytest.raises(UserError, match=r"names lost\.tar, which is not there"):
        find_dataset(tmp_path)


@pytest.mark.parametrize("missing", ["train", "valid"])
def test_dataset_json_must_name_train_and_valid(tmp_path: Path, missing: str) -> None:
    splits = {split: {"shards": touch_split(tmp_path, split, 1)} for split in ("train", "valid") if split != missing}
    write_dataset_json(tmp_path, splits, source="test")
    with pytest.raises(UserError, match=f"has no {missing} shards"):
        find_dataset(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"splits": []}',
        b'{"splits": {"train": []}}',
        b'{"splits": {"train": {"shards": [1]}}}',
        b"\xff",
    ],
)
def test_a_dataset_json_that_is_none_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "dataset.json").write_bytes(text)
    with pytest.raises(UserError, match=r"dataset\.json is not a data set's description .*: run `prepare` again"):
        find_dataset(tmp_path)


def test_a_pattern_is_expanded_below_the_folder_in_its_order(tmp_path: Path) -> None:
    made = touch_split(tmp_path, "train", 12)
    assert expand_pattern(tmp_path, "clip_dataset_train.{000002..000011}.tar") == tuple(tmp_path / name for name in made[2:])
    assert names(expand_pattern(tmp_path, "clip_dataset_train.{000009,000001}.tar")) == [made[9], made[1]]
    assert names(expand_pattern(tmp_path, made[3])) == [made[3]]
    assert names(expand_pattern(Path("/"), str(tmp_path / made[4]))) == [made[4]]


@pytest.mark.parametrize(
    "pattern",
    [
        "pipe:cat a.tar",
        "pipe:curl http://x/{0..9}.tar",
        "http://host/a.tar",
        "https://host/{0..3}.tar",
        "s3://bucket/a.tar",
    ],
)
def test_pipes_and_urls_are_refused_before_anything_is_looked_at(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(UserError, match=r"reaches out or runs a command.*--allow-remote"):
        expand_pattern(tmp_path / "nowhere", pattern)


@pytest.mark.parametrize("pattern", ["file:///a.tar", "ftp://host/a.tar", "hf://datasets/a.tar"])
@pytest.mark.parametrize("allow_remote", [False, True])
def test_other_schemes_are_refused_even_where_remote_shards_are_allowed(
    tmp_path: Path, pattern: str, allow_remote: bool
) -> None:
    with pytest.raises(UserError, match="is not allowed: a path, or one of https, http, s3, gs, pipe"):
        expand_pattern(tmp_path, pattern, allow_remote=allow_remote)


def test_allowed_urls_and_commands_are_expanded_and_named(tmp_path: Path) -> None:
    names = ["a.000.tar", "a.001.tar"]
    for pattern in ("https://host/dir/a.{000..001}.tar?key=1", "s3://bucket/a.{000..001}.tar", "pipe:cat 'x/a.{000..001}.tar'"):
        shards = expand_pattern(tmp_path, pattern, allow_remote=True)
        assert [shard.name for shard in shards] == names
        assert all(isinstance(shard, RemoteShard) for shard in shards)
    below = expand_pattern("gs://bucket/dir/", "a.{000..001}.tar", allow_remote=True)
    assert [str(shard) for shard in below] == [f"gs://bucket/dir/{name}" for name in names]
    assert below[0].parent == "gs://bucket/dir"
    assert expand_pattern("gs://bucket", "b.tar", allow_remote=True) == (RemoteShard("gs://bucket/b.tar"),)


@pytest.mark.parametrize("pattern", ["{pipe:touch ran,a}.tar", "{h,f}{t}tp:", " pipe:touch ran", "PIPE:touch ran"])
def test_a_pipe_hidden_from_the_check_is_no_more_than_a_missing_file(
    tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="matches none of its files"):
        expand_pattern(tmp_path, pattern)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pattern", ["a.{0..3.tar", "a.0..3}.tar", "{{0..1}.tar"])
def test_unbalanced_braces_are_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(UserError, match=r"has unbalanced braces: write e\.g\. \{000000\.\.000006\}"):
        expand_pattern(tmp_path, pattern)


def test_missing_files_of_a_pattern_are_counted_and_the_first_one_named(tmp_path: Path) -> None:
    touch_split(tmp_path, "train", 2)
    with pytest.raises(
        UserError, match=r"matches 3 of its 5 files missing in .*first missing one is clip_dataset_train\.000002\.tar"
    ):
        expand_pattern(tmp_path, "clip_dataset_train.{000000..000004}.tar")
    with pytest.raises(UserError, match="matches none of its files"):
        expand_pattern(tmp_path, "clip_dataset_test.{000000..000004}.tar")
    for pattern in ("", "."):
        with pytest.raises(UserError, match="matches none of its files"):
            expand_pattern(tmp_path, pattern)


def test_a_written_split_has_shards_of_1000_and_says_what_is_in_them(tmp_path: Path) -> None:
    samples = [ShardSample(key=f"{i:06d}", jpeg=b"x", captions=("one",), product_id=str(i // 3)) for i in range(2_001)]
    described = write_split(tmp_path, "train", iter(samples))
    expected = [shard_name("train", number, augmented=False) for number in range(3)]
    assert described == {"shards": expected, "samples": 2_001, "products": 667}
    assert sorted(names(tmp_path.iterdir())) == expected
    assert json.dumps(described)
