"""What a refused sweep says of its changed space or data."""

from typing import Any

from fashionclip_tune.tuning.planning.dataset import data_changes, text_changes


def data(photos: Any, products: Any, **shards: Any) -> Any:
    return {
        "train": {"photos": photos, "products": products, "shards": shards},
        "valid": {"photos": 9, "products": 3, "shards": {}},
    }


def test_counts_and_shards_are_named() -> None:
    assert data_changes(data(4, 2, a="1"), data(4, 2, a="1")) == ""
    before, now = data(1600, 2, a="1", b="2", c="3"), data(1700, 2, a="1", b="4", d="5")
    said = "train: 1,700 photos, were 1,600; train: b is another; train: c is gone; train: d is new"
    assert data_changes(before, now) == said


def test_many_changes_are_counted() -> None:
    many = {f"shard{i}": str(i) for i in range(9)}
    assert data_changes(data(4, 2), data(4, 2, **many)).endswith("train: shard3 is new; and 5 more")


def test_lines_are_numbered_as_they_were() -> None:
    before = "def space(trial):\n    rate = 1\n    return {}\n"
    assert text_changes(before, before) == ""
    assert text_changes(before, before.replace("= 1", "= 2")) == "line 2: rate = 1 -> rate = 2"
    assert text_changes(before, "import os\n" + before) == "line 1: nothing -> import os"
    assert text_changes(before, before.replace("    rate = 1\n", "")) == "line 2: rate = 1 -> nothing"
