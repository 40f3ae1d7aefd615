"""What has changed since a sweep was started, of what it cannot do without: its space and its data."""

from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any

from fashionclip_tune.index import ShardIndex

_SHOWN = 4


def describe_data(train: ShardIndex, valid: ShardIndex) -> dict[str, Any]:
    """What ``data_changes`` compares: photos, products and each shard's checksum, for each split."""
    return {
        split: {
            "photos": len(index),
            "products": len(set(index.product_ids.tolist())),
            "shards": {shard.name: content.checksum for shard, content in zip(index.shards, index.contents, strict=True)},
        }
        for split, index in (("train", train), ("valid", valid))
    }


def data_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """``train: 200 photos, were 160; clip_dataset_train.000001.tar is new``."""
    changes = []
    for split, old in before.items():
        new = now[split]
        counts = [f"{new[what]:,} {what}, were {old[what]:,}" for what in ("photos", "products") if new[what] != old[what]]
        shards = [
            f"{name} is {'new' if name not in old['shards'] else 'gone' if name not in new['shards'] else 'another'}"
            for name in sorted({*old["shards"], *new["shards"]})
            if old["shards"].get(name) != new["shards"].get(name)
        ]
        changes += [f"{split}: {change}" for change in counts + shards]
    return _shortened(changes)


def text_changes(before: str, now: str) -> str:
    """``line 3: "epochs": 3 -> "epochs": 4``."""
    old, new = before.splitlines(), now.splitlines()
    changes = []
    for kind, start, end, new_start, new_end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind != "equal":
            was, is_now = (" ".join(line.strip() for line in lines) for lines in (old[start:end], new[new_start:new_end]))
            changes.append(f"line {start + 1}: {was or 'nothing'} -> {is_now or 'nothing'}")
    return _shortened(changes)


def _shortened(changes: list[str]) -> str:
    more = [f"and {len(changes) - _SHOWN} more"] if len(changes) > _SHOWN else []
    return "; ".join(changes[:_SHOWN] + more)
