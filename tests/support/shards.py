"""Small shards, and the batches that training reads of them."""

import io
import itertools
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.batches import TrainBatch
from fashionclip_tune.data.index import ShardIndex
from fashionclip_tune.data.loader import train_loader
from fashionclip_tune.models.openclip import LoadedModel

CAPTIONS = ("original of {key}", "second of {key}", "third of {key}")


def encoded(image: Image.Image, image_format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def photo(number: int) -> bytes:
    """Each of another colour."""
    return encoded(Image.new("RGB", (24, 32), (number * 37 % 256, number * 91 % 256, number * 53 % 256)))


def write_shards(folder: Path, sizes: Sequence[int], *, unreadable: Sequence[int] = ()) -> list[Path]:
    """Samples ``s000``, ``s001``, ... over shards of these sizes, with three captions each."""
    numbers = itertools.count()
    shards = []
    for shard, size in enumerate(sizes):
        shards.append(folder / f"clip_dataset_train.{shard:06d}.tar")
        with tarfile.open(shards[-1], "w") as tar:
            for number in itertools.islice(numbers, size):
                key = f"s{number:03d}"
                members = {f"{key}.jpg": b"no image" if number in unreadable else photo(number)}
                members |= {f"{key}.txt{i}.txt": caption.format(key=key).encode() for i, caption in enumerate(CAPTIONS)}
                for name, data in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return shards


def configured(overrides: Mapping[str, Any]) -> ProjectConfig:
    defaults = {"model.pretrained": None, "training.batch_size": 4, "training.num_workers": 0, "device": "cpu"}
    return ProjectConfig(clip_model="tiny-clip").with_overrides({**defaults, **overrides})


def batches(index: ShardIndex, loaded: LoadedModel, first: int, last: int, **overrides: Any) -> list[TrainBatch]:
    """Steps ``first`` to ``last`` - 1; a keyword ``training__seed`` is the setting ``training.seed``."""
    config = configured({name.replace("__", "."): value for name, value in overrides.items()})
    with train_loader(
        config, index, loaded.preprocessing, loaded.tokenizer, first_step=first, total_steps=last, pin_memory=False
    ) as loader:
        return list(loader)


def assert_equal(ours: Sequence[TrainBatch], theirs: Sequence[TrainBatch]) -> None:
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert our.keys == their.keys
        assert our.bad == their.bad
        assert torch.equal(our.images_BCHW, their.images_BCHW)
        assert torch.equal(our.tokens_BL, their.tokens_BL)
