#!/usr/bin/env python
"""Samples per second and core of this project's loader, side by side with others on the same shards.

    python -m benchmarks loader --images PHOTOS --rounds 5

Photos are enlarged or reduced to a short side of 256 pixels first (JPEG, quality 90), so that figures compare with those
of Fashion-Gen; without --images, synthetic garments are rendered at that size. Each pipeline runs in a process of its own,
in turn, on one thread and without worker processes; rates are per second of that process's CPU time. open_clip_train's
loader does not run on webdataset 1.0: give it an older one with
``pip install --no-deps --target DIR webdataset==0.2.86`` and ``--old-webdataset DIR``; without it, it is left out.
"""

import argparse
import io
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from benchmarks.speed.harness import in_own_process, in_turn, median_ratio, spread

_BATCH_SIZE = 64
_SHORT_SIDE = 256
_SIZE = 224


def write_photos(images: Path | None, out: Path, count: int) -> None:
    """Shards that all pipelines read: ``KEY.jpg`` and a plain ``KEY.txt``."""
    import webdataset

    from fashionclip_tune.synthetic import GarmentRecipe, render_dataset

    if images is None:
        recipe = GarmentRecipe(num_products=max(10, count * 5 // 8 + 5), views_per_product=2, image_size=_SHORT_SIDE)
        render_dataset(out / "garments", recipe)
        tar = webdataset.WebDataset([str(p) for p in sorted((out / "garments").glob("*train*.tar"))], shardshuffle=False)
        photos = (sample["jpg"] for sample in tar)
    else:
        photos = (path.read_bytes() for path in sorted(images.glob("*.jpg")))
    for number in range(2):
        with webdataset.TarWriter(str(out / f"photos.{number:06d}.tar"), encoder=False) as tar:
            for index in range(count // 2):
                photo = Image.open(io.BytesIO(next(photos))).convert("RGB")
                scale = _SHORT_SIDE / min(photo.size)
                photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BICUBIC)
                jpeg = io.BytesIO()
                photo.save(jpeg, "JPEG", quality=90)
                caption = f"Women Navy Striped Short Sleeve Crew Neck T-Shirt {index}"
                tar.write({"__key__": f"{number}{index:06d}", "jpg": jpeg.getvalue(), "txt": caption.encode()})


def ours(shards: list[Path]) -> Iterator[int]:
    """What a worker does: read, decode, tokenise, and resize as uint8 what is not of the canvas' shape."""
    with loader_of(shards) as batches:
        for batch in batches:
            yield len(batch.keys)


def loader_of(shards: list[Path], *, first_step: int = 0, **training: Any) -> AbstractContextManager[Iterator[Any]]:
    from fashionclip_tune.data.index import load_index
    from fashionclip_tune.data.loader import train_loader

    config, loaded = _run()
    config = config.with_overrides({f"training.{name}": value for name, value in training.items()})
    return train_loader(
        config,
        load_index(shards),
        loaded.preprocessing,
        loaded.tokenizer,
        first_step=first_step,
        total_steps=10**6,
        pin_memory=False,
    )


def device_work(shards: list[Path], **augmentation: Any) -> Iterator[int]:
    """What the training device does to a uint8 batch, here on the CPU: augmentation, or else resizing; normalisation."""
    from fashionclip_tune.data.batches import TrainBatches
    from fashionclip_tune.data.index import load_index
    from fashionclip_tune.training.augment import augment, draw_augmentation

    config, loaded = _run(**augmentation)
    preprocessing, wanted = loaded.preprocessing, config.augmentation
    canvases = TrainBatches(config, load_index(shards), preprocessing, loaded.tokenizer)[0].images_BCHW
    generator = torch.Generator().manual_seed(0)
    parts = {"rand_augment": wanted.rand_augment, "erasing": wanted.erasing}
    while True:
        if wanted.image_strength == 0:
            images = preprocessing.resize_canvas(canvases).float() / 255
        else:
            draws = draw_augmentation(len(canvases), wanted.image_strength, generator, **parts)
            images = augment(canvases, draws, preprocessing.size)
        preprocessing.normalise(images)
        yield len(canvases)


def _run(**augmentation: Any) -> tuple[Any, Any]:
    import open_clip

    from fashionclip_tune.config.options import AugmentationConfig, TrainingConfig
    from fashionclip_tune.config.project import ProjectConfig
    from fashionclip_tune.data.preprocessing import Preprocessing
    from fashionclip_tune.models.openclip import LoadedModel

    training = TrainingConfig(batch_size=_BATCH_SIZE, num_workers=0)
    config = ProjectConfig(training=training, augmentation=AugmentationConfig(**augmentation))
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    preprocessing = Preprocessing(_SIZE, mean, std, "shortest", "bicubic")
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    # The loader needs no network: this spares the benchmark a model.
    return config, LoadedModel("ViT-B-32", torch.nn.Identity(), preprocessing, tokenizer, {}, "", True)


def open_clip_train(shards: list[Path]) -> Iterator[int]:
    """open_clip_train.data.get_wds_dataset, OpenCLIP's training transform."""
    import open_clip
    from open_clip_train.data import get_wds_dataset

    args = SimpleNamespace(
        train_data="::".join(map(str, shards)),
        train_num_samples=10**7,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        batch_size=_BATCH_SIZE,
        workers=0,
        world_size=1,
        seed=0,
    )
    transform = open_clip.transform.image_transform(_SIZE, is_train=True)
    data = get_wds_dataset(args, transform, is_train=True, tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    for images, _ in data.dataloader:
        yield len(images)


def published(shards: list[Path]) -> Iterator[int]:
    """As the published runs read: webdataset, Pillow, OpenCLIP's training transform, shard order."""
    import open_clip
    import webdataset

    transform, tokenizer = open_clip.transform.image_transform(_SIZE, is_train=True), open_clip.get_tokenizer("ViT-B-32")
    data = webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False).repeat().decode("pil")
    data = data.to_tuple("jpg", "txt").map_tuple(transform, lambda text: tokenizer([text])[0]).batched(_BATCH_SIZE)
    for images, _ in data:
        yield len(images)


def bare_decode(shards: list[Path]) -> Iterator[int]:
    """torchvision's JPEG decoder on bytes in memory: the limit."""
    from torchvision.io import ImageReadMode, decode_jpeg

    from fashionclip_tune.data.index import load_index
    from fashionclip_tune.data.reader import ShardReader

    index = load_index(shards)
    reader = ShardReader(index)
    photos = [torch.frombuffer(bytearray(reader.image(sample)), dtype=torch.uint8) for sample in range(len(index))]
    while True:
        for start in range(0, len(photos) - _BATCH_SIZE, _BATCH_SIZE):
            for photo in photos[start : start + _BATCH_SIZE]:
                decode_jpeg(photo, mode=ImageReadMode.RGB)
            yield _BATCH_SIZE


def tar_reading(shards: list[Path]) -> Iterator[int]:
    """webdataset reading tars, decoding nothing."""
    import webdataset

    data = webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False).repeat()
    for number, _ in enumerate(data, 1):
        if number % _BATCH_SIZE == 0:
            yield _BATCH_SIZE


PIPELINES: dict[str, Callable[[list[Path]], Iterator[int]]] = {
    "ours": ours,
    "open_clip_train": open_clip_train,
    "published": published,
    "bare_decode": bare_decode,
    "tar_reading": tar_reading,
    "device_resize": device_work,
    "device_augment": partial(device_work, image_strength=0.5),
    "device_augment_all": partial(device_work, image_strength=0.5, rand_augment=True, erasing=True),
}


def measure(name: str, shards: list[Path], seconds: float) -> float:
    """Samples per second of CPU time, after three batches that do not count."""
    torch.set_num_threads(1)
    batches = PIPELINES[name](shards)
    for _ in range(3):
        next(batches)
    samples, started = 0, time.process_time()
    while time.process_time() - started < seconds:
        samples += next(batches)
    return samples / (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of JPEG photos (default: synthetic garments)")
    parser.add_argument("--count", type=int, default=2_000, help="photos (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of CPU time a pipeline and round (default: %(default)s)")
    parser.add_argument("--old-webdataset", type=Path, help="folder with webdataset 0.2.86, for open_clip_train")
    parser.add_argument("--only", nargs=2, metavar=("PIPELINE", "SHARDS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        name, folder = arguments.only
        print(json.dumps(measure(name, sorted(Path(folder).glob("photos.*.tar")), arguments.seconds)))
        return
    names = [name for name in PIPELINES if name != "open_clip_train" or arguments.old_webdataset is not None]
    with tempfile.TemporaryDirectory() as folder:
        write_photos(arguments.images, Path(folder), arguments.count)

        def measured_alone(name: str) -> float:
            path = str(arguments.old_webdataset) if name == "open_clip_train" else ""
            environment = {"FASHIONCLIP_CACHE": f"{folder}/cache", "PYTHONPATH": path}
            flags = ("--only", name, folder, "--seconds", arguments.seconds)
            return float(in_own_process(__file__, *flags, environment=environment))

        rates = in_turn(names, arguments.rounds, measured_alone)
    print(f"{arguments.count:,} photos, short side {_SHORT_SIDE}; {platform.machine()}, Python {platform.python_version()}")
    print("| pipeline | samples/s and core, median | lowest | highest | ours over it, median of the rounds |")
    print("|---|---|---|---|---|")
    for name, measured in rates.items():
        print(f"| {name} | {spread(measured, ',.0f')} | {median_ratio(rates['ours'], measured):.2f} |")


if __name__ == "__main__":
    main()
